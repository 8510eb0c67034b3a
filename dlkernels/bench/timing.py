"""Times two or more sides in alternating blocks, for machines on which other programs run as well.

A long block of one side followed by a long block of the other would measure how the load of other programs changes.
Here short blocks alternate (theirs, ours, theirs, ours, ...), the first calls after each switch are discarded (they
suffer from the caches and the spinning threads of the other side), and each pair of neighbouring blocks gives one ratio
of medians. The result is the median of those ratios: a load that comes and goes affects both blocks of a pair, whereas
medians over all calls would compare one side's quiet time with the other's busy time. The range of the ratios shows the
size of the noise.

More than two sides take turns in rounds (`rotate`), and each round gives one ratio for each pair of sides.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

Clock = Callable[[], float]


class Side(Protocol):
    def prepare(self) -> None: ...
    def __call__(self) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Budget:
    seconds: float = 1.0
    block_seconds: float = 0.02
    discard_seconds: float = 0.002
    min_pairs: int = 5
    max_pairs: int = 100
    # Slow cases stop here, even with fewer pairs than min_pairs.
    max_seconds: float = 60.0

    def wants_more(self, pairs: int, elapsed: float) -> bool:
        if pairs < self.min_pairs:
            return pairs == 0 or elapsed < self.max_seconds
        return pairs < self.max_pairs and elapsed < self.seconds


@dataclasses.dataclass(frozen=True)
class Sample:
    """Seconds per call (medians over all calls), and theirs / ours for each pair of blocks."""

    theirs: float
    ours: float
    pair_ratios: tuple[float, ...]
    calls: tuple[int, int]

    @property
    def spread(self) -> tuple[float, float]:
        return min(self.pair_ratios), max(self.pair_ratios)

    @property
    def ratio(self) -> float:
        return statistics.median(self.pair_ratios)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.pair_ratios) < 2:
            return self.spread
        low, _, high = statistics.quantiles(self.pair_ratios, n=4, method="inclusive")
        return low, high


def run_block(side: Side, calls: int, discard_seconds: float, clock: Clock = time.perf_counter) -> list[float]:
    """The times of `calls` calls. Calls are discarded before them, at least one and for at least `discard_seconds`."""
    side.prepare()
    end = clock() + discard_seconds
    side()
    while clock() < end:
        side()
    times = []
    for _ in range(calls):
        start = clock()
        side()
        times.append(clock() - start)
    return times


def calls_per_block(seconds_per_call: float, block_seconds: float) -> int:
    """At least two, so that a block's median does not depend on a single call."""
    return max(2, min(5000, round(block_seconds / max(seconds_per_call, 1e-9))))


def alternate(theirs: Side, ours: Side, budget: Budget, clock: Clock = time.perf_counter) -> Sample:
    return summarize(*rotate((theirs, ours), budget, clock))


def rotate(
    sides: Sequence[Side], budget: Budget, clock: Clock = time.perf_counter, settle: Callable[[], None] = lambda: None
) -> list[list[list[float]]]:
    """The blocks of each side, one per round. `settle` is called before each block."""
    warm = [run_block(side, 1, 0.0, clock)[0] for side in sides]
    calls = []
    for side, seconds in zip(sides, warm, strict=True):
        # Slow calls are not measured again: a block has the least number of them anyway.
        if seconds < budget.block_seconds:
            seconds = min(run_block(side, 2, budget.discard_seconds, clock))
        calls.append(calls_per_block(seconds, budget.block_seconds))
    blocks: list[list[list[float]]] = [[] for _ in sides]
    turns = orders(len(sides))
    start = clock()
    while budget.wants_more(len(blocks[0]), clock() - start):
        for at in turns[len(blocks[0]) % len(turns)]:
            settle()
            blocks[at].append(run_block(sides[at], calls[at], budget.discard_seconds, clock))
    return blocks


def orders(count: int) -> list[list[int]]:
    """The orders in which the sides take turns, one for each round until they repeat. A block suffers from what the
    side before it left behind, so each order has another stride: of five sides each follows each other one equally
    often."""
    strides = [stride for stride in range(1, count) if math.gcd(stride, count) == 1]
    return [[at * stride % count for at in range(count)] for stride in strides or [1]]


def until_quiet(limit: float = 0.1) -> None:
    """Waits until the threads of this process sleep, but no longer than `limit` seconds. Threads spin after a call,
    those of ONNX Runtime for 20 ms and those of OpenMP for 4, and would take a core from the next side."""
    end = time.perf_counter() + limit
    while time.perf_counter() < end:
        used = time.process_time()
        time.sleep(0.001)
        if time.process_time() - used < 0.0003:
            return


def summarize(theirs: Sequence[Sequence[float]], ours: Sequence[Sequence[float]]) -> Sample:
    pairs = tuple(statistics.median(a) / statistics.median(b) for a, b in zip(theirs, ours, strict=True))
    all_theirs = [t for block in theirs for t in block]
    all_ours = [t for block in ours for t in block]
    return Sample(statistics.median(all_theirs), statistics.median(all_ours), pairs, (len(all_theirs), len(all_ours)))
