"""The operators' vmap rules fold the n samples into the batch or head dimension, [..., B, ...] -> [..., n*B, ...]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["each_sample", "fold", "is_mapped", "unflatten", "unfold", "unfold_all"]


def fold(tensor: Tensor | None, mapped_dim: int | None, batch_dim: int, n: int) -> Tensor | None:
    """Folds the mapped dimension into the batch dimension, sample-major. A tensor that is not mapped is repeated n
    times, and one without a batch dimension (an empty placeholder) is not folded."""
    if tensor is None:
        return None
    if mapped_dim is None:
        if tensor.dim() <= batch_dim:
            return tensor
        tensor = tensor.unsqueeze(batch_dim).expand(*tensor.shape[:batch_dim], n, *tensor.shape[batch_dim:])
    else:
        if tensor.dim() - 1 <= batch_dim:
            return tensor.select(mapped_dim, 0)
        tensor = tensor.movedim(mapped_dim, batch_dim)
    return tensor.flatten(batch_dim, batch_dim + 1)


def unflatten(tensor: Tensor, dim: int, outer: int, inner: int) -> Tensor:
    return tensor.reshape(*tensor.shape[:dim], outer, inner, *tensor.shape[dim + 1 :])


def unfold(tensor: Tensor, batch_dim: int, n: int) -> tuple[Tensor, int | None]:
    """Undoes `fold`: returns the tensor and the position of its mapped dimension, None for an empty placeholder."""
    if tensor.dim() <= batch_dim:
        return tensor, None
    return unflatten(tensor, batch_dim, n, tensor.shape[batch_dim] // n), batch_dim


def unfold_all(
    tensors: Sequence[Tensor], batch_dims: Sequence[int], n: int
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    pairs = [unfold(tensor, dim, n) for tensor, dim in zip(tensors, batch_dims, strict=True)]
    return tuple(tensor for tensor, _ in pairs), tuple(dim for _, dim in pairs)


def each_sample(
    call: Callable[..., Sequence[Tensor]], n: int, in_dims: Sequence[Any], args: Sequence[Any]
) -> tuple[tuple[Tensor, ...], int]:
    """Calls `call` once per sample. Mapped weights (an ensemble) need this: an operator takes one set of weights."""
    results = []
    for i in range(n):
        sample = (
            arg.select(dim, i) if isinstance(arg, Tensor) and dim is not None else arg
            for arg, dim in zip(args, in_dims, strict=True)
        )  # fmt: skip
        results.append(call(*sample))
    return tuple(torch.stack(outs) for outs in zip(*results, strict=True)), 0


def is_mapped(in_dims: Sequence[Any]) -> bool:
    return any(dim is not None for dim in in_dims)
