"""Compiles csrc/ into the one module `_C` with ninja: incremental, parallel, without importing torch.

The CUDA kernels go into the same module, which then still loads on any torch, with CUDA or without. They take a minute
of two cores for each architecture, so by default they are compiled only where they can be used: if there are an nvcc,
a GPU, and a torch with CUDA.

setup.py calls `build`; developers run `make build`, which is `python csrc/setup/native.py`: it writes the module to
dlkernels/. `--opt 0 --out FILE` makes another build beside it, to be loaded with DLKERNELS_NATIVE=FILE.

Environment variables (with defaults): CXX, CXXFLAGS and LDFLAGS have their usual meaning. DLKERNELS_OPT=0..3 is the
optimisation level (2), MAX_JOBS the number of files that compile at once (all cores). DLKERNELS_NO_NATIVE=1 compiles
nothing. DLKERNELS_CUDA=1 compiles the CUDA kernels or fails, 0 never compiles them. NVCC names their compiler.
DLKERNELS_CUDA_ARCHS names the architectures, "80 90a" for example (those of this machine's GPUs, or 80, 90a and 100a
if it has none); if set, the CUDA kernels are compiled as with DLKERNELS_CUDA=1. DLKERNELS_CUDA_MISMATCH=1 allows an
nvcc of another major release than the CUDA of torch.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from find_torch import REQUIREMENT, find_torch

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
# Compiled once for each instruction set.
PER_ISA = "kernels_of_isa.cpp"
DEFAULT_OPT = "2"
DEFAULT_CUDA_ARCHS = ("80", "90a", "100a")
# Files of the CUDA folders that are plain C++ and always compiled, because explain works without CUDA too.
PLAN = ("plan_cap", "sequence_plan")
TORCH_TARGET_VERSION = "0x020b000000000000ULL"  # 2.11: one module for every torch from there on

_NINJA = """\
ninja_required_version = 1.5
cxx = {cxx}
cflags = {cflags}
ldflags = {ldflags}
nvcc = {nvcc}
nvflags = {nvflags}

rule compile
  command = $cxx -MMD -MF $out.d $cflags$own -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $out
rule compile_cuda
  command = $nvcc -MD -MF $out.d $nvflags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $out
rule link
  command = $cxx -shared $in -o $out $ldflags
  description = link $out

{compiles}
build {target}: link {objects}
default {target}
"""


def compiler() -> list[str] | None:
    """The C++ compiler's command (CXX, else the first of c++, g++, clang++), or None where there is none."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for candidate in candidates:
        command = shlex.split(candidate)
        if command and shutil.which(command[0]):
            return command
    return None


def why_not_compiled() -> str | None:
    """The reason to install without the compiled module; None if it has to be compiled."""
    if os.environ.get("DLKERNELS_NO_NATIVE", "") not in ("", "0"):
        return "DLKERNELS_NO_NATIVE is set"
    if sys.platform != "linux":
        return f"the compiled module is for Linux, not {sys.platform}"
    if compiler() is None:
        return f"there is no C++ compiler (looked for {os.environ.get('CXX') or 'c++, g++, clang++'})"
    return None


def module_name() -> str:
    return f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


class Unit(NamedTuple):
    """A file to compile, its object below the build folder, and the instruction set that it is compiled for, if any."""

    source: Path
    object: str
    isa: str = ""


def isas() -> list[str]:
    """The rows of csrc/core/isas.def."""
    return re.findall(r"^DLK_ISA_ROW\((\w+),", (CSRC / "core" / "isas.def").read_text(), re.MULTILINE)


def units(cuda: bool) -> list[Unit]:
    """All files of the module; those that take longest to compile come first."""
    found, kernels = [], []
    for source in sorted([*CSRC.rglob("*.cpp"), *CSRC.rglob("*.cu")]):
        name = str(source.relative_to(CSRC))
        if source.name == PER_ISA:
            kernels += [Unit(source, f"{name.removesuffix('.cpp')}.{isa}.o", isa) for isa in reversed(isas())]
        elif cuda or source.stem in PLAN or "cuda" not in source.relative_to(CSRC).parts:
            found.append(Unit(source, f"{name}.o"))
    return kernels + found


