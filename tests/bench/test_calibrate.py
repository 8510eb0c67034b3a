"""Tests `bench --calibrate`: what it concludes from times, and that it changes nothing."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import dlkernels.nn
from dlkernels.bench import calibrate, calibrate_cases
from dlkernels.bench.calibrate import Best, Crossover, Point
from dlkernels.bench.cli import Command
from dlkernels.bench.timing import Budget
from dlkernels.integrations import fast_path, sdpa_operator

pytestmark = [pytest.mark.usefixtures("native"), pytest.mark.o0_skip(reason="it measures time")]
SHORT = Budget(0.01, block_seconds=0.001, discard_seconds=0.0, min_pairs=1, max_pairs=2, max_seconds=0.1)


@pytest.fixture(autouse=True)
def restored(native: Any) -> Iterator[None]:
    before = (sdpa_operator.LEAST_SCORES, fast_path.LEAST_SCORES, fast_path.LEAST_SCORES_16_BIT)
    yield
    native.override_plan_constants({})
    sdpa_operator.LEAST_SCORES, fast_path.LEAST_SCORES, fast_path.LEAST_SCORES_16_BIT = before


def case(*places: int, inclusive: bool = False) -> Crossover:
    points = [Point(at, lambda: lambda: None) for at in places]
    return Crossover("rnn_dot_rows", "low / high", {}, {}, points, inclusive)


@pytest.mark.parametrize(
    ("ratios", "inclusive", "wanted", "lost"),
    [
        ((0.5, 0.8, 2.0, 4.0), False, "8", 0.0),
        ((0.5, 0.8, 0.9, 4.0), False, "16", 0.0266),  # 8 goes the high way and takes 1 / 0.9 of the time
        ((2.0, 2.0, 2.0, 2.0), False, "<= 2", 0.4142),
        ((0.5, 0.5, 0.5, 0.5), False, "> 16", 0.4142),
        ((0.5, 0.8, 0.9, 2.0), True, "8", 0.0),
        ((0.5, 0.8, 2.0, 2.0), True, "4", 0.1892),
        ((2.0, 2.0, 2.0, 2.0), True, "< 2", 0.6818),
        ((0.5, 0.5, 0.5, 0.5), True, ">= 16", 0.1892),
        ((0.5, 1.1, 0.5, 4.0), False, "16", 0.1892),  # one that does not fit in changes nothing
    ],
)
def test_crossover(ratios: tuple[float, ...], inclusive: bool, wanted: str, lost: float) -> None:
    found = calibrate.crossover(case(2, 4, 8, 16, inclusive=inclusive), 8, ratios)
    assert found.wanted == wanted
    assert found.lost == pytest.approx(lost, abs=1e-4)
    assert ("as in the table" in str(found)) == (lost < calibrate.TOLERATED)
    assert f"low / high: 2: {ratios[0]:.2f}" in str(found)


def test_best() -> None:
    which = Best("rnn_chunk_rows", "a layer", (96, 384, 768), lambda: lambda: None)
    found = calibrate.best(which, 384, (0.5, 1.0, 2.0))
    assert (found.wanted, found.lost) == ("96", 1.0)
    assert calibrate.best(which, 384, (1.5, 1.0, 2.0)).lost == 0


def test_every_case_goes_both_ways(native: Any) -> None:
    """Otherwise it would measure one way twice. The plan shows which way layers and attention go."""
    for each in calibrate_cases.cases(torch.get_num_threads()):
        if isinstance(each, Crossover) and not each.constant.startswith(("sdpa", "fast_path")):
            run = native.attention_last_run if each.constant.startswith("attention") else native.last_run
            for point in each.points:
                call, ways = point.make(), []
                for numbers in (each.low, each.high):
                    calibrate.override(numbers)
                    with torch.no_grad():
                        call()
                    ways.append({name: value for name, value in run().items() if name != "members"})
                assert ways[0] != ways[1], (each.constant, point.at)


@pytest.mark.parametrize("least", ["sdpa_least_scores", "fast_path_least_scores_16_bit"])
def test_the_switches_follow(least: str) -> None:
    calibrate.override({least: 3})
    assert 3 in (sdpa_operator.LEAST_SCORES.wide, fast_path.LEAST_SCORES_16_BIT)
    calibrate.override({})
    assert 3 not in (sdpa_operator.LEAST_SCORES.wide, fast_path.LEAST_SCORES_16_BIT)


def test_it_changes_nothing(native: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    before = native.plan_constants()
    layer = functools.partial(dlkernels.nn.LSTM(4, 4), torch.randn(1, 2, 4))
    cases = [
        Crossover("rnn_dot_rows", "dot / tiles", {"rnn_dot_rows": 9}, {"rnn_dot_rows": 1}, [Point(2, lambda: layer)]),
        Best("rnn_chunk_rows", "an LSTM", (384, 96), lambda: layer),
    ]
    monkeypatch.setattr(calibrate_cases, "cases", lambda threads: cases)
    monkeypatch.setattr(calibrate_cases, "speed", lambda: 12345)
    monkeypatch.setattr(calibrate, "findings", functools.partial(calibrate.findings, budget=SHORT))
    assert Command().run(["--calibrate"]) == 0
    assert native.plan_constants() == before
    out = capsys.readouterr().out
    for text in (
        "rnn_dot_rows",
        "rnn_chunk_rows",
        "table         8",
        "table       384",
        "12345",
        f"column {native.isa()}",
    ):
        assert text in out
    assert "not measured: rnn_serial_work" in out


def test_a_number_that_makes_no_sense(native: Any) -> None:
    for numbers, said in (({"rnn_rows": 1}, "unknown constant"), ({"rnn_dot_rows": 0}, "at least 1")):
        with pytest.raises(ValueError, match=said):
            native.override_plan_constants(numbers)
