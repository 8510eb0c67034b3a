"""The shapes on which the kernels run under emulation. They are covering arrays: every pair of values of two factors
occurs in some shape, unless it is too expensive for the emulation, which computes some tenths of a GFLOP per second.
Small shapes that together run every kernel are added to them.

A shape is written cell:dtype:path:T:B:H:D:form:options; test_case.h parses it.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from functools import cache

_FACTORS: dict[str, tuple[str | int, ...]] = {
    "cell": ("lstm", "lstm_cells", "gru", "rnn_tanh", "rnn_relu"),
    "dtype": ("f32", "bf16", "f16"),
    "path": ("best", "small", "wide", "grid", "smallgrid", "steps"),
    "T": (1, 2, 5, 33),
    "B": (1, 3, 8, 17, 64),
    "H": (1, 16, 40, 64, 128, 200, 256, 512),
    "D": (1, 2),
    "form": ("padded", "lengths", "packed"),
    "options": ("b", "hb", "hbk", "hbf", "hg", "-"),
    "resets": ("", "r"),
}
_NAMES = list(_FACTORS)
_LIMITED = [_NAMES.index(name) for name in ("path", "T", "B", "H", "D")]  # the factors that determine the cost

# In float32 a chunk of a grid has fewer cells than the block has threads. With an even number of chunks the final
# states of the last chunk are handled by other threads than its steps.
_FURTHER_SMALL = ("gru:f32:smallgrid:2:64:16:2:lengths:hb",)
# A grid uses each place of its exchange several times. An h_0 with the bits of an absent value (`n`) must not make the
# other blocks wait for ever.
_LONG = (
    "lstm:bf16:smallgrid:20:8:40:1:padded:hb",
    "lstm:bf16:smallgrid:20:24:16:2:lengths:hbn",
    "rnn_relu:f32:smallgrid:12:8:40:1:padded:hbn",
)

# Layers with layer normalisation, zoneout and recurrent dropout. A part of one unit has no variance. With more than 512
# units threads have several, and with more than 64 rows the sums have several segments.
_VARIANTS = (
    "lstm:f32:variant:5:3:40:2:lengths:hbkldz",
    "gru:f32:variant:5:3:40:2:packed:hbkldz",
    "lstm:f16:variant:4:2:70:1:padded:hbfldz",
    "lstm:f32:variant:3:2:1:1:padded:hblz",
    "gru:f32:variant:3:3:1:2:lengths:hble",
    "lstm:bf16:variant:5:3:17:2:packed:hkd",
    "gru:f16:variant:5:3:17:2:lengths:hbkdz",
)
_FURTHER_VARIANTS = (
    "gru:bf16:variant:3:5:33:1:lengths:bfle",
    "lstm:bf16:variant:3:5:33:2:packed:hble",
    "gru:f16:variant:4:2:70:2:padded:hgld",
    "lstm:f32:variant:2:9:16:1:packed:fe",
    "gru:f32:variant:2:1:520:1:padded:hbl",
    "lstm:f32:variant:1:80:8:1:lengths:hbldz",
)

Row = tuple[str | int, ...]
Pair = tuple[int, str | int, int, str | int]
Limits = tuple[str | int, ...]  # values of the limited factors
Allowed = Callable[..., bool]


def _affordable(path: str, T: int, B: int, H: int, D: int) -> bool:
    if H >= 256:
        return T <= 2 and B <= 8
    return T * B * H * H <= 5 * 17 * 200 * 200


def _small(path: str, T: int, B: int, H: int, D: int) -> bool:
    # On a large GPU up to so many blocks run at once. For the threads of 32 blocks the thread sanitizer takes about as
    # many mappings of memory as Linux gives a process.
    blocks = math.ceil(B / 8) * math.ceil(H / 16) * D
    few_blocks = path in ("small", "smallgrid", "steps") or blocks <= 24
    return T <= 5 and H <= 64 and T * B <= 128 and few_blocks


def _pairs(row: Row) -> set[Pair]:
    return {(i, row[i], j, row[j]) for i, j in itertools.combinations(range(len(row)), 2)}


@cache
def _all_limits(allowed: Allowed) -> list[Limits]:
    choices = (_FACTORS[_NAMES[i]] for i in _LIMITED)
    return [values for values in itertools.product(*choices) if allowed(*values)]


def _limits_with(allowed: Allowed, pair: Pair) -> Iterator[Limits]:
    """The allowed values of the limited factors that contain the pair's values, where the pair has such factors."""
    fixed = [(_LIMITED.index(i), value) for i, value in (pair[:2], pair[2:]) if i in _LIMITED]
    return (values for values in _all_limits(allowed) if all(values[i] == value for i, value in fixed))


