"""Calls of torch's recurrent operators through torch.nn, and what `dlkernels.enable` says of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import dlkernels
from dlkernels._core import extension
from dlkernels.integrations.enable import Enabled

# Of the modules that test `enable`.
MARKS = [
    pytest.mark.usefixtures("native", "off_again"),
    pytest.mark.o0_skip(reason="Python and dispatch around kernels that other tests call as well"),
    pytest.mark.skipif(extension.prefers_torch, reason="enable() leaves calls to torch, as only scalar kernels exist"),
]


@pytest.fixture
def off_again() -> Iterator[None]:
    yield
    dlkernels.disable()


T, B, I, H = 5, 3, 4, 6
X, ROW = torch.randn(T, B, I), torch.randn(B, I)
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTM(I, H, 2, bidirectional=True),
    "gru": lambda: nn.GRU(I, H, bias=False),
    "rnn_tanh": lambda: nn.RNN(I, H, batch_first=True),
    "rnn_relu": lambda: nn.RNN(I, H, 3, nonlinearity="relu"),
}
CELLS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTMCell(I, H),
    "gru": lambda: nn.GRUCell(I, H, bias=False),
    "rnn_tanh": lambda: nn.RNNCell(I, H),
    "rnn_relu": lambda: nn.RNNCell(I, H, nonlinearity="relu"),
}
Q = torch.randn(2, 2, 4, 8)


def packed() -> Any:
    return pack_padded_sequence(X, torch.tensor([5, 2, 4]), enforce_sorted=False)


CALLS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    **{f"{mode}.input": (layer, lambda: X) for mode, layer in LAYERS.items()},
    **{f"{mode}.data": (layer, packed) for mode, layer in LAYERS.items()},
    **{f"{mode}_cell": (cell, lambda: ROW) for mode, cell in CELLS.items()},
}


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [] if result is None else [t for part in result for t in flat(part)]


def assert_close(found: Any, expected: Any) -> None:
    for mine, theirs in zip(flat(found), flat(expected), strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-6)


def served(handle: Enabled) -> dict[str, int]:
    calls: dict[str, int] = {}
    for (operator, _), count in handle.served.items():
        calls[operator] = calls.get(operator, 0) + count
    return calls
