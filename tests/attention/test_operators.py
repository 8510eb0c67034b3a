"""The attention operators on the CPU, called directly: values against float64 on every instruction set, and the
promises of the kernels: determinism, masks that hide, memory, plans."""

from __future__ import annotations

import itertools
import math
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dlkernels.testing import FACTOR_FORWARD, FACTOR_GRAD, error, floor
from tests.support import attention_oracle as oracle
from tests.support.attention_oracle import Case, Results, make_data, op_arguments, run_op, run_oracle
from tests.support.instruction_sets import kernels_of

pytestmark = pytest.mark.usefixtures("native")

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def check(case: Case, isa: str = "") -> Results:
    """Runs the operators and holds every result against float64."""
    data = make_data(case)
    reference = run_oracle(case, data, F64)
    theirs = oracle.measures(case, data)
    ours = run_op(case, data)
    assert ours.keys() == reference.keys()
    orders = oracle.other_orders(case, data)
    for name, value in ours.items():
        dtype = oracle.result_dtype(case, name)
        assert value.dtype == dtype and value.shape == reference[name].shape, (name, case)
        found, factor = error(value, reference[name]), FACTOR_GRAD if name[0] == "d" else FACTOR_FORWARD

        def limit(name: str = name, dtype: torch.dtype = dtype, factor: float = factor) -> float:
            measure = max(e for e in (error(t[name], reference[name]) for t in theirs) if math.isfinite(e))
            return factor * measure + floor(reference[name], dtype)

        # Where the results are few, one measurement is a matter of luck.
        while found > limit() and (other := next(orders, None)):
            theirs.append(other)
        assert found <= limit(), f"{name} {isa} {case}: error {found:.3e}, limit {limit():.3e}"
    return ours


def grid() -> list[Case]:
    """Widths, lengths and features crossed at random, always the same cases."""
    r = random.Random(3)
    cases = []
    for i in range(72):
        D = (8, 32, 59, 64, 80, 111, 128, 256)[i % 8]
        Hkv = r.choice([1, 2])
        options: dict[str, Any] = {
            "B": 2, "Hkv": Hkv, "H": r.choice([4, 6]) if Hkv == 2 else r.choice([4, 5]),
            "M": r.choice([1, 7, 97, 128]), "N": r.choice([1, 7, 97, 128]), "D": D, "Dv": r.choice([D, D, 8, 59, 64]),
            "dtype": (F32, BF16, F16, F64, F32)[i % 5], "causal": r.choice([0, 0, 1, 2]),
            "window": r.choice([(-1, -1), (-1, -1), (30, -1), (20, 5), (-1, 4), (0, 0)]),
            "slopes": r.choice([None, None, "h", "bh"]), "sinks": r.random() < 0.3,
            "softcap": r.choice([0.0, 0.0, 0.0, 2.0, 30.0]), "scale": r.choice([None, None, None, 0.3, -0.2, 0.0]),
            "dropout": r.choice([0.0, 0.0, 0.1, 0.5]), "layout": r.choice(["bhmd", "bmhd", "strided"]),
            "dlse": r.random() < 0.5, "seed": i,
        }  # fmt: skip
        if i % 4 == 3:
            lengths = (0, 1, 7, 50, 97)
            q, k = ((97, *(r.choice(lengths) for _ in range(2))) for _ in range(2))
            options.update(B=3, lengths_q=q, lengths_k=k)
        elif i % 2 == 0:
            kinds = ("bool", "bool", "own", "float32")
            options.update(
                mask=r.choice(["", "n", "mn", "bn", "bhmn", "hmn", "bm", "h", "bmn"]), mask_kind=r.choice(kinds)
            )
        cases.append(Case(**options))
    return cases


