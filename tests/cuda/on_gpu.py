"""The rung `linked`: nvcc compiles the kernels' test, which otherwise runs under emulation, into a program for a GPU.
It needs no torch, so compute-sanitizer, under which `make gpu-check` runs it, watches the kernels alone.

It is made for the GPU of this machine. Without one it is made for sm_90a and not run, which keeps it from falling
behind the kernels.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from compiled import ARCHS, files
from ladder import BUILD, CUDA, HERE, Failure, Unit, kernel_object, must, tool
from native import gpus_here

_HERE = (gpus_here() or ["90a"])[0]
ARCH = "80" if _HERE.startswith("8") else _HERE  # 8.6 and 8.9 run the code for 8.0
PROGRAM = BUILD / "kernels-gpu"
CLUSTERS = BUILD / "clusters-gpu"
# The files that are C++ for the emulation too, and how long each takes to compile, in seconds.
CPP = {
    HERE / "kernels_test.cpp": 6, HERE / "variants_test.cpp": 6, CUDA / "sequence_plan.cpp": 2, CUDA / "steps.cpp": 2,
    CUDA / "variant_steps.cpp": 2,
}  # fmt: skip


def _nvcc() -> list[str]:
    import native

    if ARCH not in ARCHS:
        raise Failure(f"this GPU is sm_{ARCH}, none of {', '.join(ARCHS)}")
    return [tool(os.environ.get("NVCC", "nvcc")), *native.nvcc_flags([ARCH]), "-x", "cu"]


def _object(source: Path) -> Path:
    return BUILD / f"{source.name}.gpu.o"


def compile_cpp(source: Path) -> None:
    must([*_nvcc(), "-c", source, "-o", _object(source)])


def link() -> None:
    objects = [*(kernel_object(file, ARCH) for file in files()), *map(_object, CPP)]
    must([tool(os.environ.get("NVCC", "nvcc")), *objects, "-o", PROGRAM])


def clusters() -> None:
    must([*_nvcc(), HERE / "clusters_test.cu", "-o", CLUSTERS])


def units() -> list[Unit]:
    made = [Unit("linked", f"nvcc {path.name}", cost, partial(compile_cpp, path)) for path, cost in CPP.items()]
    kernels = tuple(f"nvcc {file} sm_{ARCH}" for file in files()) if ARCH in ARCHS else ()
    return [
        *made,
        Unit("linked", "link for a GPU", 1, link, (*(unit.name for unit in made), *kernels)),
        Unit("linked", "clusters", 4, clusters),
    ]
