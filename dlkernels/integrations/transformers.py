"""Our attention as `attn_implementation="dlkernels"` in models of Hugging Face transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dlkernels.attention.functional import attention

__all__ = ["NAME", "register"]

NAME = "dlkernels"


def register() -> None:
    """Adds the name "dlkernels" to transformers' attention implementations, for
    `AutoModel.from_pretrained(..., attn_implementation="dlkernels")` and `model.set_attn_implementation("dlkernels")`.

    Served are causal and bidirectional models, padding, sliding windows, grouped heads, caches, softcap, sinks,
    position biases and dropout, with gradients. Attention weights (`output_attentions=True`) need "eager".

    Raises ImportError if transformers is not installed or has no attention interface (before 4.53).
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        raise ImportError(
            "dlkernels.integrations.transformers needs transformers with AttentionInterface and "
            f"AttentionMaskInterface: pip install 'transformers>=4.53' ({error})"
        ) from error
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None, softcap: float | None = None,
    s_aux: Tensor | None = None, position_bias: Tensor | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """query [B, H, M, D], key and value [B, Hkv, N, D] -> [B, M, H, D]. s_aux: the sinks [H]. `attention_mask` is what
    `sdpa_mask` makes: True where a query may attend, sliding windows included, or None if `is_causal` says it all.
    """
    if others.get("output_attentions"):
        raise ValueError(
            'attn_implementation="dlkernels" does not compute attention weights, which output_attentions=True asks '
            'for; use attn_implementation="eager"'
        )
    queries, keys = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and queries > 1
    mask = attention_mask
    if mask is not None:
        mask = mask[..., :keys]
    if position_bias is not None:
        bias = position_bias[..., :keys].to(query.dtype)
        if mask is None:
            mask = bias
        elif mask.dtype == torch.bool:
            mask = bias.masked_fill(~mask, -torch.inf)
        else:
            mask = bias + mask
    if s_aux is not None:
        s_aux = s_aux.to(query.dtype)
    o = attention(
        query, key, value, attn_mask=mask, causal=causal, dropout_p=dropout, softmax_scale=scaling,
        softcap=softcap or 0.0, sinks=s_aux,
    )  # fmt: skip
    return o.transpose(1, 2).contiguous(), None
