"""Calls of recurrent layers and cells as functions of their floating-point tensors, the same calls of the reference,
and losses of their results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dlkernels import reference
from dlkernels.rnn.operators.arguments import CellConfig, CellInputs, SequenceConfig, SequenceInputs
from dlkernels.rnn.operators.cell import cell
from dlkernels.rnn.operators.sequence import sequence

MODES = ("lstm", "gru", "rnn_tanh", "rnn_relu")
T, B, I, H, P = 3, 2, 2, 3, 2
BATCH_SIZES = torch.tensor([2, 2, 1])
LENGTHS = torch.tensor([1, 3])
RESETS = torch.tensor([[False, True], [True, False], [False, True]])  # [T, B]
PACKED_RESETS = torch.tensor([False, True, False, False, True])

# The arguments of `Case` by name of the variant.
VARIANTS = {
    "plain": {},
    "no-bias": {"bias": False},
    "two-directions": {"bidirectional": True},
    "batch-first": {"batch_first": True},
    "projected": {"projected": True, "bidirectional": True},
    "projected-lengths": {
        "projected": True, "bias": False, "bidirectional": True, "lengths": True, "batch_first": True
    },
    "lengths": {"lengths": True, "bidirectional": True},
    "packed": {"packed": True, "bidirectional": True},
    "truncated": {"bptt_steps": 2, "bidirectional": True},
    "truncated-every-step": {"bptt_steps": 1, "lengths": True, "bidirectional": True},
    "truncated-packed": {"bptt_steps": 2, "packed": True, "bidirectional": True},
    "no-state": {"state": False},
    "resets": {"resets": True, "bidirectional": True},
    "resets-lengths": {"resets": True, "lengths": True, "bidirectional": True, "batch_first": True},
    "resets-packed": {"resets": True, "packed": True, "bidirectional": True},
    "resets-truncated": {"resets": True, "bptt_steps": 1, "bidirectional": True},
    "resets-no-state": {"resets": True, "state": False},
    "cells": {"cells": True, "bidirectional": True, "resets": True},
    "cells-lengths": {"cells": True, "lengths": True, "batch_first": True},
    "cells-packed": {"cells": True, "packed": True, "bidirectional": True},
    "cells-truncated": {"cells": True, "bptt_steps": 2},
    "cells-projected": {"cells": True, "projected": True, "bidirectional": True},
}  # fmt: skip


def cases() -> list[Any]:
    return [
        pytest.param(mode, name, id=f"{mode}-{name}")
        for mode in MODES
        for name, variant in VARIANTS.items()
        if mode == "lstm" or not variant.keys() & {"projected", "cells"}
    ]


class Case:
    """A layer call as a function of its floating-point tensors."""

    def __init__(
        self, mode: str, projected: bool = False, bias: bool = True, bidirectional: bool = False,
        batch_first: bool = False, lengths: bool = False, packed: bool = False, bptt_steps: int = 0, state: bool = True,
        resets: bool = False, cells: bool = False, dtype: torch.dtype = torch.float64,
    ) -> None:  # fmt: skip
        self.cfg = SequenceConfig(mode, bidirectional, batch_first, bptt_steps, cells=cells)
        self.lengths = LENGTHS if lengths else None
        self.resets = (PACKED_RESETS if packed else RESETS) if resets else None
        self.batch_sizes = BATCH_SIZES if packed else None
        directions, outputs, rows = 1 + bidirectional, P if projected else H, reference.GATES[mode] * H
        shape = (5, I) if packed else (B, T, I) if batch_first else (T, B, I)
        sizes: list[tuple[int, ...]] = [shape]
        self.states = (1 + (mode == "lstm")) if state else 0
        sizes += [(directions, B, outputs), (directions, B, H)][: self.states]
        per_direction: list[tuple[int, ...]] = [(rows, I), (rows, outputs)]
        per_direction += [(rows,), (rows,)] if bias else []
        per_direction += [(P, H)] if projected else []
        sizes += per_direction * directions
        self.tensors = tuple(torch.randn(size, dtype=dtype).mul_(0.7).requires_grad_() for size in sizes)

    def split(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None, Tensor | None, tuple[Tensor, ...]]:
        x, *rest = tensors
        h0 = rest[0] if self.states > 0 else None
        c0 = rest[1] if self.states > 1 else None
        return x, h0, c0, tuple(rest[self.states :])

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        x, h0, c0, weights = self.split(tensors)
        outs = sequence(self.cfg, SequenceInputs(x, h0, c0, None, self.batch_sizes, self.lengths, weights, self.resets))
        return outs[: 2 + (self.cfg.mode == "lstm") + self.cfg.cells]

    def expected(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        x, h0, c0, weights = self.split(tensors)
        cfg = self.cfg
        outs = reference.sequence(
            cfg.mode, x, h0, c0, weights, self.batch_sizes, self.lengths, cfg.bidirectional, cfg.batch_first,
            cfg.bptt_steps, resets=self.resets, return_cells=cfg.cells,
        )  # fmt: skip
        return outs if cfg.mode == "lstm" else outs[:2]


class CellCase:
    def __init__(self, mode: str, bias: bool = True, state: bool = True) -> None:
        self.cfg, self.bias = CellConfig(mode), bias
        self.states = (1 + (mode == "lstm")) if state else 0
        rows = reference.GATES[mode] * H
        sizes: list[tuple[int, ...]] = [(B, I), *[(B, H)] * self.states, (rows, I), (rows, H)]
        sizes += [(rows,), (rows,)] if bias else []
        self.tensors = tuple(torch.randn(size, dtype=torch.float64).mul_(0.7).requires_grad_() for size in sizes)

    def full(self, tensors: tuple[Tensor, ...]) -> list[Any]:
        x, *rest = tensors
        states = [*rest[: self.states], None, None][:2]
        weights = [*rest[self.states :], *([] if self.bias else [None, None])]
        return [x, *states, *weights]

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(cell(self.cfg, CellInputs(*self.full(tensors)))[: 1 + (self.cfg.mode == "lstm")])

    def expected(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(out for out in reference.cell(self.cfg.mode, *self.full(tensors)) if out is not None)


def loss(outs: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([(out * out.detach().cos() + out.sin()).sum() for out in outs]).sum()


def smooth_loss(outs: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([(out.square() + out.sin()).sum() for out in outs]).sum()


def all_close(got: Any, want: Any) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
