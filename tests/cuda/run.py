"""Tests the CUDA kernels without a GPU: `python tests/cuda/run.py [--short | --quick] [RUNG...]`. The rungs:

emulation  the emulation's own test: each planted bug is noticed by the builds that must notice it
kernels    the kernels under emulation are compared with the reference, over a covering array of shapes
asan       the same over smaller shapes with the address and undefined-behaviour sanitizers
tsan       the same with clang's ThreadSanitizer, in several schedules
boundary   the torch boundary on CPU tensors with emulated kernels: tests/gpu/recurrent*_cuda.py (after `make build`)
mutants    bugs planted in the kernels: each must be noticed
compile    nvcc for sm_80, sm_90a and sm_100a: no spills, no local memory, registers, tensor-core instructions
linked     the kernels' test as a program for a GPU (on_gpu.py), which `make gpu-check` runs under compute-sanitizer
resident   all blocks of a plan that wait for each other at a barrier fit an H200 at the same time

This needs nvcc with its headers, g++, and clang++ with the runtimes of its sanitizers (Debian: clang,
libclang-rt-14-dev). A rung that lacks one of them fails. MAX_JOBS is the number of commands that run at a time (2);
with --more-jobs each byte on standard input adds one. NICE is their niceness. The times in the report are processor
times. --short, which `make gpuless` uses, leaves out one schedule of each shape and compiles everything for sm_90a
only, but some of it for the others too. --quick, which .ci/run uses, runs one schedule of each shape, and leaves out
the other architectures, float16 sequence kernels for nvcc, the program of the rung `linked`, and what only tests the
tests: emulation, mutants and the bugs planted in machine code.
"""

from __future__ import annotations

import os
import sys
import time
from collections import defaultdict

from ladder import BUILD, JOBS, ROOT, Outcome, Unit, chosen_units, run_units

sys.path.insert(0, str(ROOT / "csrc" / "setup"))
sys.dont_write_bytecode = True

import boundary  # noqa: E402
import compiled  # noqa: E402
import emulated  # noqa: E402
import on_gpu  # noqa: E402

RUNGS = ("emulation", "kernels", "boundary", "asan", "tsan", "mutants", "compile", "linked", "resident")


def report(units: list[Unit], outcomes: dict[str, Outcome]) -> list[str]:
    """Prints a line for each rung and returns what failed."""
    by_rung: defaultdict[str, list[Unit]] = defaultdict(list)
    for unit in units:
        by_rung[unit.rung].append(unit)
    failures = []
    for rung, members in by_rung.items():
        failed = [unit.name for unit in members if outcomes[unit.name].failure]
        spent = sum(outcomes[unit.name].spent for unit in members)
        result = f"FAILED: {', '.join(failed)}" if failed else "passed"
        print(f"{rung:10} {spent:5.0f} s  {len(members):3} units, the last after "
              f"{max(outcomes[unit.name].ended for unit in members):4.0f} s  {result}")  # fmt: skip
        failures += failed
    if os.environ.get("VERBOSE"):
        for unit in sorted(units, key=lambda unit: -outcomes[unit.name].spent):
            print(f"  {outcomes[unit.name].spent:5.1f} s (guess {unit.seconds:4.1f})  {unit.name}")
    for name in failures:
        print(f"\n{name}: {outcomes[name].failure}")
    return failures


def main() -> None:
    quick = "--quick" in sys.argv[1:]
    short = quick or "--short" in sys.argv[1:]
    wanted = [rung for rung in sys.argv[1:] if not rung.startswith("--")]
    wanted = wanted or [rung for rung in RUNGS if not quick or rung not in ("emulation", "mutants", "linked")]
    unknown = set(wanted) - set(RUNGS)
    if unknown:
        raise SystemExit(f"no such rung: {', '.join(unknown)}; there are {', '.join(RUNGS)}")
    BUILD.mkdir(parents=True, exist_ok=True)
    units = chosen_units(
        [*emulated.units(short, quick), *boundary.units(), *compiled.units(short, quick), *on_gpu.units()], wanted
    )
    begin = time.monotonic()
    outcomes = run_units(units, sys.stdin.fileno() if "--more-jobs" in sys.argv[1:] else None)
    failures = report(units, outcomes)
    spent = sum(outcome.spent for outcome in outcomes.values())
    print(f"all        {spent:5.0f} s  of processors, {time.monotonic() - begin:.0f} s by the clock, {JOBS} at a time")
    if failures:
        raise SystemExit(f"failed: {len(failures)} of {len(units)} units")


if __name__ == "__main__":
    main()
