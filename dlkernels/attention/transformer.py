"""TransformerEncoderLayer and TransformerDecoderLayer: torch.nn's classes with our attention and another forward.

The encoder layer of torch.nn has a fast path for inference that computes everything in one operator and never calls
`self_attn`. So these have a forward of their own, which always calls the submodules. Their input may be nested tensors,
which `torch.nn.TransformerEncoder` makes of padded batches in inference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import relu

from dlkernels._core import extension
from dlkernels._core.private_torch import has_global_forward_hooks
from dlkernels._core.tools import PUBLIC_MODULE, KnownLayer, is_tracing, mark_as_leaf
from dlkernels.attention import by_torch
from dlkernels.attention.layers import MultiheadAttention
from dlkernels.attention.masks import additive, same_kind

__all__ = ["TransformerDecoderLayer", "TransformerEncoderLayer"]


_PLAIN = (MultiheadAttention, torch.nn.Linear, torch.nn.LayerNorm, torch.nn.Dropout)


def _use_ours(attention: torch.nn.Module) -> None:
    """Changes the class of the module in place, so that its initialisation draws the same numbers as torch's."""
    attention.__class__ = MultiheadAttention
    mark_as_leaf(attention)


class TransformerEncoderLayer(KnownLayer, torch.nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer` on fused attention kernels."""

    __module__ = PUBLIC_MODULE

    def __init__(
        self, d_model: int, nhead: int, dim_feedforward: int = 2048, dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = relu, layer_norm_eps: float = 1e-5, batch_first: bool = False,
        norm_first: bool = False, bias: bool = True, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device,
            dtype,
        )  # fmt: skip
        _use_ours(self.self_attn)

    def forward(
        self, src: Tensor, src_mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:  # fmt: skip
        """As in torch.nn; `is_causal` without `src_mask` is an error in inference too."""
        # torch.jit.trace records torch's own operators.
        if is_tracing() or (extension.prefers_torch and _is_torchs(self, src, src_mask, src_key_padding_mask)):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        mask, padding = self._masks(src.dtype, src_mask, src_key_padding_mask)
        x = src
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), mask, padding, is_causal=is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + self._sa_block(x, mask, padding, is_causal=is_causal))
        return self.norm2(x + self._ff_block(x))  # type: ignore[no-any-return]

    def _masks(self, dtype: torch.dtype, mask: Any, padding: Any) -> tuple[Tensor | None, Tensor | None]:
        """The masks as the layer passes them on. torch's layer makes both additive. Ours does so only if code other
        than its own may see them. Otherwise a boolean mask stays as it is: it is smaller, and the kernel skips what it
        hides."""
        if mask is not None and not isinstance(mask, Tensor):
            raise RuntimeError(f"src_mask: expected None or a Tensor, got {type(mask).__name__}")
        mask, padding = same_kind(mask, "src_mask", padding, "src_key_padding_mask", dtype)
        return (additive(mask, dtype), additive(padding, dtype)) if _may_look_at_masks(self) else (mask, padding)


class TransformerDecoderLayer(KnownLayer, torch.nn.TransformerDecoderLayer):
    """`torch.nn.TransformerDecoderLayer` on fused attention kernels."""

    __module__ = PUBLIC_MODULE

    def __init__(
        self, d_model: int, nhead: int, dim_feedforward: int = 2048, dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = relu, layer_norm_eps: float = 1e-5, batch_first: bool = False,
        norm_first: bool = False, bias: bool = True, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device,
            dtype,
        )  # fmt: skip
        _use_ours(self.self_attn)
        _use_ours(self.multihead_attn)

    def forward(
        self, tgt: Tensor, memory: Tensor, tgt_mask: Tensor | None = None, memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None, memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False, memory_is_causal: bool = False,
    ) -> Tensor:  # fmt: skip
        """As in torch.nn."""
        if is_tracing():
            return super().forward(
                tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, tgt_is_causal,
                memory_is_causal,
            )  # fmt: skip
        of_self = (tgt_mask, tgt_key_padding_mask, tgt_is_causal)
        of_memory = (memory, memory_mask, memory_key_padding_mask, memory_is_causal)
        x = tgt
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), *of_self)
            x = x + self._mha_block(self.norm2(x), *of_memory)
            return x + self._ff_block(self.norm3(x))
        x = self.norm1(x + self._sa_block(x, *of_self))
        x = self.norm2(x + self._mha_block(x, *of_memory))
        return self.norm3(x + self._ff_block(x))  # type: ignore[no-any-return]


def _is_torchs(layer: TransformerEncoderLayer, src: Tensor, *masks: Tensor | None) -> bool:
    """Whether torch.nn's forward runs the call. Its fast path for inference calls no submodule unless there are hooks,
    so the submodules have to be plain ones."""
    return (
        type(layer) is TransformerEncoderLayer
        and not _may_look_at_masks(layer)
        and all(type(child) in _PLAIN for child in layer.children())
        and by_torch.serves_layer(src, src, src, *masks)
    )


def _may_look_at_masks(layer: TransformerEncoderLayer) -> bool:
    own: Any = layer.self_attn
    return bool(
        type(own).forward is not MultiheadAttention.forward
        or type(own).__call__ is not MultiheadAttention.__call__
        or type(layer)._sa_block is not torch.nn.TransformerEncoderLayer._sa_block
        or "_sa_block" in layer.__dict__
        or "forward" in own.__dict__
        or own._forward_pre_hooks
        or own._forward_hooks
        or has_global_forward_hooks()
    )
