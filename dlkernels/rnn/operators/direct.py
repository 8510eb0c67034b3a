"""Forward calls that go from Python to the CPU kernels without torch's dispatcher (csrc/rnn/torch/direct.cpp).

`layers` and `cell` serve plain calls without gradients and return None for all others and for those that the kernels
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

__all__ = ["cell", "layers"]


def _not_served(*arguments: Any) -> None:
    return None


# layers(mode, x, h0, c0, weights, packed, batch_sizes, lengths, num_layers, bidirectional, batch_first)
# -> [y, h_n], followed by c_n for the lstm. `weights` has those of all layers; `packed` is None or a tuple.
layers: Callable[..., list[Tensor] | None] = _not_served
# cell(mode, x, h, c, w_ih, w_hh, b_ih, b_hh) -> [h'], followed by c' for the lstm.
cell: Callable[..., list[Tensor] | None] = _not_served

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
