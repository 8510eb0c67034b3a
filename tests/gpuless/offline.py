"""Compiles Triton kernels for a GPU that is not in this machine, through a normal launch, and inspects the binary."""

from __future__ import annotations

import io
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import cache, driver

CUOBJDUMP = Path(os.path.dirname(triton.__file__)) / "backends" / "nvidia" / "bin" / "cuobjdump"
# The cache starts empty, so its keys need no hash of all of Triton's files, which takes two seconds per process.
cache.triton_key = lambda: triton.__version__
# Triton always runs ptxas verbosely, but prints what it says only with this setting.
knobs.nvidia.dump_ptxas_log = True
# What ptxas said of each compiled kernel, by the kernel's hash.
_said: dict[str, str] = {}


class OfflineDriver:
    """The methods of a driver that `kernel.warmup` calls."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        # Different for each architecture. Otherwise Triton would return the kernel compiled for the previous one.
        return self.capability

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name: str) -> str:
        return "i32"


@contextmanager
def architecture(name: str) -> Iterator[None]:
    """Within it, kernels are compiled for the architecture `name`, such as "sm_90"."""
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


def compile_launch(kernel: Any, args: tuple[Any, ...], grid: tuple[int, ...], options: dict[str, Any]) -> Any:
    """Compiles a launch instead of making it."""
    log = io.StringIO()
    with redirect_stdout(log):
        compiled = kernel.warmup(*args, grid=grid, **options)
    # Nothing is printed if this process has compiled the same launch before.
    if log.getvalue():
        _said[compiled.hash] = log.getvalue()
    return compiled


def advisories(said: str) -> list[str]:
    """ptxas' messages (C7500 to C7599) that it could not schedule the code as it was written, such as C7515: each wgmma
    waits for the one before it."""
    return re.findall(r"\(C75\d\d\).*", said)


class Binary(NamedTuple):
    """The resources of a compiled kernel, which ptxas does not limit to what the GPU has, the number of instructions of
    each kind, and ptxas' advisories."""

    registers: int
    stack: int
    shared: int
    tensor_columns: int  # columns of tensor memory on 10.0
    spill_stores: int
    spill_loads: int
    wgmma: int
    mma: int
    tcgen05: int
    fma: int
    async_copies: int
    narrow_loads: int  # of one 16-bit number
    advisories: tuple[str, ...]


class Loop(NamedTuple):
    """An innermost loop with matrix instructions."""

    matrix: int
    spills: int
    selects: int  # instructions that choose between two values, which bounds checks and masks need
    waits: int  # for the results of wgmma


def _cuobjdump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def disassemble(kernel: Any) -> list[tuple[int, str]]:
    """(address, instruction). Triton's own listing, asm["sass"], stops at address 0x10000 without an error."""
    text = _cuobjdump(kernel.asm["cubin"], "-sass")
    return [(int(at, 16), code) for at, code in re.findall(r"/\*([0-9a-f]{4,8})\*/\s+(.*?);", text)]


def inspect(kernel: Any) -> tuple[Binary, list[Loop]]:
    """The resources and the loops of a kernel. Loops are listed only if registers are spilled, that is, if there is a
    stack, or if there are wgmma, since a listing takes half a second."""
    usage_text = _cuobjdump(kernel.asm["cubin"], "--dump-resource-usage")
    usage = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", usage_text.split("Function")[-1])}
    wgmma = len(re.findall(r"wgmma\.mma_async", kernel.asm["ptx"]))
    code = disassemble(kernel) if usage["STACK"] or wgmma else []
    said = _said[kernel.hash]
    assert re.search(r"Used \d+ registers", said), f"ptxas was not verbose: {said!r}"

    def moves(name: str) -> int:
        return sum(re.search(rf"\b{name}\b", line) is not None for _, line in code)

    def instructions(pattern: str) -> int:
        return len(re.findall(pattern, kernel.asm["ptx"]))

    return Binary(
        usage["REG"], usage["STACK"], kernel.metadata.shared, getattr(kernel.metadata, "tmem_size", 0), moves("STL"),
        moves("LDL"), wgmma, instructions(r"\bmma\.sync"), instructions(r"tcgen05\.mma"),
        instructions(r"\bfma\.rn\.f32"), instructions(r"cp\.async\."),
        instructions(r"\bld\.global(?:\.[\w:]+)*\.b16\b"), tuple(advisories(said)),
    ), _matrix_loops(code)  # fmt: skip


def _matrix_loops(code: list[tuple[int, str]]) -> list[Loop]:
    """The innermost loops with matrix instructions in the order of addresses. A loop is the code between a backward
    branch and its target; it is innermost if it contains no other loop with matrix instructions. (It may contain loops
    that wait for a barrier.)"""
    spans: dict[tuple[int, int], Loop] = {}
    for at, line in code:
        jump = re.search(r"\bBRA.*\b0x([0-9a-f]+)", line)
        target = int(jump[1], 16) if jump else at
        if target >= at:
            continue
        body = "\n".join(line for where, line in code if target <= where < at)
        matrix, *rest = (
            len(re.findall(x, body))
            for x in (r"HGMMA|HMMA|UTCHMMA|FFMA", r"\b(?:STL|LDL)\b", r"\bF?SEL\b", r"WARPGROUP\.DEPBAR")
        )
        if matrix:
            spans[target, at] = Loop(matrix, *rest)
    return [
        loop for (first, last), loop in sorted(spans.items())
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in spans)
    ]  # fmt: skip
