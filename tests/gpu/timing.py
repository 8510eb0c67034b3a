"""Measures times for the benchmarks of `make gpu-check`, on a CUDA device or, in a rehearsal, on the CPU."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

DEVICE = os.environ.get("DLKERNELS_DEVICE", "cuda")
REHEARSAL = DEVICE == "cpu"  # runs the same code at small sizes to test it; the times mean nothing
DEADLINE = float(os.environ.get("DLKERNELS_DEADLINE", "inf"))  # in seconds, as time.time() counts them


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _timed(call: Callable[[], Any], repeats: int) -> list[float]:
    if DEVICE != "cuda":
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            call()
            times.append((time.perf_counter() - begin) * 1e3)
        return times
    events = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        events.append((start, stop))
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in events]


def milliseconds(call: Callable[[], Any], budget: float = 0.15) -> tuple[float, float]:
    """The median of a call's time on the device after a warm-up, and the range of its middle half, in milliseconds."""
    for _ in range(1 if REHEARSAL else 3):
        call()
    synchronize()
    begin = time.perf_counter()
    call()
    synchronize()
    repeats = 2 if REHEARSAL else max(5, min(50, int(budget / max(time.perf_counter() - begin, 1e-5))))
    measured = sorted(_timed(call, repeats))
    quarter = len(measured) // 4
    return statistics.median(measured), measured[-1 - quarter] - measured[quarter]


def why(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def run_all(path: Path, plan: Sequence[Callable[[], dict[str, Any]]]) -> int:
    """Runs all cases and writes the rows after each, so that no measurement is lost if the process ends later."""
    if DEVICE == "cuda" and not torch.cuda.is_available():
        print("NOT RUN: torch finds no CUDA device")
        return 3
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for index, case in enumerate(plan):
        if time.time() > DEADLINE:
            print(f"NOT RUN: the last {len(plan) - index} of {len(plan)} cases, the time of this part was over")
            rows.append({"not_run": f"{len(plan) - index} of {len(plan)} cases, no time was left"})
            break
        try:
            rows.append(case())
        except Exception as error:
            rows.append({"failed": why(error)})
        print(json.dumps(rows[-1]), flush=True)
        path.write_text(json.dumps(rows, indent=1))
    path.write_text(json.dumps(rows, indent=1))
    return int(any("failed" in row or "not_run" in row.get("dlkernels", {}) for row in rows))
