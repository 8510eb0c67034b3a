"""Our attention inside of aten::_native_multi_head_attention, the fast path that nn.MultiheadAttention and
nn.TransformerEncoderLayer take in inference, where they call no scaled_dot_product_attention.

The operator projects its input to queries, keys and values, attends and projects the result. torch's kernel keeps the
scores of all pairs in memory; ours makes the same products with our fused attention between them. The operator of the
whole encoder layer, aten::_transformer_encoder_layer_fwd, calls this one through the dispatcher, so its attention is
served as well, and the rest of the layer is torch's.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from dlkernels._core import extension
from dlkernels._core.dtypes import KERNEL_DTYPES
from dlkernels._core.private_torch import skip_in_dynamo
from dlkernels._core.routing import ONLY_SCALAR
from dlkernels.attention.arguments import AttentionConfig, AttentionInputs
from dlkernels.attention.functional import unexpanded
from dlkernels.attention.nested import from_rows, to_rows
from dlkernels.attention.operators import run_forward
from dlkernels.integrations import counts
from dlkernels.integrations.sdpa_operator import kernel_name
from dlkernels.integrations.switch import SMALL, Kernels, Switch

__all__ = ["NAME", "SWITCH"]

NAME = "_native_multi_head_attention"
_KEYS = ("CPU", "NestedTensorCPU")
# torch's kernels, which are known while ours are registered.
_torchs: dict[str, Any] = {}
_torch_has_warned = False


def least_scores() -> tuple[int, int]:
    """Below so many scores of a sequence, of wide and of 16-bit tensors, torch's kernel takes less time than ours and
    the Python code around it, as measured for the kind of machine (csrc/core/plan_constants.def)."""
    wide, narrow = (extension.plan_constant(f"fast_path_least_scores{of}") for of in ("", "_16_bit"))
    return wide, narrow


LEAST_SCORES, LEAST_SCORES_16_BIT = least_scores()
# torch's numbers for masks [B, T] and [B, H, T, T]; 0 is [T, T].
_PADDING, _OF_EACH_HEAD = 1, 2
_UNFIT = "refused: the input and the weights are not those of a layer"


class _Weights(NamedTuple):
    """Of the projections, and the number of heads."""

    heads: int
    qkv_weight: Tensor
    qkv_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor


def _register() -> Kernels:
    for key in _KEYS:
        _torchs[key] = torch.library.get_kernel(f"aten::{NAME}", key)
    if _torch_has_warned:
        return Kernels({NAME: _kernel}, _KEYS, with_keyset=True)
    return _register_in_silence()


def _register_in_silence() -> Kernels:
    """torch warns of the first kernel in a process that takes the place of another. Later ones are registered without
    a change of the filters, after which Python would show warnings again that it shows once."""
    global _torch_has_warned
    _torch_has_warned = True
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*overriding a previously registered kernel")
        return Kernels({NAME: _kernel}, _KEYS, with_keyset=True)


SWITCH = Switch("fast path of attention", _register)


def _kernel(
    keys: Any, query: Tensor, key: Tensor, value: Tensor, embed_dim: int, num_head: int, qkv_weight: Tensor,
    qkv_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor, mask: Tensor | None = None, need_weights: bool = True,
    average_attn_weights: bool = True, mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    weights = _Weights(num_head, qkv_weight, qkv_bias, proj_weight, proj_bias)
    reason = _why_not(query, key, value, embed_dim, weights, need_weights)
    if reason is None:
        found = _nested(query, mask, weights) if query.is_nested else _dense(query, mask, mask_type, weights)
        if isinstance(found, Tensor):
            isa = extension.native.isa()  # type: ignore[union-attr]
            counts.count_served(NAME, kernel_name(isa, query.dtype))
            return found, None
        reason = found
    counts.count_left(NAME, reason)
    return _torchs["NestedTensorCPU" if query.is_nested else "CPU"].call_boxed(  # type: ignore[no-any-return]
        keys, query, key, value, embed_dim, num_head, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, need_weights,
        average_attn_weights, mask_type,
    )  # fmt: skip


def _why_not(
    query: Tensor, key: Tensor, value: Tensor, embed_dim: int, weights: _Weights, need_weights: bool
) -> str | None:
    """Why a call is left to torch; None if our kernels may serve it. torch raises the errors of mistakes."""
    reason = SWITCH.why_not(query)
    if reason is not None:
        return reason
    if need_weights:
        return "the attention weights are asked for"
    if _is_small(query, embed_dim, weights.heads):
        return SMALL
    if not extension.HAVE_NATIVE:
        return extension.why_not
    if extension.prefers_torch:
        return ONLY_SCALAR
    if query is not key or key is not value:
        return "no self-attention"
    if query.dtype not in KERNEL_DTYPES:
        return f"no kernel for {query.dtype} on cpu"
    if any(x.dtype != query.dtype or not x.is_cpu for x in weights[1:]):
        return "the input and the weights differ in dtype or device"
    shapes = [tuple(x.shape) for x in weights[1:]]
    of_layer = [(3 * embed_dim, embed_dim), (3 * embed_dim,), (embed_dim, embed_dim), (embed_dim,)]
    if query.dim() != 3 or shapes != of_layer or weights.heads <= 0 or embed_dim % weights.heads:
        return _UNFIT
    return None if query.numel() else "without elements"


def _is_small(x: Tensor, features: int, heads: int) -> bool:
    """Whether torch is faster. Leaving a call to torch takes some microseconds as well, so this is asked early. torch
    computes the softmax of each nested sequence by itself, so for more than one ours is faster at any size."""
    if x.dim() != 3 or features <= 0 or (x.is_nested and x.size(0) > 1):
        return False
    rows = x.numel() // features
    least = LEAST_SCORES_16_BIT if x.itemsize == 2 and not x.is_nested else LEAST_SCORES
    return heads * rows * rows < x.size(0) * least


def _dense(x: Tensor, mask: Tensor | None, mask_type: int | None, weights: _Weights) -> Tensor | str:
    """The result for a tensor [B, T, E], or why the call is left to torch."""
    batch, steps, features = x.shape
    if features != weights.out_bias.shape[0]:
        return _UNFIT
    if mask is not None:
        of_scores = _visible(mask, mask_type, batch, weights.heads, steps)
        if isinstance(of_scores, str):
            return of_scores
        mask = of_scores
    # Matrices, because torch multiplies each sequence by itself if x is not contiguous, which takes many times as long.
    qkv = linear(x.reshape(-1, features), weights.qkv_weight, weights.qkv_bias)
    q, k, v = qkv.view(batch, steps, 3, weights.heads, -1).permute(2, 0, 3, 1, 4).unbind()
    cfg = AttentionConfig(0, 0, 1 / math.sqrt(q.shape[-1]))
    o = run_forward(AttentionInputs(q, k, v, mask), cfg)[0]
    rows = o.transpose(1, 2).reshape(-1, features)
    return linear(rows, weights.out_weight, weights.out_bias).view(batch, steps, features)


def _nested(x: Tensor, mask: Tensor | None, weights: _Weights) -> Tensor | str:
    """The same for a nested tensor [B, *, E]."""
    if mask is not None:
        return "refused: a mask beside a nested tensor"
    try:
        ragged = to_rows(x)
    except AssertionError:
        return "refused: the sequences of the nested tensor differ in their features"
    rows = ragged.rows
    if rows.shape[1] != weights.out_bias.shape[0]:
        return _UNFIT
    q, k, v = linear(rows, weights.qkv_weight, weights.qkv_bias).view(len(rows), 3, weights.heads, -1).unbind(1)
    cfg = AttentionConfig(ragged.max_seqlen, ragged.max_seqlen, 1 / math.sqrt(q.shape[-1]))
    given = AttentionInputs(q, k, v, cu_seqlens_q=ragged.cu_seqlens, cu_seqlens_k=ragged.cu_seqlens)
    o = run_forward(given, cfg)[0]
    return from_rows(linear(o.flatten(1), weights.out_weight, weights.out_bias), x)


def _visible(mask: Tensor, mask_type: int | None, batch: int, heads: int, steps: int) -> Tensor | str:
    """The mask for our kernels, True where a query may attend, or why the call is left to torch. What is not zero is
    hidden, in masks of numbers as well: nn.MultiheadAttention has made these from masks of booleans."""
    full = {0: (steps, steps), _PADDING: (batch, steps), _OF_EACH_HEAD: (batch, heads, steps, steps)}
    if not mask.is_cpu or mask_type not in full or mask.shape != full[mask_type]:
        return "refused: the mask does not fit"
    visible = unexpanded(mask) == 0
    if not visible.any(-1).all():
        return "a query may attend to nothing, for which torch gives NaN"
    if mask_type == _OF_EACH_HEAD:
        return visible
    return visible[:, None, None, :] if mask_type == _PADDING else visible[None, None]


# Dynamo must not trace the kernel where a compiled program calls the operator outside of its graphs.
skip_in_dynamo(_kernel)
