"""Compares `functional.scaled_dot_product_attention` with torch's in values, shapes and errors, and tests the switch
that replaces torch's."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as imported
from torch.testing._internal.common_methods_invocations import op_db

import dlkernels
from dlkernels.attention import sdpa
from dlkernels.functional import scaled_dot_product_attention as ours
from dlkernels.testing import FACTOR_FORWARD, FACTOR_GRAD, error, floor
from tests.support.attention_modules import operators
from tests.support.sdpa_calls import MASK, MISTAKES, OURS, K, Q, V, attempt, draw

pytestmark = [
    pytest.mark.usefixtures("native"),
    pytest.mark.o0_skip(reason="Python around calls that attention/test_functional.py makes as well"),
]

theirs = torch.nn.functional.scaled_dot_product_attention
OP = next(op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")


def leaf(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.detach().to(dtype).requires_grad_() if t.is_floating_point() else t


def outcome(function: Callable[..., Tensor], tensors: list[Tensor], kwargs: dict[str, Any], dtype: torch.dtype) -> Any:
    kwargs = {k: leaf(v, dtype) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    leaves = [leaf(t, dtype) for t in tensors]
    out = function(*leaves, **kwargs)
    wanted = [t for t in (*leaves, *kwargs.values()) if isinstance(t, Tensor) and t.requires_grad]
    torch.manual_seed(5)
    cotangent = torch.randn(out.shape, dtype=torch.float64).to(dtype)
    return [out.detach(), *torch.autograd.grad(out, wanted, cotangent)]


def by_flash(*tensors: Tensor, **kwargs: Any) -> Tensor:
    """Calls torch's function on [B, H, M, D], so that it uses its flash kernel, whose errors are closer to ours. For
    other ranks torch uses its math path, which saves the attention weights."""
    lead = torch.broadcast_shapes(*(t.shape[:-2] for t in tensors))
    full = (t.expand(*lead, *t.shape[-2:]) for t in tensors)
    return theirs(*(t if t.dim() == 4 else t[None] for t in full), **kwargs).view(*lead, *tensors[0].shape[-2:])


NEIGHBOURS = 15


def errors(tensors: list[Tensor], kwargs: dict[str, Any], dtype: torch.dtype) -> list[tuple[float, float, Tensor]]:
    """Returns our error, torch's error and the float64 value of the output and of each gradient."""
    with operators() as seen:
        found = outcome(ours, tensors, kwargs, dtype)
    assert {OURS, f"{OURS}_backward"} <= seen.names
    expected, exact = outcome(theirs, tensors, kwargs, dtype), outcome(theirs, tensors, kwargs, torch.float64)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
    measures = [expected]
    if all(t.dim() in (3, 4) and t.shape[-1] == tensors[0].shape[-1] for t in tensors) and "enable_gqa" not in kwargs:
        measures.append(outcome(by_flash, tensors, kwargs, dtype))
    return [
        (error(a, c), max(error(m[i], c) for m in measures), c)
        for i, (a, c) in enumerate(zip(found, exact, strict=True))
    ]


