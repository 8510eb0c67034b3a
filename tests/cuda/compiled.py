"""The rungs `compile` and `resident`, which check what nvcc makes of the kernels: registers, spills, tensor-core
instructions, what a step of a sequence consists of, and whether all blocks that wait for each other fit the GPU at the
same time. Bugs planted in the kernels show that the checks of a step notice them."""

from __future__ import annotations

import os
import re
import shutil
from functools import partial
from pathlib import Path
from typing import NamedTuple

from emulated import copy_of_headers
from ladder import BUILD, CSRC, CUDA, HERE, Failure, Unit, kernel_object, must, tool
from machine_code import TENSOR_PRODUCT, Instruction, Step, code_of, step_of

ARCHS = ("80", "90a", "100a")
# Roughly how long each file takes to compile for sm_90a, in seconds, and the factor for each architecture.
SECONDS = {"sequence_forward": 15, "sequence_backward": 22, "cell": 5, "variants": 5}
ARCH_FACTORS = {"80": 0.4, "90a": 1.0, "100a": 1.6}


class Kernel(NamedTuple):
    file: str
    arch: str
    function: str
    registers: int
    static_shared: int
    tensor_products: int
    code: list[Instruction]


_kernels: dict[tuple[str, str], list[Kernel]] = {}  # by (file, arch); compile_one fills it


def files() -> list[str]:
    return sorted(path.name for path in CUDA.glob("*.cu"))


def compile_one(file: str, arch: str) -> None:
    import native

    nvcc = tool(os.environ.get("NVCC", "nvcc"))
    cubin = BUILD / f"{file}.sm_{arch}.cubin"
    # nvcc keeps the machine code beside the object, which on_gpu.py links into a program for a GPU.
    kept = BUILD / f"{file}.sm_{arch}.kept"
    kept.mkdir(exist_ok=True)
    options = ["-Xptxas=-v", "-lineinfo", "-keep", "-keep-dir", kept]
    report = must([nvcc, *native.nvcc_flags([arch]), *options, "-c", CUDA / file, "-o", kernel_object(file, arch)])
    shutil.copy(kept / Path(file).with_suffix(".cubin"), cubin)
    code = code_of(cubin, int(arch.rstrip("a")))
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
        products = sum(one.opcode == TENSOR_PRODUCT for one in code[function])
        static = int(shared[1]) if shared else 0
        kernels.append(Kernel(file, arch, function, int(registers), static, products, code[function]))
    if not kernels or len(kernels) != len(code):
        raise Failure(f"{file}: {len(kernels)} kernels reported and {len(code)} in the binary for sm_{arch}")
    _kernels[file, arch] = kernels


def check_compiled() -> None:
    """Checks that exactly the 16-bit sequence kernels that their GPU can run have tensor-core products, and what their
    steps consist of."""
    wrong = []
    for kernel in (kernel for some in _kernels.values() for kernel in some):
        sequence = sequence_kernel(kernel.function)
        runs = sequence is not None and not (sequence.cluster and kernel.arch == "80")
        expected = runs and sequence is not None and sequence.dtype != "f32"
        if expected != (kernel.tensor_products > 0):
            raise Failure(f"{kernel.function} on sm_{kernel.arch} has {kernel.tensor_products} tensor-core products")
        if runs and sequence is not None:
            step = step_of(kernel.code, sequence.cluster)
            wrong += [
                f"{sequence} on sm_{kernel.arch}: {fault} ({step})" for fault in faults(sequence, step, kernel.arch)
            ]
    if wrong:
        raise Failure("\n".join(wrong))


# ---- What a step of a sequence consists of.

