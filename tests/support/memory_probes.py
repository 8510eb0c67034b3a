"""Checks that repeated calls leave no memory behind, and allocator settings for measuring the peak of one call."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

# With glibc's dynamic thresholds freed blocks stay in the process, and a peak would depend on earlier calls.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def leaves_nothing(once: Callable[[], None], first: int, then: int) -> None:
    """Calls `once` `first` times and then two times `then` times, and asserts that neither the number of tensors nor
    the resident memory grows."""

    def repeat(count: int) -> tuple[int, int]:
        for _ in range(count):
            once()
        with open("/proc/self/status") as status:
            resident = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
        gc.collect()
        return resident, sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    before, middle, after = repeat(first), repeat(then), repeat(then)
    print("KiB and tensors:", before, middle, after)
    assert before[1] == middle[1] == after[1], "tensors are left behind"
    assert after[0] - middle[0] < 1024 and after[0] - before[0] < 3072, "the process grows"
