"""Argument checks that the recurrent layers and attention share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["tensor"]


def tensor(function: str, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}(): argument '{name}' must be Tensor, not {type(value).__name__}")
