"""Threads, ISA and determinism for a block of code, and fresh interpreters with settings of their own."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dlkernels._core import extension


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    if not extension.HAVE_NATIVE:
        yield
        return
    extension.native.set_isa(name)
    try:
        yield
    finally:
        extension.native.set_isa(None)


def kernels_of(
    isa: str, *, attention: torch.dtype | None = None, layer: torch.dtype | None = None, dot: bool = False
) -> str:
    """The instruction set whose kernels serve `isa` for attention or for a layer of even sizes without a projection, in
    that dtype: those that multiply bfloat16 have kernels for nothing else."""
    if isa not in ("avx512_bf16", "amx"):
        return isa
    if attention == torch.bfloat16 and not dot:
        return isa
    return "avx512_bf16" if layer == torch.bfloat16 and not dot else "avx512"


def whole_pairs(n: int) -> int:
    """n, or the next even number under the instruction set that takes bfloat16 in pairs, of even sizes alone."""
    return n + n % 2 if extension.native is not None and extension.native.isa() == "avx512_bf16" else n


@contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(enabled)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def run_python(source: str, timeout: float = 120, **env: str) -> str:
    """Runs `source` in a fresh interpreter that sees these helpers; returns what it printed."""
    here = os.path.dirname(os.path.abspath(__file__))
    paths = [here, *[p for p in (os.environ.get("PYTHONPATH"),) if p]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONFAULTHANDLER": "1", **env}
    try:
        done = subprocess.run(
            [sys.executable, "-c", inspect.cleandoc(source)], capture_output=True, text=True, timeout=timeout,
            env=environment, cwd=os.path.dirname(here),
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"no end after {timeout} s\n{error.stdout}\n{error.stderr}") from error
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