@pytest.mark.parametrize("case", grid(), ids=str)
def test_against_float64(case: Case, isa: str) -> None:
    check(case, isa)


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize("M, N", [(1, 2100), (3, 1300), (70, 1100), (1025, 1025)])
def test_long_keys_are_split(M: int, N: int, dtype: torch.dtype, best_isa: str) -> None:
    case = Case(B=1, H=2, Hkv=1, M=M, N=N, D=32, Dv=32, dtype=dtype, causal=2, sinks=True, seed=M)
    check(case, best_isa)
    plan = plan_of(case)
    assert plan["split"] > 1 or M == 1025
    assert "split" in plan["reason"] or M == 1025


def plan_of(case: Case, **options: Any) -> dict[str, Any]:
    from dlkernels._core import extension

    c = case
    plan: dict[str, Any] = extension.native.attention_plan(
        str(c.dtype), c.B, c.H, c.Hkv, c.M, c.N, c.D, c.Dv, **options
    )
    return plan


def test_plan_is_what_runs(native: Any, isa: str, threads: Callable[[int], None]) -> None:
    for count, case in itertools.product(
        (1, 2),
        (
            Case(M=40, N=300, D=32), Case(M=2, H=4, N=200, D=64), Case(M=1, N=1), Case(M=40, N=300, D=32, dtype=BF16),
            Case(M=40, N=300, D=32, dtype=F16), Case(M=1, N=300, D=32, dtype=BF16),
        ),
    ):  # fmt: skip
        threads(count)
        run_op(case, make_data(case), grads=False)
        ran, plan = native.attention_last_run(), plan_of(case)
        assert {key: ran[key] for key in plan} == plan
        served = kernels_of(isa, attention=case.dtype, dot=ran["kernel"].endswith("/dot"))
        assert ran["isa"] == served and not ran["backward"] and 1 <= ran["members"] <= plan["threads"]
        run_op(case, make_data(case))
        ran, plan = native.attention_last_run(), plan_of(case, backward=True)
        assert {key: ran[key] for key in plan} == plan and ran["backward"]
    assert plan_of(Case(M=1, H=8, Hkv=1, N=2048))["kernel"] == f"cpu/{kernels_of(isa)}/attention/dot"
    assert plan_of(Case(M=2, H=8, Hkv=1, N=2048))["kernel"] == f"cpu/{kernels_of(isa)}/attention/tiles"


ODD = Case(
    B=2,
    H=4,
    Hkv=2,
    M=70,
    N=700,
    D=59,
    Dv=33,
    causal=2,
    mask="hmn",
    mask_kind="own",
    slopes="h",
    sinks=True,
    dropout=0.2,
)
DECODE = Case(B=1, H=8, Hkv=2, M=1, N=1500, D=64, Dv=64, sinks=True)
VARLEN = Case(B=3, H=2, Hkv=1, D=32, Dv=32, lengths_q=(3, 0, 90), lengths_k=(80, 5, 600), causal=2, dropout=0.3)


@pytest.mark.parametrize(
    "case", [ODD, DECODE, VARLEN, Case(mask="mn", mask_kind="own", dtype=BF16, M=130, N=300)], ids=str
)
def test_same_bits_on_any_threads_and_every_time(case: Case, isa: str, threads: Callable[[int], None]) -> None:
    data = make_data(case)
    threads(1)
    first = run_op(case, data)
    for count in (2, 2, 1, 3, 2, 2):
        threads(count)
        for name, value in run_op(case, data).items():
            assert torch.equal(value, first[name]), (name, count)


def with_hidden(case: Case, value: float) -> oracle.Data:
    """Data whose hidden places all hold `value`: keys that nobody sees, and what single rows may not see."""
    data = make_data(case)
    for name in ("k", "v"):
        getattr(data, name)[..., 5:9, :] = value
    data.q[..., 3, :], data.do[..., 3, :] = value, value
    assert data.mask is not None
    if data.mask.dtype == torch.bool:
        data.mask[..., 5:9] = False
        data.mask[..., 3, :] = False
    else:
        data.mask[..., 5:9] = -math.inf
        data.mask[..., 3, :] = -math.inf
    return data


