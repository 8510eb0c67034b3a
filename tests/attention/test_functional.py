"""Compares `functional.attention` and `attention_map` with float64; the cases cover all pairs of features."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch

from dlkernels import reference
from dlkernels._core import extension
from dlkernels.functional import attention, attention_map
from tests.support import attention_oracle as oracle
from tests.support.attention_calls import arguments, check, run
from tests.support.attention_oracle import Case
from tests.support.instruction_sets import kernels_of

pytestmark = pytest.mark.usefixtures("native")

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

FACTORS: dict[str, tuple[Any, ...]] = {
    "D": (8, 32, 59, 64, 80, 111, 128, 256),
    "Dv": ("D", 8, 59, 128),
    "M": (1, 7, 97, 128, 1025),
    "N": (1, 7, 97, 128, 1025),
    "dtype": (F32, BF16, F16, F64),
    "heads": ((2, 2), (4, 2), (3, 1)),
    "causal": (0, 1, 2),
    "window": ((-1, -1), (30, -1), (20, 5), (-1, 4)),
    "slopes": (None, "h", "bh"),
    "sinks": (False, True),
    "softcap": (0.0, 15.0),
    "scale": (None, 0.3),
    # Packed sequences take no mask.
    "mask": (None, "packed", "n", "mn", "bhmn", "hm"),
    "mask_kind": ("bool", "own", "float32"),
    "dropout": (0.0, 0.2),
    "layout": ("bhmd", "bmhd", "strided"),
    "dlse": (False, True),
}

Row = tuple[Any, ...]


def pairs(row: Row) -> set[tuple[int, Any, int, Any]]:
    return {(a, row[a], b, row[b]) for a, b in itertools.combinations(range(len(row)), 2)}


def pairwise() -> list[Row]:
    """Returns rows with a value for each factor that contain every pair of values of any two factors. In each round the
    one with the most new pairs of 40 random rows is taken, until no pair is missing."""
    r = random.Random(7)
    values = list(FACTORS.values())
    missing = set().union(
        *(
            {(a, x, b, y) for x in values[a] for y in values[b]}
            for a, b in itertools.combinations(range(len(values)), 2)
        )
    )
    rows: list[Row] = []
    while missing:
        a, x, b, y = min(missing, key=repr)
        best: Row = ()
        gain = -1
        for _ in range(40):
            candidate = [r.choice(v) for v in values]
            candidate[a], candidate[b] = x, y
            if (found := len(pairs(tuple(candidate)) & missing)) > gain:
                best, gain = tuple(candidate), found
        rows.append(best)
        missing -= pairs(best)
    return rows


def as_case(row: Row, seed: int) -> Case:
    f = dict(zip(FACTORS, row, strict=True))
    H, Hkv = f.pop("heads")
    f["Dv"] = f["D"] if f["Dv"] == "D" else f["Dv"]
    M, N = f["M"], f["N"]
    # With few rows the measure, the largest of a few errors, would depend on chance, so B is larger then.
    B = 1 if M * N > 100_000 else 3 if M < 8 else 2
    if f["mask"] == "packed":
        f.update(mask=None, lengths_q=(M, max(M // 3, 3), 0, 1), lengths_k=(N, max(N // 2, 2), 5, 0))
        B = 4
    return Case(B=B, H=H, Hkv=Hkv, seed=seed, **f)


GRID = [as_case(row, seed) for seed, row in enumerate(pairwise())]


LARGE = pytest.mark.o0_skip(reason="minutes of arithmetic")


@pytest.mark.parametrize("case", [pytest.param(c, marks=[LARGE] * (c.M * c.N > 50_000)) for c in GRID], ids=str)
def test_against_float64(case: Case) -> None:
    check(case)
    sizes = {"dtype": str(case.dtype).removeprefix("torch."), "D": case.D}
    ran = extension.native.attention_last_run()
    assert ran["backward"] and ran["isa"] == kernels_of(
        extension.native.isa(), attention=case.dtype, dot=ran["kernel"].endswith("/dot")
    ), (ran, sizes)


def test_the_grid_has_every_pair() -> None:
    rows = pairwise()
    covered = set().union(*map(pairs, rows))
    names = list(FACTORS)
    for (a, first), (b, second) in itertools.combinations(enumerate(names), 2):
        for x, y in itertools.product(FACTORS[first], FACTORS[second]):
            assert (a, x, b, y) in covered, f"{first}={x} with {second}={y}"
    assert len(rows) < 150


def test_defaults() -> None:
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 6)
    expected = torch.softmax(q @ k.repeat_interleave(2, 1).mT / math.sqrt(8), -1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(attention(q, k, v), expected)
    assert isinstance(attention(q, k, v), torch.Tensor)
    o, lse = attention(q, k, v, return_lse=True)
    assert torch.equal(o, attention(q, k, v, deterministic=False)) and lse.dtype == F32
    assert torch.equal(o, attention(q, k, v, softmax_scale=8**-0.5, window=(-1, None), softcap=0, max_seqlen_q=None))


def test_causal_has_two_alignments() -> None:
    q, k, v = torch.randn(1, 1, 3, 8), torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 8)
    top, bottom = torch.ones(3, 5).tril().bool(), torch.ones(3, 5).tril(2).bool()
    torch.testing.assert_close(attention(q, k, v, causal=True), attention(q, k, v, attn_mask=top))
    torch.testing.assert_close(attention(q, k, v, causal="top_left"), attention(q, k, v, attn_mask=top))
    torch.testing.assert_close(attention(q, k, v, causal="bottom_right"), attention(q, k, v, attn_mask=bottom))
    torch.testing.assert_close(attention(q, k, v, window=(None, 2), causal=False), attention(q, k, v, attn_mask=bottom))


def test_packed_is_padded_sequence_by_sequence() -> None:
    q, k, v = torch.randn(9, 4, 8), torch.randn(12, 2, 8), torch.randn(12, 2, 8)
    cu_q, cu_k = torch.tensor([0, 4, 4, 9]), torch.tensor([0, 5, 7, 12])
    options: dict[str, Any] = {"causal": "bottom_right", "sinks": torch.randn(4), "alibi_slopes": torch.rand(3, 4)}
    for more in ({}, {"max_seqlen_q": 5, "max_seqlen_k": 7}):
        o, lse = attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_lse=True, **options, **more)
        for b in range(3):
            rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
            one = {**options, "alibi_slopes": options["alibi_slopes"][b]}
            alone = (t.transpose(0, 1)[None] for t in (q[rows], k[keys], v[keys]))
            expected, expected_lse = attention(*alone, return_lse=True, **one)
            torch.testing.assert_close(o[rows], expected[0].transpose(0, 1))
            torch.testing.assert_close(lse[:, rows], expected_lse[0])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_rows_behind_the_last_sequence(device: str) -> None:
    q, k = torch.full((6, 2, 8), math.nan, device=device), torch.full((7, 2, 8), math.nan, device=device)
    cu = torch.tensor([0, 2, 3], dtype=torch.int32, device=device)
    if device == "cpu":
        q[:3], k[:3] = torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    q, k = q.requires_grad_(), k.requires_grad_()
    o, lse = attention(q, k, k, cu_seqlens_q=cu, cu_seqlens_k=cu, return_lse=True, sinks=torch.ones(2, device=device))
    assert o.shape == (6, 2, 8) and lse.shape == (2, 6)
    if device == "cpu":
        assert (o[3:] == 0).all() and (lse[:, 3:] == -math.inf).all() and o.isfinite().all()
        for grad in torch.autograd.grad(o.sum(), (q, k)):
            assert grad.isfinite().all() and (grad[3:] == 0).all()


@pytest.mark.parametrize(
    "shape", [(5, 7), (1, 7), (5, 1), (4, 5, 7), (1, 1, 7), (2, 1, 5, 7), (2, 4, 5, 7), (1, 4, 1, 1)]
)
@pytest.mark.parametrize("kind", [torch.bool, F32])
def test_mask_shapes(shape: tuple[int, ...], kind: torch.dtype) -> None:
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 6)
    mask = torch.randn(shape) > -0.5 if kind == torch.bool else torch.randn(shape, requires_grad=True)
    full = mask.expand(2, 4, 5, 7)
    o = attention(q, k, v, attn_mask=mask)
    for same in (full.contiguous(), full, full.transpose(2, 3).contiguous().transpose(2, 3)):
        assert torch.equal(attention(q, k, v, attn_mask=same), o)
    if kind == F32:
        (grad,) = torch.autograd.grad(o.square().sum(), mask)
        expected = torch.autograd.grad(attention(q, k, v, attn_mask=full.contiguous()).square().sum(), mask)[0]
        assert grad.shape == shape
        torch.testing.assert_close(grad, expected)


def test_gradient_of_an_expanded_leaf_has_a_value_for_each_element() -> None:
    q = torch.randn(1, 1, 5, 8)
    mask = torch.zeros(1, 1).expand(5, 5).requires_grad_()
    (grad,) = torch.autograd.grad(attention(q, q, q, attn_mask=mask).square().sum(), mask)
    own = torch.zeros(5, 5, requires_grad=True)
    (expected,) = torch.autograd.grad(attention(q, q, q, attn_mask=own).square().sum(), own)
    torch.testing.assert_close(grad, expected)


def test_an_expanded_mask_costs_nothing() -> None:
    from tests.support.attention_modules import operators

    q = torch.randn(1, 2, 300, 8)
    with operators() as seen:
        attention(q, q, q, attn_mask=torch.zeros(1, 300).expand(300, 300))
    assert seen.largest < 300 * 300


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("M", [4, 40])
def test_what_is_hidden_may_hold_anything(bad: float, M: int) -> None:
    def results(value: float) -> list[torch.Tensor]:
        torch.manual_seed(1)
        q, k, v, mask = torch.randn(1, 2, M, 8), torch.randn(1, 2, 30, 8), torch.randn(1, 2, 30, 8), torch.randn(M, 30)
        q[:, :, 1], k[:, :, 5:9], v[:, :, 5:9] = value, value, value
        mask[1], mask[:, 5:9] = -math.inf, -math.inf
        leaves = [t.requires_grad_() for t in (q, k, v, mask)]
        o, lse = attention(*leaves[:3], attn_mask=mask, return_lse=True)
        cotangent = torch.randn_like(o).index_fill_(2, torch.tensor(1), value)
        return [o, lse, *torch.autograd.grad(o, leaves, cotangent)]

    for clean, dirty in zip(results(0.5), results(bad), strict=True):
        torch.testing.assert_close(dirty, clean)
    assert (results(bad)[0][:, :, 1] == 0).all()


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
def test_dtypes(dtype: torch.dtype) -> None:
    q = torch.randn(1, 2, 5, 8, dtype=dtype, requires_grad=True)
    o, lse = attention(q, q, q, return_lse=True)
    assert o.dtype == dtype and lse.dtype == (F64 if dtype == F64 else F32)
    (o.sum() + lse.sum()).backward()
    assert q.grad is not None and q.grad.dtype == dtype


def test_autocast_is_that_of_torch() -> None:
    q, k = torch.randn(1, 2, 5, 8, requires_grad=True), torch.randn(1, 2, 5, 8, dtype=BF16, requires_grad=True)
    mask = torch.randn(5, 5, requires_grad=True)
    with torch.autocast("cpu", BF16):
        o = attention(q, k, q, attn_mask=mask, sinks=torch.randn(2))
        assert o.dtype == BF16
        assert attention(q.double(), q.double(), q.double()).dtype == F64
        assert torch.equal(
            attention(q, k, q, attn_mask=mask), attention(q.bfloat16(), k, q.bfloat16(), attn_mask=mask.bfloat16())
        )
        assert attention_map(q, k, rows=2, cols=2).dtype == F32
    grads = torch.autograd.grad(o.sum(), (q, k, mask))
    assert [g.dtype for g in grads] == [F32, BF16, F32]
    with torch.autocast("cpu", torch.float16):
        assert attention(q, k, q).dtype == F16


@pytest.mark.parametrize("rows, cols", [(1, 1), (3, 7), (64, 64), (200, 5)])
@pytest.mark.parametrize(
    "case", [Case(M=40, N=90, D=16), Case(H=4, M=33, N=33, causal=1, sinks=True, slopes="h")], ids=str
)
def test_map(case: Case, rows: int, cols: int) -> None:
    data = oracle.make_data(case)
    tensors, options = arguments(case, data)
    del tensors["v"]
    for name in ("dropout_p", "cu_seqlens_q", "cu_seqlens_k"):
        del options[name]
    found = attention_map(**tensors, **options, rows=rows, cols=cols)
    torch.testing.assert_close(found.double(), oracle.pooled_map(case, data, rows, cols), rtol=2e-5, atol=1e-6)
    assert not attention_map(tensors["q"].requires_grad_(), tensors["k"]).requires_grad


def test_rows_of_the_map_sum_to_one() -> None:
    q = torch.randn(2, 4, 50, 8)
    sums = attention_map(q, q[:, :2], causal=True, rows=10, cols=13).sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))


@pytest.mark.parametrize("case", [*[c for c in GRID if c.M * c.N < 20_000][::5], Case(dropout=1.0)], ids=str)
def test_reference(case: Case) -> None:
    """The reference, which computes double backward and calls without a kernel, agrees with the float64 oracle."""
    data = oracle.make_data(case)
    expected = oracle.run_oracle(case, data, F64)
    d = oracle.cast(data, F64)
    leaves = {name: t.detach().clone().requires_grad_() for name, t in oracle.leaves(d).items()}
    mask = leaves.get("mask", d.mask)
    o, lse = reference.attention(
        leaves["q"], leaves["k"], leaves["v"], mask=mask, alibi_slopes=leaves.get("slopes"), sinks=leaves.get("sinks"),
        cu_seqlens_q=d.cu_q, cu_seqlens_k=d.cu_k, rng=d.rng, softmax_scale=case.softmax_scale, causal=case.causal,
        window_left=case.window[0], window_right=case.window[1], softcap=case.softcap, dropout_p=case.dropout,
    )  # fmt: skip
    loss = (o * d.do).sum()
    if d.dlse is not None:
        loss = loss + (lse.masked_fill(lse == -math.inf, 0.0) * d.dlse).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found = {"o": o, "lse": lse} | {
        f"d{name}": torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def test_without_a_kernel_the_reference_runs() -> None:
    q = torch.randn(1, 4, 5, 8, device="meta")
    o, lse = attention(q, q[:, :2], q[:, :2], return_lse=True)
    assert o.shape == q.shape and lse.shape == (1, 4, 5) and o.is_meta
    assert attention_map(q, q, rows=3, cols=2).shape == (1, 4, 3, 2)


REPEATED = [
    Case(B=1, H=2, M=70, N=600, D=59, Dv=33, causal=2, mask="mn", mask_kind="own", slopes="h", sinks=True, dropout=0.2),
    Case(B=2, H=4, Hkv=2, M=130, N=130, D=64, Dv=64, dtype=BF16, causal=1),
    Case(B=3, H=2, Hkv=1, D=32, Dv=32, lengths_q=(3, 0, 90), lengths_k=(80, 5, 300), causal=2, dropout=0.3),
    Case(B=1, H=8, Hkv=2, M=1, N=1500, D=64, Dv=64, sinks=True),
]


@pytest.mark.o0_skip(reason="minutes of arithmetic")
@pytest.mark.parametrize("case", REPEATED, ids=str)
def test_200_repeats_are_bit_equal(case: Case, threads: Any) -> None:
    data = oracle.make_data(case)
    first = run(case, data)
    for repeat in range(200):
        threads(1 + repeat % 3)
        for name, value in run(case, data).items():
            assert torch.equal(value, first[name]), (name, repeat)
