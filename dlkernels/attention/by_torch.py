"""Attention by torch, for calls that `attention/routing.py` leaves to it: F.scaled_dot_product_attention, and the
forward of torch.nn's layers."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dlkernels._core import extension
from dlkernels._core.autocast import without_autocast
from dlkernels._core.routing import is_for_torch
from dlkernels.attention import checks, reference
from dlkernels.attention.arguments import AttentionConfig, AttentionInputs

__all__ = ["attention", "serves_layer"]

_BOTTOM_RIGHT = 2
_theirs: Any = torch.nn.functional.scaled_dot_product_attention


def attention(cfg: AttentionConfig, given: AttentionInputs) -> Tensor | None:
    """o, or None if torch's result would be wrong: what a mask hides must not reach it, and 0 times NaN is NaN. The
    arguments have been checked."""
    if (cfg.causal or given.mask is not None) and not _all_finite(*given[:3]):
        return None
    extension.announce_torch()
    if given.cu_seqlens_q is not None:
        return _packed(cfg, given)
    tensors = (given.q, given.k, given.v, given.mask)
    # With dropout torch computes with matrices, which it can differentiate twice.
    if not cfg.dropout_p and torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return _Attention.apply(cfg, *tensors)  # type: ignore[no-any-return, no-untyped-call]
    return _call(cfg, *tensors)


def serves_layer(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None
) -> bool:
    """Whether the forward of torch.nn's layer gives what ours does, without a gradient. Where a query may attend to
    nothing, torch's fast path gives NaN; two masks would have to be joined to know."""
    if not is_for_torch(query) or query.is_nested or key.is_nested or value.is_nested:
        return False
    mask = key_padding_mask if attn_mask is None else attn_mask
    if mask is not None:
        hidden = mask if mask.dtype == torch.bool else mask == -math.inf
        both = attn_mask is not None and key_padding_mask is not None
        if both or hidden.all(-1).any() or not _all_finite(query, key, value):
            return False
    extension.announce_torch()
    return True


def _all_finite(*tensors: Tensor) -> bool:
    """A sum is finite only if all of its elements are. It may overflow although they are, which costs only time."""
    different = {id(x): x.detach() for x in tensors}.values()
    return all(math.isfinite(x.sum(dtype=torch.promote_types(x.dtype, torch.float32)).item()) for x in different)


def _call(cfg: AttentionConfig, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    causal = cfg.causal
    if causal and (mask is not None or (causal == _BOTTOM_RIGHT and q.shape[2] != k.shape[2])):
        mask, causal = _with_causal(cfg, q, k, mask), 0
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    with without_autocast(q.device):
        return _theirs(  # type: ignore[no-any-return]
            q, k, v, attn_mask=mask, dropout_p=cfg.dropout_p, is_causal=bool(causal), scale=cfg.softmax_scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip


def _with_causal(cfg: AttentionConfig, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    M, N = q.shape[2], k.shape[2]
    shift = N - M if cfg.causal == _BOTTOM_RIGHT else 0
    visible = torch.ones(M, N, dtype=torch.bool, device=q.device).tril(shift)
    if mask is None:
        return visible
    return mask & visible if mask.dtype == torch.bool else mask.masked_fill(~visible, -math.inf)


def _packed(cfg: AttentionConfig, given: AttentionInputs) -> Tensor:
    """[rows, H, Dv]: a call for each sequence. Rows that belong to no sequence are 0."""
    q, k, v, _, _, _, cu_q, cu_k, _ = given
    assert cu_q is not None and cu_k is not None
    ends_q = checks.cu_values("cu_seqlens_q", cu_q, q.shape[0], cfg.max_seqlen_q).tolist()
    ends_k = checks.cu_values("cu_seqlens_k", cu_k, k.shape[0], cfg.max_seqlen_k).tolist()
    padded = cfg._replace(max_seqlen_q=0, max_seqlen_k=0)
    outputs = []
    for (q0, q1), (k0, k1) in zip(pairwise(ends_q), pairwise(ends_k), strict=True):
        if k0 == k1:
            outputs.append(q.new_zeros((q1 - q0, q.shape[1], v.shape[-1])))
        elif q0 != q1:
            rows = (x[begin:end].transpose(0, 1)[None] for x, begin, end in ((q, q0, q1), (k, k0, k1), (v, k0, k1)))
            o = attention(padded, AttentionInputs(*rows))
            assert o is not None
            outputs.append(o[0].transpose(0, 1))
    outputs.append(q.new_zeros((q.shape[0] - ends_q[-1], q.shape[1], v.shape[-1])))
    return torch.cat(outputs)


class _Attention(torch.autograd.Function):
    """(cfg, q, k, v, mask) -> o. torch's fused kernel has no second derivative, so a backward that may be
    differentiated is that of the reference."""

    @staticmethod
    def forward(ctx: Any, cfg: AttentionConfig, *tensors: Tensor | None) -> Tensor:
        needs = ctx.needs_input_grad[1:]
        given = [x if x is None else x.detach().requires_grad_(need) for x, need in zip(tensors, needs, strict=True)]
        with torch.enable_grad():
            o = _call(cfg, *given)  # type: ignore[arg-type]
        ctx.save_for_backward(*tensors)
        ctx.cfg, ctx.graph = cfg, (o, [x for x, need in zip(given, needs, strict=True) if need])
        return o.detach().clone() if cfg.contiguous else o.detach()

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad[1:]
        tensors = ctx.saved_tensors
        if torch.is_grad_enabled():
            q, k, v, mask = tensors
            o, _ = reference.attention(q, k, v, mask=mask, **ctx.cfg.keywords)
            wanted = [x for x, need in zip(tensors, needs, strict=True) if need]
            found = iter(torch.autograd.grad(o, wanted, do, create_graph=True))
        else:
            o, wanted = ctx.graph
            found = iter(torch.autograd.grad(o, wanted, do, retain_graph=True))
        return (None, *(next(found) if need else None for need in needs))
