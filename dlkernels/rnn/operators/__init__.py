"""The recurrent operators `torch.ops.dlkernels.*`, by mode: "lstm", "gru", "rnn_tanh", "rnn_relu". `sequence` has those
of a layer, `cell` those of one step: the order of their arguments, their fakes and their autograd Functions.

They check and compute, no more: no autograd, no broadcasting, no promotion, no mutation. What is not there or not
wanted comes back as a tensor of shape [0].

All tensors of a call are of one dtype, unless it has a `Types`, which autocast asks for: then each may be float32,
bfloat16 or float16 (the weights of one dtype), products may be rounded to `Types.product` and sums are float32.
Gradients come in the dtypes of what they are of.
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
    """From mode to operator, each with its fake and what torch counts for it. `fake` takes a Kind and, by name, the
    arguments of the operator.

    They are fetched once: a lookup through torch.ops costs as much as a good part of a short call.
    """
    if not extension.HAVE_NATIVE:
        return {}
    for mode, kind in KINDS.items():
        register_fake(mode + suffix, partial(fake, kind))
    register_formulas({mode + suffix: formula for mode in MODES})
    return {mode: getattr(torch.ops.dlkernels, mode + suffix).default for mode in MODES}


def pack(mode: str, weights: Sequence[Tensor], bidirectional: bool) -> Tensor:
    """The weights as the kernels of the instruction set in force like them: opaque bytes, stale once weights change."""
    return torch.ops.dlkernels.pack.default(mode, weights, bidirectional)  # type: ignore[no-any-return]


def _pack_fake(mode: str, weights: Sequence[Tensor], bidirectional: bool) -> Tensor:
    assert extension.native is not None
    directions = 2 if bidirectional else 1
    hidden, proj, _ = sizes(kind_of(mode), weights, directions)
    size = extension.native.packed_bytes(
        mode, weights[0].dtype, int(weights[0].shape[1]), int(hidden), int(proj), directions
    )
    return weights[0].new_empty((size,), dtype=torch.uint8)


if extension.HAVE_NATIVE:
    register_fake("pack", _pack_fake)
