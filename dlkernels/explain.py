"""Tells which kernel runs a layer for a given input, and why, without computing anything."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils.rnn import PackedSequence

from dlkernels._core.explanation import Explanation, LayerExplanation, describe
from dlkernels.attention import explain as of_attention
from dlkernels.integrations import recurrent_operators, sdpa_operator
from dlkernels.integrations.switch import Switch
from dlkernels.rnn import explain as of_rnn
from dlkernels.rnn.routing import Extras

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
    if not isinstance(target, _OF_TORCH):
        _refuse(target)
    if not args and not kwargs:
        raise TypeError(f"explain(): the input of the call is missing: explain({type(target).__name__}(...), input)")
    if isinstance(target, of_attention.LAYERS):
        return of_attention.explain_layer(target, *args, **kwargs)
    if isinstance(target, _ATTENTION_OF_TORCH):
        return _not_ours(target, next(iter((*args, *kwargs.values()))))
    return _layer(target, *args, **kwargs)


def _refuse(target: Any) -> NoReturn:
    got = type(target).__name__
    if isinstance(target, Module):
        inside = [(name, module) for name, module in target.named_modules() if isinstance(module, _OF_TORCH)]
        layers = ", ".join(f"{name} ({type(module).__name__})" for name, module in inside[:3])
        if layers:
            got += f"; explain one of the layers in it, with that layer's input: {layers}{', ...' * (len(inside) > 3)}"
    raise TypeError(
        f"explain: expected a recurrent layer or cell, an attention layer or an attention function, got {got}"
    )


def _switches(layer: Module) -> list[Switch]:
    """Those that serve the operators that a layer of torch.nn calls."""
    if isinstance(layer, _ATTENTION_OF_TORCH):
        return [sdpa_operator.SWITCH]
    return [recurrent_operators.SWITCH]


def _layer(layer: Module, input: Tensor | PackedSequence, hx: Any = None, **extras: Any) -> Explanation:
    if not isinstance(input, (Tensor, PackedSequence)):
        raise TypeError(f"explain(): argument 'input' must be Tensor or PackedSequence, not {type(input).__name__}")
    if not isinstance(layer, of_rnn.LAYERS):
        return _not_ours(layer, input)
    try:
        given = Extras(**extras)
    except TypeError as error:
        raise TypeError(str(error).replace("Extras.__new__()", "explain()")) from None
    return of_rnn.explain_layer(layer, input, hx, given)


def _not_ours(layer: Module, input: Any) -> Explanation:
    of_torch = type(layer).__module__.startswith("torch.")
    reason = "torch.nn layer: not patched" if of_torch else "not a layer of dlkernels"
    if any(switch.is_on for switch in _switches(layer)):
        reason += "; dlkernels.enable() is on, and handle.report() tells which of its calls our kernels served"
    data = input.data if isinstance(input, PackedSequence) else input
    only = LayerExplanation("whole module", "torch", reason, grad=False)
    return Explanation(repr(layer), describe("input", data), (only,))
