"""Checks that the ranks of a group make the same call, so that they raise an exception where they would otherwise wait
for each other. It costs one all_gather of a few integers in each call. The ranks have to agree before the first
message, because one of another size than its receiver expects may end the process."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dlkernels._core.dtypes import DTYPES
from dlkernels.distributed.group import Ring
from dlkernels.distributed.layout import LAYOUTS

__all__ = ["Signature", "agree", "refuse"]


class Signature(NamedTuple):
    """What a rank calls with. Everything but `rows`, the rows of its keys, must be the same on all ranks."""

    rows: int
    batch: int
    heads: int
    kv_heads: int
    width: int
    value_width: int
    dtype: torch.dtype
    causal: bool
    layout: str
    softmax_scale: float
    softcap: float
    need_q: bool
    need_kv: bool


# Of each field the argument that it comes from, and what it is of that argument.
_NAMES = {
    "rows": ("k", "number of rows (layout 'zigzag')"),
    "batch": ("q", "batch size"),
    "heads": ("q", "number of heads"),
    "kv_heads": ("k", "number of heads"),
    "width": ("q", "width"),
    "value_width": ("v", "width"),
    "dtype": ("q", "dtype"),
    "causal": ("causal", "value"),
    "layout": ("layout", "value"),
    "softmax_scale": ("softmax_scale", "value"),
    "softcap": ("softcap", "value"),
    "need_q": ("q", "requires_grad"),
    "need_kv": ("k and v", "requires_grad"),
}
# The first number of a rank's message.
_REFUSED, _CALLS = 0, 1


def agree(ring: Ring, own: Signature, device: torch.device) -> list[int]:
    """The number of rows of the keys of each rank. Raises RuntimeError, on every rank, if the ranks disagree."""
    table = _gather(ring, [_CALLS, *_encoded(own)], device)
    for rank, (kind, *_) in enumerate(table):
        if kind == _REFUSED:
            raise RuntimeError(f"ring_attention: rank {rank} refused its arguments; its own exception says why")
    for at, field in enumerate(Signature._fields, 1):
        if field == "rows" and own.layout != "zigzag":
            continue
        for rank, row in enumerate(table):
            if row[at] != table[0][at]:
                argument, what = _NAMES[field]
                values = [_decoded(field, each[at]) for each in (table[0], row)]
                raise RuntimeError(
                    f"{argument}: expected the same {what} on all ranks of the group, got {values[0]} on rank 0 and "
                    f"{values[1]} on rank {rank}"
                )
    return [row[1] for row in table]


def refuse(ring: Ring, device: torch.device) -> None:
    """Tells the other ranks that this one raises an exception instead of calling."""
    _gather(ring, [_REFUSED] + [0] * len(Signature._fields), device)


def _gather(ring: Ring, own: list[int], device: torch.device) -> list[list[int]]:
    message = torch.tensor(own, dtype=torch.int64, device=device)
    table: Tensor = message.new_empty((ring.world, len(own)))
    dist.all_gather(list(table.unbind()), message, group=ring.group)
    return table.tolist()


def _encoded(own: Signature) -> list[int]:
    return [_CODES[field][0](value) if field in _CODES else value for field, value in own._asdict().items()]


def _decoded(field: str, code: int) -> Any:
    return _CODES[field][1](code) if field in _CODES else code


def _bits(value: float) -> int:
    return int(struct.unpack("q", struct.pack("d", value))[0])


def _number(bits: int) -> float:
    return float(struct.unpack("d", struct.pack("q", bits))[0])


# How the fields that are no ints become one, and back.
_CODES: dict[str, tuple[Callable[[Any], int], Callable[[int], Any]]] = {
    "dtype": (DTYPES.index, DTYPES.__getitem__),
    "layout": (LAYOUTS.index, LAYOUTS.__getitem__),
    "softmax_scale": (_bits, _number),
    "softcap": (_bits, _number),
    "causal": (int, bool),
    "need_q": (int, bool),
    "need_kv": (int, bool),
}
