"""Attention and the recurrent layers as functions, which take the weights as arguments."""

from dlkernels.attention.functional import attention, attention_map
from dlkernels.attention.sdpa import scaled_dot_product_attention
from dlkernels.rnn.functional import gru, lstm, rnn
from dlkernels.rnn.functional_cells import gru_cell, lstm_cell, rnn_cell
from dlkernels.rnn.normalised import layer_norm_gru, layer_norm_gru_cell, layer_norm_lstm, layer_norm_lstm_cell

__all__ = [
    "attention",
    "attention_map",
    "gru",
    "gru_cell",
    "layer_norm_gru",
    "layer_norm_gru_cell",
    "layer_norm_lstm",
    "layer_norm_lstm_cell",
    "lstm",
    "lstm_cell",
    "rnn",
    "rnn_cell",
    "scaled_dot_product_attention",
]
