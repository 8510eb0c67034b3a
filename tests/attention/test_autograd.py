"""Tests attention under first and second derivatives, vmap, functorch, torch.compile and torch's checks of
operators."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, vmap
from torch.utils.checkpoint import checkpoint

from dlkernels import reference
from dlkernels.attention.arguments import AttentionConfig, AttentionInputs
from dlkernels.functional import attention
from tests.support.attention_oracle import Case, make_data, op_arguments

pytestmark = [
    pytest.mark.usefixtures("native"),
    pytest.mark.o0_skip(
        reason="autograd, vmap and compilers are Python around the kernels, and higher derivatives are the reference's"
    ),
]

CU_Q, CU_K = torch.tensor([0, 2, 3]), torch.tensor([0, 1, 5])
n = 3


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def new(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def everything(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, slopes: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    return attention(  # type: ignore[no-any-return]
        q, k, v, attn_mask=mask, alibi_slopes=slopes, sinks=sinks, softcap=2.0, causal="bottom_right", window=(3, None),
        return_lse=True,
    )  # fmt: skip


def packed(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    return attention(  # type: ignore[no-any-return]
        q, k, v, alibi_slopes=slopes, sinks=sinks, cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K, causal="bottom_right",
        return_lse=True,
    )  # fmt: skip


def with_dropout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    torch.manual_seed(3)
    return attention(q, k, v, dropout_p=0.3, window=(2, 2))  # type: ignore[no-any-return]


PADDED = ((2, 4, 3, 3), (2, 2, 5, 3), (2, 2, 5, 2), (4, 3, 1), (4,), (4,))
PACKED = ((3, 4, 3), (5, 2, 3), (5, 2, 2), (2, 4), (4,))
CHECKED: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "padded": (everything, PADDED),
    "packed": (packed, PACKED),
    "dropout": (with_dropout, ((1, 2, 4, 3), (1, 2, 4, 3), (1, 2, 4, 3))),
    "full mask": (lambda q, m: attention(q, q, q, attn_mask=m, causal=True), ((1, 2, 4, 3), (1, 2, 4, 4))),
}


@pytest.mark.parametrize("name", CHECKED)
def test_gradcheck(name: str) -> None:
    function, shapes = CHECKED[name]
    inputs = tuple(new(*shape) for shape in shapes)
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("wanted", range(6))
def test_second_derivative_of_a_few(wanted: int) -> None:
    inputs = [new(*shape).detach().requires_grad_(i == wanted) for i, shape in enumerate(PADDED)]
    assert gradgradcheck(lambda x: everything(*inputs[:wanted], x, *inputs[wanted + 1 :]), (inputs[wanted],))


def test_only_the_lse_counts() -> None:
    q, k, v = new(1, 1, 3, 2), new(1, 1, 4, 2), new(1, 1, 4, 2)
    _, lse = attention(q, k, v, return_lse=True)
    dq, dv = torch.autograd.grad(lse.sum(), (q, v))
    torch.testing.assert_close(dq, torch.softmax(q @ k.mT / math.sqrt(2), -1) @ k / math.sqrt(2))
    assert (dv == 0).all()


def loss(function: Callable[..., Any]) -> Callable[..., Tensor]:
    def of(*args: Tensor) -> Tensor:
        return sum((t.masked_fill(t == -math.inf, 0) ** 2).sum() for t in function(*args))  # type: ignore[return-value]

    return of


def loop(function: Callable[..., Any], dims: tuple[int | None, ...], args: tuple[Tensor, ...]) -> list[Tensor]:
    samples = (
        function(*(x if d is None else x.select(d, i) for x, d in zip(args, dims, strict=True))) for i in range(n)
    )
    return [torch.stack(each) for each in zip(*samples, strict=True)]


def mapped(shapes: tuple[tuple[int, ...], ...], dims: tuple[int | None, ...]) -> tuple[Tensor, ...]:
    return tuple(
        new(*(shape if dim is None else (*shape[:dim], n, *shape[dim:])))
        for shape, dim in zip(shapes, dims, strict=True)
    )


SHARED_MASK = (*PADDED[:3], (1, 3, 5), *PADDED[4:])
VMAPPED: list[tuple[Callable[..., Any], tuple[tuple[int, ...], ...], tuple[int | None, ...]]] = [
    (everything, PADDED, (0, 0, 1, 0, 1, 0)),
    (everything, PADDED, (None, 0, None, None, None, None)),
    (everything, PADDED, (3, None, None, 2, None, None)),
    (everything, PADDED, (None, None, None, None, 1, 0)),
    (everything, SHARED_MASK, (0, 0, 1, None, None, None)),
    (everything, SHARED_MASK, (None, 2, 1, 1, 0, None)),
    (packed, PACKED, (0, 1, 2, 1, None)),
    (packed, PACKED, (None, None, 0, None, 0)),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("function", "shapes", "dims"), VMAPPED)
def test_vmap(function: Callable[..., Any], shapes: Any, dims: tuple[int | None, ...]) -> None:
    args = mapped(shapes, dims)
    torch.testing.assert_close(list(vmap(function, dims)(*args)), loop(function, dims, args))
    each = grad(loss(function), tuple(range(len(args))))
    torch.testing.assert_close(list(vmap(each, dims)(*args)), loop(each, dims, args))


def test_vmap_of_vmap() -> None:
    q = new(2, 3, 1, 2, 4, 3)
    torch.testing.assert_close(vmap(vmap(attention))(q, q, q), attention(*(q.flatten(0, 2),) * 3).view_as(q))


def test_vmap_and_dropout() -> None:
    q = new(n, 1, 2, 6, 4)
    state = torch.get_rng_state()
    same = vmap(lambda x: attention(x, x, x, dropout_p=0.5), randomness="same")(q)
    for i in range(n):
        torch.set_rng_state(state)
        torch.testing.assert_close(same[i], attention(q[i], q[i], q[i], dropout_p=0.5))
    copies = q[:1].expand(q.shape)
    different = vmap(lambda x: attention(x, x, x, dropout_p=0.5), randomness="different")(copies)
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda x: attention(x, x, x, dropout_p=0.5))(q)


def test_vmap_of_what_has_no_gradient() -> None:
    """vmap also maps over boolean masks and cu_seqlens."""
    q, visible = new(n, 1, 2, 4, 3), torch.rand(n, 4, 4) < 0.7
    run = lambda x, mask: (attention(x, x, x, attn_mask=mask),)  # noqa: E731
    torch.testing.assert_close(list(vmap(run)(q, visible)), loop(run, (0, 0), (q, visible)))
    rows, cu = new(n, 5, 2, 3), torch.tensor([[0, 2, 5], [0, 0, 5], [0, 4, 4]])
    run = lambda x, cu: (attention(x, x, x, cu_seqlens_q=cu, cu_seqlens_k=cu, causal=True),)  # noqa: E731
    torch.testing.assert_close(list(vmap(run)(rows, cu)), loop(run, (0, 0), (rows, cu)))
    each = grad(loss(run))
    torch.testing.assert_close(vmap(each)(rows, cu), torch.stack([each(x, c) for x, c in zip(rows, cu, strict=True)]))


def test_checkpointing_draws_the_same_dropout_mask() -> None:
    q = new(1, 2, 30, 8)
    run = lambda x: attention(x, x, x, dropout_p=0.5)  # noqa: E731
    grads = []
    for function in (run, lambda x: checkpoint(run, x, use_reentrant=False)):
        torch.manual_seed(1)
        grads.append(torch.autograd.grad(function(q).square().sum(), q)[0])
    assert torch.equal(*grads)


def test_per_sample_gradients_and_hessian() -> None:
    q, k = new(1, 2, 3, 2), new(1, 2, 4, 2)
    inner = lambda x: attention(x, k, k).square().sum()  # noqa: E731
    hessian = torch.func.jacrev(grad(inner))(q)
    expected = torch.autograd.functional.hessian(inner, q)
    torch.testing.assert_close(hessian, expected)


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)  # type: ignore[no-any-return]


COMPILED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "one tensor": lambda q, k: attention(q, q, q, causal=True),
    "features": lambda q, k: attention(
        q, k, k, sinks=torch.ones(2, dtype=q.dtype), alibi_slopes=torch.ones(2, dtype=q.dtype), window=(3, None),
        softcap=3.0, attn_mask=q.new_zeros(5, 5),
    ),
    "lse": lambda q, k: attention(q, k, k, return_lse=True)[1],
    "packed": lambda q, k: attention(
        q[0].transpose(0, 1), k[0].transpose(0, 1), k[0].transpose(0, 1), cu_seqlens_q=CU_Q, cu_seqlens_k=CU_Q
    ),
    "autocast": lambda q, k: _in_autocast(q.float(), k.float()),
}  # fmt: skip


def _in_autocast(q: Tensor, k: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return attention(q, k, k)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "dynamic"), [*((name, False) for name in COMPILED), ("features", True), ("packed", True)]
)
def test_compile(name: str, dynamic: bool) -> None:
    function, q, k = COMPILED[name], new(2, 2, 5, 8), new(2, 2, 5, 8)
    run = compiled(function, dynamic=dynamic)
    for wanted in (False, True):
        with torch.set_grad_enabled(wanted):
            found, expected = run(q, k), function(q, k)
        torch.testing.assert_close(found, expected)
        if wanted:
            grads = [torch.autograd.grad(o.sum(), (q, k), allow_unused=True) for o in (found, expected)]
            for a, b in zip(*grads, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    torch.testing.assert_close(a, b)


def test_compile_by_inductor() -> None:
    q = new(1, 2, 5, 8)
    run = torch.compile(lambda x: attention(x, x, x, dropout_p=0.5).square(), fullgraph=True)
    o = run(q)
    assert torch.autograd.grad(o.sum(), q)[0].isfinite().all() and not torch.equal(o, run(q))


@pytest.mark.parametrize("name", ["padded", "packed", "full mask"])
def test_compile_of_a_transform_has_the_right_values(name: str) -> None:
    """Without our support Dynamo would silently drop the Function's own backward here."""
    function, shapes = CHECKED[name]
    own, each = loss(function), grad(loss(function), tuple(range(len(shapes))))
    args = tuple(new(*shape) for shape in shapes)
    torch.testing.assert_close(list(compiled(each)(*args)), list(torch.autograd.grad(own(*args), args)))
    dims = (0,) * len(shapes)
    args = mapped(shapes, dims)
    expected = loop(lambda *sample: torch.autograd.grad(own(*sample), sample), dims, args)
    torch.testing.assert_close(list(compiled(vmap(each))(*args)), expected)


