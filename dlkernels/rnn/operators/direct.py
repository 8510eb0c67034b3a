"""Forward calls that go from Python to the CPU kernels without torch's dispatcher (csrc/rnn/torch/direct.cpp).

The functions here serve plain calls without gradients and return None for all others and for those that the kernels
refuse: autocast, transforms, modes, tracing, profiling, forward-mode differentiation, subclasses of Tensor, tensors
elsewhere. They must not be called where Dynamo traces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dlkernels._core import extension
from dlkernels._core.private_torch import (
    are_transforms_active,
    forward_ad,
    handles_of_tensors,
    is_any_autocast_enabled,
    is_dispatch_mode_active,
    is_function_mode_active,
    is_profiling,
    is_tracing,
    tensors_of_handles,
)

__all__ = ["cell", "cell_module", "hold", "layer_module", "layers", "layers_without_gradients"]

_is_grad_enabled = torch.is_grad_enabled


def _not_served(*arguments: Any) -> None:
    return None


# layers(mode, x, h0, c0, weights, packed, batch_sizes, lengths, num_layers, bidirectional, batch_first)
# -> [y, h_n], followed by c_n for the lstm. `weights` has those of all layers; `packed` is None or a tuple.
layers: Callable[..., list[Tensor] | None] = _not_served
# cell(mode, x, h, c, w_ih, w_hh, b_ih, b_hh) -> [h'], followed by c' for the lstm.
cell: Callable[..., list[Tensor] | None] = _not_served
# hold(aliases, buffers) -> the two tuples of tensors as a capsule, for `Prepacked`.
hold: Callable[..., Any] = _not_served
# layer_module(module.__dict__, x, hx, resets) -> (y, h_n) or (y, (h_n, c_n)): what the module's forward returns for 3-D
# input.
layer_module: Callable[..., Any] = _not_served
# cell_module(mode, module.__dict__, x, hx) -> h' or (h', c').
cell_module: Callable[..., Any] = _not_served

if extension.native is not None:
    extension.native.connect(
        Tensor,
        torch.nn.Parameter,
        handles_of_tensors,
        tensors_of_handles,
        torch.are_deterministic_algorithms_enabled,
        forward_ad,
        (
            are_transforms_active,
            is_any_autocast_enabled,
            is_tracing,
            is_dispatch_mode_active,
            is_function_mode_active,
            is_profiling,
        ),
    )
    layers, cell = extension.native.layers, extension.native.cell
    hold = extension.native.hold
    layer_module, cell_module = extension.native.layer_module, extension.native.cell_module


def layers_without_gradients(
    mode: str, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Any, packed: Any, batch_sizes: Tensor | None,
    lengths: Tensor | None, num_layers: int, bidirectional: bool, batch_first: bool, dropout: float, training: bool,
) -> list[Tensor] | None:  # fmt: skip
    """`layers`, unless dropout has to be drawn. The arguments need not have been checked."""
    if not x.is_cpu or type(weights) not in (list, tuple):
        return None
    # Most calls that want a gradient are recognized by the first weight, before anything else is done.
    if _is_grad_enabled() and weights and getattr(weights[0], "requires_grad", True):
        return None
    if dropout and training and num_layers != 1:
        return None
    return layers(mode, x, h0, c0, weights, packed, batch_sizes, lengths, num_layers, bidirectional, batch_first)
