"""Tests `python -m benchmarks.overhead`, not what it measures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import overhead
from tests.support.fresh_python import ROOT, environment

pytestmark = [
    pytest.mark.usefixtures("native"),
    pytest.mark.o0_skip(reason="it is about a benchmark alone"),
]


def test_a_round(tmp_path: Path) -> None:
    """Status 2 says that a model was slower: a short run on a busy machine may find that."""
    out, chosen = tmp_path / "overhead.json", ("elementwise-forward", overhead.LEFT)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.overhead", "--rounds", "1", "--seconds", "0.05", "--out", str(out),
         "--only", *chosen], capture_output=True, text=True, timeout=240, env=environment(), cwd=ROOT,
    )  # fmt: skip
    assert done.returncode in (0, 2), done.stderr
    cases = json.loads(out.read_text())["cases"]
    assert tuple(cases) == chosen
    for row in cases.values():
        assert row["on_us"] > 0 and row["off_us"] > 0 and row["rounds"]["on/off"] == [round(row["on/off"], 4)]
    assert "1 models without our operators" in done.stdout and ("1 % slower" in done.stdout) == (done.returncode == 2)


def test_a_worker_that_serves_something_else_is_refused() -> None:
    """`finish` compares what was served and left with what the chosen cases say."""
    worker = overhead.Worker(on=True)
    assert worker.block(overhead.LEFT, 2) > 0
    with pytest.raises(RuntimeError, match="served and left"):
        worker.finish(["mlp-forward"])
    worker = overhead.Worker(on=False)
    assert worker.block(overhead.LEFT, 2) > 0
    worker.finish([overhead.LEFT])


def test_summary_takes_the_median_of_the_rounds() -> None:
    rounds = [{"on/off": ratio, "off/off": 1.0, "off_us": 2.0, "on_us": 2.0 * ratio} for ratio in (1.0, 1.3, 1.1)]
    row = overhead.summary(rounds)
    assert row["on/off"] == 1.1 and row["rounds"]["on/off"] == [1.0, 1.3, 1.1]


def test_interval_of_a_median() -> None:
    assert overhead.interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert overhead.interval([float(value) for value in range(6)]) == (0.0, 5.0)
    # The probability that at most 5 of 20 throws are heads is 0.0207, that at most 6 are 0.0577.
    assert overhead.interval([float(value) for value in range(20)]) == (5.0, 14.0)
