"""What is measured: one Case per shape, op, layout, dtype and thread count, and the lists of them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from typing import Protocol, TypeVar

MODES = ("lstm", "gru", "rnn")
REGIMES = ("latency", "middle", "GEMM-bound")
REGIME_TEXT = {
    "latency": "latency (B <= 4: call cost and weight traffic)",
    "middle": "middle",
    "GEMM-bound": "GEMM-bound (B*H*H >= 16M: matrix products take the time)",
}
SHORT_DTYPE = {"float32": "f32", "float64": "f64", "bfloat16": "bf16", "float16": "f16"}

Shape = tuple[int, int, int, int]


class Named(Protocol):
    def matches(self, pattern: str) -> bool: ...


C = TypeVar("C", bound=Named)


@dataclasses.dataclass(frozen=True)
class Case:
    """`against` is what our side is measured against: torch.nn, or our own layer in another mode of use:
    "padded" (this case is packed; compared per valid step) or "default" (this case is deterministic)."""

    mode: str
    B: int
    T: int
    I: int
    H: int
    cell: bool = False
    training: bool = False
    packed: bool = False
    dtype: str = "float32"
    threads: int = 1
    against: str = "torch"
    target: float | None = None

    @property
    def workload(self) -> str:
        """The name without the thread count."""
        return "-".join(
            [
                self.mode + ("cell" if self.cell else ""),
                "train" if self.training else "infer",
                *(["packed"] if self.packed else []),
                *(["deterministic"] if self.against == "default" else []),
                *(["vs-padded"] if self.against == "padded" else []),
                SHORT_DTYPE[self.dtype],
                self.shape_text,
            ]
        )

    @property
    def name(self) -> str:
        return f"{self.workload}-{self.threads}t"

    @property
    def shape_text(self) -> str:
        return f"B{self.B}-I{self.I}-H{self.H}" if self.cell else f"B{self.B}-T{self.T}-I{self.I}-H{self.H}"

    @property
    def regime(self) -> str:
        if self.B <= 4:
            return "latency"
        return "GEMM-bound" if self.B * self.H * self.H >= 16_000_000 else "middle"

    @property
    def lengths(self) -> list[int]:
        """Of a packed case: evenly from T down to T/4."""
        first, last = self.T, max(1, self.T // 4)
        return [first - (first - last) * b // max(1, self.B - 1) for b in range(self.B)]

    @property
    def valid_fraction(self) -> float:
        return sum(self.lengths) / (self.B * self.T)

    def matches(self, pattern: str) -> bool:
        return pattern in self.name or fnmatch(self.name, pattern)


GRID_SHAPES: tuple[Shape, ...] = (
    (1, 1, 128, 128),
    (1, 100, 128, 128),
    (1, 100, 512, 512),
    (16, 100, 256, 256),
    (256, 100, 64, 64),
    (64, 100, 512, 512),
)
PACKED_SHAPES: tuple[Shape, ...] = ((32, 200, 64, 64), (64, 100, 256, 256))
CELL_SHAPES: tuple[Shape, ...] = ((1, 1, 128, 128), (16, 1, 256, 256), (128, 1, 512, 512))
# Of the other dtypes, one shape per regime.
DTYPE_SHAPES: tuple[Shape, ...] = ((1, 100, 128, 128), (16, 100, 256, 256), (64, 100, 512, 512))
QUICK_SHAPES: tuple[Shape, ...] = ((1, 100, 128, 128), (16, 100, 256, 256))


def grid(threads: Sequence[int], dtypes: Sequence[str], quick: bool = False) -> list[Case]:
    """Thread counts are innermost, so the runner computes each reference once."""
    first = dtypes[0]
    cases: list[Case] = []
    if quick:
        threads, dtypes = threads[-1:], (first,)
    padded, packed, cells = (
        (QUICK_SHAPES, PACKED_SHAPES[:1], CELL_SHAPES[:1]) if quick else (GRID_SHAPES, PACKED_SHAPES, CELL_SHAPES)
    )
    for dtype, cell, is_packed in itertools.product(dtypes, (True, False), (False, True)):
        if cell and is_packed:
            continue
        shapes = cells if cell else packed if is_packed else padded
        counts = threads
        if dtype != first:
            # The other dtypes are sampled: the first dtype's grid already shows the effect of layout and threads.
            shapes = () if is_packed else CELL_SHAPES[:1] if cell else DTYPE_SHAPES
            counts = threads[-1:]
        for shape, mode, training, count in itertools.product(shapes, MODES, (False, True), counts):
            cases.append(Case(mode, *shape, cell=cell, training=training, packed=is_packed, dtype=dtype, threads=count))
    if not quick:
        for mode in MODES:
            shape = (16, 100, 256, 256)
            cases.append(Case(mode, *shape, training=True, dtype=first, threads=threads[-1], against="default"))
    return cases


def targets(threads: Sequence[int] = (1, 2)) -> list[Case]:
    """The committed speed targets, as speed-ups (torch's time over ours)."""

    def both(mode: str, shape: Shape, infer: float | None, train: float | None) -> list[Case]:
        return [Case(mode, *shape, training=t, target=goal) for t, goal in ((False, infer), (True, train))]

    cases = [Case(mode, 1, 1, 128, 128, cell=True, target=2.0) for mode in MODES]
    for mode, infer, train in (("lstm", 1.5, 1.5), ("gru", 3.0, 4.0), ("rnn", 3.0, 4.0)):
        cases += both(mode, (1, 100, 128, 128), infer, train)
    for mode, goal in (("lstm", 1.0), ("gru", 1.3), ("rnn", None)):
        cases += both(mode, (16, 100, 256, 256), goal, goal)
    for shape in ((64, 100, 512, 512), (128, 50, 1024, 1024)):
        for mode in MODES:
            cases += both(mode, shape, 0.95, 0.95)
    for mode in MODES:
        packed = Case(mode, 32, 1000, 64, 64, training=True, packed=True, target=15.0)
        # At most 1.2 times the padded run's time per valid step.
        cases += [packed, dataclasses.replace(packed, against="padded", target=1 / 1.2)]
    return [dataclasses.replace(case, threads=count) for case in cases for count in threads]


def select(cases: Iterable[C], patterns: Sequence[str]) -> list[C]:
    return [case for case in cases if not patterns or any(case.matches(p) for p in patterns)]
