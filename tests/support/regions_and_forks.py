"""Runs code inside a busy parallel region or a forked child, for the scripts of `fresh_python.run_python`."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import select
import threading
from collections.abc import Callable

import torch


def in_parallel_region(body: Callable[[], None]) -> bool:
    """Runs `body` on two threads in a parallel region of torch's OpenMP. Returns False if torch ships no libgomp."""
    library = os.path.join(os.path.dirname(torch.__file__), "lib", "libgomp.so.1")
    if not os.path.exists(library):
        return False
    gomp = ctypes.CDLL(library)
    failures: list[str] = []
    inside: list[tuple[int, int]] = []

    def member(_: object) -> None:
        inside.append((threading.get_ident(), gomp.omp_in_parallel()))
        try:
            body()
        except BaseException as error:
            failures.append(repr(error))

    callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(member)
    gomp.GOMP_parallel(callback, None, 2, 0)
    assert not failures, failures
    assert len(set(inside)) == 2 and all(flag == 1 for _, flag in inside), inside
    return True


def in_forked_child(body: Callable[[], None]) -> None:
    """Runs `body` in a child of this process, which must neither raise nor hang."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        faulthandler.dump_traceback_later(50, exit=True)
        verdict = b"failed"
        try:
            body()
            verdict = b"passed"
        except BaseException as error:
            verdict = repr(error).encode()
        finally:
            os.write(writer, verdict)
            os._exit(0)
    ready = select.select([reader], [], [], 60)[0]
    if not ready:
        os.kill(child, 9)
        os.waitpid(child, 0)
        raise SystemExit("the child hangs")
    verdict = os.read(reader, 4000)
    os.waitpid(child, 0)
    assert verdict == b"passed", verdict.decode()
