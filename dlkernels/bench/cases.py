"""Code that the layer and attention cases share: regimes, short names of dtypes, packed lengths, selection by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from typing import Protocol, TypeVar

REGIMES = ("latency", "middle", "GEMM-bound")
REGIME_TEXT = {
    "latency": "latency (B <= 4: call cost and weight traffic)",
    "middle": "middle",
    "GEMM-bound": "GEMM-bound (B*H*H >= 16M: matrix products take the time)",
}
SHORT_DTYPE = {"float32": "f32", "float64": "f64", "bfloat16": "bf16", "float16": "f16"}


class Named(Protocol):
    @property
    def name(self) -> str: ...


C = TypeVar("C", bound=Named)


def packed_lengths(longest: int, count: int) -> list[int]:
    """`count` lengths, spaced evenly from `longest` down to a quarter of it."""
    last = max(1, longest // 4)
    return [longest - (longest - last) * b // max(1, count - 1) for b in range(count)]


def select(cases: Iterable[C], patterns: Sequence[str]) -> list[C]:
    """The cases whose name contains or matches one of the patterns; all cases if there are no patterns."""
    return [c for c in cases if not patterns or any(p in c.name or fnmatch(c.name, p) for p in patterns)]
