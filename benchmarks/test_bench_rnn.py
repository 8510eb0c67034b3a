"""Layers under pytest-benchmark, for comparing two commits: see docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dlkernels.bench import cases, workload

BUILD = {"torch": workload.theirs, "dlkernels": workload.ours}
LAYERS = [case for case in cases.grid([1, 2], ["float32", "bfloat16"]) if not case.cell and case.against == "torch"]


@pytest.mark.parametrize("provider", BUILD)
@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)
def test_layer(benchmark: Callable[..., Any], case: cases.Case, provider: str) -> None:
    measure(benchmark, case, provider)


def measure(benchmark: Any, case: cases.Case, provider: str) -> None:
    """One provider's time for a case; results are checked by the tests and by `python -m dlkernels bench`."""
    benchmark.group = case.name
    threads = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        work = workload.Workload(case, workload.Inputs.make(case), BUILD[provider])
        work.prepare()
        work()
        benchmark(work)
    finally:
        torch.set_num_threads(threads)