@pytest.mark.parametrize("kind", ["bool", "own"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("M", [4, 60], ids=["dot", "tiles"])
@pytest.mark.parametrize("features", [{}, {"softcap": 3.0, "slopes": "h"}, {"dropout": 0.3, "sinks": True}], ids=str)
def test_hidden_nan_does_not_leak(kind: str, value: float, M: int, features: dict[str, Any], isa: str) -> None:
    case = Case(B=2, H=2, Hkv=2, M=M, N=40, D=20, Dv=24, mask="bhmn", mask_kind=kind, dlse=False, **features)
    clean, dirty = run_op(case, with_hidden(case, 0.5)), run_op(case, with_hidden(case, value))
    for name, expected in clean.items():
        assert expected.isfinite().all() or name == "lse", name
        torch.testing.assert_close(dirty[name], expected, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("causal", [1, 2])
def test_nan_reaches_only_those_who_see_it(causal: int, isa: str) -> None:
    case = Case(M=40, N=40, D=16, Dv=16, causal=causal, dlse=False)
    data = make_data(case)
    data.k[:, :, 25], data.v[:, :, 25] = math.nan, math.nan
    found = run_op(case, data)
    assert found["o"][:, :, :25].isfinite().all() and found["o"][:, :, 25:].isnan().all()
    assert found["dq"][:, :, :25].isfinite().all() and found["dq"][:, :, 25:].isnan().all()
    data = make_data(case)
    data.q[:, :, 10], data.do[:, :, 10] = math.nan, math.nan
    found = run_op(case, data)
    for name in ("dk", "dv"):
        assert found[name][:, :, :11].isnan().all() and found[name][:, :, 11:].isfinite().all()


def test_a_mask_may_hold_nan(isa: str) -> None:
    """It is seen by its row, even where everything else is hidden."""
    case = Case(B=1, H=1, Hkv=1, M=3, N=20, mask="mn", mask_kind="own", dlse=False)
    data = make_data(case)
    assert data.mask is not None
    data.mask[..., 1, :] = -math.inf
    data.mask[..., 1, 4] = math.nan
    found = run_op(case, data)
    assert found["o"][..., 1, :].isnan().all() and found["o"][..., [0, 2], :].isfinite().all()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_rows_that_see_nothing(dtype: torch.dtype, isa: str) -> None:
    case = Case(M=30, N=10, D=16, Dv=16, causal=2, dtype=dtype)  # the first 20 rows stand before every key
    found = check(case, isa)
    assert (found["o"][:, :, :20] == 0).all() and (found["lse"][:, :, :20] == -math.inf).all()
    assert (found["dq"][:, :, :20] == 0).all()
    case = Case(M=30, N=10, D=16, Dv=16, causal=2, sinks=True, dtype=dtype)
    data = make_data(case)
    found = check(case, isa)
    assert data.sinks is not None and (found["o"][:, :, :20] == 0).all()
    torch.testing.assert_close(found["lse"][:, :, :20], data.sinks.float()[None, :, None].expand(2, 2, 20))


def saturated(case: Case) -> oracle.Data:
    """Data with whose logits of some thousands query i sees key i + 2 alone, in floating point."""
    data = make_data(case)
    data.q.copy_((data.k[:, :, 2 : case.M + 2] * 2000).to(case.dtype))
    logits = data.q @ data.k.transpose(-1, -2) * case.softmax_scale
    largest, second = logits.topk(2, -1).values.unbind(-1)
    assert (largest - second).min() > 1200
    return data


@pytest.mark.parametrize("features", [{}, {"softcap": 1e5, "slopes": "h"}], ids=["raw", "transformed"])
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize("M", [5, 60], ids=["dot", "tiles"])
def test_saturated_rows_are_exact(M: int, dtype: torch.dtype, features: dict[str, Any], isa: str) -> None:
    case = Case(B=1, H=2, Hkv=2, M=M, N=300, D=59, Dv=48, dtype=dtype, dlse=False, **features)
    data = saturated(case)
    found = run_op(case, data)
    assert torch.equal(found["o"].double(), data.v[:, :, 2 : M + 2])
    assert (found["dq"] == 0).all() and (found["dk"] == 0).all()
    assert torch.equal(found["dv"][:, :, 2 : M + 2].double(), data.do) and (found["dv"][:, :, M + 2 :] == 0).all()


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize("M", [5, 60], ids=["dot", "tiles"])
def test_rows_that_see_one_key(M: int, dtype: torch.dtype, isa: str) -> None:
    case = Case(B=2, H=2, Hkv=2, M=M, N=M, D=59, Dv=59, dtype=dtype, window=(0, 0), dlse=False, scale=13.7)
    data = make_data(case)
    found = run_op(case, data)
    assert torch.equal(found["o"].double(), data.v) and torch.equal(found["dv"].double(), data.do)
    assert (found["dq"] == 0).all() and (found["dk"] == 0).all()


@pytest.mark.parametrize("causal", [0, 2])
def test_windows_of_any_size(causal: int) -> None:
    sizes = {"M": 30, "N": 10, "causal": causal}
    wide, endless = Case(window=(2**63 - 1, 2**63 - 1), **sizes), Case(**sizes)
    found, expected = run_op(wide, make_data(wide)), run_op(endless, make_data(endless))
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


EMPTY = [
    {"B": 0}, {"M": 0}, {"N": 0}, {"H": 0, "Hkv": 0}, {"D": 0}, {"Dv": 0}, {"D": 0, "Dv": 0}, {"M": 0, "N": 0},
    {"N": 0, "sinks": True}, {"N": 0, "M": 1, "H": 4, "Hkv": 1}, {"D": 0, "M": 1}, {"Dv": 0, "M": 1},
]  # fmt: skip


@pytest.mark.parametrize("sizes", EMPTY, ids=str)
@pytest.mark.parametrize("mask", [None, "mn", "n"])
def test_empty(sizes: dict[str, Any], mask: str | None) -> None:
    case = Case(mask=mask, mask_kind="own", slopes="bh", **sizes)
    data = make_data(case)
    reference, found = run_oracle(case, data, F64), run_op(case, data)
    for name, value in reference.items():
        if value.shape != (0,):
            torch.testing.assert_close(found[name].double(), value, rtol=1e-4, atol=1e-5, msg=name)


def test_layout_of_results() -> None:
    """o as q, unless its width is another; the gradients row by row, as torch's own."""
    for Dv, layout in itertools.product((8, 6), ("bhmd", "bmhd", "strided")):
        case = Case(B=2, H=3, Hkv=3, M=5, N=7, D=8, Dv=Dv, layout=layout)
        found = run_op(case, make_data(case))
        assert (found["o"].transpose(1, 2) if (Dv, layout) == (8, "bmhd") else found["o"]).is_contiguous(), case
        for name in ("dq", "dk", "dv"):
            assert found[name].transpose(1, 2).is_contiguous(), name
        assert found["lse"].is_contiguous()


def test_expanded_and_broadcast_inputs(isa: str) -> None:
    k = torch.randn(1, 1, 30, 16).expand(2, 2, 30, 16)
    q = torch.randn(2, 2, 9, 16)
    mask = torch.randn(1, 1, 1, 30).expand(2, 2, 9, 30)
    rules = (None, None, None, None, None, 0, 0, 0.25, 0, -1, -1, 0.0, 0.0, False)
    for m in (mask, mask.transpose(2, 3).contiguous().transpose(2, 3), mask > 0):
        o, lse, _ = torch.ops.dlkernels.attention(q, k, k, m, *rules)
        o2, lse2, _ = torch.ops.dlkernels.attention(q, k.contiguous(), k.contiguous(), m.contiguous(), *rules)
        assert torch.equal(o, o2) and torch.equal(lse, lse2)


def kept_by(case: Case, data: oracle.Data) -> Tensor:
    """What dropout kept, read from o with v = identity, q = 0: o = kept / N / (1 - p)."""
    data.q.zero_()
    data.v.copy_(torch.eye(case.N).expand_as(data.v))
    return run_op(case, data, grads=False)["o"] != 0


@pytest.mark.parametrize("M", [2, 200], ids=["dot", "tiles"])
def test_dropout_mask(M: int, isa: str) -> None:
    case = Case(B=2, H=3, Hkv=3, M=M, N=150, D=8, Dv=150, dropout=0.3, seed=7)
    data = make_data(case)
    assert data.rng is not None
    kept = kept_by(case, data)
    expected = torch.stack([oracle.keep_mask(case, data.rng, b, case.H, M, case.N) for b in range(case.B)])
    assert torch.equal(kept, expected)
    deviation = math.sqrt(0.3 * 0.7 / kept.numel())
    assert abs(kept.float().mean().item() - 0.7) < 5 * deviation
    other = oracle.dataclasses.replace(data, rng=data.rng + torch.tensor([0, 1]))
    agree = (kept_by(case, other) == kept).float().mean().item()
    assert abs(agree - (0.7**2 + 0.3**2)) < 6 * math.sqrt(0.25 / kept.numel())


def test_dropout_of_everything(isa: str) -> None:
    case = Case(M=20, N=20, dropout=1.0, dlse=False)
    found = run_op(case, make_data(case))
    for name in ("o", "dq", "dk", "dv"):
        assert (found[name] == 0).all(), name
    assert found["lse"].isfinite().all()


@pytest.mark.parametrize(
    "case, rows, cols",
    [
        (Case(M=100, N=230, D=16), 10, 23),
        (Case(H=4, Hkv=2, M=300, N=300, D=59, causal=1, slopes="h"), 7, 11),
        (Case(M=5, N=9, mask="bhmn", sinks=True, dtype=F64), 5, 9),
        (Case(M=5, N=9, softcap=3.0), 8, 20),  # bins without a query or key stay 0
        (Case(H=4, Hkv=1, M=33, N=257, dtype=BF16, window=(20, 20), causal=2), 1, 1),
    ],
    ids=str,
)
def test_map(case: Case, rows: int, cols: int, isa: str) -> None:
    data = make_data(case)
    (q, k, _), rest = op_arguments(case, data)
    mask, slopes, sinks = rest[:3]
    found = torch.ops.dlkernels.attention_map(q, k, mask, slopes, sinks, *rest[-6:-1], rows, cols)
    expected = oracle.pooled_map(case, data, rows, cols)
    assert found.dtype == (F64 if case.dtype == F64 else F32)
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=1e-6)


PEAK = """
import resource, torch
import dlkernels
n = 16384
q, k, v, do = (torch.randn(1, 1, n, 8) for _ in range(4))
slopes = torch.tensor([0.001])
rules = (None, slopes, None, None, None, torch.tensor([1, 2]), 0, 0, 0.3, 1, -1, -1, 0.0, 0.1)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
o, _, stats = torch.ops.dlkernels.attention(q, k, v, *rules, False)
torch.ops.dlkernels.attention_backward(do, None, q, k, v, o, stats, *rules, True, True, False, True, False)
torch.ops.dlkernels.attention_map(q, k, None, slopes, None, 0.3, 1, -1, -1, 0.0, 32, 32)
print(peak() - before)
"""


@pytest.mark.heavy
@pytest.mark.o0_skip("needs seconds of arithmetic")
def test_memory_is_linear() -> None:
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 16384 * 16384 // 8  # an eighth of one byte for each pair of query and key


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)), ids=str)
def test_only_what_is_wanted(needs: tuple[bool, bool, bool], isa: str) -> None:
    case = Case(M=20, N=30, mask="mn", mask_kind="own", slopes="h", sinks=True)
    data = make_data(case)
    everything = run_op(case, data)
    some = run_op(case, data, needs=(needs[0], needs[1], needs[2], needs[2], needs[2]))
    names = [["dq"], ["dk", "dv"], ["dmask", "dslopes", "dsinks"]]
    expected = {"o", "lse", *(n for wanted, group in zip(needs, names, strict=True) if wanted for n in group)}
    assert some.keys() == expected
    for name in expected:
        assert torch.equal(some[name], everything[name]), name
