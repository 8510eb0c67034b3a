"""Tests MultiheadAttention with nested tensors, under autocast, torch.compile and torch.func, and with bad input."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dlkernels
from dlkernels.nn import MultiheadAttention
from tests.support.attention_modules import Spy, check, error_of, spy, twin

__all__ = ["spy"]

pytestmark = pytest.mark.o0_skip(reason="the layers are Python around functional.attention")

E, H = 12, 3


def nested(lengths: list[int], layout: Any, features: int = E, requires_grad: bool = False) -> Tensor:
    parts = [torch.randn(length, features) for length in lengths]
    return torch.nested.nested_tensor(parts, layout=layout, requires_grad=requires_grad)


LAYOUTS = pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=["strided", "jagged"])


@LAYOUTS
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_is_each_sequence_alone(layout: Any, spy: Spy) -> None:
    module = MultiheadAttention(E, H, batch_first=True)
    x, memory = nested([3, 1, 6], layout), nested([4, 2, 5], layout)
    for key in (x, memory):
        out, weights = module(x, key, key, need_weights=False)
        assert weights is None
        assert out.is_nested
        assert out.layout == layout
        alone = [module(q, k, k, need_weights=False)[0] for q, k in zip(x.unbind(), key.unbind(), strict=True)]
        torch.testing.assert_close(list(out.unbind()), alone)
    assert sum(call.get("cu_seqlens_q") is not None for call in spy.calls) == 2
    assert (x + module(x, x, x, need_weights=False)[0]).is_nested  # the residual needs the same nested structure


@LAYOUTS
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_weights_are_padded(layout: Any, average: bool) -> None:
    theirs = nn.MultiheadAttention(E, 2, batch_first=True).eval()
    ours, x = twin(theirs), nested([3, 1, 6], torch.strided)
    given = x if layout == torch.strided else torch.nested.nested_tensor(list(x.unbind()), layout=layout)
    with torch.no_grad():
        expected, expected_weights = theirs(x, x, x, average_attn_weights=average)
        out, weights = ours(given, given, given, average_attn_weights=average)
    torch.testing.assert_close(list(out.unbind()), list(expected.unbind()))
    torch.testing.assert_close(weights, expected_weights)


@LAYOUTS
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_in_training(layout: Any, need_weights: bool) -> None:
    module = MultiheadAttention(E, H, batch_first=True)
    x = nested([3, 6], layout, requires_grad=True)
    module(x, x, x, need_weights=need_weights)[0].values().square().sum().backward()
    found = [x.grad.values().reshape(-1, E), *(p.grad.clone() for p in module.parameters())]
    module.zero_grad()
    parts = [part.detach().clone().requires_grad_() for part in x.unbind()]
    sum(module(part, part, part)[0].square().sum() for part in parts).backward()
    expected = [torch.cat([part.grad for part in parts]), *(p.grad for p in module.parameters())]
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_with_empty_sequences_and_with_holes() -> None:
    module, x = MultiheadAttention(E, H, batch_first=True), torch.randn(3, 6, E)
    start, length = torch.tensor([0, 1, 0]), torch.tensor([3, 0, 5])
    holes = torch.nested.narrow(x, dim=1, start=start, length=length, layout=torch.jagged)
    parts = [x[b, s : s + n] for b, (s, n) in enumerate(zip(start.tolist(), length.tolist(), strict=True))]
    alone = [module(part, part, part, need_weights=False)[0] for part in parts]
    for given in (holes, *(torch.nested.nested_tensor(parts, layout=kind) for kind in (torch.strided, torch.jagged))):
        out = module(given, given, given, need_weights=False)[0]
        torch.testing.assert_close(list(out.unbind()), alone)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_mistakes() -> None:
    x, dense = nested([3, 6], torch.strided), torch.randn(2, 6, E)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    module = MultiheadAttention(E, H, batch_first=True)
    for call in (
        lambda: module(x, dense, dense),
        lambda: module(dense, x, x),
        lambda: module(x, x, x, key_padding_mask=mask),
        lambda: module(x, x, x, attn_mask=mask),
        lambda: module(nested([3, 6], torch.strided, 8), x, x),
        lambda: module(x, nested([3, 6], torch.strided), nested([4, 5], torch.strided)),
        lambda: MultiheadAttention(E, H)(x, x, x),
        lambda: MultiheadAttention(E, H, batch_first=True, add_bias_kv=True)(x, x, x),
        lambda: MultiheadAttention(E, H, batch_first=True, add_zero_attn=True)(x, x, x),
    ):
        with pytest.raises(AssertionError):
            call()
    with pytest.raises(RuntimeError, match="is_causal"):
        module(x, x, x, is_causal=True)
    with pytest.raises(RuntimeError, match="number of sequences"):
        module(x, *[nested([3, 6, 2], torch.strided)] * 2)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_autocast(need_weights: bool, mask: str | None) -> None:
    theirs = nn.MultiheadAttention(E, H, add_bias_kv=True)
    ours, x = twin(theirs), torch.randn(5, 2, E)
    attn_mask = None if mask is None else torch.rand(5, 5) < 0.3 if mask == "bool" else torch.randn(5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ours(x, x, x, need_weights=need_weights, attn_mask=attn_mask)
        expected = theirs(x, x, x, need_weights=need_weights, attn_mask=attn_mask)
    exact = theirs.double()(*[x.double()] * 3, attn_mask=attn_mask if mask != "float" else attn_mask.double())
    for a, b, c in zip(found, expected, exact, strict=True):
        if b is not None:
            assert a.dtype == b.dtype == torch.bfloat16
            assert (a - c).abs().max() <= 2 * (b - c).abs().max() + 2**-8 * c.abs().max()
    found[0].sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in ours.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_low_precision(dtype: torch.dtype, isa: str) -> None:
    theirs = nn.MultiheadAttention(E, H, dtype=dtype)
    x = torch.randn(5, 2, E).to(dtype).requires_grad_()
    for need_weights in (True, False):
        check(twin(theirs), theirs, dtype, x, x, x, need_weights=need_weights)
        check(twin(theirs), theirs, dtype, x, x, x, need_weights=need_weights, attn_mask=torch.randn(5, 5).to(dtype))


CALLS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "plain": lambda m, x: m(x, x, x, need_weights=False)[0],
    "weights": lambda m, x: m(x, x, x)[1],
    "padding": lambda m, x: m(
        x, x, x, key_padding_mask=torch.arange(5)[None] >= torch.tensor([[5], [3]]), need_weights=False
    )[0],
    "causal": lambda m, x: m(
        x, x, x, attn_mask=nn.Transformer.generate_square_subsequent_mask(5), is_causal=True, need_weights=False
    )[0],
}  # fmt: skip


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("call", CALLS)
def test_compile(call: str, backend: str) -> None:
    torch.compiler.reset()
    module, run = MultiheadAttention(E, H, batch_first=True), CALLS[call]
    x = torch.randn(2, 5, E, requires_grad=True)
    compiled = torch.compile(lambda x: run(module, x), backend=backend, fullgraph=True)
    weight = module.in_proj_weight
    found, expected = (f(x) for f in (compiled, lambda x: run(module, x)))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), [x, weight]) for y in (found, expected)))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), run(module, x))


@pytest.mark.parametrize("call", CALLS)
def test_transforms(call: str) -> None:
    module, run = MultiheadAttention(E, H, batch_first=True), CALLS[call]
    weights = {name: p.detach() for name, p in module.named_parameters()}
    xs = torch.randn(3, 2, 5, E)

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Tensor:
            return run(self.module, x).square().sum()

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(Loss(), {f"module.{k}": v for k, v in weights.items()}, (x,))

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, xs)
    for at, x in enumerate(xs):
        module.zero_grad()
        loss(dict(module.named_parameters()), x).backward()
        for name, p in module.named_parameters():
            torch.testing.assert_close(found[name][at], torch.zeros_like(p) if p.grad is None else p.grad)


def mistakes(module: nn.MultiheadAttention) -> dict[str, dict[str, Any]]:
    """Returns calls with one wrong argument; query, key and value are [5, 2, E] unless they are given."""
    x, bool_mask = torch.randn(5, 2, E), torch.zeros(2, 5, dtype=torch.bool)
    square = torch.zeros(5, 5)
    unbatched = {"query": x[:, 0], "key": x[:, 0], "value": x[:, 0]}
    found: dict[str, dict[str, Any]] = {
        "hint without mask": {"is_causal": True},
        "hint and padding without mask": {"is_causal": True, "key_padding_mask": bool_mask},
        "query and others batch": {"query": torch.randn(5, 3, E)},
        "unbatched query": {"query": torch.randn(5, E)},
        "unbatched, masks batched": {**unbatched, "key_padding_mask": bool_mask},
        "unbatched, mask of other heads": {**unbatched, "attn_mask": square.expand(2, 5, 5)},
    }  # fmt: skip
    for name in ("query", "key", "value"):
        found |= {
            f"{name} None": {name: None}, f"{name} list": {name: [[1.0]]}, f"{name} int": {name: x.long()},
            f"{name} double": {name: x.double()}, f"{name} 1-D": {name: x[0, 0]}, f"{name} 4-D": {name: x[None]},
            f"{name} features": {name: x[..., :5]}, f"{name} length": {name: x[:3]}, f"{name} batch": {name: x[:, :1]},
            f"{name} meta": {name: x.to("meta")},
        }  # fmt: skip
    for name, mask in (("key_padding_mask", bool_mask), ("attn_mask", square)):
        found |= {
            f"{name} list": {name: mask.tolist()}, f"{name} int": {name: mask.long()},
            f"{name} byte": {name: mask.byte()},
            f"{name} 1-D": {name: mask[0]}, f"{name} 4-D": {name: mask[None, None]}, f"{name} rows": {name: mask[:1]},
            f"{name} columns": {name: mask[:, :3]}, f"{name} wider": {name: mask.repeat(1, 2)},
            f"{name} half": {name: mask.half()}, f"{name} double": {name: mask.double()},
            f"{name} complex": {name: mask.cfloat()}, f"{name} meta": {name: mask.to("meta")},
        }  # fmt: skip
    found["attn_mask 3-D heads"] = {"attn_mask": square.expand(2, 5, 5)}
    found["attn_mask 3-D size"] = {"attn_mask": square.expand(6, 5, 5)[:, :4]}
    return found


def call_of(module: nn.MultiheadAttention, given: dict[str, Any], need_weights: bool) -> Callable[[], Any]:
    x = torch.randn(5, 2, E)
    return lambda: module(**{"query": x, "key": x, "value": x, "need_weights": need_weights, **given})


# torch.nn accepts these meaningless arguments, ours raises.
STRICTER = {"key_padding_mask meta": "RuntimeError", "attn_mask meta": "RuntimeError"}


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("construction", [{}, {"kdim": E, "vdim": 5}], ids=["packed", "separate"])
def test_mistakes(construction: dict[str, Any], need_weights: bool) -> None:
    theirs = nn.MultiheadAttention(E, H, **construction)
    ours = twin(theirs)
    different = {}
    raised = 0
    for name, given in mistakes(theirs).items():
        if construction and "value" not in given:
            given = {"value": torch.randn(5, 2, 5), **given}
        expected = error_of(call_of(theirs, given, need_weights))
        found = error_of(call_of(ours, given, need_weights))
        raised += expected is not None
        if found is not expected and STRICTER.get(name) != (found and found.__name__):
            different[name] = (found, expected)
    assert not different
    assert raised > 40


@pytest.mark.parametrize("dropout", [1.5, -0.5, "a", None])
@pytest.mark.parametrize("need_weights", [True, False])
def test_bad_dropout(dropout: Any, need_weights: bool) -> None:
    theirs = nn.MultiheadAttention(E, H, dropout=dropout)
    assert error_of(call_of(twin(theirs), {}, need_weights)) is error_of(call_of(theirs, {}, need_weights))


@pytest.mark.parametrize(
    "args", [(0, 1), (4, 0), (4, 3), (-4, 2), ("a", 2), (4, 2, 0.0, True, False, False, "b"), (4,)], ids=str
)
def test_bad_construction(args: tuple[Any, ...]) -> None:
    assert error_of(lambda: MultiheadAttention(*args)) is error_of(lambda: nn.MultiheadAttention(*args)) is not None


def test_deleted_and_half_set_biases() -> None:
    for edit in (lambda m: setattr(m, "bias_v", None), lambda m: setattr(m, "bias_k", None)):
        theirs = nn.MultiheadAttention(E, H, add_bias_kv=True)
        edit(theirs)
        assert error_of(call_of(twin(theirs), {}, False)) is error_of(call_of(theirs, {}, False)) is AssertionError


def test_mismatched_masks_warn() -> None:
    module, x = MultiheadAttention(E, H), torch.randn(5, 2, E)
    with pytest.warns(UserWarning, match="mismatched key_padding_mask and attn_mask"):
        module(x, x, x, key_padding_mask=torch.zeros(2, 5, dtype=torch.bool), attn_mask=torch.zeros(5, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(x, x, x, key_padding_mask=torch.zeros(2, 5), attn_mask=torch.zeros(5, 5))


def test_meta_device() -> None:
    module = MultiheadAttention(E, H, device="meta")
    x = torch.empty(5, 2, E, device="meta")
    out, weights = module(x, x, x)
    assert (out.shape, weights.shape, out.device.type) == ((5, 2, E), (2, 5, 5), "meta")
    assert module(x, x, x, need_weights=False)[0].shape == (5, 2, E)
    assert dlkernels.patch(nn.MultiheadAttention(E, H, device="meta"))(x, x, x)[0].shape == (5, 2, E)
