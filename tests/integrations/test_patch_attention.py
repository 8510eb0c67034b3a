"""Tests `patch` and `unpatch` of attention and Transformer layers, alone and inside models, and training after them."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import dlkernels
from tests.support.attention_modules import Spy, spy
from tests.support.hooks_survive import check_hooks_survive

__all__ = ["spy"]

NAMES = ("MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer")
E, H = 8, 2

pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.o0_skip(reason="swapping classes is Python alone"),
]


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class OwnForward(nn.TransformerEncoderLayer):
    def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(2 * src, *args, **kwargs)


class Renamed(nn.MultiheadAttention):
    pass


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    if name == "MultiheadAttention":
        module, count = nn.MultiheadAttention(E, H, dtype=torch.float64), 3
    else:
        module, count = getattr(nn, name)(E, H, 16, 0.0, dtype=torch.float64), 1 + ("Decoder" in name)
    return module, tuple(torch.randn(5, 2, E, dtype=torch.float64) for _ in range(count))


def weight_owner(module: nn.Module) -> nn.Module:
    return getattr(module, "self_attn", module)


def first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(name: str) -> None:
    module, args = build(name)
    before, parameters = vars(module).keys(), list(module.parameters())
    expected = first(module(*args))
    assert dlkernels.patch(module) is module
    assert type(module) is getattr(dlkernels.nn, name)
    torch.testing.assert_close(first(module(*args)), expected)
    assert "" in dlkernels.patch_report(module).patched
    assert dlkernels.patch(module) is module
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(again) is getattr(dlkernels.nn, name)
        assert torch.equal(first(dlkernels.unpatch(again)(*args)), expected)
    dlkernels.unpatch(module)
    assert {type(m).__module__.split(".")[0] for m in module.modules()} == {"torch"}
    assert vars(module).keys() == before
    assert all(a is b for a, b in zip(parameters, module.parameters(), strict=True))
    assert torch.equal(first(module(*args)), expected)


def test_whole_models(spy: Spy) -> None:
    """torch's stacks are kept, and the layers in them and their attention modules are swapped."""
    model = nn.Transformer(E, H, 2, 2, 16, batch_first=True).eval()
    classes = {name: type(module) for name, module in model.named_modules()}
    src, tgt = torch.randn(2, 5, E), torch.randn(2, 4, E)
    padding = torch.arange(5) >= torch.tensor([[5], [3]])
    options = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}
    with torch.no_grad():
        expected = model(src, tgt, **options)
    duplicate = dlkernels.patch(model, copy=True)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    swapped = [
        type(module).__name__ for module in duplicate.modules() if type(module).__module__.startswith("dlkernels")
    ]
    assert sorted(swapped) == 6 * ["MultiheadAttention"] + 2 * ["TransformerDecoderLayer"] + 2 * [
        "TransformerEncoderLayer"
    ]
    assert type(duplicate.encoder) is nn.TransformerEncoder
    with torch.no_grad():
        torch.testing.assert_close(duplicate(src, tgt, **options), expected)
        assert len(spy.calls) == 6
        assert torch.equal(dlkernels.unpatch(duplicate)(src, tgt, **options), expected)
        assert len(spy.calls) == 6
    assert {name: type(module) for name, module in duplicate.named_modules()} == classes
    assert str(dlkernels.patch_report(model.encoder)).splitlines()[0] == "layers.0: TransformerEncoderLayer torch"


@pytest.mark.parametrize("name", NAMES)
def test_hooks_and_their_handles_survive(name: str) -> None:
    module, args = build(name)
    check_hooks_survive(module, weight_owner(module), lambda: first(module(*(arg.requires_grad_() for arg in args))))


@pytest.mark.parametrize("name", NAMES)
def test_parametrizations_survive(name: str) -> None:
    module, args = build(name)
    owner = weight_owner(module)
    parametrize.register_parametrization(owner, "in_proj_weight", Doubled())
    nn.utils.parametrizations.weight_norm(owner.out_proj)
    keys, expected = list(module.state_dict()), first(module(*args))
    dlkernels.patch(module)
    assert isinstance(owner, dlkernels.nn.MultiheadAttention)
    assert type(owner).__name__ == "ParametrizedMultiheadAttention"
    assert list(module.state_dict()) == keys
    torch.testing.assert_close(first(module(*args)), expected)
    torch.testing.assert_close(first(copy.deepcopy(module)(*args)), expected)
    first(module(*args)).sum().backward()
    assert owner.parametrizations.in_proj_weight.original.grad.any()
    dlkernels.unpatch(module)
    assert type(owner).__name__ == "ParametrizedMultiheadAttention"
    assert not isinstance(owner, dlkernels.nn.MultiheadAttention)
    torch.testing.assert_close(first(module(*args)), expected)
    parametrize.remove_parametrizations(owner, "in_proj_weight")
    assert type(owner) is nn.MultiheadAttention
    torch.testing.assert_close(first(module(*args)), expected)


