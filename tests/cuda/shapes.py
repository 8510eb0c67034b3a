"""The shapes that the kernels run on under emulation: covering arrays, in which every pair of values of two factors
occurs somewhere, as far as the emulation can afford it (some tenths of a GFLOP a second).

A shape is cell:dtype:path:T:B:H:D:form:options, as kernels_test.cpp reads it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

_FACTORS: dict[str, tuple[str | int, ...]] = {
    "cell": ("lstm", "gru", "rnn_tanh", "rnn_relu"),
    "dtype": ("f32", "bf16", "f16"),
    "path": ("best", "small", "grid", "smallgrid", "steps"),
    "T": (1, 2, 5, 33),
    "B": (1, 3, 8, 17, 64),
    "H": (1, 16, 40, 64, 128, 200, 256, 512),
    "D": (1, 2),
    "form": ("padded", "lengths", "packed"),
    "options": ("b", "hb", "hbk", "hbf", "hg", "-"),
}
_T, _B, _H = (list(_FACTORS).index(name) for name in ("T", "B", "H"))

Row = tuple[str | int, ...]


def _affordable(row: Row) -> bool:
    T, B, H = int(row[_T]), int(row[_B]), int(row[_H])
    if H >= 256:
        return T <= 2 and B <= 8
    return T * B * H * H <= 5 * 17 * 200 * 200


def _small(row: Row) -> bool:
    return int(row[_T]) <= 5 and int(row[_H]) <= 64 and int(row[_T]) * int(row[_B]) <= 128


def _covering(allowed: Callable[[Row], bool], seed: int) -> list[str]:
    """Greedily, from random rows with a pair that is still missing."""
    chance = random.Random(seed)
    factors = list(_FACTORS.values())

    def row_with(i: int, a: str | int, j: int, b: str | int) -> Row | None:
        for _ in range(200):
            row = [chance.choice(factor) for factor in factors]
            row[i], row[j] = a, b
            if allowed(tuple(row)):
                return tuple(row)
        return None

    def pairs(row: Row) -> set[tuple[int, str | int, int, str | int]]:
        return {(i, row[i], j, row[j]) for i, j in itertools.combinations(range(len(row)), 2)}

    missing = [
        (i, a, j, b) for i, j in itertools.combinations(range(len(factors)), 2) for a in factors[i] for b in factors[j]
    ]
    rows: list[str] = []
    while missing:
        candidates = [row for _ in range(20) if (row := row_with(*missing[0])) is not None]
        if not candidates:  # a pair that no affordable row has
            missing.pop(0)
            continue
        left = set(missing)
        best = max(candidates, key=lambda row: len(pairs(row) & left))
        covered = pairs(best)
        missing = [pair for pair in missing if pair not in covered]
        rows.append(":".join(map(str, best)))
    return rows


def all_shapes() -> list[str]:
    return _covering(_affordable, seed=0)


def small_shapes() -> list[str]:
    """For the sanitizers."""
    return _covering(_small, seed=1)
