"""Processes that form a group of torch.distributed (gloo) and run functions of the tests. They are started once for
many tests, because each needs seconds to import torch."""

from __future__ import annotations

import contextlib
import datetime
import io
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# How long a function of a test and the start of the processes may take, in seconds, on a machine that is busy with
# other things.
LIMIT = 200.0


class Failed(AssertionError):
    """A function raised an exception in a process of the group; the message has its traceback."""


class Processes:
    """`world` processes, each with one thread for computing. In each of them `groups` holds process groups by their
    number of ranks: ranks 0 and 1 are a group, ranks 2 and 3 are one, and so on. timeout: of these groups, in seconds.
    """

    def __init__(self, world: int, folder: Path, timeout: float = 100.0) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._ends: list[Any] = []
        self._processes = []
        for rank in range(world):
            ours, theirs = spawn.Pipe()
            arguments = (rank, world, str(folder / "meeting"), timeout, theirs)
            with _environment(OMP_NUM_THREADS="1"):
                process = spawn.Process(target=_serve, args=arguments, daemon=True)
                process.start()
            theirs.close()
            self._ends.append(ours)
            self._processes.append(process)

    def begin(self, function: Callable[..., Any], *args: Any, ranks: Sequence[int] | None = None) -> None:
        """Begins a function of a module on these ranks, or on all. Its results are tensors or plain values."""
        task = _to_bytes((function, args))
        for rank in range(len(self._ends)) if ranks is None else ranks:
            self._ends[rank].send_bytes(task)

    def result(self, rank: int) -> Any:
        """What the function returned on this rank."""
        deadline = time.monotonic() + LIMIT
        while not self._ends[rank].poll(0.2):
            if time.monotonic() > deadline:
                raise Failed(f"rank {rank} did not end within {LIMIT} s")
        try:
            error, value = _from_bytes(self._ends[rank].recv_bytes())
        except EOFError:
            self._processes[rank].join()
            raise Failed(f"rank {rank} ended with status {self._processes[rank].exitcode}") from None
        if error is not None:
            raise Failed(f"rank {rank}: {error}")
        return value

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Runs `function` on every rank and returns what it returned, rank by rank."""
        self.begin(function, *args)
        found: list[Any] = []
        failures = []
        for rank in range(len(self._ends)):
            try:
                found.append(self.result(rank))
            except Failed as failure:
                failures.append(str(failure))
        if failures:
            raise Failed("\n".join(failures))
        return found

    def end(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


groups: dict[int, dist.ProcessGroup] = {}


def _serve(rank: int, world: int, meeting: str, timeout: float, tasks: Any) -> None:
    torch.set_num_threads(1)
    limit, of_start = (datetime.timedelta(seconds=seconds) for seconds in (timeout, LIMIT))
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=of_start)
    size = 1
    while size <= world:
        for first in range(0, world, size):
            group = dist.new_group(list(range(first, first + size)), timeout=limit)
            if first <= rank < first + size:
                groups[size] = group
        size *= 2
    while True:
        try:
            function, args = _from_bytes(tasks.recv_bytes())
        except EOFError:
            return
        try:
            done = None, function(*args)
        except Exception:
            done = traceback.format_exc(), None
        tasks.send_bytes(_to_bytes(done))


@contextlib.contextmanager
def _environment(**changed: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _to_bytes(value: Any) -> bytes:
    """torch.save copies the values of tensors; multiprocessing would share their memory."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _from_bytes(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)