# The most instructions from the arrival of what other blocks have sent to the last store to them: a tenth more than
# nvcc 13.0 makes of the bfloat16 kernels for sm_90a. By way, cell, cluster or grid, units and columns.
CRITICAL = {
    ("backward", "gru", "cluster", 32, 8): 278,
    ("backward", "gru", "cluster", 32, 16): 466,
    ("backward", "gru", "cluster", 48, 8): 525,
    ("backward", "gru", "grid", 16, 8): 788,
    ("backward", "gru", "grid", 16, 16): 936,
    ("backward", "lstm", "cluster", 32, 8): 251,
    ("backward", "lstm", "cluster", 32, 16): 429,
    ("backward", "lstm", "cluster", 40, 8): 478,
    ("backward", "lstm", "grid", 16, 8): 727,
    ("backward", "lstm", "grid", 16, 16): 873,
    ("backward", "rnn", "cluster", 64, 8): 299,
    ("backward", "rnn", "cluster", 64, 16): 542,
    ("backward", "rnn", "grid", 32, 8): 636,
    ("backward", "rnn", "grid", 32, 16): 730,
    ("forward", "gru", "cluster", 32, 8): 277,
    ("forward", "gru", "cluster", 32, 16): 422,
    ("forward", "gru", "cluster", 48, 8): 458,
    ("forward", "gru", "grid", 16, 8): 691,
    ("forward", "gru", "grid", 16, 16): 655,
    ("forward", "lstm", "cluster", 32, 8): 271,
    ("forward", "lstm", "cluster", 32, 16): 487,
    ("forward", "lstm", "cluster", 40, 8): 435,
    ("forward", "lstm", "grid", 16, 8): 761,
    ("forward", "lstm", "grid", 16, 16): 741,
    ("forward", "rnn", "cluster", 64, 8): 311,
    ("forward", "rnn", "cluster", 64, 16): 566,
    ("forward", "rnn", "grid", 32, 8): 645,
    ("forward", "rnn", "grid", 32, 16): 741,
}


def faults(sequence: Sequence, step: Step, arch: str) -> list[str]:
    half = sequence.dtype != "f32"
    kind = "cluster" if sequence.cluster else "grid"
    found = []
    # A block signals in a grid once in several steps, and in clusters nothing has to wait for earlier stores.
    if step.memory_barriers > (0 if sequence.cluster else 1) or step.cluster_arrivals:
        found.append("it waits at every step until earlier stores are visible everywhere")
    # Between reading and sending. A float32 grid also copies the vectors to shared memory.
    if step.block_barriers > (1 if half or sequence.cluster else 2):
        found.append("there are more barriers of the block than needed")
    if step.narrow_exchanges or not step.sends:
        found.append("blocks do not exchange 16 bytes at a time")
    if step.late_inputs and not (sequence.way == "backward" and is_wide(sequence)):
        found.append("what does not depend on other blocks is loaded in the step that needs it")
    if not half:
        return found
    # In a grid all are loaded again if they have not arrived. In a cluster one may be loaded after the first product.
    few = sequence.columns > 8 or is_wide(sequence)
    if step.vectors_first < (16 if not sequence.cluster else 2 if few else 3):
        found.append("the first product does not wait for the vectors of several products together")
    # On sm_80 warps whose lanes may have diverged call a function for each shuffle.
    if step.calls and arch != "80":
        found.append("the activations have slow paths")
    if step.critical > CRITICAL[sequence.way, sequence.cell, kind, sequence.units, sequence.columns]:
        found.append("there are too many instructions between receiving and sending")
    return found


def is_wide(sequence: Sequence) -> bool:
    """Whether most registers hold weights, so that less is loaded ahead."""
    return sequence.units in (40, 48)


class Planted(NamedTuple):
    file: str
    old: str
    new: str
    fault: str  # a part of what must be reported


PLANTED = (
    Planted("group.h", "if (step > 0) receipt_wait(", "cluster_barrier(); if (step > 0) receipt_wait(",
            "earlier stores"),
    Planted("group.h", "DLK_DEVICE void wait(int) {}",
            "DLK_DEVICE void wait(int) { __syncthreads(); if (threadIdx.x == 0) signal_arrival(counter_); }",
            "earlier stores"),
    Planted("sequence_forward.h", "        turn_parity ^= 1;", "        turn_parity ^= 1;\n        __syncthreads();",
            "barriers of the block"),
    Planted("device.h",
            'asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p)',
            'asm volatile("st.relaxed.gpu.global.u32 [%0], %1; st.relaxed.gpu.global.u32 [%0 + 4], %2; '
            'st.relaxed.gpu.global.u32 [%0 + 8], %3; st.relaxed.gpu.global.u32 [%0 + 12], %4;" ::"l"(p)',
            "16 bytes at a time"),
    Planted("product.h", "kAhead = kPieces ? 8 / kColumnTiles : kColumnTiles == 2 ? 1 : kManyWeights ? 2 : 4",
            "kAhead = 1", "first product"),
    Planted("real.h", "if constexpr (sizeof(S) == 4) {\n    return {1.0f",
            "if constexpr (sizeof(S) <= 4) {\n    return {1.0f", "slow paths"),
    Planted("sequence_forward.h", "      Inputs now = next;", "      fetch(t, chunk, &next);\n      Inputs now = next;",
            "in the step that needs it"),
    Planted("sequence_forward.h", "      Inputs now = next;",
            "      if (chunk == 0) group.wait(s);\n      Inputs now = next;", "too many instructions"),
)  # fmt: skip


