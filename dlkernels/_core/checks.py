"""Argument checks that the recurrent layers and attention share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dlkernels._core.private_torch import are_transforms_active, get_unwrapped, is_batched_by_vmap, is_wrapped

__all__ = ["is_readable", "tensor"]


def tensor(function: str, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}(): argument '{name}' must be Tensor, not {type(value).__name__}")


def is_readable(*tensors: Tensor | None) -> bool:
    """Whether a check may read the values of these tensors: not in compiled code, and not where vmap maps one."""
    if torch.compiler.is_compiling():
        return False
    return not are_transforms_active() or not any(tensor is not None and _is_mapped(tensor) for tensor in tensors)


def _is_mapped(tensor: Tensor) -> bool:
    while is_wrapped(tensor):
        if is_batched_by_vmap(tensor):
            return True
        tensor = get_unwrapped(tensor)
    return False