def compare(tensors: list[Tensor], kwargs: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
    """Asserts that our operators run and that output and gradients keep the tolerance rule. If the errors of the given
    inputs break the rule, the median errors of slightly changed inputs must keep it."""
    nearby: list[list[tuple[float, float, Tensor]]] = []
    for index, (mine, measure, exact) in enumerate(errors(tensors, kwargs, dtype)):
        factor = FACTOR_GRAD if index else FACTOR_FORWARD
        # The exact gradient of a mask that is the same for all keys is zero; the reference contains only rounding
        # errors.
        least = floor(exact, dtype) + 64 * torch.finfo(dtype).eps * (exact.numel() > 0 and exact.abs().max() < 1e-12)
        if mine <= factor * measure + least:
            continue
        if not nearby:
            generator = torch.Generator().manual_seed(index)
            for _ in range(NEIGHBOURS):
                moved = [t.detach() * (1 + (torch.rand(t.shape, generator=generator) - 0.5) / 50) for t in tensors]
                nearby.append(errors(moved, kwargs, dtype))
        usual_mine, usual = (statistics.median(each[index][side] for each in nearby) for side in (0, 1))
        limit = factor * usual + least
        assert usual_mine <= limit and mine <= 4 * max(limit, factor * measure + least), (
            f"result {index}: error {mine:.2e}, torch {measure:.2e}; nearby {usual_mine:.2e}, torch {usual:.2e}"
        )


SAMPLES = list(OP.sample_inputs("cpu", torch.float32, requires_grad=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("index", range(len(SAMPLES)))
def test_every_sample_of_torch(index: int, dtype: torch.dtype) -> None:
    sample = SAMPLES[index]
    tensors = [sample.input, *sample.args]
    if not sample.kwargs["dropout_p"]:
        compare(tensors, sample.kwargs, dtype)
        return
    # With dropout, the mean of many results must be close to the result without dropout.
    q, k, v = (t.detach().to(dtype) for t in tensors)
    many = [t.expand(400, *t.shape) if t.dim() == 4 else t.expand(400, 1, *t.shape) for t in (q, k, v)]
    drawn = ours(*many, **sample.kwargs).double()
    exact = theirs(*(t.double() for t in (q, k, v)), **{**sample.kwargs, "dropout_p": 0.0})
    mean, deviation = drawn.mean(0), drawn.std(0)
    assert deviation.max() > 0.1
    off = (mean.view(exact.shape) - exact).abs() / (deviation.view(exact.shape) / math.sqrt(400) + 1e-2)
    assert off.max() < 6
    assert outcome(ours, tensors, sample.kwargs, dtype)[1].isfinite().all()


SHAPES: dict[str, tuple[list[Tensor], dict[str, Any]]] = {
    "4-D": ([Q, K, V], {}),
    "4-D causal": ([Q, K, V], {"is_causal": True}),
    "scale": ([Q, K, V], {"scale": 2}),
    "negative dropout, as torch": ([Q, K, V], {"dropout_p": -1.0}),
    "3-D": ([Q[0], K[0], V[0]], {}),
    "2-D": ([Q[0, 0], K[0, 0], V[0, 0]], {}),
    "2-D, mask": ([Q[0, 0], K[0, 0], V[0, 0]], {"attn_mask": MASK}),
    "5-D": ([draw(2, 3, 2, 4, 8), draw(2, 3, 2, 5, 8), draw(2, 3, 2, 5, 6)], {}),
    "5-D, broadcast": ([draw(3, 1, 2, 4, 8), draw(1, 2, 2, 5, 8), draw(3, 2, 1, 5, 6)], {}),
    "5-D, mask of batches": ([draw(2, 3, 2, 4, 8), draw(2, 3, 2, 5, 8), draw(2, 3, 2, 5, 6)],
                             {"attn_mask": draw(3, 1, 4, 5)}),
    "5-D, mask of heads": ([draw(2, 3, 2, 4, 8), draw(2, 3, 2, 5, 8), draw(2, 3, 2, 5, 6)],
                           {"attn_mask": draw(2, 1, 5)}),
    "6-D": ([draw(1, 2, 1, 2, 4, 8), draw(1, 2, 1, 2, 5, 8), draw(1, 2, 1, 2, 5, 6)], {"is_causal": True}),
    "query 3-D, key 4-D": ([Q[0], K, V], {}),
    "query 2-D, key 4-D": ([Q[0, 0], K, V], {}),
    "query 4-D, key 2-D": ([Q, K[0, 0], V[0, 0]], {}),
    "one key batch": ([Q, K[:1], V], {}),
    "one value batch": ([Q, K, V[:1]], {}),
    "one head of keys": ([Q, K[:, :1], V[:, :1]], {}),
    "one head of keys, not of values": ([Q, K[:, :1], V], {}),
    "one head of queries": ([Q[:, :1], K, V], {}),
    "grouped": ([draw(2, 6, 4, 8), K, V], {"enable_gqa": True}),
    "grouped, 3-D": ([draw(6, 4, 8), K[0], V[0]], {"enable_gqa": True}),
    "grouped, one batch of keys": ([draw(2, 6, 4, 8), K[:1], V[:1]], {"enable_gqa": True}),
    "grouped, other heads of values": ([draw(2, 6, 4, 8), K, V[:, :2]], {"enable_gqa": True}),
    **{f"mask {shape}": ([Q, K, V], {"attn_mask": draw(*shape)})
       for shape in ((4, 5), (1, 5), (4, 1), (3, 4, 5), (1, 4, 5), (2, 1, 1, 5), (2, 3, 4, 5), (1, 1, 1, 1))},
    "bool mask": ([Q, K, V], {"attn_mask": MASK > -0.5}),
    "mask that hides a row": ([Q, K, V], {"attn_mask": (MASK > -9).index_fill(0, torch.tensor(1), False)}),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str) -> None:
    compare(*SHAPES[name], dtype=torch.float64)
    compare(*SHAPES[name])


@pytest.mark.parametrize("sizes", [(0, 3, 4, 5, 8, 6), (2, 0, 4, 5, 8, 6), (2, 3, 0, 5, 8, 6), (2, 3, 4, 0, 8, 6),
                                   (2, 3, 4, 5, 0, 6), (2, 3, 4, 5, 8, 0)])  # fmt: skip
def test_empty(sizes: tuple[int, ...]) -> None:
    B, H, M, N, D, Dv = sizes
    tensors = [draw(B, H, M, D), draw(B, H, N, D), draw(B, H, N, Dv)]
    for a, b in zip(
        outcome(ours, tensors, {}, torch.float32), outcome(theirs, tensors, {}, torch.float32), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_mask_in_float32_beside_bfloat16() -> None:
    half = [t.bfloat16() for t in (Q, K, V)]
    torch.testing.assert_close(ours(*half, attn_mask=MASK), theirs(*half, attn_mask=MASK), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("mixed", [False, True])
def test_autocast(mixed: bool) -> None:
    k = K.bfloat16() if mixed else K
    with torch.autocast("cpu", torch.bfloat16):
        for kwargs in ({}, {"attn_mask": MASK}, {"is_causal": True}):
            found, expected = ours(Q, k, V, **kwargs), theirs(Q, k, V, **kwargs)
            assert found.dtype == expected.dtype == torch.bfloat16
            torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
        assert ours(Q.double(), K.double(), V.double()).dtype == torch.float64


def test_the_way_back_from_the_heads_is_free() -> None:
    """The result needs no copy to merge the heads if q, k and v came from a projection. attention/test_strides.py tests
    strides in general."""
    q, k, v = (torch.randn(2, 5, 3, 8).transpose(1, 2) for _ in range(3))
    assert ours(q, k, v).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str) -> None:
    """Wrong arguments raise torch's own errors with the same messages."""
    args, kwargs = MISTAKES[name]
    expected, found = attempt(theirs, args, kwargs), attempt(ours, args, kwargs)
    if isinstance(expected, Tensor):
        assert isinstance(found, Tensor) and found.shape == expected.shape and found.dtype == expected.dtype, found
        if not expected.is_meta:
            torch.testing.assert_close(found, expected, equal_nan=True)
        return
    assert type(found) is type(expected), (found, expected)
    if name not in ("nothing", "two tensors", "too many", "unknown"):  # messages of Python's own TypeErrors differ
        assert str(found) == str(expected)


def test_no_heads_to_group() -> None:
    """Zero heads of keys or values raise an error; torch divides by their number and crashes the process."""
    for args in ((Q, K[:, :0], V[:, :0]), (Q, K[:, :0], V), (Q, K, V[:, :0])):
        with pytest.raises(RuntimeError, match="heads"):
            ours(*args, enable_gqa=True)
    assert ours(Q[:, :0], K[:, :0], V[:, :0], enable_gqa=True).shape == (2, 0, 4, 6)


def test_enough_mistakes() -> None:
    raised = [n for n, (args, kwargs) in MISTAKES.items() if isinstance(attempt(theirs, args, kwargs), Exception)]
    assert len(raised) > 90


def test_what_torch_alone_has_goes_to_torch() -> None:
    nested = (
        torch.nested.nested_tensor([draw(2, 8), draw(5, 8)], layout=torch.jagged).unflatten(-1, (2, 4)).transpose(1, 2)
    )
    with operators() as seen:
        assert ours(nested, nested, nested).is_nested
        assert ours(Q, K, V, scale=math.nan).isnan().all()
        torch.testing.assert_close(
            torch.func.jvp(lambda q: ours(q, K, V), (Q,), (Q,)), torch.func.jvp(lambda q: theirs(q, K, V), (Q,), (Q,))
        )
    assert OURS not in seen.names
    for call in ((nested, nested, nested), (Q.to("meta"), K.to("meta"), V.to("meta")), (Q, K.double(), V)):
        reason = sdpa.arrange(*call, None, 0.0, False, None, False)
        assert isinstance(reason, str) and reason


class Block(nn.Module):
    """Calls scaled_dot_product_attention by an imported name, by torch.nn.functional and by torch._C._nn."""

    def forward(self, q: Tensor) -> Tensor:
        a = imported(q, q, q, is_causal=True)
        b = nn.functional.scaled_dot_product_attention(a, q, q, dropout_p=0.0)
        return torch._C._nn.scaled_dot_product_attention(b, query := q, query)


def test_the_switch_reaches_every_call() -> None:
    model, q = Block(), draw(1, 2, 7, 8)
    expected = model(q)
    with operators() as seen, dlkernels.patch_attention():
        torch.testing.assert_close(model(q), expected)
    assert OURS in seen.names and not any("scaled_dot_product" in name for name in seen.names)
    with operators() as seen:
        model(q)
    assert OURS not in seen.names


@pytest.mark.parametrize("wanted", [False, True])
def test_the_switch_inside_of_a_compiled_function(wanted: bool) -> None:
    """Dynamo's graph contains our function if the compiled function enters the switch.
    integrations/test_sdpa_operator_compiled.py tests compilation inside of the switch."""
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    model, q = Block(), draw(1, 2, 7, 8).requires_grad_(wanted)

    def switched(x: Tensor) -> Tensor:
        with dlkernels.patch_attention():
            return model(x)  # type: ignore[no-any-return]

    run = torch.compile(switched, fullgraph=True, backend=backend)
    found, expected = run(q), model(q)
    torch.testing.assert_close(found, expected)
    assert len(graphs) == 1 and "scaled_dot_product" not in graphs[0]
    assert ("autograd_function_apply" if wanted else "torch.ops.dlkernels.attention") in graphs[0]
    if wanted:
        torch.testing.assert_close(torch.autograd.grad(found.sum(), q), torch.autograd.grad(expected.sum(), q))
    torch._dynamo.reset()


def test_the_switch_leaves_mistakes_to_torch() -> None:
    with dlkernels.patch_attention(), pytest.raises(RuntimeError, match="same dtype"):
        imported(Q, K.double(), V)
    with dlkernels.patch_attention(), pytest.raises(TypeError, match="is_causal"):
        imported(Q, K, V, is_causal=1)


def test_all_ranks_are_covered() -> None:
    ranks = {t.dim() for tensors, _ in SHAPES.values() for t in tensors}
    assert ranks == {2, 3, 4, 5, 6}
    assert len(list(itertools.chain(SHAPES, SAMPLES))) > 40
