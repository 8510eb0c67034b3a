"""Measures the peak memory of a training step of our layers and of torch.nn's, for the training cases of the grid:

    python -m benchmarks.peak_memory [--only PART ...] [--out FILE]

Every byte that is allocated is counted: allocations.c, which the C compiler (CC, else cc) compiles first, replaces
malloc. A forked child for each case and side runs a small case, so that libraries are loaded, and then the case itself
some times. Prints for both sides, and ours over torch's:

- step: the MiB that a later step allocates beyond what it finds. In a model this is about a layer's share.
- all: the MiB of the first step, with what is kept for later calls: our working memory, the buffers of BLAS.

Resident memory would not do: blocks that the step before freed stay in the heap, where the step's small tensors go
again, so that of a layer that makes small tensors for each time step only a part would be seen. Runs on Linux with
glibc.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import gc
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dlkernels.bench.layers import Build, Inputs, LayerCase, Workload, grid, ours, theirs

from . import ratios

COUNTER = "DLKERNELS_ALLOCATIONS"  # names the preloaded library


def with_counter() -> int:
    """Runs this program again with the counting allocator, and returns its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "allocations.so")
        source = Path(__file__).with_name("allocations.c")
        compiler = shlex.split(os.environ.get("CC", "cc"))
        # Without -fno-builtin, GCC makes a call of calloc from calloc's own malloc and memset.
        subprocess.run([*compiler, "-O2", "-fno-builtin", "-shared", "-fPIC", source, "-o", library], check=True)
        env = {**os.environ, "LD_PRELOAD": str(library), COUNTER: str(library)}
        return subprocess.run([sys.executable, "-m", "benchmarks.peak_memory", *sys.argv[1:]], env=env).returncode


def rise(counter: ctypes.CDLL, step: Callable[[], object]) -> int:
    """By how many bytes `step` raises the memory in use."""
    counter.allocations_restart()
    begin = int(counter.allocations_in_use())
    step()
    return int(counter.allocations_highest()) - begin


def measure(counter: ctypes.CDLL, case: LayerCase, inputs: Inputs, build: Build) -> tuple[int, int]:
    """The bytes of a step and of all."""
    small = dataclasses.replace(case, B=min(case.B, 2), T=min(case.T, 3), I=8, H=8)
    first = Workload(small, Inputs.make(small), build)
    for _ in range(2):
        first()
    step = Workload(case, inputs, build)
    gc.collect()
    gc.disable()
    everything = rise(counter, step)
    step()
    return rise(counter, step), everything


def in_child(run: Callable[[], tuple[int, int]]) -> tuple[int, int]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, "{} {}".format(*run()).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        answer = file.read().split()
    _, ended = os.waitpid(child, 0)
    if ended != 0 or len(answer) != 2:
        raise RuntimeError(f"a measurement ended with status {ended}")
    return int(answer[0]), int(answer[1])


def main() -> None:
    options = ratios.parser(__doc__).parse_args()
    if COUNTER not in os.environ:
        sys.exit(with_counter())
    counter = ctypes.CDLL(os.environ[COUNTER])
    for read in (counter.allocations_in_use, counter.allocations_highest):
        read.restype = ctypes.c_long
    torch.set_num_threads(1)  # before the forks, because a child has none of its parent's threads
    found: dict[str, dict[str, Any]] = {}
    for case in grid([1], ["float32", "bfloat16"]):
        if not case.training or case.against != "torch" or not ratios.is_chosen(case.name, options):
            continue
        inputs = Inputs.make(case)
        (step, everything), (their_step, their_everything) = (
            in_child(functools.partial(measure, counter, case, inputs, build)) for build in (ours, theirs)
        )
        row = {
            "step": {"ours": step, "torch": their_step, "ratio": step / their_step},
            "all": {"ours": everything, "torch": their_everything, "ratio": everything / their_everything},
        }
        found[case.name] = row
        texts = (
            f"{name} {r['ours'] / 2**20:8.2f} {r['torch'] / 2**20:8.2f} MiB {r['ratio']:.3f}" for name, r in row.items()
        )
        print(f"{case.name:44}", *texts, sep="  ", flush=True)
    ratios.finish("cases, all", [row["all"]["ratio"] for row in found.values()], found, None)
    ratios.finish("cases, step", [row["step"]["ratio"] for row in found.values()], found, options.out)


if __name__ == "__main__":
    main()
