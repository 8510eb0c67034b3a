"""The rungs that run under the emulation: its own test with planted bugs, the kernels in three builds (plain, asan,
tsan), and bugs planted in the kernels."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import shapes
from ladder import BUILD, CSRC, CUDA, HERE, Failure, Unit, call, must, tool
from mutants import MUTANTS, Mutant

SEEDS = (0, 1, 3)
COMPILERS = {
    "plain": ["g++", "-O2"],
    # -O0, since the shapes of this rung are so small that compiling takes longer than running.
    "asan": ["clang++", "-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "tsan": ["clang++", "-O1", "-fsanitize=thread"],
}
ENVIRONMENT = {
    "TSAN_OPTIONS": "halt_on_error=1:report_atomic_races=1",
    "ASAN_OPTIONS": "detect_stack_use_after_return=0",
    "EMULATION_PATIENCE": "200000",
}


def environment(seed: int, patience: int | None = None) -> dict[str, str]:
    own = {"EMULATION_PATIENCE": str(patience)} if patience else {}
    return {**ENVIRONMENT, "EMULATION_SEED": str(seed), **own}


@cache
def cuda_include() -> Path:
    import native

    cuda = native.find_cuda()
    if cuda is None:
        raise Failure("nvcc is missing")
    return cuda.lib.parent / "include"


def flags(csrc: Path = CSRC) -> list[str]:
    folders = [f"-isystem{cuda_include()}", f"-I{HERE / 'emulation'}", f"-I{csrc}"]
    return ["-std=c++17", "-g1", "-Wall", "-Wextra", "-Werror", "-pthread", "-fPIC", *folders]


def compiler(kind: str) -> list[str]:
    name, *options = COMPILERS[kind]
    return [tool(name, f"{name}-14"), *options]


RUNTIME = BUILD / "runtime.o"


def build_runtime() -> None:
    """Compiles the emulation's runtime without sanitizers, which it informs of fibers and barriers itself."""
    must([tool("g++"), "-O2", *flags(), "-c", HERE / "emulation" / "runtime.cpp", "-o", RUNTIME])


