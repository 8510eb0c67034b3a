"""`bench --calibrate`: measures on this machine the crossovers behind csrc/core/plan_constants.def, and prints what the
machine would want beside what is in the table. It changes nothing.

A constant decides between two ways to compute. At some sizes around it, both ways are timed in alternating blocks. The
number that the machine would want is the one with which least time is lost over these sizes.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from .._core import extension
from ..integrations import fast_path, sdpa_operator
from ..integrations.enable import enable
from . import machine
from .timing import Budget, alternate

__all__ = ["NEVER", "Best", "Call", "Crossover", "Finding", "Point", "main"]

BUDGET = Budget(0.5, block_seconds=0.01, min_pairs=5, max_pairs=25, max_seconds=2.0)
# A constant of the table that loses less than this is as good as the one found: times are no more exact.
TOLERATED = 0.05
NEVER = 1 << 40

Call = Callable[[], Any]
Numbers = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Point:
    """A call whose size, in the unit of the constant, is `at`."""

    at: int
    make: Callable[[], Call]


@dataclasses.dataclass(frozen=True)
class Crossover:
    """A constant that separates two ways: `low` makes the plan go the way of sizes below it, `high` the other. Where it
    is `inclusive`, a size equal to the constant goes the way of those below."""

    constant: str
    what: str
    low: Numbers
    high: Numbers
    points: Sequence[Point]
    inclusive: bool = False


@dataclasses.dataclass(frozen=True)
class Best:
    """A constant of which the best of some numbers is looked for, with one call."""

    constant: str
    what: str
    numbers: Sequence[int]
    make: Callable[[], Call]


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was measured about a constant. `wanted` is a number, or a bound if the crossover lies beyond the sizes."""

    constant: str
    table: int
    wanted: str
    lost: float  # the part of the time that the table's number loses on average
    evidence: str

    def __str__(self) -> str:
        verdict = "as in the table" if self.lost < TOLERATED else f"the table's loses {self.lost:.0%}"
        return f"{self.constant:<34}table {self.table:>9}   here {self.wanted:>12}   {verdict}\n    {self.evidence}"


class _Way:
    """A call under some constants: a side of an alternating measurement."""

    def __init__(self, call: Call, numbers: Numbers) -> None:
        self.call, self.numbers = call, numbers

    def prepare(self) -> None:
        override(self.numbers)

    def __call__(self) -> Any:
        return self.call()


def override(numbers: Numbers) -> None:
    """Makes plans and switches choose by these numbers and otherwise by those of the table."""
    native = extension.native
    assert native is not None
    native.override_plan_constants(dict(numbers))
    sdpa_operator.LEAST_SCORES = sdpa_operator.least_scores()
    fast_path.LEAST_SCORES, fast_path.LEAST_SCORES_16_BIT = fast_path.least_scores()


def crossover(case: Crossover, table: int, ratios: Sequence[float]) -> Finding:
    """`ratios`: for each point, the time of the low way over that of the high way."""
    logs = [math.log(ratio) for ratio in ratios]
    # With the first k points going the low way, each that would be faster the other way loses what the other saves.
    losses = [sum(max(x, 0) for x in logs[:k]) + sum(max(-x, 0) for x in logs[k:]) for k in range(len(logs) + 1)]
    places = [point.at for point in case.points]
    present = sum(at <= table if case.inclusive else at < table for at in places)
    best = min(range(len(losses)), key=lambda k: (losses[k], abs(k - present)))
    if case.inclusive:
        wanted = f"< {places[0]}" if best == 0 else str(places[best - 1])
        wanted = f">= {places[-1]}" if best == len(places) else wanted
    else:
        wanted = f"> {places[-1]}" if best == len(places) else str(places[best])
        wanted = f"<= {places[0]}" if best == 0 else wanted
    evidence = ", ".join(f"{at}: {ratio:.2f}" for at, ratio in zip(places, ratios, strict=True))
    lost = math.expm1((losses[present] - losses[best]) / len(logs))
    return Finding(case.constant, table, wanted, lost, f"{case.what}: {evidence}")


def best(case: Best, table: int, times: Sequence[float]) -> Finding:
    """`times`: of each number, relative to that of the table's."""
    fastest = min(range(len(times)), key=times.__getitem__)
    evidence = ", ".join(f"{number}: {t:.2f}" for number, t in zip(case.numbers, times, strict=True))
    lost = times[case.numbers.index(table)] / times[fastest] - 1 if table in case.numbers else 0.0
    return Finding(case.constant, table, str(case.numbers[fastest]), lost, f"{case.what}: {evidence}")


def measure(case: Crossover | Best, table: int, budget: Budget = BUDGET) -> Finding:
    try:
        if isinstance(case, Best):
            call = case.make()
            now = _Way(call, {})
            times = [1 / alternate(now, _Way(call, {case.constant: number}), budget).ratio for number in case.numbers]
            return best(case, table, times)
        ratios = []
        for point in case.points:
            call = point.make()
            ratios.append(alternate(_Way(call, case.low), _Way(call, case.high), budget).ratio)
        return crossover(case, table, ratios)
    finally:
        override({})


def findings(cases: Sequence[Crossover | Best], budget: Budget = BUDGET) -> Iterator[Finding]:
    native = extension.native
    assert native is not None
    table = dict(native.plan_constants())
    for case in cases:
        with torch.no_grad(), enable():
            yield measure(case, table[case.constant], budget)


def main() -> int:
    """Prints everything; 2 without a compiled module."""
    from .calibrate_cases import cases, speed

    native = extension.native
    if native is None:
        print(f"bench --calibrate: no compiled kernels: {extension.why_not}")
        return 2
    start, host = time.monotonic(), machine.describe()
    print(machine.headline(host, machine.versions()))
    caches = ", ".join(f"{name} {size}" for name, size in host["caches"].items())
    print(f"{torch.get_num_threads()} threads; caches {caches or 'unknown'}; column {native.isa()} of the table")
    if host["environment"]:
        print("Set: " + ", ".join(f"{name}={value}" for name, value in host["environment"].items()))
    if host["load_average"] and host["load_average"][0] > 0.3:
        print(f"The load average is {host['load_average'][0]}: other programs run, and will show in the numbers.")
    print("Behind each size: time of the way below the constant / time of the way above it. Behind each number of a")
    print("constant without two ways: its time / that of the table's.\n")
    chosen = native.isa() if extension.prefers_torch else None
    extension.choose_isa(chosen)
    measured = set()
    try:
        for finding in findings(cases(torch.get_num_threads())):
            measured.add(finding.constant)
            print(finding, flush=True)
        measured.add("rnn_work_per_microsecond")
        table = dict(native.plan_constants())
        print(f"{'rnn_work_per_microsecond':<34}table {table['rnn_work_per_microsecond']:>9}   here {speed():>12}")
    finally:
        extension.choose_isa(None)
    print(f"\nnot measured: {', '.join(name for name in table if name not in measured)}")
    print(f"{time.monotonic() - start:.0f} s. Run it twice: numbers that differ are noise.")
    return 0
