"""Finds the tools of the CUDA toolkit and the programs that tests/cuda makes for a GPU. A rehearsal has stubs."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STUBS = Path(__file__).resolve().parent / "stubs"
BUILD = ROOT / "build" / "cuda-tests"
PROGRAMS = {"clusters": BUILD / "clusters-gpu", "kernels": BUILD / "kernels-gpu"}


def rehearsal() -> bool:
    return os.environ.get("DLKERNELS_DEVICE") == "cpu"


def tool(name: str) -> str | None:
    """A tool on the PATH or beside nvcc."""
    if rehearsal():
        return str(STUBS / name)
    nvcc = shutil.which(os.environ.get("NVCC") or "nvcc")
    folders = [Path(nvcc).resolve().parent, Path("/usr/local/cuda/bin")] if nvcc else [Path("/usr/local/cuda/bin")]
    return shutil.which(name) or next((str(folder / name) for folder in folders if (folder / name).is_file()), None)


def _newest(*folders: Path) -> float:
    return max(path.stat().st_mtime for folder in folders for path in folder.rglob("*") if path.is_file())


def kernels_program(name: str) -> str:
    """The path of a program of the rung `linked` (tests/cuda/on_gpu.py), made anew if a source is newer than it."""
    if rehearsal():
        return str(STUBS / f"{name}-gpu")
    program = PROGRAMS[name]
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several workers may ask at the same time
        sources = _newest(ROOT / "csrc", ROOT / "tests" / "cuda")
        if not program.is_file() or program.stat().st_mtime < sources:
            command = [sys.executable, str(ROOT / "tests" / "cuda" / "run.py"), "linked"]
            jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
            done = subprocess.run(command, env={**os.environ, "MAX_JOBS": jobs}, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return str(program)
