"""Speech: speechbrain's recurrent layers, cells and attention decoder."""

from __future__ import annotations

from typing import Any

import torch
from speechbrain.nnet import RNN as rnn
from torch import Tensor, nn

from tests.thirdparty.case import Case, Step, case, training

BATCH, TIME, WIDTH, HIDDEN = 4, 20, 24, 48
LENGTHS = torch.tensor([1.0, 0.8, 0.5, 0.25])  # parts of TIME


def _layer(cls: type[nn.Module], dtype: torch.dtype, packed: bool, **options: Any) -> Step:
    x = torch.randn(BATCH, TIME, WIDTH)
    model = cls(hidden_size=HIDDEN, input_shape=x.shape, num_layers=2, **options)
    return training(model, lambda x: model(x, lengths=LENGTHS) if packed else model(x), x, dtype=dtype)


def _of(name: str, served: tuple[str, ...], cls: type[nn.Module], packed: bool = False, **options: Any) -> Case:
    return case(name, *served)(lambda dtype: _layer(cls, dtype, packed, **options))


lstm = _of("LSTM", ("lstm.input",), rnn.LSTM)
lstm_packed = _of("LSTM, lengths, two directions", ("lstm.data",), rnn.LSTM, packed=True, bidirectional=True)
gru = _of("GRU, two directions", ("gru.input",), rnn.GRU, bidirectional=True)
gru_packed = _of("GRU, lengths", ("gru.data",), rnn.GRU, packed=True)
plain = _of("RNN with ReLU", ("rnn_relu.input",), rnn.RNN)
plain_packed = _of("RNN with tanh, lengths", ("rnn_tanh.data",), rnn.RNN, packed=True, nonlinearity="tanh")
ligru = _of("LiGRU, arithmetic of its own", (), rnn.LiGRU)


def _cell(cls: type[nn.Module], dtype: torch.dtype, **options: Any) -> Step:
    model = cls(hidden_size=HIDDEN, input_size=WIDTH, input_shape=None, num_layers=2, **options)

    def call(x: Tensor) -> list[Tensor]:
        state, found = None, []
        for seen in x.unbind(1):
            y, state = model(seen, state)
            found.append(y)
        return found

    return training(model, call, torch.randn(BATCH, TIME, WIDTH), dtype=dtype)


lstm_cell = case("LSTMCell", "lstm_cell")(lambda dtype: _cell(rnn.LSTMCell, dtype))
gru_cell = case("GRUCell", "gru_cell")(lambda dtype: _cell(rnn.GRUCell, dtype))
rnn_cell = case("RNNCell", "rnn_tanh_cell")(lambda dtype: _cell(rnn.RNNCell, dtype))


@case("AttentionalRNNDecoder, GRU", "gru_cell")
def decoder(dtype: torch.dtype) -> Step:
    model = rnn.AttentionalRNNDecoder("gru", "content", HIDDEN, attn_dim=16, num_layers=1, enc_dim=WIDTH, input_size=12)
    return training(model, lambda x, heard: model(x, heard, LENGTHS), torch.randn(BATCH, 8, 12),
                    torch.randn(BATCH, TIME, WIDTH), dtype=dtype)  # fmt: skip
