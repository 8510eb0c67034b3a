"""Attention, with every feature on every device; `dlkernels.functional` exports it.

Sizes: B sequences, H heads of queries, Hkv heads of keys and values (H is a multiple of it), M queries, N keys, widths
D of queries and keys, Dv of values.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor

from dlkernels._core import extension
from dlkernels._core.autocast import autocast_dtype, cast
from dlkernels._core.checks import is_readable
from dlkernels._core.dtypes import compute_dtype
from dlkernels._core.private_torch import are_transforms_active, forward_ad
from dlkernels.attention import by_torch, checks, operators
from dlkernels.attention.arguments import AttentionConfig, AttentionInputs
from dlkernels.attention.routing import route, route_of_call

__all__ = ["attention", "attention_map"]

Causal = bool | Literal["top_left", "bottom_right"]
Window = tuple[int | None, int | None]


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None = None, causal: Causal = False, dropout_p: float = 0.0,
    softmax_scale: float | None = None, window: Window = (None, None), alibi_slopes: Tensor | None = None,
    softcap: float = 0.0, sinks: Tensor | None = None, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
    enable_gqa: bool = True, return_lse: bool = False, deterministic: bool = True,
) -> Any:  # fmt: skip
    """Computes o = softmax(q k^T) v, or (o, lse). Neither forward nor backward makes an M x N matrix, except as the
    gradient of a mask of that size.

    q: [B, H, M, D], k: [B, Hkv, N, D], v: [B, Hkv, N, Dv] of one dtype and device, any strides; query head h reads the
        head h // (H // Hkv) of k and v. With cu_seqlens [rows, heads, width], see there.
    attn_mask: bool (True = may attend) or added to the scores (the dtype of q, or float32; it may require grad), of 2
        to 4 dimensions, broadcastable to [B, H, M, N]. Or what torch.nn.attention.bias.causal_upper_left(M, N) or
        causal_lower_right(M, N) returns, which is taken as `causal`.
    causal: True or "top_left": query i sees the keys j <= i; "bottom_right": j <= i + N - M. The right-hand
        side is the position p(i) of query i, which the window and ALiBi use too; without "bottom_right" it is i.
    dropout_p: probability with which a weight is zeroed; always active. The mask is drawn from torch's CPU generator.
    softmax_scale: factor of the scores, 1 / sqrt(D) for None.
    window: (left, right): keys p - left .. p + right are seen; None or -1 is unbounded.
    alibi_slopes: [H] or [B, H], floating: -slope * |p - j| is added (Press et al. 2022).
    softcap: c > 0 replaces a scaled score s by c * tanh(s / c); c must be so small that 1 / c is a normal number in
        float32 (float64 for float64): above 8.5e37 it is an error.
    sinks: [H], floating: a logit per head that takes part in the softmax's denominator only.
    cu_seqlens_q, cu_seqlens_k: integers [B + 1]: sequence b has the rows cu[b] .. cu[b + 1] of q, and of k and v. The
        result is [rows, H, Dv]. An attn_mask then has M and N of the longest sequences, and each sequence, for which
        its first rows and columns count, is a call of its own; the lengths are read from the tensors.
    max_seqlen_q, max_seqlen_k: at least the length of the longest sequence; with None it is computed from cu_seqlens.
    enable_gqa: False makes Hkv != H an error.
    return_lse: also the logarithm of the softmax's denominator, [B, H, M] or [H, rows], float32 (float64 for float64).
    deterministic: the kernels are always deterministic from run to run, forward and backward; False changes nothing.

    The order is: scale, softcap, ALiBi, additive mask, masking, sinks, softmax, dropout. A query that sees nothing
    gives 0 (lse -inf, or the sink) and no gradient, and what is masked may hold anything, NaN too. Under autocast q, k,
    v and an additive mask are cast as torch casts those of F.scaled_dot_product_attention.
    """
    checks.flag("return_lse", return_lse)
    checks.flag("deterministic", deterministic)
    if cu_seqlens_q is not None and has_own_mask(attn_mask):
        options = {
            "causal": causal, "dropout_p": dropout_p, "softmax_scale": softmax_scale, "window": window,
            "softcap": softcap, "sinks": sinks, "enable_gqa": enable_gqa,
        }  # fmt: skip
        o, lse = _each_sequence(
            q, k, v, attn_mask, alibi_slopes, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, options,
            return_lse,
        )  # fmt: skip
        return o if lse is None else (o, lse)
    cfg, given = checked(
        q, k, v, attn_mask, causal, dropout_p, softmax_scale, window, alibi_slopes, softcap, sinks, cu_seqlens_q,
        cu_seqlens_k, max_seqlen_q, max_seqlen_k, enable_gqa,
    )  # fmt: skip
    if extension.prefers_torch and route_of_call(cfg, given, return_lse).path == "torch":
        found = by_torch.attention(cfg, given)
        if found is not None:
            return found
    if cfg.dropout_p:
        given = given._replace(rng=draw_seed())
    o, lse = operators.attention(cfg, given)
    return (o, lse) if return_lse else o


def has_own_mask(attn_mask: Any) -> TypeGuard[Tensor]:
    """Whether this is a mask with values. With cu_seqlens such a call is made of one call for each sequence."""
    return isinstance(attn_mask, Tensor) and not checks.is_bias(attn_mask)


def _each_sequence(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, alibi_slopes: Tensor | None, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None, max_seqlen_q: int | None, max_seqlen_k: int | None, options: dict[str, Any],
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """o of packed sequences with a mask, by one call for each sequence, and lse if it is wanted."""
    cfg, given = checked(
        q, k, v, None, options["causal"], options["dropout_p"], options["softmax_scale"], options["window"],
        alibi_slopes, options["softcap"], options["sinks"], cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        options["enable_gqa"],
    )  # fmt: skip
    assert given.cu_seqlens_q is not None and given.cu_seqlens_k is not None
    ends_q, ends_k = (
        checks.cu_values(name, cu.cpu(), x.shape[0], most).tolist()
        for name, cu, x, most in (
            ("cu_seqlens_q", given.cu_seqlens_q, q, cfg.max_seqlen_q),
            ("cu_seqlens_k", given.cu_seqlens_k, k, cfg.max_seqlen_k),
        )
    )
    dtype = autocast_dtype(q)
    if dtype is not None:
        mask = cast(mask, dtype)
    queries, keys = max_seqlen_q or longest(given.cu_seqlens_q), max_seqlen_k or longest(given.cu_seqlens_k)
    padded = given.q.new_empty((0,)).expand(len(ends_q) - 1, q.shape[1], queries, 0)
    mask = checks.mask("attention", mask, padded, keys)
    per_batch = alibi_slopes is not None and alibi_slopes.dim() == 2
    outputs, logs = [], []
    for b, ((q0, q1), (k0, k1)) in enumerate(zip(pairwise(ends_q), pairwise(ends_k), strict=True)):
        own = mask[b : b + 1] if mask.shape[0] > 1 else mask
        own = own[:, :, : q1 - q0 if mask.shape[2] > 1 else 1, : k1 - k0 if mask.shape[3] > 1 else 1]
        slopes = alibi_slopes[b] if per_batch and alibi_slopes is not None else alibi_slopes
        rows = (x[begin:end].transpose(0, 1)[None] for x, begin, end in ((q, q0, q1), (k, k0, k1), (v, k0, k1)))
        found = attention(*rows, attn_mask=own, alibi_slopes=slopes, return_lse=return_lse, **options)
        o = found[0] if return_lse else found
        outputs.append(o[0].transpose(0, 1))
        if return_lse:
            logs.append(found[1][0])
    rest = q.shape[0] - ends_q[-1]  # rows that belong to no sequence
    outputs.append(given.q.new_zeros((rest, q.shape[1], v.shape[-1])))
    if not return_lse:
        return torch.cat(outputs), None
    logs.append(given.q.new_full((q.shape[1], rest), -math.inf, dtype=compute_dtype(given.q.dtype)))
    return torch.cat(outputs), torch.cat(logs, 1)


def attention_map(
    q: Tensor, k: Tensor, *, attn_mask: Tensor | None = None, causal: Causal = False,
    softmax_scale: float | None = None, window: Window = (None, None), alibi_slopes: Tensor | None = None,
    softcap: float = 0.0, sinks: Tensor | None = None, enable_gqa: bool = True, rows: int = 64, cols: int = 64,
) -> Tensor:  # fmt: skip
    """The attention probabilities as a picture [B, H, rows, cols], float32 (float64 for float64), in linear memory.

    Queries fall into `rows` bins (i into i * rows // M), keys into `cols`. A cell is the probability that a query of
    its row gives to the keys of its column, averaged over the queries; so a row sums to 1 (less with sinks). Bins
    without a query are 0. Arguments as for `attention`, padded only; not differentiable.
    """
    rows, cols = checks.bins("rows", rows), checks.bins("cols", cols)
    cfg, given = checked(
        q, k, None, attn_mask, causal, 0.0, softmax_scale, window, alibi_slopes, softcap, sinks, enable_gqa=enable_gqa,
        of_map=True,
    )  # fmt: skip
    return operators.attention_map(cfg, given, rows, cols)


def draw_seed() -> Tensor:
    """Seed and offset of a dropout mask, from the generator that torch.manual_seed sets."""
    return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device="cpu")


def checked(
    q: Tensor, k: Tensor, v: Tensor | None, attn_mask: Tensor | None = None, causal: Any = False,
    dropout_p: float = 0.0, softmax_scale: float | None = None, window: Any = (None, None),
    alibi_slopes: Tensor | None = None, softcap: float = 0.0, sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None, enable_gqa: bool = True, of_map: bool = False,
) -> tuple[AttentionConfig, AttentionInputs]:  # fmt: skip
    """Checks the arguments of `attention`, or of `attention_map`, which has no v: there q takes its place. Draws no
    seed."""
    function = "attention_map" if of_map else "attention"
    checks.tensors(function, (("q", q), ("k", k)) if of_map else (("q", q), ("k", k), ("v", v)))
    dtype = autocast_dtype(q)
    if dtype is not None:
        q, k, v = cast(q, dtype), cast(k, dtype), cast(v, dtype)
        attn_mask = (
            cast(attn_mask, dtype) if isinstance(attn_mask, Tensor) and not checks.is_bias(attn_mask) else attn_mask
        )
    checks.same_kind(q, k, v)
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    checks.heads(q, k, v, packed, checks.flag("enable_gqa", enable_gqa))
    if checks.is_bias(attn_mask) and not packed:
        causal, attn_mask = checks.bias_alignment(attn_mask, causal, q.shape[2], k.shape[2]), None
    left, right = checks.window(window)
    lengths = checks.max_seqlen("max_seqlen_q", max_seqlen_q), checks.max_seqlen("max_seqlen_k", max_seqlen_k)
    cfg = AttentionConfig(
        *lengths, softmax_scale=checks.scale(softmax_scale, q.shape[-1]), causal=checks.causal(causal),
        window_left=left, window_right=right, softcap=checks.softcap(softcap, q.dtype),
        dropout_p=checks.probability(dropout_p),
    )  # fmt: skip
    mask = None
    if packed:
        if attn_mask is not None:
            raise ValueError(f"attn_mask: expected None with cu_seqlens, got {type(attn_mask).__name__}")
        cu_seqlens_q, cu_seqlens_k = checks.cu_seqlens(cu_seqlens_q, cu_seqlens_k, q.device)
        cfg, cu_seqlens_q, cu_seqlens_k = _with_lengths(cfg, q, k, cu_seqlens_q, cu_seqlens_k)
    else:
        checks.no_lengths(max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k)
        if attn_mask is not None:
            mask = unexpanded(checks.mask(function, attn_mask, q, k.shape[2]))
    heads, batch = q.shape[1], q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    if alibi_slopes is not None:
        checks.per_head(function, "alibi_slopes", alibi_slopes, q, ((heads,), (batch, heads)))
    if sinks is not None:
        checks.per_head(function, "sinks", sinks, q, ((heads,),))
    v = q if v is None else v
    return cfg, AttentionInputs(q, k, v, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k)


def _with_lengths(
    cfg: AttentionConfig, q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor
) -> tuple[AttentionConfig, Tensor, Tensor]:  # fmt: skip
    """Does what only the CPU operators do themselves: checks the values of cu_seqlens for the reference, and finds the
    longest sequences for CUDA. If it reads values, it returns the copies that it read, for the call to use."""
    if q.is_cpu:
        if is_readable(cu_q, cu_k) and (forward_ad._current_level >= 0 or not route(q, k, k).native):
            cu_q = checks.cu_values("cu_seqlens_q", cu_q, q.shape[0], cfg.max_seqlen_q)
            cu_k = checks.cu_values("cu_seqlens_k", cu_k, k.shape[0], cfg.max_seqlen_k)
        return cfg, cu_q, cu_k
    readable = not torch.compiler.is_compiling() and not are_transforms_active()
    if not readable or q.device.type == "meta":
        rows = [cfg.max_seqlen_q or q.shape[0], cfg.max_seqlen_k or k.shape[0]]
        return cfg._replace(max_seqlen_q=rows[0], max_seqlen_k=rows[1]), cu_q, cu_k
    if not cfg.max_seqlen_q:
        cu_q = cu_q.clone()
        cfg = cfg._replace(max_seqlen_q=longest(cu_q))
    if not cfg.max_seqlen_k:
        cu_k = cu_k.clone()
        cfg = cfg._replace(max_seqlen_k=longest(cu_k))
    return cfg, cu_q, cu_k


def longest(cu: Tensor) -> int:
    return int(cu.diff().max()) if cu.shape[0] > 1 else 0


def unexpanded(mask: Tensor) -> Tensor:
    """The mask with size 1 in each dimension that was expanded (stride 0). A mask that requires a gradient is returned
    as it is, because its gradient has a value for each element."""
    if mask.requires_grad or are_transforms_active():
        return mask
    for dim, (size, stride) in enumerate(zip(mask.shape, mask.stride(), strict=True)):
        if stride == 0 and size > 1:
            mask = mask.narrow(dim, 0, 1)
    return mask
