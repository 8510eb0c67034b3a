"""The recurrent operators `torch.ops.dlkernels.*`, one for each mode: "lstm", "gru", "rnn_tanh", "rnn_relu". The module
`sequence` has the operators of a layer and `cell` those of one step, each with the order of the arguments, the fakes
and the autograd Functions.

An operator only checks and computes. It does no autograd, broadcasting, promotion or mutation. Results that do not
exist or are not wanted are returned as tensors of shape [0].

All tensors of a call have one dtype, unless the call has a `Types` for autocast. Then each tensor may be float32,
bfloat16 or float16 (all weights of one dtype), products may be rounded to `Types.product`, and sums are float32.
A gradient has the dtype of the tensor to which it belongs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dlkernels._core import extension
from dlkernels._core.devices import register_fake
from dlkernels._core.flops import Formula, register_formulas
from dlkernels.rnn.kinds import KINDS, MODES, kind_of, sizes

__all__ = ["overloads", "pack"]


def overloads(suffix: str, fake: Callable[..., Any], formula: Formula) -> dict[str, Callable[..., Any]]:
    """Registers the fake and the FLOP formula of the operators with this suffix, and returns the operators by mode.
    `fake` takes a Kind and, by name, the arguments of the operator.

    The operators are looked up only once, because a lookup through torch.ops costs a good part of a short call.
    """
    if not extension.HAVE_NATIVE:
        return {}
    for mode, kind in KINDS.items():
        register_fake(mode + suffix, partial(fake, kind))
    register_formulas({mode + suffix: formula for mode in MODES})
    return {mode: getattr(torch.ops.dlkernels, mode + suffix).default for mode in MODES}


def pack(mode: str, weights: Sequence[Tensor], bidirectional: bool, bits: int = 0) -> Tensor:
    """The weights packed for the kernels of the instruction set in force, as opaque bytes. They are a copy: later
    changes of the weights do not reach them. bits: of a packed weight, 0 for those of its dtype."""
    return torch.ops.dlkernels.pack.default(mode, weights, bidirectional, bits)  # type: ignore[no-any-return]


def _pack_fake(mode: str, weights: Sequence[Tensor], bidirectional: bool, bits: int = 0) -> Tensor:
    assert extension.native is not None
    directions = 2 if bidirectional else 1
    hidden, proj, _ = sizes(kind_of(mode), weights, directions)
    size = extension.native.packed_bytes(
        mode, weights[0].dtype, int(weights[0].shape[1]), int(hidden), int(proj), directions, bits
    )
    return weights[0].new_empty((size,), dtype=torch.uint8)


if extension.HAVE_NATIVE:
    register_fake("pack", _pack_fake)
