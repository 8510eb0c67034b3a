"""Finds forward-mode tangents (torch.func.jvp, torch.autograd.forward_ad), however deep transforms wrapped them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dlkernels._core.private_torch import (
    are_transforms_active,
    forward_ad,
    get_unwrapped,
    is_batched_by_vmap,
    level_of_transform,
    level_of_wrapper,
    unwrap_dead_wrapper,
    without_innermost_transform,
)

__all__ = ["are_carried"]


def are_carried(tensors: Sequence[Any]) -> bool:
    """Whether a tensor among these carries a tangent. Callers first ask whether `forward_ad._current_level` is at
    least 0, because otherwise no tensor does and this search would take time for nothing.

    Each transform of torch.func wraps its tensors, and a tangent may belong to any of the wrapped tensors: under
    `jvp(grad(f))` it is below the wrapper that f sees. torch tells about the tangent of a tensor only while the
    transform of its wrapper is the innermost one, so the transforms are left one after the other.
    """
    given = [unwrap_dead_wrapper(tensor) for tensor in tensors if isinstance(tensor, Tensor)]
    if not are_transforms_active():
        return any(_is_dual(tensor) for tensor in given)
    level = level_of_transform()
    inner = []
    for tensor in given:
        if level_of_wrapper(tensor) == level:
            if not is_batched_by_vmap(tensor) and _is_dual(tensor):
                return True
            tensor = get_unwrapped(tensor)
        inner.append(tensor)
    with without_innermost_transform():
        return are_carried(inner)


def _is_dual(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]
