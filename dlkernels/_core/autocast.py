"""The dtype of the current autocast region, and casts like those of autocast."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from dlkernels._core.private_torch import is_any_autocast_enabled

__all__ = ["autocast_dtype", "cast", "without_autocast"]


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast casts to on the device of x, or None if autocast is off there."""
    if not is_any_autocast_enabled():
        return None
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def cast(tensor: Any, dtype: torch.dtype) -> Any:
    """Casts `tensor` as autocast casts the arguments of linear: every floating dtype but float64."""
    if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context in which autocast is off on `device`: the reference chooses its own precision wherever it is called."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
