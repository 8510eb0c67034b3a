"""Language processing: stanza's PackedLSTM, on torch's LSTM and, with recurrent dropout, on torch's LSTMCell."""

from __future__ import annotations

import torch
from stanza.models.common.packed_lstm import PackedLSTM

from tests.thirdparty.case import Step, case, training

LENGTHS = [20, 17, 9, 9]


def _step(dtype: torch.dtype, recurrent_dropout: float) -> Step:
    model = PackedLSTM(24, 48, 2, batch_first=True, bidirectional=True, pad=True, rec_dropout=recurrent_dropout)
    states = [torch.randn(4, 4, 48) for _ in range(2)]
    return training(model, lambda x, h, c: model(x, LENGTHS, (h, c)), torch.randn(4, 20, 24), *states, dtype=dtype)


@case("PackedLSTM, two directions", "lstm.data")
def lstm(dtype: torch.dtype) -> Step:
    return _step(dtype, 0)


@case("PackedLSTM with recurrent dropout", "lstm_cell")
def cells(dtype: torch.dtype) -> Step:
    return _step(dtype, 0.3)
