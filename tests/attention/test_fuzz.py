"""Compares at least 1,000 distinct random calls of `functional.attention` with float64; none may disagree. An -O0 build
runs half of them."""

from __future__ import annotations

import collections
import math

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.support.attention_calls import check, second_looks
from tests.support.attention_oracle import Case
from tests.support.instruction_sets import available_isas, optimised, use_isa
from tests.support.settings import num_threads

pytestmark = pytest.mark.usefixtures("native")

REQUIRED = 1000 if optimised() else 500
EXAMPLES = REQUIRED * 11 // 10  # hypothesis may draw a call twice
ISAS = available_isas()
LENGTHS = st.integers(0, 5) | st.integers(6, 20) | st.sampled_from([33, 65])
LEAST = torch.finfo(torch.float32).min
OFFSETS = [0.0, 0.0, 0.0, LEAST, -1e30, 1e20]
SINKS = [None, None, None, LEAST, -LEAST, -1e30, 1e30, -math.inf]
WIDTHS = st.integers(1, 20) | st.sampled_from([31, 32, 33, 65])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    Hkv, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3]))
    packed = draw(st.integers(0, 3)) == 0
    B = draw(st.integers(1, 3))
    lengths = [tuple(draw(LENGTHS) for _ in range(B)) for _ in range(2)] if packed else [None, None]
    edge = st.sampled_from([-1, -1, 0, 1, 3, 20])
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    mask_kind = draw(st.sampled_from(["bool", "own", "float32"]))
    # With an offset of 65504, scores that differ in float64 are equal in float32, so float64 is no reference for them.
    offset = draw(st.sampled_from([0.0] if dtype == torch.float16 else OFFSETS))
    # If everything is dropped, only lse has a gradient. The test demands float32 accuracy of it, which 16-bit attention
    # cannot reach: its exponentials have errors of up to 3e-6.
    dropouts = [0.0, 0.0, 0.1, 0.5, 0.5 if dtype in (torch.bfloat16, torch.float16) else 1.0]
    return Case(
        B=B, H=Hkv * group, Hkv=Hkv, M=draw(LENGTHS), N=draw(LENGTHS), D=draw(WIDTHS), Dv=draw(WIDTHS),
        dtype=dtype,
        mask=None if packed else draw(st.sampled_from([None, "", "n", "m", "mn", "hm", "bn", "hn", "bmn", "bhmn"])),
        mask_kind=mask_kind, offset=offset, sink=draw(st.sampled_from(SINKS)), causal=draw(st.integers(0, 2)),
        window=(draw(edge), draw(edge)), slopes=draw(st.sampled_from([None, "h", "bh"])), sinks=draw(st.booleans()),
        softcap=draw(st.sampled_from([0.0, 0.0, 3.0, 30.0])), scale=draw(st.sampled_from([None, None, 0.3, -0.2])),
        dropout=draw(st.sampled_from(dropouts)), lengths_q=lengths[0], lengths_k=lengths[1],
        layout=draw(st.sampled_from(["bhmd", "bmhd", "strided"])), dlse=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )  # fmt: skip


@pytest.mark.heavy
def test_random_calls() -> None:
    passed: set[tuple[Case, str, int]] = set()
    doubts = len(second_looks)

    # Every run of the suite tests the same calls, because the search is derandomised and has no database.
    @settings(
        max_examples=EXAMPLES, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(cases(), st.sampled_from(ISAS), st.integers(1, 3))
    def property_holds(case: Case, isa: str, threads: int) -> None:
        with use_isa(isa), num_threads(threads):
            check(case)
        passed.add((case, isa, threads))

    property_holds()
    counts = {
        field: collections.Counter(str(getattr(case, field)) for case, _, _ in passed)
        for field in (
            "dtype",
            "mask",
            "causal",
            "slopes",
            "sinks",
            "sink",
            "offset",
            "softcap",
            "dropout",
            "layout",
            "dlse",
        )
    }
    print(f"\n{len(passed)} distinct calls, {len(second_looks) - doubts} results after a second look; {counts}")
    assert len(passed) >= REQUIRED
    assert len(second_looks) - doubts <= len(passed) // 10
    assert all(len(by_value) > 1 and min(by_value.values()) >= len(passed) // 50 for by_value in counts.values())
    assert {isa for _, isa, _ in passed} == set(ISAS)


def test_a_wrong_kernel_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of 64 float32 roundings in one gradient makes the check fail."""
    from tests.support import attention_calls

    honest = attention_calls.run

    def dishonest(*args, **kwargs):
        results = honest(*args, **kwargs)
        results["dk"] = results["dk"] * (1 + 64 * torch.finfo(results["dk"].dtype).eps)
        return results

    monkeypatch.setattr(attention_calls, "run", dishonest)
    with pytest.raises(AssertionError, match="dk"):
        check(Case(M=40, N=40))