@cache
def _possible_pairs(allowed: Allowed) -> tuple[Pair, ...]:
    factors = list(_FACTORS.values())
    return tuple(
        (i, a, j, b)
        for i, j in itertools.combinations(range(len(factors)), 2)
        for a, b in itertools.product(factors[i], factors[j])
        if next(_limits_with(allowed, (i, a, j, b)), None)
    )


def _covering(allowed: Allowed, seed: int) -> list[str]:
    """Builds a covering array greedily. Of 40 random rows that contain the first missing pair it takes the one that
    contains the most missing pairs."""
    chance = random.Random(seed)
    missing = list(_possible_pairs(allowed))
    rows: list[str] = []
    while missing:
        i, a, j, b = missing[0]
        limits = list(_limits_with(allowed, missing[0]))
        candidates = []
        for _ in range(40):
            row = [chance.choice(factor) for factor in _FACTORS.values()]
            row[i], row[j] = a, b
            for at, value in zip(_LIMITED, chance.choice(limits), strict=True):
                row[at] = value
            candidates.append(tuple(row))
        left = set(missing)
        best = max(candidates, key=lambda row: len(_pairs(row) & left))
        covered = _pairs(best)
        missing = [pair for pair in missing if pair not in covered]
        *parts, resets = map(str, best)
        rows.append(":".join(parts) + resets)
    return rows


def _every_kernel() -> Iterator[str]:
    """A shape for each sequence kernel: with room for one group, the batch determines the columns."""
    rest = itertools.cycle(itertools.product(("lengths", "padded", "packed"), ("hbkr", "hb", "bfr", "hg")))
    for cell, dtype in itertools.product(("lstm_cells", "gru", "rnn_tanh"), ("f32", "bf16", "f16")):
        kinds = [("small", B) for B in ((1, 2, 4, 8) if dtype == "f32" else (8, 16))]
        kinds += [("smallgrid", B) for _, B in kinds]
        if dtype != "f32" and cell != "rnn_tanh":
            kinds.append(("wide", 8))
        for path, B in kinds:
            yield ":".join((cell, dtype, path, "3", str(B), "72", "1", *next(rest)))


def _half_warps(shape: str) -> bool:
    """Whether in this shape of `_every_kernel` some warps have fewer cells than lanes."""
    _, dtype, path, _, B, *_ = shape.split(":")
    return path == "wide" or (dtype == "f32" and path == "smallgrid" and B == "1")


@cache
def all_shapes() -> list[str]:
    covering = _covering(_affordable, seed=0)
    return [*covering, *_FURTHER_SMALL, *_every_kernel(), *_LONG, *_VARIANTS, *_FURTHER_VARIANTS]


@cache
def small_shapes() -> list[str]:
    """The shapes that run under the sanitizers."""
    covering = _covering(_small, seed=1)
    return [*covering, *_FURTHER_SMALL, *filter(_half_warps, _every_kernel()), *_LONG, *_VARIANTS]


def work(shape: str) -> int:
    """Roughly the number of multiply-adds that a shape takes for one gate."""
    _, _, _, T, B, H, D, *_ = shape.split(":")
    return int(T) * int(B) * int(H) * int(H) * int(D)


def _row(shape: str) -> Row:
    parts = (*shape.removesuffix("r").split(":"), "r" if shape.endswith("r") else "")
    return tuple(int(part) if part.isdigit() else part for part in parts)


def check() -> None:
    """Checks that the arrays cover every affordable pair and that only the pairs of `big` are too expensive."""
    for seed, allowed in enumerate((_affordable, _small)):
        rows = [_row(shape) for shape in _covering(allowed, seed)]
        for row in rows:
            assert all(value in factor for value, factor in zip(row, _FACTORS.values(), strict=True)), row
            assert allowed(*(row[i] for i in _LIMITED)), row
        missing = set(_possible_pairs(allowed)) - set().union(*map(_pairs, rows))
        assert not missing, missing
    every = set(_possible_pairs(lambda *_: True))
    beyond = {(_NAMES[i], a, _NAMES[j], b) for i, a, j, b in every - set(_possible_pairs(_affordable))}
    big = {(name, size, "H", H) for name, size in (("T", 5), ("T", 33), ("B", 17), ("B", 64)) for H in (256, 512)}
    assert beyond == big, beyond ^ big
