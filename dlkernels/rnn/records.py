"""The layout of what the forward saves of each row for the backward."""

from __future__ import annotations

import torch
from torch import Tensor

SLOTS = {"lstm": 5, "gru": 5, "rnn_tanh": 1, "rnn_relu": 1}
# The last slots of a record that are narrow on the CPU in a call of a 16-bit type (csrc/rnn/params.h says why).
_NARROW = {"lstm": 0, "gru": 2, "rnn_tanh": 1, "rnn_relu": 1}


def _narrow(mode: str, dtype: torch.dtype, device: torch.device) -> int:
    return _NARROW[mode] if dtype.itemsize == 2 and device.type != "cuda" else 0


def size(mode: str, hidden: int, proj: int, dtype: torch.dtype, device: torch.device) -> int:
    """Values of the compute type in a record; `dtype`: what products may be rounded to."""
    narrow = _narrow(mode, dtype, device)
    return (SLOTS[mode] - narrow) * hidden + (narrow * hidden + 1) // 2 + proj


def slots(mode: str, saved: Tensor, hidden: int, dtype: torch.dtype) -> list[Tensor]:
    """The slots of records [..., size], [..., H] each, in the compute type; with a projection h' behind them."""
    narrow = _narrow(mode, dtype, saved.device)
    if not narrow:
        return list(torch.split(saved, hidden, -1))
    wide = (SLOTS[mode] - narrow) * hidden
    values = saved[..., wide:].contiguous().view(dtype)[..., : narrow * hidden].to(saved.dtype)
    return [part for part in (saved[..., :wide], values) for part in torch.split(part, hidden, -1) if part.shape[-1]]
