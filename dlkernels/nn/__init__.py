"""Drop-ins for torch.nn's recurrent layers and cells, attention and Transformer layers: same arguments, parameters,
state_dict and results."""

from .attention import MultiheadAttention
from .cells import GRUCell, LSTMCell, RNNCell
from .rnn import GRU, LSTM, RNN
from .transformer import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "MultiheadAttention",
    "RNNCell",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
]
