"""What autocast asks of a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What to cast to, or None outside of autocast for the device of x."""
    if not torch._C._is_any_autocast_enabled():
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
