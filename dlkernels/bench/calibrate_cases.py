"""The calls by which `bench --calibrate` measures each constant: small sweeps around the number in the table."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch

from .. import functional, nn
from .calibrate import NEVER, Best, Call, Crossover, Point

__all__ = ["cases", "speed"]

_SERIAL = {"rnn_serial_work": 1}


def cases(threads: int) -> list[Crossover | Best]:
    """Those that several threads are needed for are left out where torch has only one."""
    return [*(_of_threads(threads) if threads > 1 else []), *_of_layers(), *_of_attention(threads), *_of_switches()]


def _layer(T: int, B: int, H: int, kind: str = "LSTM", I: int | None = None) -> Call:
    layer = getattr(nn, kind)(H if I is None else I, H)
    return functools.partial(layer, torch.randn(T, B, H if I is None else I))


def _at(at: int, T: int, B: int, H: int) -> Point:
    return Point(at, lambda: _layer(T, B, H))


def _of_threads(n: int) -> list[Crossover | Best]:
    return [
        Crossover(
            "rnn_serial_work", f"LSTM, T 20, B 4, 1 thread / {n}", {"rnn_serial_work": NEVER}, _SERIAL,
            [_at(20 * 4 * 8 * H * H, 20, 4, H) for H in (8, 12, 16, 24, 32, 48, 64)],
        ),
        Crossover(
            "rnn_units_work_saved", "LSTM, T 50, B 1, 1 thread / units", {**_SERIAL, "rnn_units_work_saved": NEVER},
            {**_SERIAL, "rnn_units_work_saved": 1},
            [_at(round(8 * H * H * (1 - 1 / n)), 50, 1, H) for H in (32, 48, 64, 96, 128, 192)],
        ),
        Crossover(
            "rnn_own_rows", "LSTM, T 20, H 128, units / own rows", {"rnn_own_rows": NEVER, "rnn_units_work_saved": 1},
            {"rnn_own_rows": 1}, [_at(rows, 20, n * rows, 128) for rows in (1, 2, 4, 8, 16, 32)],
        ),
        Crossover(
            "rnn_own_rows_beyond", "LSTM, T 5, H 640, units / own rows", {"rnn_own_rows_beyond": NEVER},
            {"rnn_own_rows_beyond": 1}, [_at(rows, 5, n * rows, 640) for rows in (4, 8, 16, 32, 64)],
        ),
        Crossover(
            "rnn_own_units", f"LSTM, T 1, B {32 * n}, own rows / units",
            {"rnn_own_units": NEVER, "rnn_own_rows_beyond": 32}, {"rnn_own_units": 1},
            [_at(units, 1, 32 * n, n * units) for units in (32, 64, 128, 256, 384)],
        ),
        Crossover(
            "attention_serial_work", f"4 heads, D 64, 1 thread / {n}", {"attention_serial_work": NEVER},
            {"attention_serial_work": 1},
            [Point(512 * M * M, functools.partial(_attend, 1, 4, M, M)) for M in (10, 16, 24, 32, 48, 64)],
        ),
    ]  # fmt: skip


def _of_layers() -> list[Crossover | Best]:
    return [
        Crossover(
            "rnn_dot_rows", "LSTM, T 1, H 128, dot / tiles", {"rnn_dot_rows": NEVER}, {"rnn_dot_rows": 1},
            [_at(rows, 1, rows, 128) for rows in (2, 4, 6, 8, 12, 16, 24, 32)], inclusive=True,
        ),
        Crossover(
            "rnn_dot_rows_beyond", "LSTM, T 1, H 512, dot / tiles", {"rnn_dot_rows_beyond": NEVER},
            {"rnn_dot_rows_beyond": 1}, [_at(rows, 1, rows, 512) for rows in (2, 4, 8, 12, 16, 24, 32)], inclusive=True,
        ),
        Crossover(
            "rnn_fused_rows", "LSTM, T 50, H 128, chunks / fused", {"rnn_fused_rows": NEVER}, {"rnn_fused_rows": 1},
            [_at(rows, 50, rows, 128) for rows in (2, 4, 8, 16, 32)],
        ),
        Crossover(
            "rnn_fused_bytes", "LSTM, T 5, B 16, fused / chunks", {"rnn_fused_bytes": NEVER}, {"rnn_fused_bytes": 1},
            [_at(32 * H * H, 5, 16, H) for H in (256, 512, 704, 896, 1152)], inclusive=True,
        ),
        Best(
            "rnn_chunk_rows", "GRU, T 100, B 16, H 256", (96, 192, 384, 768, 1536), lambda: _layer(100, 16, 256, "GRU")
        ),
    ]  # fmt: skip


def _attend(B: int, H: int, M: int, N: int, dtype: torch.dtype = torch.float32) -> Call:
    q, k, v = (torch.randn(B, H, rows, 64, dtype=dtype) for rows in (M, N, N))
    return functools.partial(functional.attention, q, k, v)


def _of_attention(threads: int) -> list[Crossover | Best]:
    return [
        Crossover(
            "attention_dot_rows", "8 heads, N 1024, D 64, dot / tiles", {"attention_dot_rows": NEVER},
            {"attention_dot_rows": 1},
            [Point(M, functools.partial(_attend, 1, 8, M, 1024)) for M in (2, 4, 6, 8, 12, 16, 24)], inclusive=True,
        ),
        Best(
            "attention_block_rows", "4 heads, M = N = 1024, D 64", (96, 144, 192, 288, 384),
            lambda: _attend(1, 4, 1024, 1024),
        ),
        Best(
            "attention_converted_block_rows", "the same in bfloat16", (144, 192, 240, 336, 528),
            lambda: _attend(1, 4, 1024, 1024, torch.bfloat16),
        ),
        Best(
            "attention_tasks", "1 head, M 64, N 8192, D 64", (threads, 8, 16, 32, 64), lambda: _attend(1, 1, 64, 8192)
        ),
        Best(
            "attention_split_keys", "1 head, M 64, N 4096, D 64", (128, 256, 512, 1024, 2048),
            lambda: _attend(1, 1, 64, 4096),
        ),
    ]  # fmt: skip


def _sdpa(M: int, dtype: torch.dtype) -> Call:
    """torch's function: `enable` is on, and leaves calls of few scores to torch."""
    q, k, v = (torch.randn(1, 2, M, 64, dtype=dtype) for _ in range(3))
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)


