"""Drop-ins for torch.nn's recurrent layers and cells: same arguments, parameters, state_dict and results."""

from .cells import GRUCell, LSTMCell, RNNCell
from .rnn import GRU, LSTM, RNN

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]
