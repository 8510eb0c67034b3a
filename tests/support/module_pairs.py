"""Makes small layers, cells and attention modules of torch.nn and of dlkernels with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import dlkernels

# Numbers of time steps, sequences and features.
T, B, F = 5, 3, 4


class Kind(NamedTuple):
    name: str
    make: Callable[[Any], nn.Module]
    inputs: int = 1
    of_one_step: bool = False


KINDS = [
    Kind("LSTM", lambda lib: lib.LSTM(F, 6)),
    Kind("LSTM-deep", lambda lib: lib.LSTM(F, 6, 2, bidirectional=True, batch_first=True, proj_size=2)),
    Kind("GRU", lambda lib: lib.GRU(F, 6)),
    Kind("GRU-deep", lambda lib: lib.GRU(F, 6, 2, bidirectional=True, batch_first=True)),
    Kind("RNN", lambda lib: lib.RNN(F, 6, bias=False)),
    Kind("RNN-relu", lambda lib: lib.RNN(F, 6, 2, nonlinearity="relu")),
    Kind("LSTMCell", lambda lib: lib.LSTMCell(F, 6), 1, True),
    Kind("GRUCell", lambda lib: lib.GRUCell(F, 6), 1, True),
    Kind("RNNCell", lambda lib: lib.RNNCell(F, 6), 1, True),
    Kind("MultiheadAttention", lambda lib: lib.MultiheadAttention(F, 2), 3),
    Kind("TransformerEncoderLayer", lambda lib: lib.TransformerEncoderLayer(F, 2, 8, 0.0)),
    Kind("TransformerDecoderLayer", lambda lib: lib.TransformerDecoderLayer(F, 2, 8, 0.0), 2),
]
EVERY_KIND = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
LAYERS = ("LSTM", "GRU", "RNN")


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result if part is not None for tensor in flat(part)]


def pair(kind: Kind, how: str) -> tuple[nn.Module, nn.Module]:
    """Returns torch's module and ours with the same weights; ours is patched or from dlkernels.nn, as `how` says."""
    theirs = kind.make(nn)
    if how == "patched":
        return theirs, dlkernels.patch(theirs, copy=True)
    ours = kind.make(dlkernels.nn)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs_of(kind: Kind, steps: int = T) -> list[Tensor]:
    shape = (B, F) if kind.of_one_step else (steps, B, F)
    return [torch.randn(shape) for _ in range(kind.inputs)]


def assert_same(theirs: Any, ours: Any) -> None:
    torch.testing.assert_close(flat(ours), flat(theirs))
