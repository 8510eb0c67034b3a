"""Runs the units of work of which the rungs of run.py consist, MAX_JOBS at a time (default 2), and their commands."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
CUDA = CSRC / "rnn" / "cuda"
BUILD = ROOT / "build" / "cuda-tests"
JOBS = int(os.environ.get("MAX_JOBS") or min(2, len(os.sched_getaffinity(0))))

_here = threading.local()  # .spent: processor seconds of the commands that the current unit of this thread has run


class Failure(Exception):
    pass


class Done(NamedTuple):
    returncode: int
    output: str


class Unit(NamedTuple):
    """A piece of a rung. `seconds` is a guess of its time, by which units are ordered. `after` names the units that
    must have run before it."""

    rung: str
    name: str
    seconds: float
    run: Callable[[], object]
    after: tuple[str, ...] = ()


def call(command: Sequence[str | Path], **environment: str) -> Done:
    nice = ["nice", "-n", os.environ["NICE"]] if os.environ.get("NICE") else []
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        child = subprocess.Popen(
            [*nice, *map(str, command)], env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        _here.spent = getattr(_here, "spent", 0.0) + usage.ru_utime + usage.ru_stime
        output.seek(0)
        return Done(child.returncode, output.read())


def must(command: Sequence[str | Path], **environment: str) -> str:
    done = call(command, **environment)
    if done.returncode != 0:
        shown = " ".join([*(f"{name}={value}" for name, value in environment.items()), *map(str, command)])
        raise Failure(f"{shown[:2000]}\nended with {done.returncode}:\n{done.output[-6000:]}")
    return done.output


def kernel_object(file: str, arch: str) -> Path:
    """What the rung `compile` makes of a kernel file."""
    return BUILD / f"{file}.sm_{arch}.o"


def tool(*names: str) -> str:
    for name in names:
        if shutil.which(name):
            return name
    raise Failure(f"{names[0]} is missing")


class Outcome(NamedTuple):
    spent: float  # processor seconds
    ended: float  # seconds since the start of the run
    failure: str | None


def chosen_units(units: Sequence[Unit], rungs: Sequence[str]) -> list[Unit]:
    """The units of these rungs and all units on which they depend."""
    by_name = {unit.name: unit for unit in units}
    assert len(by_name) == len(units)
    todo = [unit.name for unit in units if unit.rung in rungs]
    wanted: set[str] = set()
    while todo:
        name = todo.pop()
        if name not in wanted:
            wanted.add(name)
            todo += by_name[name].after
    return [unit for unit in units if unit.name in wanted]


def run_units(units: Sequence[Unit], more_jobs: int | None = None) -> dict[str, Outcome]:
    """Runs all units, JOBS at a time, and one more at a time from each byte on that comes from the file descriptor
    `more_jobs`. The units on which the longest chain of others depends run first."""
    waiting = {unit.name: unit for unit in units}
    chain: dict[str, float] = {}

    def chain_from(unit: Unit) -> float:
        if unit.name not in chain:
            followers = (chain_from(other) for other in units if unit.name in other.after)
            chain[unit.name] = unit.seconds + max(followers, default=0.0)
        return chain[unit.name]

    order = sorted(units, key=chain_from, reverse=True)
    outcomes: dict[str, Outcome] = {}
    changed = threading.Condition()
    begin = time.monotonic()

    def next_unit() -> Unit | None:
        with changed:
            while waiting:
                for unit in order:
                    if unit.name in waiting and all(name in outcomes for name in unit.after):
                        return waiting.pop(unit.name)
                changed.wait()
        return None

    def work() -> None:
        while unit := next_unit():
            _here.spent = 0.0
            failure = next((f"{name} failed" for name in unit.after if outcomes[name].failure), None)
            if failure is None:
                try:
                    unit.run()
                except Exception as error:  # any error fails this unit; the others still run
                    failure = str(error) if isinstance(error, Failure) else repr(error)
            with changed:
                outcomes[unit.name] = Outcome(_here.spent, time.monotonic() - begin, failure)
                changed.notify_all()

    def work_beside() -> None:
        # A thread inside sys.stdin would be a fatal error when the interpreter ends.
        while more_jobs is not None and os.read(more_jobs, 1):
            threading.Thread(target=work).start()

    threading.Thread(target=work_beside, daemon=True).start()
    for _ in range(JOBS):
        threading.Thread(target=work).start()
    with changed:
        changed.wait_for(lambda: len(outcomes) == len(units))
    return outcomes
