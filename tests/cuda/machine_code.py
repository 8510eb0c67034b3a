"""Reads the machine code of kernels from a cubin: the instructions that decide the time of a step of a sequence kernel.

An instruction has 16 bytes. Its lowest 12 bits are the opcode; the constants below are the same on all GPUs from sm_80
on. nvdisasm would print it, but not every installation of nvcc has one.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

BRANCHES = {0x947, 0x547}  # BRA, BRA.U
CALLS = {0x943, 0x944}
EXIT = 0x94D
LOAD_GLOBAL, STORE_GLOBAL, LOAD_SHARED = 0x981, 0x986, 0x984
SEND_ASYNC = 0xDBD  # STAS: an asynchronous store to another block of the cluster
TRY_WAIT = 0x5A7  # SYNCS.PHASECHK
TENSOR_PRODUCT = 0x23C  # HMMA
MEMORY_BARRIER, BLOCK_BARRIER, CLUSTER_ARRIVE = 0x992, 0xB1D, 0x9C7
CLEAR_PAIR = 0x805  # CS2R: zeros in two registers
NO_RESULT = {STORE_GLOBAL, SEND_ASYNC, 0x388, *BRANCHES}  # 0x388: STS
FLOAT_ARITHMETIC = {0x20, 0x21, 0x23}  # the lowest 9 bits of FMUL, FADD and FFMA
NO_REGISTER = 0xFF
WORD, QUAD = 4, 6  # the codes of accesses of 32 and 128 bits


class Instruction(NamedTuple):
    at: int
    low: int
    high: int
    long_branch: bool  # whether bits 16 to 23 are the lowest of a branch's distance, as they are from sm_90 on

    @property
    def opcode(self) -> int:
        return self.low & 0xFFF

    @property
    def width(self) -> int:
        return self.high >> 9 & 7

    @property
    def strong(self) -> bool:
        """Whether an access to global memory is one that other blocks may see at once (relaxed, acquire)."""
        return self.high >> 12 & 0xF == 0xF

    @property
    def target(self) -> int:
        """Where a branch goes."""
        word = self.low | self.high << 64
        upper = word >> 34 & (1 << 48) - 1
        upper -= (upper >> 47) << 48
        return self.at + 16 + 4 * (upper << 8 | self.low >> 16 & 0xFF if self.long_branch else upper)

    @property
    def destinations(self) -> range:
        """The registers that an instruction overwrites which has a result, perhaps one or two too few."""
        wide = self.opcode == TENSOR_PRODUCT or (self.opcode in (LOAD_SHARED, LOAD_GLOBAL) and self.width == QUAD)
        first = self.low >> 16 & 0xFF
        return range(first, first + (4 if wide else 2 if self.opcode == CLEAR_PAIR else 1))

    @property
    def sources(self) -> set[int]:
        """The registers that an arithmetic instruction reads. An operand may be a number instead."""
        registers = {self.low >> 24 & 0xFF, self.high & 0xFF}
        if self.opcode >> 9 == 1:
            registers.add(self.low >> 32 & 0xFF)
        return registers - {NO_REGISTER}


def code_of(cubin: Path, sm: int = 90) -> dict[str, list[Instruction]]:
    """The instructions of each kernel in an ELF file: the sections `.text.NAME`. `sm` is the GPU's generation."""
    data = cubin.read_bytes()
    table, size, count, names = *struct.unpack_from("<Q", data, 40), *struct.unpack_from("<3H", data, 58)
    headers = [struct.unpack_from("<IIQQQQ", data, table + i * size) for i in range(count)]
    strings = headers[names][4]
    found = {}
    for name, _, _, _, offset, length in headers:
        text = data[strings + name : data.index(b"\0", strings + name)].decode()
        if text.startswith(".text."):
            code = data[offset : offset + length]
            found[text.removeprefix(".text.")] = [
                Instruction(at, *struct.unpack_from("<QQ", code, at), sm >= 90) for at in range(0, length, 16)
            ]
    return found


class Step(NamedTuple):
    """Counts of the loop over the steps of a sequence kernel. `critical` are the instructions from the first that waits
    for the other blocks to the last that sends to them."""

    critical: int
    calls: int  # in the critical part: slow paths of divisions and functions
    memory_barriers: int
    block_barriers: int
    cluster_arrivals: int
    sends: int  # stores of 16 bytes to the other blocks
    narrow_exchanges: int  # accesses to memory shared with other blocks of less than 16 bytes, and no counter
    vectors_first: int  # loads of 16 bytes before the first tensor-core product of a step
    late_inputs: int  # uses of values that were loaded in the same step


def _count(code: Sequence[Instruction], *opcodes: int) -> int:
    return sum(one.opcode in opcodes for one in code)


def step_of(code: Sequence[Instruction], cluster: bool) -> Step:
    def sends(one: Instruction) -> bool:
        if cluster:
            return one.opcode == SEND_ASYNC
        return one.opcode == STORE_GLOBAL and one.strong

    def waits(one: Instruction) -> bool:
        if cluster:
            return one.opcode == TRY_WAIT
        return one.opcode == LOAD_GLOBAL and one.strong and one.width == QUAD

    first_send = next(one.at for one in code if sends(one))
    # Code for rare cases stands behind the end of the kernel and jumps back into it: those are no loops.
    exits = [one.at for one in code if one.opcode == EXIT]
    begin, end = max(
        (
            (one.target, one.at)
            for one in code
            if one.opcode in BRANCHES
            and one.target <= first_send <= one.at
            and not any(one.target <= at <= one.at for at in exits)
        ),
        key=lambda loop: loop[1] - loop[0],
    )
    loop = [one for one in code if begin <= one.at <= end]
    stores = [one for one in loop if sends(one)]
    # In a grid each store to the others is followed by one that makes the memory of an earlier step absent again.
    last = stores[-1] if cluster else stores[len(stores) // 2 - 1]
    wait = next(one for one in loop if waits(one))
    critical = [one for one in loop if wait.at <= one.at <= last.at]
    product = next((one.at for one in critical if one.opcode == TENSOR_PRODUCT), wait.at)
    load = LOAD_SHARED if cluster else LOAD_GLOBAL
    inputs: set[int] = set()  # registers with values loaded in this step
    late = 0
    for one in (one for one in loop if one.at <= last.at):
        if one.opcode & 0x1FF in FLOAT_ARITHMETIC:
            late += len(one.sources & inputs)
        if one.opcode not in NO_RESULT:
            inputs -= set(one.destinations)
        if one.opcode == LOAD_GLOBAL and not one.strong and one.width == WORD and one.at < wait.at:
            inputs |= set(one.destinations)
    return Step(
        critical=len(critical),
        calls=_count(critical, *CALLS),
        memory_barriers=_count(loop, MEMORY_BARRIER),
        block_barriers=_count(loop, BLOCK_BARRIER),
        cluster_arrivals=_count(loop, CLUSTER_ARRIVE),
        sends=sum(one.width == QUAD for one in stores) if not cluster else len(stores),
        narrow_exchanges=0 if cluster else sum(one.width != QUAD for one in stores),
        vectors_first=sum(one.opcode == load and one.width == QUAD and wait.at <= one.at < product for one in loop),
        late_inputs=late,
    )
