"""The rung `boundary`, which tests the torch boundary (csrc/rnn/torch/cuda) on CPU tensors with emulated kernels."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

from emulated import PROGRAMS, RUNTIME, SOURCES, compiler, flags, object_of
from ladder import BUILD, CSRC, CUDA, HERE, ROOT, Failure, Unit, call, must

TORCH = CSRC / "rnn" / "torch"
OWN = (
    TORCH / "cuda" / "registration.cpp", TORCH / "cuda" / "sequence.cpp", TORCH / "cuda" / "cell.cpp",
    TORCH / "cuda" / "variants.cpp", CUDA / "plan_cap.cpp", TORCH / "boundary.cpp", HERE / "boundary.cpp",
)  # fmt: skip
KERNELS = tuple(source for source in SOURCES if source not in PROGRAMS)
TESTS = sorted((ROOT / "tests" / "gpu").glob("recurrent*_cuda.py"))
LIBRARY = BUILD / "boundary.so"
SHARDS = 4


def torch_folder() -> Path:
    from find_torch import find_torch

    torch = find_torch()
    if torch is None:
        raise Failure("torch is missing")
    return torch.folder


def _name(source: Path) -> str:
    return f"{source.parent.name}-{source.name}"


def build(source: Path) -> None:
    import native

    torch = torch_folder() / "include"
    options = [
        "-fvisibility=hidden", "-DDLKERNELS_GPU_KEY=CPU", f"-DTORCH_TARGET_VERSION={native.TORCH_TARGET_VERSION}",
        f"-isystem{torch}", f"-isystem{torch / 'torch' / 'csrc' / 'api' / 'include'}",
    ]  # fmt: skip
    must([*compiler("plain"), *flags(), *options, "-c", source, "-o", object_of("boundary", _name(source))])


def link() -> None:
    built = [*(object_of("plain", source) for source in KERNELS), *(object_of("boundary", _name(path)) for path in OWN)]
    # -Bsymbolic binds the library's calls to its own replacements of torch's functions (boundary.cpp).
    options = ["-shared", "-Wl,-Bsymbolic", f"-L{torch_folder() / 'lib'}", "-ltorch", "-ltorch_cpu", "-pthread"]
    must([*compiler("plain"), *built, RUNTIME, *options, "-o", LIBRARY])


def run_tests(shard: int) -> None:
    command = [sys.executable, "-m", "pytest", *TESTS, "-q", "--tb=short", "-p", "no:cacheprovider"]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = call(
        [*command, f"--confcutdir={TESTS[0].parent}"], DLKERNELS_DEVICE="cpu", DLKERNELS_EMULATED=str(LIBRARY),
        DLKERNELS_REQUIRE_NATIVE="1", DLKERNELS_SHARD=f"{shard}/{SHARDS}", OMP_NUM_THREADS="1", PYTHONPATH=path,
    )  # fmt: skip
    if done.returncode != 0 or " passed" not in done.output:
        raise Failure(done.output[-6000:])


def units() -> list[Unit]:
    all_units = [Unit("build", f"{_name(path)} boundary", 5, partial(build, path)) for path in OWN]
    built = ("runtime", *(f"{source} plain" for source in KERNELS), *(unit.name for unit in all_units))
    all_units.append(Unit("build", "link boundary", 1, link, built))
    for shard in range(SHARDS):
        name = f"boundary {shard + 1}/{SHARDS}"
        all_units.append(Unit("boundary", name, 12, partial(run_tests, shard), ("link boundary",)))
    return all_units
