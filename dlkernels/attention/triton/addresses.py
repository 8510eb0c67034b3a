"""What the kernels are told of a tensor's addresses: strides, and what divides them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = ["align", "mask_strides", "readable", "slope_stride", "strides"]

_MAX_ROW_STRIDE = 2**31 // 256  # a tile has fewer than 256 rows, so offsets within it fit 32 bits


def readable(x: Tensor) -> Tensor:
    """x, or a contiguous copy if the kernels cannot read x: they need contiguous rows, and offsets within a tile that
    fit 32 bits."""
    steps = x.stride()
    rows = steps[-2] if len(steps) == 4 else steps[0]
    fits = steps[-1] == 1 or x.size(-1) <= 1
    return x if fits and rows < _MAX_ROW_STRIDE else x.contiguous()


def strides(x: Tensor) -> tuple[int, int, int]:
    """(batch, head, row); packed tensors have no batch. 0 where there is only one, since nothing is known of that
    stride."""
    sizes, strides = x.shape, x.stride()
    if len(sizes) == 3:
        return 0, strides[1] if sizes[1] > 1 else 0, strides[0] if sizes[0] > 1 else 0
    return (
        strides[0] if sizes[0] > 1 else 0, strides[1] if sizes[1] > 1 else 0, strides[2] if sizes[2] > 1 else 0
    )  # fmt: skip


def align(like: Tensor, strides: Sequence[int], *tensors: Tensor) -> int:
    """The elements of `like`'s dtype in 16 bytes if all tensors start at a multiple of 16 bytes and all strides are
    multiples of so many elements, else 1. The kernels then access 16 bytes at a time."""
    step = 16 // like.element_size()
    for stride in strides:
        if stride % step:
            return 1
    for x in tensors:
        if x.data_ptr() % 16:
            return 1
    return step


def mask_strides(mask: Tensor | None) -> tuple[tuple[int, ...], int]:
    """The strides of a mask, and the kernels' MASK_ALIGN (elements.mask_strides)."""
    if mask is None:
        return (0, 0, 0, 0), 0
    strides = tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True))
    return strides, align(mask, strides[:3], mask) if strides[3] == 1 else 0


def slope_stride(alibi_slopes: Tensor | None) -> int:
    return alibi_slopes.stride(0) if alibi_slopes is not None and alibi_slopes.dim() == 2 else 0
