"""F.scaled_dot_product_attention on our kernels. `dlkernels.patch_attention` replaces torch's with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlkernels._core import extension
from dlkernels._core.autocast import autocast_dtype, cast
from dlkernels._core.private_torch import FakeTensor, FunctionalTensor, forward_ad
from dlkernels.attention import by_torch, operators
from dlkernels.attention.arguments import AttentionConfig, AttentionInputs
from dlkernels.attention.checks import scale as scale_of
from dlkernels.attention.functional import draw_seed, unexpanded
from dlkernels.attention.routing import route, route_of_call

__all__ = ["Call", "arrange", "run", "scaled_dot_product_attention"]

_theirs: Callable[..., Tensor] = torch.nn.functional.scaled_dot_product_attention
_flash_enabled: Callable[[], bool] = torch.backends.cuda.flash_sdp_enabled
_PLAIN = (Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """`torch.nn.functional.scaled_dot_product_attention`, the same arguments and results; `attention` offers more.

    query [..., H, M, D], key [..., Hkv, N, D], value [..., Hkv, N, Dv] with any leading dimensions, or none. A
    call that no kernel of ours serves goes to torch's own function (`dlkernels.explain` tells why), and so does a call
    with a mistake: errors are torch's.
    """
    call = arrange(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if isinstance(call, str):
        return _theirs(
            query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
            enable_gqa=enable_gqa,
        )  # fmt: skip
    return run(call)


class Call(NamedTuple):
    """A call as `operators.attention` takes it, and the leading dimensions of its result. No seed is drawn yet."""

    cfg: AttentionConfig
    given: AttentionInputs
    batch: tuple[int, ...]
    has_heads: bool


def arrange(
    query: Any, key: Any, value: Any, attn_mask: Any, dropout_p: Any, is_causal: Any, scale: Any, enable_gqa: Any
) -> Call | str:
    """The call for our kernels, or why it is left to torch."""
    if not all(_is_plain(x) for x in (query, key, value)) or not (attn_mask is None or _is_plain(attn_mask)):
        return "query, key, value and attn_mask are not all dense tensors"
    reason = _unusual(dropout_p, is_causal, scale, enable_gqa, attn_mask)
    if reason:
        return reason
    q, k, v, mask = query, key, value, attn_mask
    if enable_gqa:
        _refuse_no_heads(q, k, v)
    dtype = autocast_dtype(q)
    if dtype is not None:
        q, k, v, mask = cast(q, dtype), cast(k, dtype), cast(v, dtype), cast(mask, dtype)
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        return "query, key and value differ in dtype or device"
    if mask is not None and (mask.dtype not in (torch.bool, torch.float32, q.dtype) or mask.device != q.device):
        return "attn_mask has another dtype or device"
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    decided = route(q, k, v, mask)
    if not decided.native:
        return decided.reason
    shapes = _shapes(q, k, v, mask, enable_gqa)
    if isinstance(shapes, str):
        return shapes
    batch, heads, shared, has_heads = shapes
    dropout_p = float(dropout_p) if dropout_p > 0 else 0.0
    cfg = AttentionConfig(
        0, 0, scale_of(scale, q.shape[-1]), int(is_causal), dropout_p=dropout_p,
        contiguous=not _is_fused(q, k, v, mask, dropout_p, enable_gqa),
    )  # fmt: skip
    given = AttentionInputs(
        _fold(q, batch, heads, heads), _fold(k, batch, shared, heads), _fold(v, batch, shared, heads),
        None if mask is None else _fold_mask(unexpanded(mask), batch),
    )  # fmt: skip
    return Call(cfg, given, batch, has_heads)


def run(call: Call) -> Tensor:
    o = _attend(call.cfg, call.given)
    if len(call.batch) == 1:
        return o
    if call.batch:
        return torch.unflatten(o, 0, call.batch)
    return o.squeeze(0) if call.has_heads else o.squeeze((0, 1))


def _attend(cfg: AttentionConfig, given: AttentionInputs) -> Tensor:
    if extension.prefers_torch and route_of_call(cfg, given).path == "torch":
        found = by_torch.attention(cfg, given)
        if found is not None:
            return found
    if cfg.dropout_p:
        given = given._replace(rng=draw_seed())
    return operators.attention(cfg, given)[0]


def _is_fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, enable_gqa: bool) -> bool:
    """Whether torch would run its fused kernel, for a call that has passed the checks above."""
    return (
        q.dim() == k.dim() == v.dim() == 4
        and dropout_p == 0.0
        and q.shape[0] == k.shape[0] == v.shape[0]
        and k.shape[1] == v.shape[1]
        and (enable_gqa or q.shape[1] == k.shape[1])
        and q.shape[-1] == v.shape[-1]
        and all(size > 0 for size in (*q.shape, k.shape[-2]))
        and all(x.stride(-1) == 1 for x in (q, k, v))
        and (mask is None or (mask.dim() in (2, 4) and not mask.requires_grad))
        and (torch.compiler.is_compiling() or _flash_enabled())  # Dynamo cannot trace it
    )


def _is_plain(x: Any) -> bool:
    return isinstance(x, Tensor) and type(x) in _PLAIN and not x.is_nested and x.layout == torch.strided


def _refuse_no_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuses heads of 0, by which torch's function divides, which would end the process."""
    of_q, of_k, of_v = (x.shape[-3] if x.dim() > 2 else 1 for x in (q, k, v))
    if 0 in (of_k, of_v) and not of_q == of_k == of_v:
        raise RuntimeError(
            f"Number of heads in key and value must divide the number of heads in query, {of_q}, got {of_k}, {of_v}"
        )


