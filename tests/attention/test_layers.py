"""Compares MultiheadAttention with torch.nn's: arguments, masks, attention weights, memory, dropout and state."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dlkernels
from dlkernels.nn import MultiheadAttention
from tests.support.attention_modules import Spy, check, operators, spy, twin
from tests.support.instruction_sets import use_isa

__all__ = ["spy"]

pytestmark = pytest.mark.o0_skip(reason="the layers are Python around functional.attention")

B, H, M, N, E = 2, 3, 5, 7, 12
INF = float("-inf")

CONSTRUCTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no bias": {"bias": False, "batch_first": True},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True, "batch_first": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True},
    "kdim": {"kdim": 5},
    "vdim": {"vdim": 6, "batch_first": True, "bias": False},
    "all": {"kdim": 5, "vdim": 6, "add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
}

# (kind of key_padding_mask, rank and kind of attn_mask); "causal" means a causal mask with the hint is_causal.
MASKS = [
    ("", ""), ("bool", ""), ("float", ""), ("", "2 bool"), ("", "2 float"), ("", "3 bool"), ("", "3 float"),
    ("bool", "2 bool"), ("bool", "3 bool"), ("float", "2 float"), ("float", "3 float"), ("bool", "2 float"),
    ("", "causal"), ("float", "causal"),
]  # fmt: skip


def make(dtype: torch.dtype = torch.float64, embed: int = E, heads: int = H, **kwargs: Any) -> nn.MultiheadAttention:
    module = nn.MultiheadAttention(embed, heads, dtype=dtype, **kwargs)
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return module


def make_masks(
    padding: str, attn: str, batch: int | None, queries: int, keys: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Returns masks that never hide the first key, so that torch gives NaN for no row."""
    masks: dict[str, Any] = {}
    rows = 1 if batch is None else batch
    if padding:
        closed = torch.rand(rows, keys) < 0.4
        closed[:, 0] = False
        mask = closed if padding == "bool" else torch.randn(rows, keys, dtype=dtype).masked_fill(closed, INF)
        masks["key_padding_mask"] = mask if batch is not None else mask[0]
    if attn == "causal":
        masks["attn_mask"] = nn.Transformer.generate_square_subsequent_mask(queries, dtype=dtype)
        masks["is_causal"] = True
    elif attn:
        shape = (queries, keys) if attn[0] == "2" else (rows * H, queries, keys)
        closed = torch.rand(shape) < 0.4
        closed[..., 0] = False
        masks["attn_mask"] = closed
        if attn.endswith("float"):
            masks["attn_mask"] = torch.randn(shape, dtype=dtype).masked_fill(closed, INF).requires_grad_()
    return masks


