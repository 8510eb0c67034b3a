"""The masks of `torch.nn.MultiheadAttention` and the Transformer layers, checked and turned into those of `attention`.

Here True means masked out; in `functional.attention` True means may attend.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["additive", "check_attn_mask", "check_inputs", "check_key_padding_mask", "combine", "same_kind"]


def same_kind(
    attn_mask: Tensor | None, attn_name: str, padding_mask: Tensor | None, padding_name: str, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Returns masks of the same kind unchanged. If one is boolean and the other additive, torch warns and adds them up;
    so this warns too and returns the boolean one as an additive one in `dtype`."""
    for name, mask in ((padding_name, padding_mask), (attn_name, attn_mask)):
        if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
            raise AssertionError(f"only bool and floating types of {name} are supported, got {mask.dtype}")
    if attn_mask is None or padding_mask is None or attn_mask.dtype == padding_mask.dtype:
        return attn_mask, padding_mask
    warnings.warn(
        f"Support for mismatched {padding_name} and {attn_name} is deprecated. Use same type for both instead.",
        stacklevel=3,
    )
    return additive(attn_mask, dtype), additive(padding_mask, dtype)


def additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Returns a boolean mask as 0 and -inf in `dtype`, another mask unchanged."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def check_attn_mask(mask: Tensor, batch: int, heads: int, queries: int, keys: int) -> None:
    expected = (queries, keys) if mask.dim() == 2 else (batch * heads, queries, keys)
    if mask.shape != expected:
        raise RuntimeError(
            f"The shape of the {mask.dim()}D attn_mask is {tuple(mask.shape)}, but should be {expected}."
        )


def check_key_padding_mask(mask: Tensor, batch: int, keys: int) -> None:
    if mask.shape != (batch, keys):
        raise AssertionError(f"Expected key_padding_mask to be of shape {(batch, keys)}, but got {tuple(mask.shape)}")


def combine(
    attn_mask: Tensor | None, padding_mask: Tensor | None, hint: bool, heads: int, extra_keys: int
) -> tuple[Tensor | None, bool]:
    """The mask for `attention`, and the value of its argument `causal`.

    The mask is no larger than it must be: [B, 1, 1, N] for padding alone, [M, N] or [B, H, M, N] for attn_mask alone,
    [B, 1 or H, M, N] for both. `hint` says that attn_mask is causal. All queries may see the `extra_keys` keys that are
    appended.
    """
    # torch.nn ignores the hint if there is padding. Following it there too saves a mask of B x M x N and half of the
    # tiles. It is not followed where it would change a result: the appended keys, or the gradient of attn_mask.
    if hint and (padding_mask is None or not (extra_keys or (attn_mask is not None and attn_mask.requires_grad))):
        attn_mask, causal = None, True
    else:
        causal = False
    mask = attn_mask
    if mask is not None and mask.dim() == 3:
        mask = torch.unflatten(mask, 0, (-1, heads))
    if padding_mask is not None:
        padding_mask = padding_mask[:, None, None, :]
        if mask is None:
            mask = padding_mask
        elif mask.dtype == torch.bool:
            mask = mask | padding_mask
        else:
            mask = mask + padding_mask
    if mask is None:
        return None, causal
    if extra_keys:
        mask = pad(mask, (0, extra_keys))
    return (mask.logical_not() if mask.dtype == torch.bool else mask), causal


def check_inputs(query: Any, key: Any, value: Any, padding_mask: Any, attn_mask: Any, heads: int) -> bool:
    """Checks the ranks and returns whether the input is batched."""
    rank: int = query.dim()
    if rank not in (2, 3):
        raise AssertionError(f"query should be unbatched 2D or batched 3D tensor but received {rank}-D query tensor")
    kind = "batched (3-D)" if rank == 3 else "unbatched (2-D)"
    if key.dim() != rank or value.dim() != rank:
        raise AssertionError(
            f"For {kind} `query`, expected `key` and `value` to be {rank}-D but found {key.dim()}-D and "
            f"{value.dim()}-D tensors respectively"
        )
    if padding_mask is not None and padding_mask.dim() != rank - 1:
        raise AssertionError(
            f"For {kind} `query`, expected `key_padding_mask` to be `None` or {rank - 1}-D but found "
            f"{padding_mask.dim()}-D tensor instead"
        )
    if attn_mask is not None and attn_mask.dim() not in (2, 3):
        raise AssertionError(
            f"For {kind} `query`, expected `attn_mask` to be `None`, 2-D or 3-D but found {attn_mask.dim()}-D tensor "
            "instead"
        )
    if rank == 2 and attn_mask is not None and attn_mask.dim() == 3:
        expected = (heads, query.shape[0], key.shape[0])
        if attn_mask.shape != expected:
            raise AssertionError(f"Expected `attn_mask` shape to be {expected} but got {tuple(attn_mask.shape)}")
    return rank == 3
