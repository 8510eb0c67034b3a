"""Tests values at the limits of the range: rows whose scores have a large common offset, extreme sinks and softcaps."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dlkernels import functional, reference
from tests.support import attention_oracle as oracle
from tests.support.attention_calls import check, run
from tests.support.attention_oracle import Case, make_data

pytestmark = pytest.mark.usefixtures("native")

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
LEAST = torch.finfo(F32).min


def gradients(function: object, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, do: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    o = function(*leaves, attn_mask=mask)  # type: ignore[operator]
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


@pytest.mark.parametrize("length", [11, 1100], ids=["few keys", "split keys"])
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize("offset", ["finfo.min", -1e30, 1e20], ids=str)
def test_a_large_offset_changes_no_gradient(offset: str | float, dtype: torch.dtype, length: int) -> None:
    """Every key of a row with a large offset has the same weight, so results are those of a mean over the keys."""
    rows, far = 5, torch.finfo(dtype).min if isinstance(offset, str) else offset
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 2, length, 8, generator=generator).to(dtype) for _ in range(2))
    q, do = (torch.randn(1, 2, rows, 8, generator=generator).to(dtype) for _ in range(2))
    mask = torch.full((rows, length), far, dtype=dtype)
    o, dq, dk, dv = gradients(functional.scaled_dot_product_attention, q, k, v, mask, do)
    # Gradients are inversely proportional to the number of keys, and so is the bound.
    like = {"rtol": 2**-6, "atol": 0.4 / length} if dtype == BF16 else {"rtol": 1e-5, "atol": 1e-6}
    mean = v.mean(2, keepdim=True)
    torch.testing.assert_close(o, mean.expand(1, 2, rows, 8), **like)
    torch.testing.assert_close(dv, (do.sum(2, keepdim=True) / length).expand_as(v), **like)
    ds = ((do @ v.transpose(-1, -2)) - (do * mean).sum(-1, keepdim=True)) / length * 8**-0.5
    torch.testing.assert_close(dq, ds @ k, **like)
    torch.testing.assert_close(dk, ds.transpose(-1, -2) @ q, **like)
    with sdpa_kernel(SDPBackend.MATH):  # torch's fused kernel loses the row's sum
        theirs = gradients(F.scaled_dot_product_attention, q, k, v, mask, do)
    for mine, other in zip((o, dq, dk, dv), theirs, strict=True):
        torch.testing.assert_close(mine, other, **like)


def test_the_reported_call() -> None:
    q, v, mask = torch.zeros(1, 4, 11, 8), torch.randn(1, 4, 11, 8), torch.full((11, 11), LEAST)
    *_, dv = gradients(functional.scaled_dot_product_attention, q, q, v, mask, torch.ones_like(v))
    assert dv.sum(2)[0, 0, 0].item() == pytest.approx(11)


OFFSETS = [
    Case(M=33, N=40, mask="mn", mask_kind="own", offset=LEAST),
    Case(M=33, N=40, H=4, Hkv=2, mask="hmn", mask_kind="own", offset=1e20, slopes="h", sinks=True),
    Case(M=33, N=40, mask="bmn", mask_kind="float32", offset=-1e30, dtype=BF16),
    Case(M=200, N=300, D=16, mask="mn", mask_kind="own", offset=LEAST, dtype=BF16, causal=1),
    Case(M=7, N=1200, mask="mn", mask_kind="own", offset=1e20, window=(900, -1)),
    Case(M=33, N=40, mask="mn", mask_kind="own", offset=LEAST, softcap=3.0, dropout=0.3),
    Case(M=1, N=1300, H=4, Hkv=1, mask="n", mask_kind="own", offset=-1e30),
    Case(M=20, N=30, mask="m", mask_kind="own", offset=1e20, dtype=F64),
    Case(M=20, N=30, mask="bhmn", mask_kind="own", offset=LEAST, sinks=True, sink=LEAST),
]


@pytest.mark.parametrize("case", OFFSETS, ids=str)
def test_offsets_beside_everything_else(case: Case, isa: str) -> None:
    check(case)


SINKS = [LEAST, -LEAST, -1e38, 1e38, 3e38, -1e30, 1e30, -1e9]


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@pytest.mark.parametrize("sink", SINKS)
def test_extreme_sinks(sink: float, dtype: torch.dtype, isa: str) -> None:
    """With extreme sinks o, lse, every gradient and the map agree with float64. Some masked rows see only the sink."""
    for case in (
        Case(M=9, N=20, H=4, Hkv=2, mask="hm", dtype=dtype, sinks=True, sink=sink),
        Case(M=3, N=1200, H=4, Hkv=2, causal=2, dtype=dtype, sinks=True, sink=sink),
        Case(M=9, N=20, dtype=dtype, sinks=True, sink=sink, scale=0.7, softcap=3.0, slopes="h"),
        Case(M=9, N=20, H=4, Hkv=2, dtype=dtype, sinks=True, sink=sink, scale=0.01),
        Case(lengths_q=(3, 0, 4), lengths_k=(5, 2, 0), B=3, dtype=dtype, sinks=True, sink=sink),
    ):
        data = make_data(case)
        results = check(case, data)
        assert all(x.isfinite().all() or name == "lse" for name, x in results.items()), case
        if case.varlen:
            continue
        (q, k, _), (mask, slopes, sinks, *_) = oracle.op_arguments(case, data)
        options = {"alibi_slopes": slopes, "sinks": sinks, "softcap": case.softcap, "softmax_scale": case.scale}
        causal = "bottom_right" if case.causal else False
        found = functional.attention_map(q, k, attn_mask=mask, causal=causal, rows=3, cols=5, **options)
        expected = oracle.pooled_map(case, data, 3, 5)
        torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("sink", [-1e300, 1e300, LEAST * 1.01])
def test_sinks_beyond_the_compute_type(sink: float) -> None:
    """A float64 sink beyond the range of float32 queries has no weight if it is negative, else all the weight."""
    q = torch.randn(1, 2, 5, 8)
    o = functional.attention(q, q, q, sinks=torch.tensor([sink, 0.0], dtype=F64))
    expected = functional.attention(q, q, q)[:, 0] if sink < 0 else torch.zeros(1, 5, 8)
    torch.testing.assert_close(o[:, 0], expected)


def test_sinks_beyond_the_compute_type_in_the_reference() -> None:
    q = torch.randn(1, 2, 5, 8)
    sinks = torch.tensor([1e300, -1e300], dtype=F64, requires_grad=True)
    o, lse = reference.attention(q, q, q, sinks=sinks, softmax_scale=1.0)
    assert o[0, 0].eq(0).all() and lse.isfinite().all()
    torch.testing.assert_close(o[:, 1], reference.attention(q, q, q, softmax_scale=1.0)[0][:, 1])
    lse.sum().backward()
    torch.testing.assert_close(sinks.grad, torch.tensor([5.0, 0.0], dtype=F64))


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_a_large_sink_keeps_its_digits(dtype: torch.dtype, isa: str) -> None:
    """The key's logit is 93750, and the sink exceeds it by 89 steps of float32. The scale is a float32 number, but the
    sink divided by it is none; its rounding error would change the probability by a thousandth."""
    q, k, v = torch.zeros(1, 1, 5, 8, dtype=dtype), torch.zeros(1, 1, 1, 8, dtype=dtype), torch.ones(1, 1, 1, 8)
    q[..., 0] = k[..., 0] = 1000
    above = 89 * 2.0**-7
    sinks = torch.full((1,), 93750 + above, dtype=dtype)
    o = functional.attention(q, k, v.to(dtype), sinks=sinks, softmax_scale=0.09375)
    expected = torch.full(o.shape, 1 / (1 + math.exp(above)), dtype=F64)
    torch.testing.assert_close(o.double(), expected, rtol=1e-5, atol=0)


def test_statistics_of_a_row_that_sees_nothing(isa: str) -> None:
    """They are +inf and 0, so every finite score has probability 0."""
    q, mask = torch.randn(1, 2, 5, 8), torch.ones(1, 1, 5, 5, dtype=torch.bool)
    mask[:, :, 2] = False
    options = (None, None, None, None, None, 5, 5, 1.0, 0, -1, -1, 0.0, 0.0, False)
    stats = torch.ops.dlkernels.attention(q, q, q, mask, *options)[2]
    assert stats[0, :, :, 2].tolist() == [[math.inf, 0.0]] * 2
    assert stats[..., [0, 1, 3, 4]].isfinite().all()


def test_minus_infinity_is_still_no_sink() -> None:
    case = Case(sinks=True, sink=-math.inf, mask="hm")
    assert run(case, make_data(case))["dsinks"][0] == 0
    check(case)


def test_softcaps_that_no_number_holds() -> None:
    q = torch.randn(1, 2, 5, 8)
    for dtype, most in ((F32, 8e37), (BF16, 8e37), (F16, 8e37), (F64, 4e307)):
        x = q.to(dtype)
        for function in (lambda cap, x=x: functional.attention(x, x, x, softcap=cap),
                         lambda cap, x=x: functional.attention_map(x, x, softcap=cap)):  # fmt: skip
            with pytest.raises(ValueError, match=r"softcap: expected 0 \(none\) or a positive number of at most"):
                function(most * 2)
            found, without = function(most), function(0.0)
            torch.testing.assert_close(found, without, rtol=1e-6 if dtype in (F32, F64) else 1e-2, atol=1e-6)


def test_the_reference_agrees() -> None:
    """The reference, which serves calls without a kernel and double backward, agrees with the oracle."""
    case = Case(M=5, N=6, dtype=F64, mask="mn", mask_kind="own", offset=LEAST, sinks=True, sink=LEAST)
    data = make_data(case)
    o, lse = reference.attention(
        data.q, data.k, data.v, mask=data.mask, sinks=data.sinks, softmax_scale=case.softmax_scale
    )
    expected = oracle.run_oracle(case, data, F64, grads=False)
    torch.testing.assert_close(o, expected["o"])
    torch.testing.assert_close(lse, expected["lse"])
