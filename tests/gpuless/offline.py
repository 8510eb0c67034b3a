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
from triton.runtime import cache, driver

CUOBJDUMP = Path(os.path.dirname(triton.__file__)) / "backends" / "nvidia" / "bin" / "cuobjdump"
# A cache that begins empty needs no hash of the whole of Triton in its keys: two seconds in each process.
cache.triton_key = lambda: triton.__version__


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
    """What ptxas made, which compiles a kernel over every limit without an error; and what it was told to use."""

    registers: int
    stack: int
    shared: int
    tensor_columns: int  # of 10.0's tensor memory
    spill_stores: int
    spill_loads: int
    wgmma: int
    mma: int
    tcgen05: int
    fma: int
    async_copies: int


class Loop(NamedTuple):
    """An innermost loop with matrix instructions."""

    matrix: int
    spills: int
    selects: int  # of one value or another: what bounds and masks cost


def _cuobjdump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def disassemble(kernel: Any) -> list[tuple[int, str]]:
    """(address, instruction). Triton's own listing, asm["sass"], ends without a word at address 0x10000."""
    text = _cuobjdump(kernel.asm["cubin"], "-sass")
    return [(int(at, 16), code) for at, code in re.findall(r"/\*([0-9a-f]{4,8})\*/\s+(.*?);", text)]


def inspect(kernel: Any) -> tuple[Binary, list[Loop]]:
    """The loops are listed only if something spills, that is, if there is a stack: a listing takes half a second."""
    usage_text = _cuobjdump(kernel.asm["cubin"], "--dump-resource-usage")
    usage = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", usage_text.split("Function")[-1])}
    code = disassemble(kernel) if usage["STACK"] else []

    def moves(name: str) -> int:
        return sum(re.search(rf"\b{name}\b", line) is not None for _, line in code)

    def instructions(pattern: str) -> int:
        return len(re.findall(pattern, kernel.asm["ptx"]))

    return Binary(
        usage["REG"], usage["STACK"], kernel.metadata.shared, getattr(kernel.metadata, "tmem_size", 0), moves("STL"),
        moves("LDL"), instructions(r"wgmma\.mma_async"), instructions(r"\bmma\.sync"), instructions(r"tcgen05\.mma"),
        instructions(r"\bfma\.rn\.f32"), instructions(r"cp\.async\."),
    ), _matrix_loops(code)  # fmt: skip


def _matrix_loops(code: list[tuple[int, str]]) -> list[Loop]:
    """In the order of addresses: what lies between a branch back and its target, with matrix instructions but without
    another such pair inside. (Loops that wait for a barrier are inside, too.)"""
    spans: dict[tuple[int, int], Loop] = {}
    for at, line in code:
        jump = re.search(r"\bBRA.*\b0x([0-9a-f]+)", line)
        target = int(jump[1], 16) if jump else at
        if target >= at:
            continue
        body = "\n".join(line for where, line in code if target <= where < at)
        matrix, *rest = (
            len(re.findall(x, body)) for x in (r"HGMMA|HMMA|UTCHMMA|FFMA", r"\b(?:STL|LDL)\b", r"\bF?SEL\b")
        )
        if matrix:
            spans[target, at] = Loop(matrix, *rest)
    return [
        loop for (first, last), loop in sorted(spans.items())
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in spans)
    ]  # fmt: skip
