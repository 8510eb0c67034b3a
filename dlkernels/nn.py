"""Drop-ins for torch.nn's recurrent layers and cells, attention and Transformer layers: same arguments, parameters,
state_dict and results. And recurrent layers and cells with layer normalisation, which torch.nn does not have."""

import sys

from dlkernels.attention.layers import MultiheadAttention
from dlkernels.attention.transformer import TransformerDecoderLayer, TransformerEncoderLayer
from dlkernels.rnn.cells import GRUCell, LSTMCell, RNNCell
from dlkernels.rnn.layers import GRU, LSTM, RNN
from dlkernels.rnn.normalised_cells import LayerNormGRUCell, LayerNormLSTMCell
from dlkernels.rnn.normalised_layers import LayerNormGRU, LayerNormLSTM

# Pickles of earlier versions name the modules in which those versions defined the classes.
for _name in ("attention", "cells", "rnn", "transformer"):
    sys.modules[f"{__name__}.{_name}"] = sys.modules[__name__]

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "LayerNormGRU",
    "LayerNormGRUCell",
    "LayerNormLSTM",
    "LayerNormLSTMCell",
    "MultiheadAttention",
    "RNNCell",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
]