class Cuda(NamedTuple):
    """The CUDA compiler, where its libraries are, the GPUs to compile for, and the compiler's release."""

    nvcc: str
    lib: Path
    archs: list[str]
    release: str  # "13.0"


def find_cuda() -> Cuda | None:
    """The CUDA compiler of this machine; None where there is none."""
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
    if not nvcc or not shutil.which(nvcc):
        return None
    # nvcc may be a script that calls the real one, so its output tells where CUDA is.
    said = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    top = next((line.split("=", 1)[1] for line in said.splitlines() if line.startswith("#$ TOP=")), None)
    if top is None:
        raise SystemExit(f"dlkernels: {nvcc} does not say where CUDA is; DLKERNELS_CUDA=0 builds without it")
    libs = [path for name in ("lib64", "lib") if (path := Path(top.strip(), name)).is_dir()]
    lib = next((path for path in libs if (path / "libcudart_static.a").is_file()), None)
    if lib is None:
        raise SystemExit(f"dlkernels: no libcudart_static.a under {top}; DLKERNELS_CUDA=0 builds without CUDA")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+\.\d+)", version)
    if release is None:
        raise SystemExit(f"dlkernels: {nvcc} --version does not name a release; DLKERNELS_CUDA=0 builds without it")
    chosen = os.environ.get("DLKERNELS_CUDA_ARCHS", "").replace(",", " ").split()
    return Cuda(nvcc, lib, chosen or gpus_here() or list(DEFAULT_CUDA_ARCHS), release[1])


def cuda_mismatch(cuda: Cuda) -> str:
    """Why kernels compiled by this nvcc may not run beside the torch that they are built for; empty if nothing speaks
    against it. The module contains CUDA's runtime of nvcc's release. One of another major release than torch's may need
    a newer GPU driver than the one that torch runs with."""
    torch = find_torch()
    if os.environ.get("DLKERNELS_CUDA_MISMATCH") == "1" or torch is None or torch.cuda is None:
        return ""
    if cuda.release.split(".")[0] == torch.cuda.split(".")[0]:
        return ""
    return (
        f"nvcc is of CUDA {cuda.release} and torch {torch.version} of CUDA {torch.cuda}, "
        f"and with another major release the kernels may need a newer GPU driver than torch (CUDA 13: 580 or later)"
    )


def gpus_here() -> list[str]:
    """The architectures of this machine's GPUs, as nvcc names them."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return []
    found = subprocess.run([smi, "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True)
    words = {line.strip().replace(".", "") for line in found.stdout.splitlines()}
    numbers = sorted(int(word) for word in words if word.isdigit()) if found.returncode == 0 else []
    return [f"{number}a" if number >= 90 else str(number) for number in numbers]


def cuda_to_build() -> tuple[Cuda | None, str]:
    """What compiles the CUDA kernels, or None and why they are left out."""
    wish = os.environ.get("DLKERNELS_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"dlkernels: DLKERNELS_CUDA is 0 or 1, not {wish!r}")
    if wish == "0":
        return None, "DLKERNELS_CUDA is 0"
    cuda = find_cuda()
    if wish == "1" or os.environ.get("DLKERNELS_CUDA_ARCHS"):
        if cuda is None:
            raise SystemExit("dlkernels: the CUDA kernels are asked for and there is no nvcc (looked at NVCC and PATH)")
        if mismatch := cuda_mismatch(cuda):
            raise SystemExit(
                f"dlkernels: {mismatch}. Name another compiler by NVCC, or set DLKERNELS_CUDA_MISMATCH=1 to build "
                f"with this one"
            )
        return cuda, ""
    if cuda is None:
        return None, "it was built without nvcc"
    torch = find_torch()
    if torch is not None and not (torch.lib / "libtorch_cuda.so").is_file():
        return None, f"it was built for torch {torch.version}, which is without CUDA"
    if not gpus_here():
        return None, "it was built where there is no GPU"
    if mismatch := cuda_mismatch(cuda):
        return None, mismatch
    return cuda, ""


def nvcc_flags(archs: list[str]) -> list[str]:
    """The flags of nvcc. Register spills are errors, because the kernels rely on their values being in registers."""
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [
        "-std=c++17",
        "-O3",
        f"-I{CSRC}",
        "--expt-relaxed-constexpr",
        *codes,
        "-Xptxas=--warn-on-spills,--warn-on-local-memory-usage",
        "-Werror=all-warnings",
    ]


def _python_include() -> str:
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").is_file():
        raise SystemExit(
            f"dlkernels: there is a C++ compiler but no {include}/Python.h: install Python's headers "
            f"(Debian: python3-dev), or set DLKERNELS_NO_NATIVE=1 to install without the compiled module"
        )
    return include


def _pybind11_include(build_dir: Path) -> Path:
    """A copy of pybind11's headers: their folder is new in every isolated build, so every file would recompile."""
    import pybind11

    include = build_dir / f"pybind11-{pybind11.__version__}"
    if not include.is_dir():
        partial = include.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(Path(pybind11.get_include(), "pybind11"), partial / "pybind11")
        partial.rename(include)
    return include


