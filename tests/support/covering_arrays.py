"""Covering arrays: a small set of combinations that contains every pair of values of every two factors."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]


def pairwise(
    factors: Mapping[str, Sequence[Any]], allowed: Callable[[Row], bool] = lambda row: True, seed: int = 0
) -> list[Row]:
    """Returns rows that cover every allowed pair of values; the rows are the same in every run. `allowed` is also
    called with rows of only two factors and then says whether these two values may be combined."""
    generator = random.Random(seed)
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(factors, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
        if allowed({a: factors[a][i], b: factors[b][j]})
    }
    rows: list[Row] = []
    while missing:
        first = min(missing)
        best: tuple[int, dict[str, int]] | None = None
        for _ in range(200):
            chosen = dict(first)
            for name in generator.sample(list(factors), len(factors)):
                chosen.setdefault(name, generator.randrange(len(factors[name])))
            if not allowed({name: factors[name][index] for name, index in chosen.items()}):
                continue
            gain = len(missing & _pairs(chosen, factors))
            if best is None or gain > best[0]:
                best = gain, chosen
        if best is None:
            raise ValueError(f"no allowed row has {first}")
        missing -= _pairs(best[1], factors)
        rows.append({name: factors[name][best[1][name]] for name in factors})
    return rows


def _pairs(chosen: dict[str, int], factors: Mapping[str, Sequence[Any]]) -> set[Any]:
    return {((a, chosen[a]), (b, chosen[b])) for a, b in itertools.combinations(factors, 2)}


def row_id(row: Row) -> str:
    return "-".join(str(value).removeprefix("torch.") for value in row.values())
