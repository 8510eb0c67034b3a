"""The tiles that the sweep of `make gpu-check` tries, and how a call is made to take one of them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import torch

from dlkernels.attention.triton import heuristics
from dlkernels.attention.triton.heuristics import Tile


def candidates(kernel: str, width: int, dtype: torch.dtype) -> list[Tile]:
    """Tiles for a kernel with operands of 16 bits whose operands fit the shared memory of an H100. Whether a tile
    compiles, and how fast it is, the sweep finds out."""
    rows, columns = ((64, 128), (32, 64, 128)) if kernel != "backward_key" else ((32, 64), (64, 128))
    found = []
    for block_m, block_n, warps, stages in itertools.product(rows, columns, (4, 8), (2, 3)):
        tile = Tile(block_m, block_n, warps, stages)
        kept, walked = (block_n, block_m) if kernel == "backward_key" else (block_m, block_n)
        operands = 2 * width * (kept * (1 if kernel == "forward" else 2) + 2 * walked * stages)
        # A warp group computes 64 rows at a time, and its sums of float32 are in registers.
        sums = kept * width * (1 if kernel != "backward_key" else 2) + block_m * block_n
        fits = kept >= 16 * warps and sums <= warps * 32 * 192
        if operands <= heuristics.FAMILIES["sm_90"] and fits:
            found.append(tile)
    return found


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