def _training(M: int) -> Call:
    q, k, v = (torch.randn(1, 2, M, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))

    def call() -> Any:
        with torch.enable_grad():
            o = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            return torch.autograd.grad(o, (q, k, v), o)

    return call


def _fast_path(T: int, dtype: torch.dtype) -> Call:
    layer, x = torch.nn.MultiheadAttention(64, 4, batch_first=True, dtype=dtype).eval(), torch.randn(1, T, 64).to(dtype)
    return functools.partial(layer, x, x, x, need_weights=False)


def _of_switches() -> list[Crossover | Best]:
    wide, narrow = torch.float32, torch.bfloat16
    sizes = (16, 32, 45, 64, 91, 128)
    ways: list[tuple[str, str, list[Point]]] = [
        (name, what, [Point(2 * M * M, functools.partial(make, M, *options)) for M in sizes])
        for name, what, make, options in (
            ("sdpa_least_scores", "D 64, float32, torch / ours", _sdpa, (wide,)),
            ("sdpa_least_scores_16_bit", "D 64, bfloat16, torch / ours", _sdpa, (narrow,)),
            ("sdpa_least_scores_16_bit_training", "the same in training", _training, ()),
        )
    ]
    ways += [
        (name, what, [Point(4 * T * T, functools.partial(_fast_path, T, dtype)) for T in (16, 32, 45, 64, 91, 128)])
        for name, what, dtype in (
            ("fast_path_least_scores", "MultiheadAttention(64, 4), float32, torch / ours", wide),
            ("fast_path_least_scores_16_bit", "the same in bfloat16", narrow),
        )
    ]
    return [Crossover(name, what, {name: NEVER}, {name: 1}, points) for name, what, points in ways]


def speed() -> int:
    """Multiply-adds of one core in a microsecond: those of an LSTM that has nothing to wait for."""
    T, B, H = 20, 64, 256
    call, threads = _layer(T, B, H), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            times = []
            for _ in range(20):
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return round(T * B * 8 * H * H / (sorted(times)[5] * 1e6))
