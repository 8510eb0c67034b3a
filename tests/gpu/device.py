"""Features that only a CUDA device has (plans, graphs, streams), and their replacements in a rehearsal on the CPU."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from turns import ON_GPU

from dlkernels._core import extension
from dlkernels.rnn.operators import direct

# A library that runs the CUDA layers on CPU tensors with emulated kernels. tests/cuda/run.py builds it.
EMULATED = os.environ.get("DLKERNELS_EMULATED", "")
CUDA_KERNELS = ON_GPU or bool(EMULATED)
KINDS = ("cluster", "grid", "steps")


def _emulate() -> Any:
    torch.ops.load_library(EMULATED)
    # The emulated kernels are registered in the dispatcher, past which the CPU's kernels can be called.
    direct.layers = direct.cell = direct.layer_module = direct.cell_module = lambda *_: None
    # On the CPU torch has no matrix product of 16-bit operands with a float32 result.
    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype_out", lambda a, b, dtype, out: torch.mm(a.to(dtype), b.to(dtype), out=out), "CPU")
    return ctypes.CDLL(EMULATED), library


_emulated = _emulate() if EMULATED else None


@contextlib.contextmanager
def best_plan(kind: str) -> Iterator[None]:
    """Within it, layers run by plans of this kind or, where that is not possible, of a later one in KINDS."""

    def cap(name: str) -> None:
        extension.native.cap_cuda_plan(name)
        if _emulated:
            _emulated[0].boundary_cap_plan(KINDS.index(name))

    cap(kind)
    try:
        yield
    finally:
        cap(KINDS[0])


def plan_of(
    mode: str, dtype: torch.dtype, T: int, B: int, H: int, D: int, backward: bool = False
) -> dict[str, Any]:  # fmt: skip
    device = torch.cuda.current_device() if ON_GPU else None
    return dict(extension.native.cuda_plan(mode, dtype, T, B, H, D, backward, device))


def plan_kind(mode: str, dtype: torch.dtype, T: int, B: int, H: int, D: int, backward: bool = False) -> str:
    return str(plan_of(mode, dtype, T, B, H, D, backward)["kind"])


def replayable(work: Callable[[], Any]) -> Callable[[], Any]:
    """Captures `work` in a CUDA graph and returns a function that replays it. Without a GPU it is `work` itself."""
    if not ON_GPU:
        return work
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()

    def replay() -> Any:
        graph.replay()
        return results

    return replay


@contextlib.contextmanager
def other_stream() -> Iterator[None]:
    """Runs the block on another stream. That stream waits for the current one before, and the current for it after."""
    if not ON_GPU:
        yield
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        yield
    torch.cuda.current_stream().wait_stream(side)


@contextlib.contextmanager
def no_host_sync() -> Iterator[None]:
    """Makes every operation that synchronizes with the device an error."""
    if not ON_GPU:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


NAMES = ("CUDAGraph", "Stream", "current_device", "current_stream", "get_device_capability", "graph",
         "set_sync_debug_mode", "stream", "synchronize")  # fmt: skip
