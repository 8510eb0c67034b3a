"""Ring attention as users call it: the checks of its arguments, and the way to `RingAttention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dlkernels._core import extension, tangents
from dlkernels._core.dtypes import KERNEL_DTYPES
from dlkernels._core.private_torch import are_transforms_active, forward_ad, skip_in_dynamo
from dlkernels.attention import checks
from dlkernels.attention import functional as attention
from dlkernels.attention.arguments import AttentionConfig, AttentionInputs
from dlkernels.attention.routing import route
from dlkernels.distributed.agreement import Signature, agree, refuse
from dlkernels.distributed.group import Ring, ring_of
from dlkernels.distributed.layout import checked_layout
from dlkernels.distributed.ring import Call, RingAttention

__all__ = ["ring_attention"]


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, *, group: Any = None, causal: bool = False, softmax_scale: float | None = None,
    softcap: float = 0.0, layout: str = "contiguous", return_lse: bool = False, check: bool = True,
) -> Any:  # fmt: skip
    """Attention over a sequence that is divided among the ranks of a group: o, or (o, lse), of this rank's queries over
    the keys of all ranks. The keys and values travel around the ring of ranks while each rank computes (Liu et al.
    2023, Ring Attention), so that no rank ever has more than two shards of them besides its own. The gradients are
    exact.

    q: [B, H, M, D], k: [B, Hkv, N, D], v: [B, Hkv, N, Dv]: this rank's rows, of one dtype and device, any strides;
        float32, float64, bfloat16 or float16. Query head h reads the head h // (H // Hkv) of k and v. The ranks may
        have different numbers of rows, unless the layout is "zigzag".
    group: a ProcessGroup of torch.distributed; None is the default group.
    causal: each query sees the keys up to its own position in the whole sequence; M and N must be equal.
    softmax_scale: factor of the scores, 1 / sqrt(D) for None.
    softcap: c > 0 replaces a scaled score s by c * tanh(s / c).
    layout: which rows a rank has, which counts for causal attention only. "contiguous": the ranks' shards follow each
        other; keys of later ranks are skipped, so the last rank has the most to compute. "zigzag": rank r has the
        chunks r and 2 * world - 1 - r of 2 * world, as `shard` cuts them; all ranks compute the same number of scores.
    return_lse: also the logarithm of the softmax's denominator, [B, H, M], float32 (float64 for float64).
    check: compare the arguments of the ranks before the first message, by one all_gather of 14 integers. With False
        this is not sent; all ranks must then have the same number of rows, and ranks that disagree wait for each
        other until the group's timeout, or their processes end.

    o is [B, H, M, Dv] of the dtype of q. The partial results are summed in float32 (float64 for float64), and so are
    the gradients of k and v, which travel around the ring in that dtype.

    Forward and backward are collective: every rank of the group makes the same calls in the same order, and a rank
    whose o does not matter for the loss runs its backward too. A group with one rank communicates nothing, and its call
    is `dlkernels.functional.attention`. Under autocast q, k and v are cast as there.

    Raises TypeError for arguments of a wrong type, ValueError for ranks of tensors, dtypes and values that are not
    accepted, RuntimeError for sizes, devices and dtypes that do not fit together, on this rank or among the ranks, and
    without a process group; NotImplementedError for torch.func transforms and forward-mode differentiation. If one
    rank refuses its arguments, the others raise RuntimeError. A rank that ends or stops answering makes the others
    raise torch's RuntimeError, at the latest after the group's timeout. Second derivatives raise RuntimeError if the
    group has several ranks.
    """
    ring = ring_of(group)
    checking = check is not False and ring.world > 1
    try:
        cfg, given = _checked(q, k, v, causal, softmax_scale, softcap, layout, return_lse, check, ring)
        native = route(*given[:3]).native
    except Exception:
        if checking:
            refuse(ring, q.device if isinstance(q, Tensor) else torch.device("cpu"))
        raise
    if ring.world == 1:
        return attention.attention(
            q, k, v, causal=causal, softmax_scale=softmax_scale, softcap=softcap, return_lse=return_lse
        )
    q, k, v = given[:3]
    signature = _signature(q, k, v, cfg, layout, causal)
    lengths = agree(ring, signature, q.device) if checking else [k.shape[2]] * ring.world
    if not native:
        extension.announce_reference()
    call = Call(cfg, ring, tuple(lengths), layout, causal, native, signature.need_q, signature.need_kv)
    o, lse = RingAttention.apply(call, q, k, v)  # type: ignore[no-untyped-call]
    return (o, lse) if return_lse else o


def _checked(
    q: Tensor, k: Tensor, v: Tensor, causal: Any, softmax_scale: float | None, softcap: float, layout: Any,
    return_lse: Any, check: Any, ring: Ring,
) -> tuple[AttentionConfig, AttentionInputs]:  # fmt: skip
    """The arguments of the operators, without `causal`, which each block decides for itself."""
    for name, value in (("causal", causal), ("return_lse", return_lse), ("check", check)):
        checks.flag(name, value)
    checked_layout(layout)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        # A test by name, because importing the class takes long.
        if type(tensor).__name__ == "DTensor":
            raise TypeError(f"{name}: expected this rank's rows as a plain tensor (DTensor.to_local()), got a DTensor")
    if are_transforms_active():
        raise NotImplementedError("ring_attention: torch.func transforms are not supported")
    if forward_ad._current_level >= 0 and tangents.are_carried((q, k, v)):
        raise NotImplementedError("ring_attention: forward-mode differentiation is not supported")
    cfg, given = attention.checked(q, k, v, softmax_scale=softmax_scale, softcap=softcap)
    if given.q.dtype not in KERNEL_DTYPES:
        raise ValueError(f"q: expected float32, float64, bfloat16 or float16, got {given.q.dtype}")
    rows, keys = q.shape[2], k.shape[2]
    if causal and rows != keys:
        raise RuntimeError(f"k: expected {rows} rows like q for causal attention, got shape {list(k.shape)}")
    if layout == "zigzag" and ring.world > 1:
        for name, tensor in (("q", q), ("k", k)):
            if tensor.shape[2] % 2:
                raise RuntimeError(
                    f"{name}: expected an even number of rows for layout 'zigzag', got shape {list(tensor.shape)}"
                )
    return cfg, given


def _signature(q: Tensor, k: Tensor, v: Tensor, cfg: AttentionConfig, layout: str, causal: bool) -> Signature:
    needs = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (q, k, v)]
    return Signature(
        rows=k.shape[2], batch=q.shape[0], heads=q.shape[1], kv_heads=k.shape[1], width=q.shape[3],
        value_width=v.shape[3], dtype=q.dtype, causal=causal, layout=layout, softmax_scale=cfg.softmax_scale,
        softcap=cfg.softcap, need_q=needs[0], need_kv=needs[1] or needs[2],
    )  # fmt: skip


# Dynamo would trace into the messages; a compiled program calls this as it is.
skip_in_dynamo(ring_attention)
