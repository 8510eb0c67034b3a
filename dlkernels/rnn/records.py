"""The layout of the record that the forward saves for each row and the backward reads."""

from __future__ import annotations

import torch
from torch import Tensor

from dlkernels.rnn.kinds import Kind

__all__ = ["size", "slots"]


def _narrow(kind: Kind, dtype: torch.dtype, device: torch.device) -> int:
    return kind.narrow if dtype.itemsize == 2 and device.type != "cuda" else 0


def size(kind: Kind, hidden: int, proj: int, dtype: torch.dtype, device: torch.device) -> int:
    """The size of a record, in values of the compute type; `dtype` is the type to which products may be rounded."""
    narrow = _narrow(kind, dtype, device)
    return (len(kind.slots) - narrow) * hidden + (narrow * hidden + 1) // 2 + proj


def slots(kind: Kind, saved: Tensor, hidden: int, dtype: torch.dtype) -> list[Tensor]:
    """The slots of records [..., size], [..., H] each, in the compute type; with a projection, h' follows them."""
    narrow = _narrow(kind, dtype, saved.device)
    if not narrow:
        return list(torch.split(saved, hidden, -1))
    wide = (len(kind.slots) - narrow) * hidden
    values = saved[..., wide:].contiguous().view(dtype)[..., : narrow * hidden].to(saved.dtype)
    return [part for part in (saved[..., :wide], values) for part in torch.split(part, hidden, -1) if part.shape[-1]]
