"""Attention under pytest-benchmark, for comparing two commits: see docs/benchmarks.md."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dlkernels.bench import attention
from dlkernels.bench.attention import AttentionCase, AttentionWorkload

RUN = {"torch": attention.theirs, "dlkernels": attention.ours}
CASES = [case for case in attention.grid([1, 2], ["float32", "bfloat16"]) if case.against == "torch"]


@pytest.mark.parametrize("provider", RUN)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_attention(benchmark: Any, case: AttentionCase, provider: str) -> None:
    """One provider's time for a case; results are checked by the tests and by `python -m dlkernels bench`."""
    benchmark.group = case.name
    threads = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        work = AttentionWorkload(case, attention.make_inputs(case), RUN[provider], padded=provider == "torch")
        work.prepare()
        work()
        benchmark(work)
    finally:
        torch.set_num_threads(threads)
