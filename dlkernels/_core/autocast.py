"""Which dtype autocast is in force for, and casts as it makes them."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from dlkernels._core.private_torch import is_any_autocast_enabled

__all__ = ["autocast_dtype", "cast", "without_autocast"]


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What to cast to, or None outside of autocast for the device of x."""
    if not is_any_autocast_enabled():
        return None
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def cast(tensor: Any, dtype: torch.dtype) -> Any:
    """As autocast casts the arguments of linear: every floating dtype but float64."""
    if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The reference decides its own precision, whatever region it is called from."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