def steps_of(name: str, planted: Planted | None) -> list[str]:
    """Compiles the lstm's forward in bfloat16 with a bug, and returns the faults of its steps."""
    import native

    folder = copy_of_headers(name)
    if planted is not None:
        file = folder / planted.file
        text = file.read_text()
        if text.count(planted.old) != 1:
            raise Failure(f"{planted.file} has {text.count(planted.old)} times, not once: {planted.old}")
        file.write_text(text.replace(planted.old, planted.new))
    cubin = folder / "one_kernel.cubin"
    flags = [flag for flag in native.nvcc_flags(["90a"]) if not flag.startswith(("-I", "-Werror"))]
    nvcc = tool(os.environ.get("NVCC", "nvcc"))
    must([nvcc, *flags, f"-I{folder.parents[1]}", "-cubin", HERE / "one_kernel.cu", "-o", cubin])
    found = []
    for function, code in code_of(cubin).items():
        sequence = sequence_kernel(function)
        if sequence is None:
            raise Failure(f"{function} is not a sequence kernel")
        found += faults(sequence, step_of(code, sequence.cluster), "90a")
    return found


def check_planted(number: int, planted: Planted | None) -> None:
    found = steps_of(f"compiled-{number}", planted)
    if planted is None and found:
        raise Failure(f"the kernels as they are: {found}")
    if planted is not None and not any(planted.fault in fault for fault in found):
        raise Failure(f"not noticed: {planted}; found: {found}")


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


def check_resident(quick: bool) -> None:
    """Checks for every plan that the blocks that wait for each other at a barrier can all run at the same time, with
    the registers and the shared memory that the compiled kernel uses, and that some plan selects every kernel. With
    `quick` a float16 kernel counts as the bfloat16 kernel (left_out())."""
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
        taken = "bf16" if quick and dtype == "f16" else dtype
        sequence = Sequence(way, cell, taken, kind == "cluster", int(units), int(columns))
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


def left_out(file: str, arch: str, quick: bool) -> bool:
    """Whether --short, or with `quick` --quick, leaves out this compilation. --short compiles everything for sm_90a. A
    float16 kernel takes the registers of the bfloat16 kernel, since the sizes are the same and only the conversion
    differs, so it is compiled for no other architecture, and by --quick for none. Of the other two, sm_100a gets the
    forward kernels and sm_80 the backward ones: for sm_100a ptxas takes four times as long, and for backward kernels
    longer than for forward ones."""
    if "sequence" not in file:
        return False
    if arch == "90a":
        return quick and "_f16" in file
    return "_f16" in file or (arch == "80") == ("forward" in file)


def units(short: bool = False, quick: bool = False) -> list[Unit]:
    all_units = []
    for arch in ("90a",) if quick else ARCHS:
        for file in files():
            if short and left_out(file, arch, quick):
                continue
            seconds = SECONDS.get(file.removesuffix(".cu").rsplit("_", 1)[0], 1) * ARCH_FACTORS[arch]
            seconds *= 0.8 if "f32" in file else 1
            run = partial(compile_one, file, arch)
            all_units.append(Unit("compile", f"nvcc {file} sm_{arch}", seconds, run))
    compiled = tuple(unit.name for unit in all_units)
    all_units.append(Unit("compile", "machine code", 1, check_compiled, compiled))
    for number, planted in () if quick else enumerate((None, *PLANTED)):
        run = partial(check_planted, number, planted)
        all_units.append(Unit("compile", f"planted in machine code {number}", 5, run))
    sequences = tuple(name for name in compiled if "sequence" in name and name.endswith("sm_90a"))
    all_units.append(Unit("resident", "resident", 3, partial(check_resident, quick), sequences))
    return all_units