def assembler_flags(command: list[str], build_dir: Path) -> list[str]:
    """Tests whether the assembler knows AMX and AVX512_BF16: it may be older than the GCC that generates them."""
    run = subprocess.run(
        [*command, "-x", "c++", "-c", "-o", str(build_dir / "assembler.o"), "-"],
        input='void release() { asm("tilerelease"); }', capture_output=True, text=True,
    )  # fmt: skip
    return [] if run.returncode == 0 else ["-DDLK_OLD_ASSEMBLER"]


def _flags(opt: str, build_dir: Path) -> tuple[list[str], list[str]]:
    torch = find_torch()
    if torch is None:
        raise SystemExit(f"dlkernels: no {REQUIREMENT} to compile against in the environment of {sys.executable}")
    cxx = compiler()
    assert cxx is not None
    tuning = [f"-O{opt}", "-std=c++17", *shlex.split(os.environ.get("CXXFLAGS", ""))]
    tuning += assembler_flags([*cxx, *tuning], build_dir)
    system = [_python_include(), _pybind11_include(build_dir), *torch.include]
    compile_flags = [
        *tuning,
        "-fPIC",
        "-fvisibility=hidden",
        "-fvisibility-inlines-hidden",
        "-Wall",
        "-Werror=switch",
        "-pthread",
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
        f'-DDLKERNELS_BUILD_FLAGS="{" ".join(tuning)}"',
        # Error messages of torch's headers contain the file's path: this removes the folders of the build.
        *(f"-fmacro-prefix-map={path}/=" for path in (ROOT, *torch.include)),
        f"-I{CSRC}",
        *(f"-isystem{path}" for path in system),
    ]
    # No rpath is needed: torch is imported first, and the loader finds its loaded libraries by their names.
    link_flags = [
        *shlex.split(os.environ.get("LDFLAGS", "")),
        "-pthread",
        f"-L{torch.lib}",
        "-Wl,--no-as-needed",
        "-ltorch",
        "-ltorch_cpu",
    ]
    return compile_flags, link_flags


