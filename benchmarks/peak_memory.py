"""Measures the peak memory of a training step of our layers and of torch.nn's, for the training cases of the grid:

    python -m benchmarks.peak_memory [--only PART ...] [--out FILE]

A forked child for each case and side measures by how much the resident memory rises during the step. Prints the MiB of
both and ours over torch's, then the geometric mean and the largest ratio of the cases in which torch needs a MiB or
more. Runs on Linux only.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dlkernels.bench.layers import Inputs, Workload, grid, ours, theirs

from . import ratios

# With these settings freed memory returns to the system at once, so that only memory in use is resident.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


def status(field: str) -> int:
    """The value of a line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def rise(step: Callable[[], object]) -> int:
    """Bytes by which memory rises while `step` runs for the second time."""
    step()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present memory
    before = status("VmRSS")
    step()
    return status("VmHWM") - before


def in_child(measure: Callable[[], int]) -> int:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, str(measure()).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        answer = file.read()
    _, ended = os.waitpid(child, 0)
    if ended != 0 or not answer:
        raise RuntimeError(f"a measurement ended with status {ended}")
    return int(answer)


def main() -> None:
    options = ratios.parser(__doc__).parse_args()
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **ALLOCATOR})
    torch.set_num_threads(1)  # before the forks, because a child has none of its parent's threads
    found: dict[str, dict[str, Any]] = {}
    for case in grid([1], ["float32", "bfloat16"]):
        if not case.training or case.against != "torch" or not ratios.is_chosen(case.name, options):
            continue
        inputs = Inputs.make(case)
        steps = [functools.partial(Workload, case, inputs, build) for build in (ours, theirs)]
        mine, other = (in_child(lambda make=make: rise(make())) for make in steps)  # type: ignore[misc]
        found[case.name] = {"ours": mine, "torch": other, "ratio": mine / max(other, 1)}
        print(f"{case.name:50} {mine / 2**20:9.2f} {other / 2**20:9.2f} MiB  {mine / max(other, 1):.3f}", flush=True)
    # Below a MiB the result depends on single pages.
    rated = [row["ratio"] for row in found.values() if row["torch"] >= 2**20]
    ratios.finish("cases of a MiB or more, ours over torch's", rated, found, options.out)


if __name__ == "__main__":
    main()
