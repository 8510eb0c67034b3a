"""Keeps the weights of a model's recurrent layers in fewer bits, for inference on the CPU."""

from __future__ import annotations

import copy as copylib
import warnings
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils.parametrize import is_parametrized

from dlkernels.integrations.patch import _check_module, _layer_name, _obstacle, _swap
from dlkernels.rnn.prepacked import Prepackable, check_weights, why_not_packable

__all__ = ["quantize"]

M = TypeVar("M", bound=Module)

_RECURRENT = (torch.nn.RNNBase, torch.nn.RNNCellBase)


def quantize(model: M, weights: torch.dtype = torch.int8, *, inplace: bool = False) -> M:
    """Returns `model` in eval mode with every RNN, LSTM, GRU and cell of it prepacked in `weights` (see `prepack`).

    The result is a deep copy unless `inplace`. Layers of torch.nn become ours, as by `patch`. Their float32 parameters
    stay, as the state_dict, but want no gradient any more. Other modules, such as Linear, stay as they are. A warning
    names the recurrent layers that are left as they are, and why. The packed copies follow the rules of `prepack`:
    quantize again after loading, copying or moving the model.
    """
    _check_module("quantize", model)
    check_weights("quantize", weights)
    if not inplace:
        model = copylib.deepcopy(model)
    model.eval()
    left = []
    for name, module in model.named_modules():
        reason = _quantize(module, weights)
        if reason:
            left.append(f"{name or '(root)'}: {_layer_name(module)} ({reason})")
    if left:
        warnings.warn(f"dlkernels.quantize left {len(left)} layer(s) as they are: {'; '.join(left)}", stacklevel=2)
    return model


def _quantize(module: Module, weights: torch.dtype) -> str:
    """Quantizes a module if it is a recurrent layer. Returns why it was left as it is, empty if it is none."""
    recurrent = isinstance(module, _RECURRENT)
    reason = _obstacle(module) if recurrent or isinstance(module, torch.jit.ScriptModule) else ""
    if reason or not recurrent:
        return reason
    own: list[Tensor] = list(module.parameters(recurse=False))
    if is_parametrized(module):
        return "a weight is parametrized"
    reason = why_not_packable(own, weights)
    if reason:
        return reason
    _swap(module)
    if not isinstance(module, Prepackable):
        return "a recurrent layer of another library"
    module.requires_grad_(False).prepack(weights)
    return ""
