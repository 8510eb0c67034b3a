"""Everything that can be said about the CUDA kernels without a GPU: `python tests/cuda/run.py [RUNG...]`.

emulation  the emulation's own test: planted bugs, each noticed by the builds that must notice it
kernels    the kernels under emulation against the reference, over a covering array of shapes
asan       the same over smaller shapes with the address and undefined-behaviour sanitizers
tsan       the same with clang's ThreadSanitizer, in several schedules
mutants    bugs planted in the kernels: each must be noticed
compile    nvcc for sm_80, sm_90a and sm_100a: no spills, no local memory, registers, tensor-core instructions

Needs nvcc with its headers, g++, clang++ with its ThreadSanitizer runtime (Debian: clang, libclang-rt-14-dev). A rung
that lacks something fails. NICE=19 runs everything at that niceness.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import shapes
from mutants import MUTANTS, Mutant

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CUDA = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "cuda-tests"
JOBS = min(2, len(os.sched_getaffinity(0)))
SEEDS = (0, 1, 3)
sys.path.insert(0, str(ROOT / "csrc" / "setup"))

COMPILERS = {
    "plain": ["g++", "-O2", "-Wno-array-bounds"],  # GCC 12 loses track of what a storage dtype implies
    "asan": ["g++", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-Wno-array-bounds"],
    "tsan": ["clang++", "-O1", "-fsanitize=thread"],
}
ENVIRONMENT = {
    "TSAN_OPTIONS": "halt_on_error=1:report_atomic_races=1",
    "ASAN_OPTIONS": "detect_stack_use_after_return=0",
    "EMULATION_PATIENCE": "200000",
}


class Failure(Exception):
    pass


def call(command: Sequence[str | Path], seed: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    nice = ["nice", "-n", os.environ["NICE"]] if os.environ.get("NICE") else []
    env = {**os.environ, **ENVIRONMENT, "EMULATION_SEED": str(seed), **environment}
    return subprocess.run(
        [*nice, *map(str, command)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def must(command: Sequence[str | Path], seed: int = 0) -> str:
    done = call(command, seed)
    if done.returncode != 0:
        raise Failure(
            f"{' '.join(map(str, command))[:2000]}\n(seed {seed}) ended with {done.returncode}:\n{done.stdout[-6000:]}"
        )
    return done.stdout


def tool(*names: str) -> str:
    for name in names:
        if shutil.which(name):
            return name
    raise Failure(f"{names[0]} is missing")


def cuda_include() -> Path:
    import native

    cuda = native.find_cuda()
    if cuda is None:
        raise Failure("nvcc is missing")
    return cuda.lib.parent / "include"


def flags() -> list[str]:
    folders = [f"-isystem{cuda_include()}", f"-I{HERE / 'emulation'}"]
    return ["-std=c++17", "-g1", "-Wall", "-Wextra", "-Werror", "-pthread", *folders]


def compiler(kind: str) -> list[str]:
    name, *options = COMPILERS[kind]
    return [tool(name, f"{name}-14"), *options]


def runtime() -> Path:
    """The emulation itself, which no sanitizer may see."""
    out = BUILD / "runtime.o"
    must([tool("g++"), "-O2", *flags(), "-c", HERE / "emulation" / "runtime.cpp", "-o", out])
    return out


def in_parallel(function: Callable[[str], None], items: Sequence[str]) -> None:
    with ThreadPoolExecutor(JOBS) as pool:
        list(pool.map(function, items))


# ---- The emulation's own bugs: which builds must notice. Others may.
PLANTED = {
    "missing_block_barrier": "tsan",
    "missing_cluster_wait": "plain tsan",
    "missing_cluster_barrier": "plain tsan",
    "unordered_flag": "tsan",
    "unordered_wait": "tsan",
    "lost_signal": "plain",
    "divergent_barrier": "plain",
    "outside_shuffle_mask": "plain",
    "absent_lane": "plain",
    "shared_overrun": "asan",
    "shared_neighbour": "asan",
    "global_overrun": "asan",
    "uninitialised_shared": "plain",
    "misaligned_vector": "asan",
    "absent_block": "plain",
    "wrong_fragment": "plain",
}


def emulation() -> str:
    link = runtime()

    def build(kind: str) -> None:
        must([*compiler(kind), *flags(), HERE / "emulation_test.cpp", link, "-o", BUILD / f"emulation-{kind}"])

    in_parallel(build, list(COMPILERS))
    listed = call([BUILD / "emulation-plain"]).stdout.split()
    if sorted(listed) != sorted([*PLANTED, "none"]):
        raise Failure(f"the planted bugs are {listed}")
    for kind in COMPILERS:
        for seed in SEEDS:
            must([BUILD / f"emulation-{kind}", "none"], seed)
    for bug, kinds in PLANTED.items():
        for kind in kinds.split():
            results = [call([BUILD / f"emulation-{kind}", bug], seed, EMULATION_PATIENCE="2000") for seed in SEEDS]
            if all(result.returncode == 0 for result in results):
                raise Failure(f"{kind} does not notice {bug}")
    return f"{len(PLANTED)} planted bugs noticed"


# ---- The kernels.
SOURCES = (
    "sequence_backward_bf16.cu", "sequence_forward_bf16.cu", "sequence_backward_f16.cu", "sequence_forward_f16.cu",
    "sequence_backward_f32.cu", "sequence_forward_f32.cu", "cell.cu", "rows.cu", "sequence_plan.cpp", "steps.cpp",
)  # fmt: skip


def objects(kind: str, folder: Path, sources: Sequence[Path]) -> list[Path]:
    def build(name: str) -> None:
        source = Path(name)
        must([*compiler(kind), *flags(), "-x", "c++", "-c", source, "-o", folder / f"{source.name}.{kind}.o"])

    in_parallel(build, list(map(str, sources)))
    return [folder / f"{source.name}.{kind}.o" for source in sources]


def test_program(kind: str) -> Path:
    out = BUILD / f"kernels-{kind}"
    built = objects(kind, BUILD, [*(CUDA / name for name in SOURCES), HERE / "kernels_test.cpp"])
    must([*compiler(kind), "-pthread", *built, runtime(), "-o", out])
    return out


def run_shapes(program: Path, chosen: Sequence[str], seeds: Sequence[int]) -> str:
    runs = [(shape, seed) for seed in seeds for shape in chosen]
    with ThreadPoolExecutor(JOBS) as pool:
        for output in pool.map(lambda run: must([program, run[0]], run[1]), runs):
            if "1 shapes, 0 failures" not in output:
                raise Failure(output)
    return f"{len(chosen)} shapes, seeds {', '.join(map(str, seeds))}"


def kernels() -> str:
    return run_shapes(test_program("plain"), shapes.all_shapes(), (0, 3))


def asan() -> str:
    return run_shapes(test_program("asan"), shapes.small_shapes(), (0, 1))


def tsan() -> str:
    return run_shapes(test_program("tsan"), shapes.small_shapes(), SEEDS)


# ---- Bugs in the kernels themselves.
# Of one cell and dtype, to compile fast: several chunks, both directions, uneven lengths.
MUTANT_SHAPES = ("lstm:bf16:small:5:64:40:2:lengths:hbk", "lstm:bf16:smallgrid:3:64:40:2:lengths:hb")


def mutants() -> str:
    steady = {}
    for kind in COMPILERS:
        folder = BUILD / f"mutants-{kind}"
        folder.mkdir(exist_ok=True)
        unchanged = [CUDA / "cell.cu", CUDA / "rows.cu", CUDA / "sequence_plan.cpp", CUDA / "steps.cpp"]
        steady[kind] = objects(kind, folder, [*unchanged, HERE / "kernels_test.cpp"])
    link = runtime()

    def build_and_run(number: int, mutant: Mutant | None, kind: str) -> bool:
        folder = BUILD / f"mutant-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(ROOT / "csrc", folder / "csrc", ignore=shutil.ignore_patterns("cpu", "setup"))
        if mutant:
            file = folder / "csrc" / "cuda" / mutant.file
            text = file.read_text()
            if text.count(mutant.old) != 1:
                raise Failure(f"{mutant.file} has {text.count(mutant.old)} times, not once: {mutant.old}")
            file.write_text(text.replace(mutant.old, mutant.new))
        program = folder / "test"
        one = folder / "csrc" / "cuda" / "one_cell.cpp"
        shutil.copy(HERE / "one_cell.cpp", one)
        must([*compiler(kind), *flags(), "-O1", "-Wno-error", one, *steady[kind], link, "-pthread", "-o", program])
        results = [
            call([program, shape], seed, EMULATION_PATIENCE="20000") for shape in MUTANT_SHAPES for seed in SEEDS
        ]  # fmt: skip
        return any(result.returncode != 0 for result in results)

    for kind in COMPILERS:
        if build_and_run(0, None, kind):
            raise Failure(f"{kind} finds something in the kernels as they are")
    with ThreadPoolExecutor(JOBS) as pool:
        noticed = list(
            pool.map(lambda item: build_and_run(item[0], item[1], item[1].noticed_by), enumerate(MUTANTS, 1))
        )
    missed = [mutant for mutant, seen in zip(MUTANTS, noticed, strict=True) if not seen]
    if missed:
        raise Failure(f"not noticed: {missed}")
    return f"{len(MUTANTS)} mutants noticed"


# ---- What nvcc makes of the kernels.
ARCHS = ("80", "90a", "100a")


def compile_all() -> str:
    import native

    nvcc = tool(os.environ.get("NVCC", "nvcc"))
    reports: dict[str, str] = {}

    def build(name: str) -> None:
        common = [nvcc, *native.nvcc_flags(list(ARCHS)), "-Xptxas=-v", "-c", CUDA / name]
        reports[name] = must([*common, "-o", BUILD / f"{name}.o"])

    files = sorted(path.name for path in CUDA.glob("*.cu"))
    in_parallel(build, sorted(files, key=lambda name: not name.startswith("sequence")))
    count = 0
    for name, report in reports.items():
        entries = re.findall(
            r"Compiling entry function '(\S+)' for '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?"
            r"Used (\d+) registers", report, re.DOTALL,
        )  # fmt: skip
        for function, arch, stack, spills, registers in entries:
            count += 1
            limit = 255 if "sequence_" in function else 128
            if int(stack) or int(spills) or int(registers) > limit:
                raise Failure(f"{name}: {function} on {arch}: {registers} registers, {stack} stack, {spills} spilled")
        archs = {arch for _, arch, *_ in entries}
        if archs != {f"sm_{arch}" for arch in ARCHS}:
            raise Failure(f"{name} was compiled for {archs}")
    for dtype, instruction in (("bf16", "f32.bf16.bf16.f32"), ("f16", "f32.f16.f16.f32")):
        for direction in ("forward", "backward"):
            ptx = must(
                [
                    nvcc,
                    *native.nvcc_flags(["90a"]),
                    "-ptx",
                    CUDA / f"sequence_{direction}_{dtype}.cu",
                    "-o",
                    "/dev/stdout",
                ]
            )
            for kernel in ptx.split(".entry ")[1:]:
                if f"mma.sync.aligned.m16n8k16.row.col.{instruction}" not in kernel:
                    raise Failure(f"sequence_{direction}_{dtype}: no tensor-core products in {kernel[:80]}")
    return f"{count} kernels of {len(files)} files for {', '.join(f'sm_{arch}' for arch in ARCHS)}"


RUNGS: dict[str, Callable[[], str]] = {
    "emulation": emulation,
    "kernels": kernels,
    "asan": asan,
    "tsan": tsan,
    "mutants": mutants,
    "compile": compile_all,
}


def main() -> None:
    BUILD.mkdir(parents=True, exist_ok=True)
    chosen = sys.argv[1:] or list(RUNGS)
    failed = []
    for name in chosen:
        begin = time.monotonic()
        try:
            result = RUNGS[name]()
        except Failure as failure:
            failed.append(name)
            result = f"FAILED: {failure}"
        print(f"{name:10} {time.monotonic() - begin:5.0f} s  {result}", flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
