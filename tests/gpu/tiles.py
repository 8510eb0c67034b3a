"""The tiles that the sweep of `make gpu-check` tries, and how a call is made to take one of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from dlkernels.attention.triton import heuristics
from dlkernels.attention.triton.heuristics import Tile


def candidates(kernel: str, width: int, dtype: torch.dtype) -> list[Tile]:
    """The tiles that compile cleanly for capability 9.0, which a test of `make gpuless` shows; the first one ships."""
    return heuristics.candidates(kernel, width, str(dtype).removeprefix("torch."))


class Asked:
    """Whether the host code asked for the tile of the kernel."""

    yes = False


@contextlib.contextmanager
def forced(kernel: str, tile: Tile) -> Iterator[Asked]:
    """Within it, calls take this tile for this kernel. A call that takes another one must not pass for a measurement
    of this one: the caller checks that the host code asked."""
    original, asked = heuristics.tile, Asked()

    def choose(name: str, *rest: object) -> Tile:
        if name != kernel:
            return original(name, *rest)  # type: ignore[arg-type]
        asked.yes = True
        return tile

    heuristics.tile = choose  # type: ignore[assignment]
    try:
        yield asked
    finally:
        heuristics.tile = original
