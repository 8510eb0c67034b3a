"""Measures times for the benchmarks of `make gpu-check`, on a CUDA device or, in a rehearsal, on the CPU."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from journal import Result, why

DEVICE = os.environ.get("DLKERNELS_DEVICE", "cuda")
REHEARSAL = DEVICE == "cpu"  # runs the same code at small sizes to test it; the times mean nothing
BLOCKS = 2 if REHEARSAL else 5  # of replays; their median is the result


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def context_broken() -> bool:
    """Whether an error has made the CUDA context of this process unusable."""
    if DEVICE != "cuda":
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return torch.cuda.is_current_stream_capturing()


def _captured(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def _block(run: Callable[[], Any], repeats: int) -> float:
    """Microseconds of one run, from `repeats` of them without a gap."""
    if DEVICE != "cuda":
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - begin) / repeats * 1e6
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        run()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / repeats * 1e3


def microseconds(call: Callable[[], Any], seconds: float = 0.08) -> Result:
    """The time of a call on the device: the median of several blocks of replays of a CUDA graph, which leaves out what
    Python takes, and the range of the blocks. A call that cannot be captured is made again and again instead."""
    method, run = "calls", call
    if DEVICE == "cuda":
        try:
            method, run = "graph", _captured(call).replay
        except Exception as error:
            method, run = f"calls, since it cannot be captured: {why(error)}", call
            torch.cuda.synchronize()
    for _ in range(1 if REHEARSAL else 2):
        run()
    synchronize()
    once = _block(run, 1)
    repeats = 1 if REHEARSAL else max(2, min(200, int(seconds * 1e6 / BLOCKS / max(once, 1.0))))
    times = sorted(_block(run, repeats) for _ in range(BLOCKS))
    return {"us": statistics.median(times), "spread_us": times[-1] - times[0], "method": method}


def host_microseconds(call: Callable[[], Any]) -> float:
    """What a call takes on the host: the least mean of several series of calls that are not waited for."""
    count = 3 if REHEARSAL else 100
    best = float("inf")
    for _ in range(BLOCKS):
        synchronize()
        begin = time.perf_counter()
        for _ in range(count):
            call()
        best = min(best, (time.perf_counter() - begin) / count * 1e6)
    synchronize()
    return best