def test_export() -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return attention(q, q, q, causal=True)  # type: ignore[no-any-return]

    q = torch.randn(1, 2, 5, 8)
    program = torch.export.export(Model(), (q,))
    assert "dlkernels.attention" in str(program.graph)
    torch.testing.assert_close(program.module()(q), attention(q, q, q, causal=True))


OPS = [
    Case(M=5, N=9, D=8, Dv=6, mask="hm", mask_kind="own", slopes="bh", sinks=True, dropout=0.3, dtype=torch.float64),
    Case(M=3, N=4, H=4, Hkv=2, mask="n", causal=1, dlse=False, dtype=torch.bfloat16),
    Case(B=2, D=4, Dv=4, lengths_q=(3, 2), lengths_k=(1, 4), slopes="h", layout="bhmd"),
    Case(B=0), Case(M=0, N=3), Case(N=0, sinks=True),
]  # fmt: skip


@pytest.mark.parametrize("case", OPS, ids=str)
def test_opcheck(case: Case) -> None:
    ops, data = torch.ops.dlkernels, make_data(case)
    (q, k, v), rest = op_arguments(case, data)
    mask, slopes, sinks, cu_q, *_ = rest
    for contiguous in (False, True):
        torch.library.opcheck(ops.attention.default, (q, k, v, *rest, contiguous))
    o, lse, stats = ops.attention(q, k, v, *rest, False)
    do, dlse = torch.randn_like(o), None if data.dlse is None else torch.randn_like(lse)
    has_mask = mask is not None and mask.is_floating_point()
    for needs in ((True, True, has_mask, slopes is not None, sinks is not None), (False, True, False, False, False)):
        torch.library.opcheck(ops.attention_backward.default, (do, dlse, q, k, v, o, stats, *rest, *needs))
    if cu_q is None:
        torch.library.opcheck(ops.attention_map.default, (q, k, mask, slopes, sinks, *rest[-6:-1], 3, 2))


