"""Cases that run with `dlkernels.enable` off and on and must give the same results and errors, after the list of cases
in PyTorch's own test/test_nn.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dlkernels
from tests.support.enabled_calls import MARKS, flat, served

MARKS_OF_CASES = [
    *MARKS,
    pytest.mark.usefixtures("in_double"),
    pytest.mark.filterwarnings("ignore:dropout option adds dropout after all but last"),
    pytest.mark.filterwarnings("ignore:`?torch.nn.utils.weight_norm"),
]

T, B, I, H = 5, 3, 4, 6
LAYERS: dict[str, Callable[..., Any]] = {
    "rnn_tanh": nn.RNN,
    "rnn_relu": lambda *args, **kwargs: nn.RNN(*args, nonlinearity="relu", **kwargs),
    "lstm": nn.LSTM,
    "gru": nn.GRU,
}
CELLS: dict[str, Callable[..., Any]] = {
    "rnn_tanh": nn.RNNCell,
    "rnn_relu": lambda *args, **kwargs: nn.RNNCell(*args, nonlinearity="relu", **kwargs),
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
}
Case = Callable[[str], Any]


@pytest.fixture
def in_double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def into(table: dict[str, Case]) -> Callable[[Case], Case]:
    """Adds a case, which takes the name of a mode and returns tensors and texts to be compared."""

    def add(case: Case) -> Case:
        table[case.__name__] = case
        return case

    return add


def state(mode: str, *shape: int) -> Any:
    return (torch.randn(shape), torch.randn(shape)) if mode == "lstm" else torch.randn(shape)


def gradients(results: Any, *wanted: Tensor) -> list[Tensor]:
    loss = sum(y.square().sum() for y in flat(results) if y.requires_grad)
    return [torch.zeros(()) if g is None else g for g in torch.autograd.grad(loss, wanted, allow_unused=True)]


def error(call: Callable[[], Any]) -> str:
    """The type and the text of the error that the call must raise."""
    try:
        call()
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"
    raise AssertionError("no error was raised")


def compare(case: Case, mode: str, *operators: str) -> None:
    """Runs a case twice, and asserts that the results agree and that our kernels served these operators."""
    torch.manual_seed(0)
    expected = case(mode)
    with dlkernels.enable() as handle:
        torch.manual_seed(0)
        found = case(mode)
    assert set(served(handle)) == set(operators), handle.report()
    assert_same(found, expected)


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, (tuple, list)):
        for mine, theirs in zip(found, expected, strict=True):
            assert_same(mine, theirs)
    elif isinstance(expected, str):
        assert found == expected
    else:
        torch.testing.assert_close(found, expected)