# ---- The bugs planted in the emulation's own test, each with the builds that must notice it. The others may notice it.
PLANTED = {
    "missing_block_barrier": "tsan",
    "missing_cluster_barrier": "plain tsan",
    "unwaited_receipt": "plain tsan",
    "unannounced_bytes": "plain",
    "too_few_bytes": "plain",
    "unordered_flag": "tsan",
    "unordered_wait": "tsan",
    "lost_signal": "plain",
    "unerased_piece": "plain",
    "unsignalled_piece": "plain",
    "unawaited_erasure": "plain",
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


def emulation(kind: str) -> None:
    program = BUILD / f"emulation-{kind}"
    must([*compiler(kind), *flags(), HERE / "emulation_test.cpp", RUNTIME, "-o", program])
    listed = call([program]).output.split()
    if sorted(listed) != sorted([*PLANTED, "none"]):
        raise Failure(f"the planted bugs are {listed}")
    for seed in SEEDS:
        must([program, "none"], **environment(seed))
    for bug in (bug for bug, kinds in PLANTED.items() if kind in kinds.split()):
        if all(call([program, bug], **environment(seed, 2000)).returncode == 0 for seed in SEEDS):
            raise Failure(f"{kind} does not notice {bug}")


# ---- The kernels.
SOURCES = {
    # Roughly how long each takes to compile, in seconds.
    "sequence_forward_bf16.cu": 4, "sequence_backward_bf16.cu": 4,
    "sequence_forward_f16.cu": 4, "sequence_backward_f16.cu": 4,
    "sequence_forward_f32.cu": 2, "sequence_backward_f32.cu": 2,
    "cell.cu": 4, "rows.cu": 1, "sequence_plan.cpp": 1, "steps.cpp": 1, "kernels_test.cpp": 4,
    "variants.cu": 3, "variant_steps.cpp": 1, "variants_test.cpp": 4,
}  # fmt: skip
PROGRAMS = ("kernels_test.cpp", "variants_test.cpp")


def object_of(kind: str, source: str) -> Path:
    return BUILD / f"{source}.{kind}.o"


def build_object(kind: str, source: str) -> None:
    folder = HERE if source in PROGRAMS else CUDA
    must([*compiler(kind), *flags(), "-x", "c++", "-c", folder / source, "-o", object_of(kind, source)])


def link(kind: str) -> None:
    built = [object_of(kind, source) for source in SOURCES]
    must([*compiler(kind), "-pthread", *built, RUNTIME, "-o", BUILD / f"kernels-{kind}"])


# The sequence kernels that ran in the plain build: way, cell, dtype, cluster, units of a slice, columns.
Instance = tuple[str, str, str, bool, int, int]
_ran: set[Instance] = set()


def run_shape(kind: str, shape: str, seeds: Sequence[int]) -> None:
    cell, dtype, *_ = shape.split(":")
    for seed in seeds:
        output = must([BUILD / f"kernels-{kind}", shape], **environment(seed))
        if "1 shapes, 0 failures" not in output:
            raise Failure(output)
        for way, plan, units, columns in re.findall(r"^plan (\w+) (\w+) (\d+) (\d+)$", output, re.MULTILINE):
            if kind == "plain" and plan != "steps":
                _ran.add((way, cell.split("_")[0], dtype, plan == "cluster", int(units), int(columns)))


def plain_test(name: str, *further: Path) -> None:
    """Compiles a test that needs no emulated blocks and runs it."""
    program = BUILD / name
    must([tool("g++"), "-O1", *flags(), HERE / f"{name}.cpp", *further, "-o", program])
    if " hold" not in (output := must([program])):
        raise Failure(output)


def check_every_kernel_ran() -> None:
    """Checks that the shapes of the rung `kernels` make every sequence kernel run that is compiled."""
    objects = [
        object_of("plain", source) for source in SOURCES if source.startswith("sequence_") and "plan" not in source
    ]
    names = re.findall(
        r"sequence_(forward|backward)<dlk::gpu::(Lstm|Gru|Rnn)Cell, (\S+), (true|false), (\d+), (\d+)>\(",
        must([tool("nm"), "-C", *objects]),
    )  # fmt: skip
    dtypes = {"__nv_bfloat16": "bf16", "__half": "f16", "float": "f32"}
    compiled = {
        (way, cell.lower(), dtypes[dtype], cluster == "true", int(units), int(columns))
        for way, cell, dtype, cluster, units, columns in names
    }
    if not compiled or compiled != _ran:
        missing, unknown = sorted(compiled - _ran), sorted(_ran - compiled)
        raise Failure(f"{len(compiled)} kernels are compiled; never run: {missing}; run and not compiled: {unknown}")


# ---- Bugs planted in the kernels.
# Shapes of one cell, so that compiling is fast. They cover several chunks, both directions and uneven lengths.
VARIANT_SHAPES = (
    "lstm:f32:variant:5:3:40:2:lengths:hbkldz",
    "gru:f32:variant:5:3:40:2:lengths:hbkldz",
    "lstm:bf16:variant:3:5:33:2:packed:hble",
)
MUTANT_SHAPES = (
    "lstm:bf16:small:3:40:40:2:lengths:hbk",
    "lstm:bf16:smallgrid:2:40:40:2:lengths:hb",
    "lstm:f32:smallgrid:1:16:16:1:lengths:hb",
    # Warps with fewer cells than lanes.
    "lstm:f32:smallgrid:4:1:40:1:padded:hb",
    "lstm:bf16:wide:4:8:72:1:padded:hb",
    # Chunks that are alive at different times.
    "lstm:bf16:small:7:33:40:2:lengths:hb",
    # A grid uses each place of its exchange more than once; an h_0 with the bits of an absent value.
    "lstm:bf16:smallgrid:20:8:40:1:padded:hb",
    "lstm:bf16:smallgrid:2:8:16:1:padded:hbn",
    "lstm:f32:smallgrid:3:8:40:1:padded:hbn",
    # Resets and c of every step, in a cluster and step by step.
    "lstm_cells:bf16:small:5:33:40:2:lengths:hbr",
    "lstm_cells:f32:steps:5:24:40:2:lengths:hbr",
    *VARIANT_SHAPES,
)
WAYS = ("forward", "backward")
STEADY = (
    "cell.cu", "rows.cu", "sequence_plan.cpp", "steps.cpp", "variants.cu", "variant_steps.cpp", *PROGRAMS,
)  # fmt: skip
# What is compiled again for a bug in these files; for a bug in another file it is a sequence kernel.
OUTSIDE_SEQUENCES = {
    "rows.cu": "rows.cu", "cell_kernels.h": "cell.cu", "steps.cpp": "steps.cpp", "variant_rows.h": "variants.cu",
    "variant_forward.h": "variants.cu", "variant_backward.h": "variants.cu", "variant_steps.cpp": "variant_steps.cpp",
}  # fmt: skip


def one_cell(kind: str, way: str, header_folder: Path, out: Path) -> None:
    source = header_folder / "one_cell.cpp"
    shutil.copy(HERE / "one_cell.cpp", source)
    csrc = header_folder.parents[1]
    must([*compiler(kind), *flags(csrc), "-Wno-error", f"-DONE_CELL_{way.upper()}", "-c", source, "-o", out])


def copy_of_headers(name: str) -> Path:
    """Makes a copy of the headers of csrc in which a bug can be planted, and returns its folder of CUDA kernels."""
    folder = BUILD / f"mutant-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(CSRC, folder / "csrc", ignore=shutil.ignore_patterns("cpu", "torch", "setup", "*.cpp", "*.cu"))
    return folder / "csrc" / CUDA.relative_to(CSRC)


def one_cell_of(kind: str, way: str) -> Path:
    return BUILD / f"one_cell-{way}.{kind}.o"


def link_mutant(kind: str, kernels: Sequence[Path], program: Path, replaced: str = "") -> None:
    steady = [object_of(kind, source) for source in STEADY if source != replaced]
    must([*compiler(kind), "-pthread", *kernels, *steady, RUNTIME, "-o", program])


def notices(program: Path, seeds: Sequence[int] = SEEDS, shapes: Sequence[str] = MUTANT_SHAPES) -> bool:
    runs = ((shape, seed) for seed in seeds for shape in shapes)
    return any(call([program, shape], **environment(seed, 20000)).returncode != 0 for shape, seed in runs)


def unchanged(kind: str) -> None:
    folder = copy_of_headers(f"none-{kind}")
    for way in WAYS:
        one_cell(kind, way, folder, one_cell_of(kind, way))
    program = BUILD / f"one_cell-{kind}"
    link_mutant(kind, [one_cell_of(kind, way) for way in WAYS], program)
    if notices(program, SEEDS[:1]):
        raise Failure(f"{kind} finds something in the kernels as they are")


def mutated(number: int, mutant: Mutant) -> None:
    kind = mutant.noticed_by
    folder = copy_of_headers(str(number))
    source = OUTSIDE_SEQUENCES.get(mutant.file, "")
    if source:
        shutil.copy(CUDA / source, folder)
    file = folder / mutant.file
    text = file.read_text()
    if text.count(mutant.old) != 1:
        raise Failure(f"{mutant.file} has {text.count(mutant.old)} times, not once: {mutant.old}")
    file.write_text(text.replace(mutant.old, mutant.new))
    changed = folder / "changed.o"
    if source:
        must([*compiler(kind), *flags(folder.parents[1]), "-Wno-error", "-x", "c++", "-c", folder / source,
              "-o", changed])  # fmt: skip
        kept = [one_cell_of(kind, way) for way in WAYS]
    else:
        # A header that forward and backward share is changed for both. Only one of them is compiled, which must notice
        # it.
        way = "backward" if "backward" in mutant.file else "forward"
        one_cell(kind, way, folder, changed)
        kept = [one_cell_of(kind, "forward" if way == "backward" else "backward")]
    link_mutant(kind, [changed, *kept], folder / "test", source)
    if not notices(folder / "test", shapes=VARIANT_SHAPES if "variant" in mutant.file else MUTANT_SHAPES):
        raise Failure(f"not noticed: {mutant}")


def units(short: bool = False, quick: bool = False) -> list[Unit]:
    shapes.check()
    all_units = [Unit("build", "runtime", 3, build_runtime)]
    for kind in COMPILERS:
        all_units.append(Unit("emulation", f"emulation {kind}", 8, partial(emulation, kind), ("runtime",)))
        built = []
        for source, seconds in SOURCES.items():
            built.append(f"{source} {kind}")
            all_units.append(Unit("build", built[-1], seconds, partial(build_object, kind, source)))
        all_units.append(Unit("build", f"link {kind}", 1, partial(link, kind), (*built, "runtime")))
    for rung, kind, chosen, seeds in (
        ("kernels", "plain", shapes.all_shapes(), (0, 3)),
        ("asan", "asan", shapes.small_shapes(), (0, 1)),
        ("tsan", "tsan", shapes.small_shapes(), SEEDS),
    ):
        for at, shape in enumerate(chosen):
            seconds = 1 + shapes.work(shape) / 1e6
            # --short leaves out one seed, that is, one schedule of the threads, of each shape. --quick takes one of
            # those that are left, in turn.
            some = seeds[:-1] if short else seeds
            run = partial(run_shape, kind, shape, some[at % len(some) :][:1] if quick else some)
            all_units.append(Unit(rung, f"{rung} {shape}", seconds, run, (f"link {kind}",)))
    planned = partial(plain_test, "plan_test", CUDA / "sequence_plan.cpp")
    all_units.append(Unit("kernels", "plans", 2, planned))
    all_units.append(Unit("kernels", "limits", 2, partial(plain_test, "limits_test")))
    all_units.append(Unit("kernels", "activations", 2, partial(plain_test, "activation_test")))
    ran = tuple(f"kernels {shape}" for shape in shapes.all_shapes())
    all_units.append(Unit("kernels", "every kernel ran", 1, check_every_kernel_ran, ran))
    for kind in sorted({mutant.noticed_by for mutant in MUTANTS}):
        steady = tuple(f"{source} {kind}" for source in STEADY)
        run = partial(unchanged, kind)
        all_units.append(Unit("mutants", f"unchanged {kind}", 8, run, ("runtime", *steady)))
    for number, mutant in enumerate(MUTANTS, 1):
        run = partial(mutated, number, mutant)
        all_units.append(Unit("mutants", f"mutant {number}", 5, run, (f"unchanged {mutant.noticed_by}",)))
    return all_units