def test_the_reference_takes_every_argument() -> None:
    """Its other arguments reach it as `AttentionConfig.keywords`; one that is missing there would be ignored."""
    parameters = inspect.signature(reference.attention).parameters
    config = AttentionConfig(0, 0, 1.0)
    assert parameters.keys() == {*AttentionInputs._fields, *config.keywords, "dropout_p"}
    assert {*config.keywords, "max_seqlen_q", "max_seqlen_k", "dropout_p", "contiguous"} == set(config._fields)


def test_the_schemas_in_python_are_those_of_the_compiled_module() -> None:
    from dlkernels.attention import operators, triton

    assert operators.OPERATORS.keys() == triton.OPERATORS.keys()
    for name in operators.OPERATORS:
        own = torch._C.parse_schema(f"dlkernels::{operators.schema(name)}")
        assert str(own) == str(getattr(torch.ops.dlkernels, name).default._schema)


def test_nothing_is_recorded_beyond_the_function() -> None:
    """The forward is one operator, and so is the backward."""
    from tests.support.attention_modules import operators

    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    with operators() as seen:
        attention(q, q, q).sum().backward()
    assert {name for name in seen.names if name.startswith("dlkernels")} == {
        "dlkernels::attention", "dlkernels::attention_backward",
    }  # fmt: skip


def test_batched_gradients_of_lse_alone() -> None:
    """torch.autograd.grad(is_grads_batched=True), the vmap that preceded torch.func, gives the right gradients."""
    q, k, v = (torch.randn(1, 2, n, 8, dtype=torch.float64, requires_grad=True) for n in (3, 5, 5))
    _, lse = attention(q, k, v, return_lse=True)
    vectors = torch.randn(4, *lse.shape, dtype=lse.dtype)
    found = torch.autograd.grad(lse, (q, k), vectors, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(lse, (q, k), vector, retain_graph=True) for vector in vectors]
    for mine, rows in zip(found, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(mine, torch.stack(rows))
