"""Compiles Triton kernels for a GPU that is not here, by the way a launch takes, and reads what the binary holds."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

CUOBJDUMP = Path(os.path.dirname(triton.__file__)) / "backends" / "nvidia" / "bin" / "cuobjdump"


class OfflineDriver:
    """As much of a driver as `kernel.warmup` asks for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        # A number per architecture, or the kernel that was compiled for the last one comes back.
        return self.capability

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name: str) -> str:
        return "i32"


@contextmanager
def architecture(name: str) -> Iterator[None]:
    """For "sm_90" and the like."""
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("TRITON_CACHE_DIR")
        os.environ["TRITON_CACHE_DIR"] = folder
        driver.set_active(OfflineDriver(int(name[3:])))
        try:
            yield
        finally:
            os.environ.pop("TRITON_CACHE_DIR")
            if before is not None:
                os.environ["TRITON_CACHE_DIR"] = before


class Binary(NamedTuple):
    """What ptxas made: it compiles a kernel over every limit without an error."""

    registers: int
    stack: int
    shared: int
    spill_stores: int
    spill_loads: int
    wgmma: int
    mma: int
    tcgen05: int
    async_copies: int


def inspect(kernel: Any) -> Binary:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        usage_text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", usage_text.split("Function")[-1])}
    sass, ptx = kernel.asm["sass"], kernel.asm["ptx"]

    def count(pattern: str) -> int:
        return len(re.findall(pattern, sass))

    return Binary(
        usage["REG"], usage["STACK"], kernel.metadata.shared, count(r"\bSTL\b"), count(r"\bLDL\b"), count("HGMMA"),
        count("HMMA"), len(re.findall(r"tcgen05\.mma", ptx)), count("LDGSTS"),
    )  # fmt: skip


class Loop(NamedTuple):
    """An innermost loop with matrix instructions."""

    matrix: int
    spills: int


def matrix_loops(kernel: Any) -> list[Loop]:
    """From the machine code: what lies between a label and a branch back to it, without another such pair inside."""
    lines = kernel.asm["sass"].splitlines()
    labels = {line[:-1]: index for index, line in enumerate(lines) if re.fullmatch(r"LBB\d+:", line)}
    spans = []
    for index, line in enumerate(lines):
        jump = re.search(r"BRA.* (LBB\d+)", line)
        if jump and labels.get(jump[1], index) < index:
            spans.append((labels[jump[1]], index))
    loops = []
    for first, last in spans:
        if any((a, b) != (first, last) and first <= a and b <= last for a, b in spans):
            continue
        body = "\n".join(lines[first:last])
        matrix = len(re.findall(r"HGMMA|HMMA|UTCHMMA|UTCMMA|FFMA", body))
        if matrix:
            loops.append(Loop(matrix, len(re.findall(r"\b(?:STL|LDL)\b", body))))
    return loops
