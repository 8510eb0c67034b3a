"""The rungs `compile` and `resident`, which check what nvcc makes of the kernels: registers, spills, tensor-core
instructions, and whether all blocks that wait for each other fit the GPU at the same time."""

from __future__ import annotations

import os
import re
import struct
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ladder import BUILD, CSRC, CUDA, HERE, Failure, Unit, must, tool

ARCHS = ("80", "90a", "100a")
# Roughly how long each file takes to compile for sm_90a, in seconds, and the factor for each architecture.
SECONDS = {"sequence_forward": 15, "sequence_backward": 22, "cell": 5}
ARCH_FACTORS = {"80": 0.4, "90a": 1.0, "100a": 1.6}


class Kernel(NamedTuple):
    file: str
    arch: str
    function: str
    registers: int
    static_shared: int
    tensor_products: int


_kernels: dict[tuple[str, str], list[Kernel]] = {}  # by (file, arch); compile_one fills it


def files() -> list[str]:
    return sorted(path.name for path in CUDA.glob("*.cu"))


def code_of(cubin: Path) -> dict[str, bytes]:
    """The machine code of each kernel in an ELF file: the sections `.text.NAME`."""
    data = cubin.read_bytes()
    table, size, count, names = *struct.unpack_from("<Q", data, 40), *struct.unpack_from("<3H", data, 58)
    headers = [struct.unpack_from("<IIQQQQ", data, table + i * size) for i in range(count)]
    strings = headers[names][4]
    found = {}
    for name, _, _, _, offset, length in headers:
        text = data[strings + name : data.index(b"\0", strings + name)].decode()
        if text.startswith(".text."):
            found[text.removeprefix(".text.")] = data[offset : offset + length]
    return found


def tensor_products(code: bytes) -> int:
    """Counts the HMMA instructions. An instruction has 16 bytes, and its lowest 12 bits are the opcode, which is the
    same on all GPUs from sm_75 on."""
    return sum(struct.unpack_from("<H", code, at)[0] & 0xFFF == 0x23C for at in range(0, len(code), 16))


def compile_one(file: str, arch: str) -> None:
    import native

    nvcc = tool(os.environ.get("NVCC", "nvcc"))
    cubin = BUILD / f"{file}.sm_{arch}.cubin"
    report = must([nvcc, *native.nvcc_flags([arch]), "-Xptxas=-v", "-cubin", CUDA / file, "-o", cubin])
    code = code_of(cubin)
    entries = re.findall(
        r"Compiling entry function '(\S+)' for '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?"
        r"Used (\d+) registers([^\n]*)", report, re.DOTALL,
    )  # fmt: skip
    kernels = []
    for function, for_arch, stack, spills, registers, rest in entries:
        limit = 255 if "sequence_" in function else 128
        if for_arch != f"sm_{arch}" or int(stack) or int(spills) or int(registers) > limit:
            raise Failure(f"{file}: {function} on {arch}: {registers} registers, {stack} stack, {spills} spilled")
        shared = re.search(r"(\d+) bytes smem", rest)
        products = tensor_products(code[function])
        kernels.append(Kernel(file, arch, function, int(registers), int(shared[1]) if shared else 0, products))
    if not kernels or len(kernels) != len(code):
        raise Failure(f"{file}: {len(kernels)} kernels reported and {len(code)} in the binary for sm_{arch}")
    _kernels[file, arch] = kernels


def check_compiled() -> None:
    """Checks that exactly the 16-bit sequence kernels that their GPU can run have tensor-core products."""
    for kernel in (kernel for some in _kernels.values() for kernel in some):
        sequence = sequence_kernel(kernel.function)
        runs = sequence is not None and not (sequence.cluster and kernel.arch == "80")
        expected = runs and sequence is not None and sequence.dtype != "f32"
        if expected != (kernel.tensor_products > 0):
            raise Failure(f"{kernel.function} on sm_{kernel.arch} has {kernel.tensor_products} tensor-core products")


# ---- Which blocks are resident at the same time.


class Sequence(NamedTuple):
    """The template arguments of a sequence kernel. A plan selects one such instance."""

    way: str
    cell: str
    dtype: str
    cluster: bool
    units: int
    columns: int


