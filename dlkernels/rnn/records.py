"""The layout of the record that the forward saves of each row for the backward. On the CPU, in a call of a 16-bit type,
slots of 16 bits come first (csrc/rnn/cpu/record.h): the bounded ones in fixed point, then the narrow ones in the type
of the call."""

from __future__ import annotations

import torch
from torch import Tensor

from dlkernels.rnn.kinds import Kind

__all__ = ["has_halves", "of_slots", "size", "slots"]

_FIXED_STEPS = 32767  # 1 in fixed point; a NaN is -32768


def has_halves(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether records have slots of 16 bits."""
    return dtype.itemsize == 2 and device.type != "cuda"


def of_slots(hidden: int, whole: int, halves: int) -> int:
    """The size of slots of the compute type and of slots of 16 bits, in values of the compute type."""
    return whole * hidden + (halves * hidden + 1) // 2


def size(
    kind: Kind, hidden: int, proj: int, dtype: torch.dtype, device: torch.device, one_step: bool = False
) -> int:  # fmt: skip
    """The size of a record, in values of the compute type; `dtype` is the type to which products may be rounded.
    `one_step`: the record of a cell, which has no state slot where the backward can do without."""
    drops_state = one_step and kind.state_follows and device.type != "cuda"
    count, halves = len(kind.slots) - drops_state, 0
    if has_halves(dtype, device):
        halves = kind.bounded + kind.narrow - (drops_state and kind.narrow > 0)
    return of_slots(hidden, count - halves, halves) + proj


def slots(kind: Kind, saved: Tensor, hidden: int, dtype: torch.dtype) -> list[Tensor]:
    """The slots of a layer's records [..., size], [..., H] each, in the compute type; with a projection, h' follows
    them."""
    if not has_halves(dtype, saved.device):
        return list(torch.split(saved, hidden, -1))
    bounded, halves = kind.bounded * hidden, (kind.bounded + kind.narrow) * hidden
    at = (halves + 1) // 2
    bits = saved[..., :at].contiguous()
    fixed = bits.view(torch.int16)[..., :bounded]
    gates = torch.where(fixed < -_FIXED_STEPS, torch.nan, fixed.to(saved.dtype) / _FIXED_STEPS)
    parts = (gates, saved[..., at:], bits.view(dtype)[..., bounded:halves].to(saved.dtype))
    return [slot for part in parts for slot in torch.split(part, hidden, -1) if slot.shape[-1]]