def _unusual(dropout_p: Any, is_causal: Any, scale: Any, enable_gqa: Any, attn_mask: Any) -> str:
    if not isinstance(dropout_p, (int, float)) or dropout_p > 1:
        return "dropout_p is no probability"
    if not isinstance(is_causal, bool) or not isinstance(enable_gqa, bool):
        return "is_causal or enable_gqa is no bool"
    if scale is not None and (not isinstance(scale, (int, float)) or not -math.inf < scale < math.inf):
        return "scale is no finite number"
    return "both attn_mask and is_causal are given" if is_causal and attn_mask is not None else ""


def _shapes(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, enable_gqa: bool
) -> tuple[tuple[int, ...], int, int, bool] | str:
    """(batch dimensions, H, Hkv, whether there are heads at all)."""
    least = 3 if enable_gqa else 2
    if min(q.dim(), k.dim(), v.dim()) < least:
        return "query, key or value has too few dimensions"
    if q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        return "the sizes of query, key and value do not fit together"
    lead = _broadcast(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    of_q, of_k, of_v = (x.shape[-3] if x.dim() > 2 else 1 for x in (q, k, v))
    heads = of_q if enable_gqa else max(of_q, of_k, of_v)
    if not enable_gqa and 0 in (of_q, of_k, of_v):
        heads = 0
    has_heads = max(q.dim(), k.dim(), v.dim()) > 2
    for of_one in (of_q, of_k, of_v):
        if of_one != heads and (of_one == 0 or heads % of_one if enable_gqa else of_one != 1):
            return "the heads of query, key and value do not fit together"
    if lead is None:
        return "the batch dimensions of query, key and value do not fit together"
    full = (*lead, heads, q.shape[-2], k.shape[-2]) if has_heads else (q.shape[-2], k.shape[-2])
    if mask is not None and not _fits(mask.shape, full):
        return "attn_mask does not fit the scores"
    # If k and v have equally many heads, groups of query heads share them; else both are expanded to all heads.
    shared = of_k if of_k == of_v else heads
    return lead, heads, shared, has_heads


def _broadcast(*shapes: Sequence[int]) -> tuple[int, ...] | None:
    rank = max(map(len, shapes))
    result = [1] * rank
    for shape in shapes:
        for at, size in enumerate(shape, rank - len(shape)):
            if size == 1:
                continue
            if result[at] not in (1, size):
                return None
            result[at] = size
    return tuple(result)


def _fits(shape: Sequence[int], full: Sequence[int]) -> bool:
    rank = len(shape)
    return 2 <= rank <= len(full) and all(
        size in (1, expected) for size, expected in zip(shape, full[len(full) - rank :], strict=True)
    )


def _fold(x: Tensor, batch: tuple[int, ...], heads: int, all_heads: int) -> Tensor:
    """[B, heads, rows, width] of x with any leading dimensions."""
    own = x.shape[-3] if x.dim() > 2 else 1
    if own != heads and own != 1:
        x = x.repeat_interleave(all_heads // own, -3)
    shape = (*batch, heads, *x.shape[-2:])
    if x.shape != shape:
        x = x.expand(shape)
    return x.unsqueeze(0) if not batch else x if len(batch) == 1 else x.flatten(0, len(batch) - 1)


def _fold_mask(mask: Tensor, batch: tuple[int, ...]) -> Tensor:
    """[B, H, M, N], with 1 where it is broadcast."""
    mask = mask[(None,) * (len(batch) + 3 - mask.dim())]
    if len(batch) > 1:
        own = mask.shape[: len(batch)]
        if any(size != 1 for size in own):
            mask = mask.expand(*batch, *mask.shape[len(batch) :])
        return mask.flatten(0, len(batch) - 1)
    return mask if batch else mask.unsqueeze(0)
