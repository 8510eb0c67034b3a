"""How fast a layer could be on this machine at most: its products at the rate of a large torch.mm, and its weights read
at the rate at which the machine reads as many bytes. Both rates are measured here.

The products are counted as 2 operations for each weight, row and step, and three times as many in training. W_hh is
read in every step, W_ih once in a call. A call takes the longer of the two times; nothing else is counted, neither the
cells nor the exchange between threads nor the call itself, so a call of a few microseconds cannot reach its bound.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import time
from collections.abc import Callable

import torch

from .engines import GATES

__all__ = ["counted", "product_rate", "read_rate", "seconds"]

_SIZE = 1024  # of the matrices of the large product
_TRIES, _LEAST = 5, 2e-3  # how often a rate is measured, for how many seconds at least


def counted(mode: str, B: int, T: int, I: int, H: int, training: bool, item_bytes: int) -> tuple[int, int, int]:
    """Operations of a call, bytes of weights that it reads, and bytes of weights that it returns to: W_ih and W_hh."""
    rows = len(GATES[mode]) * H
    ih, hh = rows * I, rows * H
    operations = 2 * B * T * (ih + hh) * (3 if training else 1)
    return operations, (ih + T * hh) * item_bytes, (ih + hh if T == 1 else hh) * item_bytes


@functools.cache
def product_rate(dtype: torch.dtype, threads: int) -> float:
    """Operations a second of torch.mm."""
    a, b = torch.randn(2, _SIZE, _SIZE).to(dtype)
    present = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.mm(a, b)
        best = min(_timed(lambda: torch.mm(a, b)) for _ in range(_TRIES))
    finally:
        torch.set_num_threads(present)
    return 2 * _SIZE**3 / best


@functools.cache
def read_rate(size: int, threads: int) -> float:
    """Bytes a second when the same `size` bytes are read again and again, each thread its part. The C library's memchr
    reads them: it looks for a byte that is not there and does little else. Fewer than 256 KB a thread count as 256 KB,
    since a call of memchr from Python would take longer than to read them."""
    part = max(size // threads, 1 << 18)
    memchr = ctypes.CDLL(None).memchr
    memchr.argtypes, memchr.restype = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], ctypes.c_void_p
    buffers = [ctypes.create_string_buffer(part) for _ in range(threads)]
    calls = 1 + int(_LEAST * 50e9 / part)

    def read(buffer: ctypes.Array[ctypes.c_char], spent: list[float], start: threading.Barrier) -> None:
        address = ctypes.addressof(buffer)
        memchr(address, 1, part)
        start.wait()
        begin = time.perf_counter()
        for _ in range(calls):
            memchr(address, 1, part)
        spent.append(time.perf_counter() - begin)

    best = float("inf")
    for _ in range(_TRIES):
        spent: list[float] = []
        start = threading.Barrier(threads)
        workers = [threading.Thread(target=read, args=(buffer, spent, start)) for buffer in buffers]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = min(best, max(spent))
    return threads * part * calls / best


def seconds(
    mode: str, B: int, T: int, I: int, H: int, training: bool, dtype: torch.dtype, item_bytes: int, threads: int
) -> float:
    """The least time of a call of one layer. `item_bytes` is the size of a weight, `dtype` that of the products. With
    int8 weights only the reading counts, because torch has no product of int8 that would be a measure."""
    operations, read, size = counted(mode, B, T, I, H, training, item_bytes)
    reading = read / read_rate(size, threads)
    return reading if item_bytes == 1 else max(operations / product_rate(dtype, threads), reading)


def _timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