def _ninja_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _ninja_command(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def _write_ninja_file(build_dir: Path, opt: str, cuda: Cuda | None, why_no_cuda: str) -> Path:
    cxx = compiler()
    assert cxx is not None
    compile_flags, link_flags = _flags(opt, build_dir)
    # Only module.cpp gets the flags that tell what was built, so that nothing else recompiles when that changes.
    module_flags = [f'-DDLKERNELS_WHY_NO_CUDA="{why_no_cuda}"']
    nvcc, nvflags = [], []
    if cuda:
        module_flags = [
            f'-DDLKERNELS_CUDA_ARCHS="{" ".join(cuda.archs)}"',
            f'-DDLKERNELS_CUDA_RELEASE="{cuda.release}"',
        ]
        nvcc = [cuda.nvcc, f"-ccbin={cxx[0]}"]
        nvflags = [*nvcc_flags(cuda.archs), "-Xcompiler=-fPIC,-fvisibility=hidden"]
        link_flags += [f"-L{cuda.lib}", "-lcudart_static", "-ldl", "-lrt"]
    target = build_dir / module_name()
    rules = {".cpp": "compile", ".cu": "compile_cuda"}
    compiles, objects = [], []
    for unit in units(cuda is not None):
        own = [f"-DDLK_ISA={unit.isa}"] if unit.isa else []
        if unit.source == CSRC / "torch" / "module.cpp":
            own = module_flags
        objects.append(_ninja_path(build_dir / unit.object))
        compiles.append(f"build {objects[-1]}: {rules[unit.source.suffix]} {_ninja_path(unit.source)}")
        if own:
            compiles.append(f"  own = $ {_ninja_command(own)}")
    text = _NINJA.format(
        cxx=_ninja_command(cxx),
        cflags=_ninja_command(compile_flags),
        ldflags=_ninja_command(link_flags),
        nvcc=_ninja_command(nvcc),
        nvflags=_ninja_command(nvflags),
        compiles="\n".join(compiles),
        target=_ninja_path(target),
        objects=" ".join(objects),
    )
    file = build_dir / "build.ninja"
    if not file.is_file() or file.read_text() != text:
        file.write_text(text)
    return target


def _ninja() -> str:
    try:
        import ninja
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise SystemExit("dlkernels: ninja is needed to compile (pip install ninja)") from None
        return found
    return os.path.join(ninja.BIN_DIR, "ninja")


def build(out: Path, opt: str | None = None) -> None:
    """Brings `out`, the module's file, up to date with csrc/. A compile error raises SystemExit."""
    opt = opt or os.environ.get("DLKERNELS_OPT") or DEFAULT_OPT
    if opt not in ("0", "1", "2", "3"):
        raise SystemExit(f"dlkernels: DLKERNELS_OPT is the optimisation level, 0 to 3, not {opt!r}")
    build_dir = ROOT / "build" / f"native-{sys.implementation.cache_tag}-O{opt}"
    build_dir.mkdir(parents=True, exist_ok=True)
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    cuda, why_no_cuda = cuda_to_build()
    with (build_dir / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two builds at once would write the same objects
        target = _write_ninja_file(build_dir, opt, cuda, why_no_cuda)
        _tell_editors(build_dir)
        if subprocess.run([_ninja(), "-C", str(build_dir), "-j", jobs]).returncode != 0:
            raise SystemExit("dlkernels: the native module does not compile (the compiler's messages are above)")
        _install(target, out)
    built = f"for {', '.join(f'sm_{arch}' for arch in cuda.archs)}" if cuda else f"none: {why_no_cuda}"
    print(f"dlkernels: CPU kernels compiled; CUDA kernels {built}", flush=True)


def _tell_editors(build_dir: Path) -> None:
    """Writes how each file is compiled to build/compile_commands.json, which .clangd names."""
    listed = subprocess.run([_ninja(), "-C", str(build_dir), "-t", "compdb"], capture_output=True, text=True)
    if listed.returncode == 0:
        (ROOT / "build" / "compile_commands.json").write_text(listed.stdout)


def _install(target: Path, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.is_file() and out.stat().st_mtime_ns == target.stat().st_mtime_ns:
        return
    # The file is replaced, not overwritten, because a process may be running the old one.
    fresh = out.with_name(f".{out.name}.{os.getpid()}")
    shutil.copy2(target, fresh)
    fresh.replace(out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile dlkernels' native module in place.")
    parser.add_argument("--out", type=Path, default=ROOT / "dlkernels" / module_name(), help="file to write")
    parser.add_argument("--opt", choices=["0", "1", "2", "3"], help="optimisation level (DLKERNELS_OPT, else 2)")
    arguments = parser.parse_args()
    reason = why_not_compiled()
    if reason:
        raise SystemExit(f"dlkernels: nothing compiled: {reason}")
    build(arguments.out, arguments.opt)
    print(f"dlkernels: {arguments.out} is up to date")


if __name__ == "__main__":
    main()
