"""Tests how the benchmark times two sides in alternating blocks, with a fake clock."""

from __future__ import annotations

import pytest

from dlkernels.bench import timing
from dlkernels.bench.timing import Budget

pytestmark = pytest.mark.o0_skip(reason="the runner is Python alone")


class FakeSide:
    """Advances the fake clock by the given cost at each call."""

    now = 0.0

    def __init__(self, costs: list[float]):
        self.costs, self.calls, self.blocks = costs, 0, 0

    def prepare(self) -> None:
        self.blocks += 1

    def __call__(self) -> None:
        FakeSide.now += self.costs[min(self.calls, len(self.costs) - 1)]
        self.calls += 1


def clock() -> float:
    return FakeSide.now


class TestTiming:
    def test_first_calls_of_a_block_are_discarded(self) -> None:
        side = FakeSide([5.0, 3.0, 1.0])
        assert timing.run_block(side, 3, discard_seconds=6.0, clock=clock) == [1.0, 1.0, 1.0]
        assert side.calls == 5 and side.blocks == 1

    def test_one_call_is_always_discarded(self) -> None:
        assert timing.run_block(FakeSide([9.0, 1.0]), 1, discard_seconds=0.0, clock=clock) == [1.0]

    def test_blocks_alternate_and_the_ratio_is_theirs_over_ours(self) -> None:
        slow, fast = FakeSide([3e-3]), FakeSide([1e-3])
        sample = timing.alternate(slow, fast, Budget(0.5, 0.01, 0.002, min_pairs=4, max_pairs=6), clock)
        assert sample.ratio == pytest.approx(3) and sample.spread == pytest.approx((3, 3))
        assert 4 <= len(sample.pair_ratios) <= 6 and slow.blocks == fast.blocks
        assert sample.calls == (3 * len(sample.pair_ratios), 10 * len(sample.pair_ratios))

    def test_number_of_calls_follows_the_budget(self) -> None:
        assert timing.calls_per_block(1e-3, 0.02) == 20
        assert timing.calls_per_block(10.0, 0.02) == 2
        assert timing.calls_per_block(0.0, 0.02) == 5000
        slow = timing.alternate(FakeSide([1.0]), FakeSide([1.0]), Budget(0.1, min_pairs=2), clock)
        assert len(slow.pair_ratios) == 2
        slowest = timing.alternate(FakeSide([1.0]), FakeSide([1.0]), Budget(0.1, max_seconds=7.0), clock)
        assert len(slowest.pair_ratios) == 2, "fewer pairs than asked for, when they take too long"

    def test_noise_that_meets_both_sides_cancels(self) -> None:
        load = [1, 1, 5, 5, 5, 1, 1]
        sample = timing.summarize([[2.0 * k] * 3 for k in load], [[1.0 * k] * 3 for k in load])
        assert sample.ratio == 2 and sample.spread == (2, 2) and sample.quartiles == (2, 2)

    def test_spread_and_quartiles(self) -> None:
        sample = timing.summarize([[1.0], [2.0], [3.0], [4.0], [50.0]], [[1.0]] * 5)
        assert sample.ratio == 3 and sample.spread == (1, 50) and sample.quartiles == (2, 4)
        assert timing.summarize([[2.0]], [[1.0]]).quartiles == (2, 2)
