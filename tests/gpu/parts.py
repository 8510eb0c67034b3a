"""The parts of `make gpu-check`: their order, their time limits and their workers."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from supervise import Worker
from tools import tool

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
REHEARSED = "test_pairs_of_features or test_decode or test_cuda_graph or test_autocast"


class Run(NamedTuple):
    """What the workers of a part depend on."""

    rehearse: bool
    on_gpu: bool
    cores: int


class Part(NamedTuple):
    name: str
    limit: float  # seconds
    stages: Callable[[Run], list[list[Worker]]]
    needs: str = ""  # a tool without which the part cannot run


def python(file: str, *arguments: str) -> list[str]:
    return [sys.executable, str(HERE / file), *arguments]


def settings(run: Run, **more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    device = {"DLKERNELS_DEVICE": "cpu", "OMP_NUM_THREADS": "1"} if run.rehearse else {}
    # In a rehearsal the module need not be compiled.
    return {"PYTHONPATH": path, "DLKERNELS_TEST_ALLOW_REFERENCE": "1", **device, **more}


def build(run: Run) -> list[list[Worker]]:
    compile_for = {"DLKERNELS_CUDA": str(int(run.on_gpu))}
    return [[
        Worker(name, python("build.py", name), settings(run, **compile_for), 600.0, fresh=True)
        for name in ("module", "programs")
    ]]  # fmt: skip


def smoke(run: Run) -> list[list[Worker]]:
    return [[Worker("smoke", python("smoke.py"), settings(run), 40.0)]]


def recurrent(run: Run) -> list[list[Worker]]:
    return [[Worker("recurrent", python("bench_recurrent.py"), settings(run), 30.0)]]


def attention(run: Run) -> list[list[Worker]]:
    count = 1 if run.rehearse else max(1, min(12, run.cores - 2))
    compiling = [
        Worker(f"compile-{i}", python("bench_attention.py", "compile", f"{i}/{count}"), settings(run), 90.0, fresh=True)
        for i in range(count)
    ]
    return [compiling, [Worker("attention", python("bench_attention.py", "measure"), settings(run), 60.0)]]


def tests(run: Run) -> list[list[Worker]]:
    """Several processes, since most of the time goes into compiling and into float64 on the CPU."""
    shards = {
        "attention": max(1, min(10, run.cores - 5)), "recurrent": max(1, min(3, run.cores - 2)), "recurrent_torch": 1,
        "recurrent_dropin": 1, "recurrent_resets": 1, "recurrent_variants": 1,
    }  # fmt: skip

    threads = {} if run.rehearse else {"OMP_NUM_THREADS": "2"}

    def worker(name: str, files: list[str], shard: str, *more: str) -> Worker:
        options = ["-q", "--tb=short", "-p", "no:cacheprovider", f"--confcutdir={HERE}", *more]
        command = [sys.executable, "-m", "pytest", *(str(HERE / f"{file}_cuda.py") for file in files), *options]
        return Worker(name, command, settings(run, DLKERNELS_SHARD=shard, **threads), 120.0)

    if run.rehearse:  # a few of each file; all of the recurrent ones run in the rung `boundary`
        return [[worker("few", list(shards), "0/40", "-k", REHEARSED)]]
    return [[worker(f"{name}-{i}", [name], f"{i}/{count}") for name, count in shards.items() for i in range(count)]]


def sanitizer(name: str) -> Callable[[Run], list[list[Worker]]]:
    return lambda run: [[Worker(name, python("sanitize.py", name), settings(run), 60.0)]]


def ncu(run: Run) -> list[list[Worker]]:
    return [[Worker("ncu", python("counters.py"), settings(run), 60.0)]]


# The order is that of what is wanted first from a GPU that is lent for half an hour.
PARTS = (
    Part("build", 240.0, build),
    Part("smoke", 90.0, smoke),
    Part("recurrent", 240.0, recurrent),
    Part("attention", 360.0, attention),
    Part("tests", 420.0, tests),
    Part("memcheck", 180.0, sanitizer("memcheck"), "compute-sanitizer"),
    Part("racecheck", 120.0, sanitizer("racecheck"), "compute-sanitizer"),
    Part("synccheck", 120.0, sanitizer("synccheck"), "compute-sanitizer"),
    Part("ncu", 60.0, ncu, "ncu"),
)
GROUPS = {"sanitizers": ("memcheck", "racecheck", "synccheck")}


def why_not(part: Part) -> str:
    return f"there is no {part.needs}" if part.needs and tool(part.needs) is None else ""