def test_skips_are_named_with_their_reason() -> None:
    replaced = nn.MultiheadAttention(E, H)
    replaced.forward = lambda *args: args  # type: ignore[method-assign]
    model = nn.ModuleDict({
        "own": OwnForward(E, H, 16, 0.0), "renamed": Renamed(E, H), "replaced": replaced,
        "plain": nn.TransformerDecoderLayer(E, H, 16),
    })  # fmt: skip
    x = torch.randn(5, 2, E)
    expected = model["own"](x)
    with pytest.warns(UserWarning, match="left 3 layer") as caught:
        dlkernels.patch(model)
    reasons = {entry.name: entry.reason for entry in dlkernels.patch_report(model).skipped}
    assert reasons.keys() == {"own", "renamed", "replaced"}
    assert "TransformerEncoderLayer with its own forward" in reasons["own"]
    assert "a subclass of torch.nn.MultiheadAttention" in reasons["renamed"]
    assert "replaced on the instance" in reasons["replaced"]
    assert all(name in str(caught[0].message) for name in reasons)
    assert type(model["own"]) is OwnForward
    assert type(model["own"].self_attn) is dlkernels.nn.MultiheadAttention
    assert dlkernels.patch_report(model).patched == [
        "own.self_attn", "plain", "plain.self_attn", "plain.multihead_attn",
    ]  # fmt: skip
    torch.testing.assert_close(model["own"](x), expected)
    with torch.no_grad():  # torch's fast path uses the parameters of our attention
        torch.testing.assert_close(model["own"].eval()(x), expected)


def test_native_layers_are_left_alone_by_unpatch() -> None:
    layer = dlkernels.nn.TransformerEncoderLayer(E, H, 16)
    dlkernels.unpatch(layer)
    assert type(layer) is dlkernels.nn.TransformerEncoderLayer
    assert type(layer.self_attn) is dlkernels.nn.MultiheadAttention
    assert {entry.state for entry in dlkernels.patch_report(layer).entries} == {"native"}


class Tagger(nn.Module):
    """A typical model with a Transformer stack of torch's and an attention module of its own."""

    def __init__(self, batch_first: bool, attention_dropout: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, E)
        layer = nn.TransformerEncoderLayer(E, H, 16, 0.2, batch_first=batch_first)
        layer.self_attn.dropout = attention_dropout
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.attention = nn.MultiheadAttention(E, H, batch_first=batch_first)
        self.drop = nn.Dropout(0.2)
        self.out = nn.Linear(E, 11)

    def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
        x = self.encoder(self.embed(tokens), src_key_padding_mask=padding)
        return self.out(x + self.drop(self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]))


def losses(patched: bool, batch_first: bool, attention_dropout: float, dtype: torch.dtype, steps: int) -> list[float]:
    torch.manual_seed(0)
    model = Tagger(batch_first, attention_dropout).to(dtype)
    if patched:
        dlkernels.patch(model)
        assert not dlkernels.patch_report(model).skipped
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    padding = torch.arange(9) >= torch.tensor([[9], [6], [3], [9]])
    found = []
    for _ in range(steps):
        tokens = torch.randint(11, (4, 9), generator=generator)
        given = tokens if batch_first else tokens.t()
        loss = nn.functional.cross_entropy(model(given, padding).flatten(0, 1), given.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_patched_model_trains_as_before(batch_first: bool) -> None:
    """With the same seed and dropout everywhere except on the attention weights, the losses are the same."""
    ours, theirs = (losses(patched, batch_first, 0.0, torch.float64, 8) for patched in (True, False))
    assert ours == pytest.approx(theirs, rel=1e-8)
    assert ours[-1] < ours[0]


def test_a_patched_model_learns_as_well_with_attention_dropout() -> None:
    ours, theirs = (losses(patched, True, 0.3, torch.float32, 60) for patched in (True, False))
    assert ours != theirs
    assert sum(ours[-10:]) == pytest.approx(sum(theirs[-10:]), rel=0.25)
    assert sum(ours[-10:]) < 0.6 * sum(ours[:10])


def test_the_example_runs() -> None:
    root = Path(__file__).parents[2]
    paths = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(root / "examples" / "text_transformer.py"), "--steps", "1", "--threads", "1"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, env={**os.environ, "PYTHONPATH": paths}
    )
    assert done.returncode == 0, done.stderr
    assert "encoder.layers.1.self_attn: MultiheadAttention patched" in done.stdout
    assert "goes on with 'def ':\ndef " in done.stdout