def sequence_kernel(mangled: str) -> Sequence | None:
    match = re.search(
        r"sequence_(forward|backward)I.*?(Lstm|Gru|Rnn)CellE(13__nv_bfloat16|6__half|f)Lb([01])ELi(\d+)ELi(\d+)E",
        mangled,
    )
    if match is None:
        return None
    dtype = {"13__nv_bfloat16": "bf16", "6__half": "f16", "f": "f32"}[match[3]]
    return Sequence(match[1], match[2].lower(), dtype, match[4] == "1", int(match[5]), int(match[6]))


# The number of multiprocessors of an H200, and the registers, threads and shared memory in bytes of each. Of the shared
# memory each block occupies 1 KiB more than it requests. All blocks of a cluster run within one GPC (a part of the
# GPU), which has at least 16 multiprocessors.
MULTIPROCESSORS, CLUSTER_ROOM = 132, 16
REGISTERS, THREADS, SHARED, SHARED_OF_BLOCK, RESERVED = 65536, 2048, 228 << 10, 227 << 10, 1 << 10


def blocks_at_once(registers: int, shared: int, threads: int) -> int:
    """How many blocks of a kernel fit one multiprocessor. Registers are allocated per warp in units of 256."""
    if shared > SHARED_OF_BLOCK:
        return 0
    of_warp = -(-registers * 32 // 256) * 256
    return min(THREADS // threads, REGISTERS // of_warp // (threads // 32), SHARED // (shared + RESERVED))


def check_resident() -> None:
    """Checks for every plan that the blocks that wait for each other at a barrier can all run at the same time, with
    the registers and the shared memory that the compiled kernel uses, and that some plan selects every kernel."""
    program = BUILD / "plans"
    must([tool("g++"), "-std=c++17", "-O1", f"-I{CSRC}", HERE / "plans.cpp", CUDA / "sequence_plan.cpp", "-o", program])
    kernels = {
        sequence: kernel
        for (_, arch), some in _kernels.items()
        if arch == "90a"
        for kernel in some
        if (sequence := sequence_kernel(kernel.function))
    }
    checked = 0
    selected = set()
    for line in must([program]).splitlines():
        cell, dtype, *_, way, kind, slices, groups, at_once, units, columns, threads, shared = line.split()
        if kind == "steps":
            continue
        sequence = Sequence(way, cell, dtype, kind == "cluster", int(units), int(columns))
        selected.add(sequence)
        kernel = kernels[sequence]
        on_one = blocks_at_once(kernel.registers, kernel.static_shared + int(shared), int(threads))
        # The barrier of a grid joins the blocks of all groups. That of a cluster joins the blocks of one group, and the
        # plan counts on groups_at_once groups that run at the same time.
        together = int(slices) * (int(groups) if kind == "grid" else min(int(groups), int(at_once)))
        fits = kind == "grid" or int(slices) <= CLUSTER_ROOM * on_one
        if together > MULTIPROCESSORS * on_one or not fits:
            raise Failure(f"{line}: {together} blocks, {on_one} on a multiprocessor ({kernel.registers} registers)")
        checked += 1
    if checked < 1200:
        raise Failure(f"only {checked} plans are persistent")
    if unused := set(kernels) - selected:
        raise Failure(f"no plan selects {sorted(unused)}")


def left_out(file: str, arch: str) -> bool:
    """Whether --short leaves out this compilation. A float16 kernel takes the registers of the bfloat16 kernel, since
    the sizes are the same and only the conversion differs: it is compiled for sm_90a only, the other dtypes for all."""
    return "f16" in file and "bf16" not in file and arch != "90a"


def units(short: bool = False) -> list[Unit]:
    all_units = []
    for arch in ARCHS:
        for file in files():
            if short and left_out(file, arch):
                continue
            seconds = SECONDS.get(file.removesuffix(".cu").rsplit("_", 1)[0], 1) * ARCH_FACTORS[arch]
            seconds *= 0.4 if "f32" in file else 1
            run = partial(compile_one, file, arch)
            all_units.append(Unit("compile", f"nvcc {file} sm_{arch}", seconds, run))
    compiled = tuple(unit.name for unit in all_units)
    all_units.append(Unit("compile", "tensor cores", 0, check_compiled, compiled))
    sequences = tuple(name for name in compiled if "sequence" in name and name.endswith("sm_90a"))
    all_units.append(Unit("resident", "resident", 3, check_resident, sequences))
    return all_units
