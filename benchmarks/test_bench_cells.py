"""Single cells under pytest-benchmark, for comparing two commits: see docs/benchmarks.md."""

from __future__ import annotations

from typing import Any

import pytest
from test_bench_rnn import BUILD, measure

from dlkernels.bench import cases

CELLS = [case for case in cases.grid([1, 2], ["float32", "bfloat16"]) if case.cell]


@pytest.mark.parametrize("provider", BUILD)
@pytest.mark.parametrize("case", CELLS, ids=lambda case: case.name)
def test_cell(benchmark: Any, case: cases.Case, provider: str) -> None:
    measure(benchmark, case, provider)
