"""Compares at least 2,000 distinct random configurations with float64; none may disagree. An -O0 build runs half of
them."""

from __future__ import annotations

import collections
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.instruction_sets import available_isas, use_isa
from tests.support.layer_cases import DTYPES, MODES, Case, check_case, second_looks
from tests.support.settings import deterministic_algorithms, num_threads

# Half of them is enough for an -O0 build, which test_grid, test_interactions and test_threads test as well.
REQUIRED = 1000
EXAMPLES = REQUIRED * 13 // 10  # hypothesis may draw a configuration twice
ISAS = available_isas()


@dataclass(frozen=True)
class Setting:
    isa: str
    threads: int
    deterministic: bool


@st.composite
def cases(
    draw: st.DrawFn,
    sizes: st.SearchStrategy[int],
    steps: st.SearchStrategy[int],
    batches: st.SearchStrategy[int],
    cuts: tuple[int, ...] = (0, 0, 0, 1, 2, 3, 6),
) -> Case:
    mode = draw(st.sampled_from(MODES))
    t, b, hidden = draw(steps), draw(batches), draw(sizes)
    proj = 0
    if mode == "lstm_proj":
        hidden = max(2, hidden)
        proj = draw(st.integers(1, hidden - 1))
    form = draw(st.sampled_from(["full", "lengths", "packed"]))
    # A length of 0 is allowed with lengths=, but not in a PackedSequence.
    lengths = (
        None if form == "full" else tuple(draw(st.lists(st.integers(form == "packed", t), min_size=b, max_size=b)))
    )
    return Case(
        mode, t, b, draw(sizes), hidden, proj, layers=draw(st.integers(1, 2)), bias=draw(st.booleans()),
        bidirectional=draw(st.booleans()), batch_first=draw(st.booleans()), contiguous=draw(st.booleans()),
        lengths=lengths, packed=form == "packed", hx=draw(st.booleans()),
        bptt_steps=draw(st.sampled_from(cuts)),
        cotangents=draw(st.sampled_from(["yhc", "y", "h", *(["c", "hc", "yc"] if mode.startswith("lstm") else [])])),
        dtype=draw(st.sampled_from(DTYPES)), seed=draw(st.integers(0, 2**31)),
    )  # fmt: skip


def configurations(cases: st.SearchStrategy[Case]) -> st.SearchStrategy[tuple[Case, Setting]]:
    setting = st.builds(Setting, st.sampled_from(ISAS), st.integers(1, 3), st.booleans())
    return st.tuples(cases, setting)


SMALL = cases(
    sizes=st.integers(1, 9) | st.sampled_from([15, 16, 17, 33]), steps=st.integers(1, 6), batches=st.integers(1, 5)
)
LARGER = cases(
    sizes=st.sampled_from([31, 32, 48, 63, 64, 65, 100, 128, 130]),
    steps=st.integers(1, 20),
    batches=st.sampled_from([1, 2, 3, 7, 8, 15, 16, 17, 31, 40]),
    cuts=(0, 0, 0, 0, 7),  # the oracle of truncated gradients is slow
)


def check(case: Case, setting: Setting) -> None:
    with use_isa(setting.isa), num_threads(setting.threads), deterministic_algorithms(setting.deterministic):
        check_case(case)


def run(strategy: st.SearchStrategy[tuple[Case, Setting]], examples: int) -> set[tuple[Case, Setting]]:
    """Runs at most `examples` configurations of the strategy and returns those that passed."""
    passed: set[tuple[Case, Setting]] = set()

    # Every run of the suite tests the same configurations, because the search is derandomised and has no database.
    @settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(strategy)
    def property_holds(configuration: tuple[Case, Setting]) -> None:
        check(*configuration)
        passed.add(configuration)

    property_holds()
    return passed


@pytest.mark.heavy
def test_small_configurations() -> None:
    doubts = len(second_looks)
    passed = run(configurations(SMALL), EXAMPLES)
    counts = {
        field: dict(sorted(collections.Counter(str(getattr(case, field)) for case, _ in passed).items()))
        for field in ("mode", "dtype", "packed", "layers", "bidirectional", "batch_first", "contiguous", "bias", "hx")
    }
    print(f"\n{len(passed)} distinct configurations, none disagrees: {counts}")
    print(f"{len(second_looks) - doubts} of them after a second look at torch's own error")
    assert len(passed) >= REQUIRED
    assert len(second_looks) - doubts <= len(passed) // 25
    assert all(len(by_value) > 1 and min(by_value.values()) >= len(passed) // 20 for by_value in counts.values())
    assert {setting.isa for _, setting in passed} == set(ISAS)


@pytest.mark.heavy
def test_larger_configurations() -> None:
    assert len(run(configurations(LARGER), 120)) >= 100


def test_a_wrong_kernel_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of 64 float32 roundings in the gradient of one weight makes the check fail."""
    from tests.support import layer_cases

    honest = layer_cases.run_layer

    def dishonest(case, data, dtype, package, *args, **kwargs):
        results = honest(case, data, dtype, package, *args, **kwargs)
        if package is layer_cases.dlkernels.nn:
            name = "dweight_hh_l0"
            results[name] = results[name] * (1 + 64 * torch.finfo(dtype).eps)
        return results

    monkeypatch.setattr(layer_cases, "run_layer", dishonest)
    with pytest.raises(AssertionError, match="dweight_hh_l0"):
        check(Case("gru", T=5, B=3, I=4, H=6), Setting(ISAS[-1], 1, False))