def inputs(module: nn.MultiheadAttention, form: str, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], int | None, int]:
    """Returns (query, key, value), the batch size or None, and the number of keys."""

    def draw(length: int, features: int) -> Tensor:
        shape = (length, features) if form == "unbatched" else (B, length, features)
        x = torch.randn(shape, dtype=dtype)
        if form != "unbatched" and not module.batch_first:
            x = x.transpose(0, 1).contiguous()
        return x.requires_grad_()

    batch = None if form == "unbatched" else B
    if form == "self" and module._qkv_same_embed_dim:
        x = draw(M, E)
        return (x, x, x), batch, M
    query, key = draw(M, E), draw(N, module.kdim)
    if form == "memory" and module._qkv_same_embed_dim:
        return (query, key, key), batch, N
    return (query, key, draw(N, module.vdim)), batch, N


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_arguments(construction: str, dtype: torch.dtype, best_isa: str) -> None:
    theirs = make(dtype, **CONSTRUCTIONS[construction])
    ours = twin(theirs)
    forms = itertools.cycle(["self", "memory", "three", "unbatched"])
    with use_isa(best_isa):
        for (padding, attn), weights in itertools.product(
            MASKS, [{"need_weights": False}, {}, {"average_attn_weights": False}]
        ):
            form = "self" if attn == "causal" and theirs._qkv_same_embed_dim else next(forms)
            args, batch, keys = inputs(theirs, form, dtype)
            if attn == "causal" and keys != M:
                args, keys = tuple(a.narrow(1 if theirs.batch_first and batch else 0, 0, M) for a in args), M
            masks = make_masks(padding, attn, batch, M, keys, dtype)
            check(ours, theirs, dtype, *args, **masks, **weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_usual_sizes(dtype: torch.dtype, isa: str) -> None:
    theirs = make(dtype, 64, 4, batch_first=True)
    x = torch.randn(2, 131, 64).to(dtype).requires_grad_()
    padding = torch.arange(131) >= torch.tensor([131, 70])[:, None]
    hint = {"attn_mask": nn.Transformer.generate_square_subsequent_mask(131, dtype=dtype), "is_causal": True}
    for masks in (
        {},
        {"key_padding_mask": padding},
        hint,
        {"attn_mask": torch.randn(131, 131).to(dtype).requires_grad_()},
    ):
        check(twin(theirs), theirs, dtype, x, x, x, need_weights=False, **masks)


def test_masks_stay_small(spy: Spy) -> None:
    """A padding mask is not expanded to M x N, a mask for all heads not to H x M x N, and a causal hint needs no
    mask."""
    module = twin(make(torch.float32, batch_first=True))
    x = torch.randn(B, M, E)
    padding, square = torch.zeros(B, M, dtype=torch.bool), torch.zeros(M, M, dtype=torch.bool)
    for masks in (
        {}, {"key_padding_mask": padding}, {"attn_mask": square}, {"key_padding_mask": padding, "attn_mask": square},
        {"attn_mask": square, "is_causal": True},
        {"key_padding_mask": padding, "attn_mask": square, "is_causal": True},
        {"key_padding_mask": padding, "attn_mask": square.expand(B * H, M, M)},
    ):  # fmt: skip
        module(x, x, x, need_weights=False, **masks)
    assert spy.mask_shapes() == [None, (B, 1, 1, M), (M, M), (B, 1, M, M), None, (B, 1, 1, M), (B, H, M, M)]
    assert [call["causal"] for call in spy.calls] == [False, False, False, False, True, True, False]
    assert all(call["q"].data_ptr() + 4 * E == call["k"].data_ptr() for call in spy.calls)  # columns of one product


def test_nothing_of_quadratic_size(native: Any) -> None:
    length = 1024
    module = twin(make(torch.float32, 16, 2, batch_first=True))
    x = torch.randn(1, length, 16, requires_grad=True)
    square = nn.Transformer.generate_square_subsequent_mask(length)
    for masks in ({"key_padding_mask": torch.arange(length)[None] >= 1000}, {"attn_mask": square, "is_causal": True}):
        with operators() as seen:
            module(x, x, x, need_weights=False, **masks)[0].sum().backward()
        assert {"dlkernels::attention", "dlkernels::attention_backward"} <= seen.names
        assert seen.largest < length * length
    with operators() as seen:
        module(x, x, x)
    assert seen.largest >= length * length  # with weights, the M x N matrix is seen


def test_rows_without_keys_are_zero_and_never_nan() -> None:
    module = twin(make(torch.float32, batch_first=True))
    x = torch.randn(B, M, E, requires_grad=True)
    padding = torch.tensor([[True] * M, [False] * M])
    for masks in ({"key_padding_mask": padding}, {"attn_mask": padding[:1].expand(M, M)}):
        for need_weights in (True, False):
            out, weights = module(x, x, x, need_weights=need_weights, **masks)
            assert torch.equal(out[0], module.out_proj.bias.expand(M, E))
            if weights is not None:
                assert not weights[0].any()
            grads = torch.autograd.grad(out.sum(), [x, *module.parameters()])
            assert all(grad.isfinite().all() for grad in grads)


def test_nan_behind_padding_stays_there() -> None:
    module = twin(make(torch.float32, batch_first=True))
    x, memory = torch.randn(B, M, E, requires_grad=True), torch.randn(B, N, E)
    padding = torch.arange(N) >= torch.tensor([[N], [4]])
    expected = module(x, memory, memory, key_padding_mask=padding, need_weights=False)[0]
    (expected_grad,) = torch.autograd.grad(expected.sum(), x)
    memory[padding] = float("nan")
    found = module(x, memory, memory, key_padding_mask=padding, need_weights=False)[0]
    assert torch.equal(found, expected)
    assert torch.equal(torch.autograd.grad(found.sum(), x)[0], expected_grad)


def test_dropout_on_the_weights() -> None:
    """Without need_weights the dropout mask differs from torch's but has the same statistics and depends on the
    seed."""
    module = twin(make(torch.float32, 8, 2, dropout=0.3, batch_first=True))
    x = torch.randn(1, 64, 8)

    def draw(seed: int, **kwargs: Any) -> Tensor:
        torch.manual_seed(seed)
        return module(x, x, x, **kwargs)[0].detach()

    assert torch.equal(draw(1, need_weights=False), draw(1, need_weights=False))
    assert not torch.equal(draw(1, need_weights=False), draw(2, need_weights=False))
    exact = module.eval()(x, x, x, need_weights=False)[0].detach()
    module.train()
    draws = {flag: torch.stack([draw(seed, need_weights=flag) for seed in range(400)]) for flag in (True, False)}
    spread = draws[True].std(0)
    for results in draws.values():
        torch.testing.assert_close(results.mean(0), exact, rtol=0, atol=6 * spread.max().item() / 20)
    ratio = draws[False].std(0) / spread
    assert 0.95 < ratio.mean() < 1.05
    weights = module(x, x, x, average_attn_weights=False)[1]
    assert 0.2 < (weights == 0).float().mean() < 0.4
    theirs = copy.deepcopy(module)
    theirs.__class__ = nn.MultiheadAttention
    torch.manual_seed(5)
    expected = theirs(x, x, x)[0]
    torch.testing.assert_close(draw(5), expected.detach())


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_memory_order_is_torchs(batch_first: bool, need_weights: bool) -> None:
    """The strides of the result matter: a later dropout draws its mask in memory order, and callers may use view()."""
    theirs = make(batch_first=batch_first)
    ours, x = twin(theirs), torch.randn(B, M, E, dtype=torch.float64)
    assert (
        ours(x, x, x, need_weights=need_weights)[0].stride() == theirs(x, x, x, need_weights=need_weights)[0].stride()
    )
    assert ours.eval()(x, x, x, need_weights=need_weights)[0].is_contiguous()


def test_attributes_are_read_in_every_call() -> None:
    theirs = make()
    ours = twin(theirs)
    x = torch.randn(M, B, E, dtype=torch.float64)
    for module in (theirs, ours):
        module.in_proj_weight.data.mul_(0.5)
        module.out_proj.weight = nn.Parameter(module.out_proj.weight.detach() + 1)
        nn.utils.parametrizations.weight_norm(module, "in_proj_weight")
        module.bias_k = nn.Parameter(torch.ones(1, 1, E, dtype=torch.float64))
        module.bias_v = nn.Parameter(torch.full((1, 1, E), 0.5, dtype=torch.float64))
    torch.testing.assert_close(ours(x, x, x), theirs(x, x, x))
    other = {key: value + 0.1 for key, value in theirs.state_dict().items()}
    torch.testing.assert_close(
        torch.func.functional_call(ours, other, (x, x, x)), torch.func.functional_call(theirs, other, (x, x, x))
    )


@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_state(construction: str) -> None:
    torch.manual_seed(7)
    theirs = nn.MultiheadAttention(E, H, **CONSTRUCTIONS[construction])
    torch.manual_seed(7)
    ours = MultiheadAttention(E, H, **CONSTRUCTIONS[construction])
    assert isinstance(ours, nn.MultiheadAttention)
    assert repr(ours) == repr(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    args, *_ = inputs(ours, "three", torch.float32)
    expected = ours(*args)[0]
    saved = io.BytesIO()
    torch.save(ours, saved)
    saved.seek(0)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(saved, weights_only=False)):
        assert type(again) is MultiheadAttention
        assert torch.equal(again(*args)[0], expected)
    assert ours.to(torch.float64).half().out_proj.weight.dtype == torch.float16


def test_signatures_are_torchs() -> None:
    for name in ("MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer"):
        for method in ("__init__", "forward"):
            ours, theirs = (inspect.signature(getattr(getattr(p, name), method)) for p in (dlkernels.nn, nn))
            assert [(p.name, p.default, p.kind) for p in ours.parameters.values()] == [
                (p.name, p.default, p.kind) for p in theirs.parameters.values()
            ]
