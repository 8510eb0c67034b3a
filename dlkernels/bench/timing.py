"""Times two sides in alternating blocks, for machines on which other programs run as well.

A long block of one side followed by a long block of the other would measure how the load of other programs changes.
Here short blocks alternate (theirs, ours, theirs, ours, ...), the first calls after each switch are discarded (they
suffer from the caches and the spinning threads of the other side), and each pair of neighbouring blocks gives one ratio
of medians. The result is the median of those ratios: a load that comes and goes affects both blocks of a pair, whereas
medians over all calls would compare one side's quiet time with the other's busy time. The range of the ratios shows the
size of the noise.
"""

from __future__ import annotations

import dataclasses
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
    sides = (theirs, ours)
    for side in sides:
        run_block(side, 1, 0.0, clock)
    calls = [
        calls_per_block(min(run_block(side, 2, budget.discard_seconds, clock)), budget.block_seconds) for side in sides
    ]
    blocks: tuple[list[list[float]], list[list[float]]] = ([], [])
    start = clock()
    while budget.wants_more(len(blocks[0]), clock() - start):
        for side, count, kept in zip(sides, calls, blocks, strict=True):
            kept.append(run_block(side, count, budget.discard_seconds, clock))
    return summarize(*blocks)


def summarize(theirs: Sequence[Sequence[float]], ours: Sequence[Sequence[float]]) -> Sample:
    pairs = tuple(statistics.median(a) / statistics.median(b) for a, b in zip(theirs, ours, strict=True))
    all_theirs = [t for block in theirs for t in block]
    all_ours = [t for block in ours for t in block]
    return Sample(statistics.median(all_theirs), statistics.median(all_ours), pairs, (len(all_theirs), len(all_ours)))
