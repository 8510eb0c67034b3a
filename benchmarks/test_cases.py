"""Runs the grid under pytest-benchmark, to compare two commits: see docs/benchmarks.md.

No results are checked here; the tests and `python -m dlkernels bench` do that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dlkernels.bench import attention, layers
from dlkernels.bench.attention import AttentionCase, AttentionWorkload
from dlkernels.bench.layers import Inputs, LayerCase, Workload
from dlkernels.bench.runner import AnyCase
from dlkernels.bench.timing import Side

SIDES = ("torch", "dlkernels")
GRID = ([1, 2], ["float32", "bfloat16"])
LAYERS = [case for case in layers.grid(*GRID) if case.against == "torch"]
ATTENTION = [case for case in attention.grid(*GRID) if case.against == "torch"]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)
def test_layer(benchmark: Any, case: LayerCase, side: str) -> None:
    build = layers.ours if side == "dlkernels" else layers.theirs
    measure(benchmark, case, lambda: Workload(case, Inputs.make(case), build))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("case", ATTENTION, ids=lambda case: case.name)
def test_attention(benchmark: Any, case: AttentionCase, side: str) -> None:
    run = attention.ours if side == "dlkernels" else attention.theirs
    padded = side == "torch"
    measure(benchmark, case, lambda: AttentionWorkload(case, attention.make_inputs(case), run, padded=padded))


def measure(benchmark: Any, case: AnyCase, make: Callable[[], Side]) -> None:
    benchmark.group = case.name
    threads = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        work = make()
        work.prepare()
        work()
        benchmark(work)
    finally:
        torch.set_num_threads(threads)
