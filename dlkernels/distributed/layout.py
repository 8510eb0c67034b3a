"""Which rows of the sequence a rank holds, and what part of the scores between two shards has to be computed.

contiguous: rank r holds the r-th of the `world` parts of the sequence. With causal attention rank 0 has one block of
    scores to compute and the last rank `world` of them.
zigzag: the sequence is cut into 2 * world chunks, and rank r holds the chunks r and 2 * world - 1 - r. With causal
    attention every rank then computes about the same number of scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dlkernels._core import checks
from dlkernels.distributed.group import ring_of

__all__ = ["LAYOUTS", "Part", "checked_layout", "part_of", "shard", "unshard"]

LAYOUTS = ("contiguous", "zigzag")


class Part(NamedTuple):
    """The rows of the queries and those of the keys between which scores are computed. causal: query i of these rows
    sees the keys j <= i of these rows; otherwise every query sees every key."""

    queries: slice
    keys: slice
    causal: bool


def part_of(layout: str, causal: bool, rank: int, source: int, queries: int, keys: int) -> Part | None:
    """The part of the scores of the queries of `rank` and the keys of `source` that has to be computed; None if the
    queries see none of the keys. queries, keys: the number of rows of the two shards.

    Causal, contiguous: the block of a rank with itself is causal, those with earlier ranks are computed whole, and
    those with later ranks are skipped.

    Causal, zigzag: the first half of the keys of an earlier rank precedes all queries, and the second half follows them
    and is skipped. All keys of a later rank precede the second half of the queries and follow the first half, which is
    skipped.
    """
    if not queries or not keys:
        return None
    every = Part(slice(0, queries), slice(0, keys), False)
    if not causal:
        return every
    if source == rank:
        return every._replace(causal=True)
    if layout == "zigzag":
        if source < rank:
            return every._replace(keys=slice(0, keys // 2))
        return every._replace(queries=slice(queries // 2, queries))
    return every if source < rank else None


def checked_layout(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"layout: expected 'contiguous' or 'zigzag', got {type(value).__name__}")
    if value not in LAYOUTS:
        raise ValueError(f"layout: expected 'contiguous' or 'zigzag', got {value!r}")
    return value


def shard(x: Tensor, *, group: Any = None, dim: int = -2, layout: str = "contiguous") -> Tensor:
    """The rows of this rank, of a tensor that every rank has whole. It is differentiable and sends nothing.

    x: any shape and dtype; `dim` is the dimension of the sequence, of M rows. The result has M / world rows there.
    group: a ProcessGroup; None is the default group.
    layout: "contiguous": M / world consecutive rows, and the first ranks have one row more if world does not divide M.
        "zigzag": the chunks rank and 2 * world - 1 - rank of 2 * world chunks, one after the other.

    Raises TypeError for arguments of a wrong type, ValueError for a layout that does not exist, a process that is not
    in the group, and for "zigzag" an M that is no multiple of 2 * world; IndexError for a `dim` that x lacks;
    RuntimeError without a process group.
    """
    checks.tensor("shard", "x", x)
    layout, ring = checked_layout(layout), ring_of(group)
    rows = x.size(dim)
    if layout == "contiguous":
        return x.tensor_split(ring.world, dim)[ring.rank]
    if rows % (2 * ring.world):
        raise ValueError(
            f"x: expected a multiple of {2 * ring.world} rows (2 * world) in dimension {dim} for layout 'zigzag', got "
            f"shape {list(x.shape)}"
        )
    chunks = x.chunk(2 * ring.world, dim) if rows else (x,) * (2 * ring.world)
    return torch.cat((chunks[ring.rank], chunks[-1 - ring.rank]), dim)


@torch.no_grad()
def unshard(x: Tensor, *, group: Any = None, dim: int = -2, layout: str = "contiguous") -> Tensor:
    """The whole tensor of which each rank has its rows, the inverse of `shard`. No gradient flows through it.

    x: this rank's rows, of any dtype; all sizes but that of `dim` are the same on all ranks, and for "zigzag" that one
    too. All ranks of the group must call this. Raises what `shard` raises, and RuntimeError if the ranks disagree about
    the number of rows for "zigzag".
    """
    checks.tensor("unshard", "x", x)
    layout, ring = checked_layout(layout), ring_of(group)
    rows = x.size(dim)
    lengths = _lengths(rows, ring.world, group, x.device)
    most = max(lengths)
    if layout == "zigzag" and (min(lengths) != most or most % 2):
        raise RuntimeError(f"x: expected the same even number of rows on every rank for layout 'zigzag', got {lengths}")
    padded = x.new_zeros(_with_size(x.shape, dim, most))
    padded.narrow(dim, 0, rows).copy_(x)
    found = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(found, padded, group=group)
    shards = [each.narrow(dim, 0, length) for each, length in zip(found, lengths, strict=True)]
    if layout == "zigzag":
        halves = [each.tensor_split(2, dim) for each in shards]
        shards = [first for first, _ in halves] + [second for _, second in reversed(halves)]
    return torch.cat(shards, dim)


def _lengths(rows: int, world: int, group: Any, device: torch.device) -> list[int]:
    own = torch.tensor([rows], device=device)
    found = own.new_empty((world, 1))
    dist.all_gather(list(found.unbind()), own, group=group)
    return found.flatten().tolist()


def _with_size(shape: Sequence[int], dim: int, size: int) -> list[int]:
    changed = list(shape)
    changed[dim] = size
    return changed
