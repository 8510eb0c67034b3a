"""Tells which kernel runs a layer for a given input, and why, without computing anything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils.rnn import PackedSequence

from dlkernels._core.explanation import Explanation, LayerExplanation, describe
from dlkernels.attention import explain as of_attention
from dlkernels.rnn import explain as of_rnn

__all__ = ["Explanation", "LayerExplanation", "explain"]

_ATTENTION_OF_TORCH = (
    torch.nn.MultiheadAttention, torch.nn.TransformerEncoderLayer, torch.nn.TransformerDecoderLayer,
)  # fmt: skip
_OF_TORCH = (torch.nn.RNNBase, torch.nn.RNNCellBase, *_ATTENTION_OF_TORCH)


def explain(target: Any, *args: Any, **kwargs: Any) -> Explanation:
    """Says which kernel `target(*args, **kwargs)` would run if it were called now, in the present grad mode, autocast,
    thread and determinism settings, and why. Nothing is run.

    target: a recurrent layer or cell, MultiheadAttention, a Transformer layer, `functional.attention`,
    `functional.scaled_dot_product_attention`, or torch's function of that name, as `patch_attention` would route it.
    """
    if any(target is function for function in of_attention.FUNCTIONS):
        return of_attention.explain_function(target, *args, **kwargs)
    if isinstance(target, of_attention.LAYERS):
        return of_attention.explain_layer(target, *args, **kwargs)
    if isinstance(target, _ATTENTION_OF_TORCH) and args:
        return _not_ours(target, args[0])
    return _layer(target, *args, **kwargs)


def _layer(
    layer: Module, input: Tensor | PackedSequence, hx: Any = None, *, lengths: Tensor | None = None, bptt_steps: int = 0
) -> Explanation:
    if not isinstance(input, (Tensor, PackedSequence)):
        raise TypeError(f"explain(): argument 'input' must be Tensor or PackedSequence, not {type(input).__name__}")
    if not isinstance(layer, of_rnn.LAYERS):
        return _not_ours(layer, input)
    return of_rnn.explain_layer(layer, input, hx, lengths, bptt_steps)


def _not_ours(layer: Module, input: Any) -> Explanation:
    if not isinstance(layer, _OF_TORCH):
        raise TypeError(
            f"explain: expected a recurrent layer or cell, an attention layer or an attention function, got "
            f"{type(layer).__name__}"
        )
    of_torch = type(layer).__module__.startswith("torch.")
    reason = "torch.nn layer: not patched" if of_torch else "not a layer of dlkernels"
    data = input.data if isinstance(input, PackedSequence) else input
    only = LayerExplanation("whole module", "torch", reason, grad=False)
    return Explanation(repr(layer), describe("input", data), (only,))
