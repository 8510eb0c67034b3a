"""Runs the workers of a part of `make gpu-check`. Their output is printed and logged line by line as it comes, a case
that hangs costs only itself, and at the time limit of the part everything that is left is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from journal import RESTART, Journal, Story

ROOT = Path(__file__).resolve().parents[2]
START = 150.0  # seconds in which a worker imports torch and begins its first case
POLL = 0.1
OVER = "the time of this part was over"
# Every process has a group of its own, so that its children can be ended with it.
_OWN_GROUP: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
_running: set[_Process] = set()
_stopped = threading.Event()


class Worker(NamedTuple):
    """A process that keeps a journal and can be started again. `patience` is how long a case may take, in seconds. A
    `fresh` one does not continue behind an earlier journal, since what it makes need not be on this machine."""

    name: str
    command: list[str]
    environment: dict[str, str]
    patience: float
    fresh: bool = False


class Outcome(NamedTuple):
    name: str
    cases: dict[str, dict[str, Any]]
    not_run: list[str]
    problem: str  # why the worker as a whole ended too early, or ""


class _Process:
    """A started worker, whose output a thread passes on."""

    def __init__(self, worker: Worker, log: Path, environment: dict[str, str]) -> None:
        self.name = worker.name
        self._log = log.open("a")
        self._popen = subprocess.Popen(
            worker.command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", **_OWN_GROUP,
        )  # fmt: skip
        _running.add(self)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            self._log.write(line)
            self._log.flush()
            print(f"[{self.name}] {line}", end="", flush=True)

    def status(self) -> int | None:
        return self._popen.poll()

    def end(self) -> None:
        """Kills what is left of the process and its children. SIGABRT first makes Python print where it is."""
        with contextlib.suppress(ProcessLookupError):
            if self._popen.poll() is None:
                os.kill(self._popen.pid, signal.SIGABRT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._popen.wait(timeout=2)
            os.killpg(self._popen.pid, signal.SIGKILL)
        # A process that waits for a driver that does not answer cannot be killed; the others must not wait for it.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(timeout=10)
        self._reader.join(timeout=5)
        self._log.close()
        _running.discard(self)


def stop() -> None:
    """Ends all processes, of a run that an exception has left. No more are started."""
    _stopped.set()
    for process in tuple(_running):
        process.end()


def _run_worker(worker: Worker, folder: Path, until: float) -> Outcome:
    path = folder / f"{worker.name}.journal"
    if worker.fresh:
        path.unlink(missing_ok=True)
    journal = Journal(path)
    log = folder / f"{worker.name}.log"
    environment = {
        **os.environ, **worker.environment, "DLKERNELS_JOURNAL": str(path), "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
    }  # fmt: skip
    problem = "" if time.time() < until else OVER
    while not problem and time.time() < until and not _stopped.is_set():
        before, size = len(Story(path).ended), _size(path)
        process = _Process(worker, log, environment)
        problem = _watch(worker, process, journal, size, until)
        story = Story(path)
        if not problem and not story.not_run:
            break
        if not problem and len(story.ended) == before:
            problem = "ended without ending a case"
    story = Story(path)
    if not story.planned and not problem:
        problem = "wrote no list of cases"
    return Outcome(worker.name, story.ended, story.not_run, problem)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _watch(worker: Worker, process: _Process, journal: Journal, size: int, until: float) -> str:
    """Waits for the end of a process, before whose start the journal had `size` bytes. Returns why the worker must not
    be started again, or "" if it may."""
    begun, patience = time.time(), START
    while True:
        time.sleep(POLL)
        status, now = process.status(), time.time()
        grown = _size(journal.path)
        if grown != size:
            begun, size, patience = now, grown, worker.patience
        if status is None and now < until and now - begun < patience:
            continue
        process.end()
        running = Story(journal.path).running
        if status is None and now >= until:
            return OVER + (f", in {running}" if running else "")
        if running is None:
            if status in (0, RESTART):
                return ""
            return f"ended with status {status}" if status is not None else f"no case began in {patience:.0f} s"
        said = f"ended with status {status}" if status is not None else f"hung: no end after {patience:.0f} s"
        print(f"[{worker.name}] {running}: {said}", flush=True)
        journal.end(running, {"failed": said})
        return ""


def run(stages: Sequence[Sequence[Worker]], folder: Path, until: float) -> list[Outcome]:
    """Runs the stages one after the other, and the workers of a stage side by side. `until` is a time.time()."""
    folder.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for stage in stages:
        here: list[Outcome] = []

        def work(worker: Worker, here: list[Outcome] = here) -> None:
            here.append(_run_worker(worker, folder, until))

        threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in stage]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        outcomes += sorted(here, key=lambda outcome: outcome.name)
    return outcomes
