"""The error messages for an initial state of a wrong shape, h or c, are equal to torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dlkernels.nn

pytestmark = pytest.mark.o0_skip(reason="the words of errors do not depend on the optimiser")


def said(call: Any) -> str:
    with pytest.raises(Exception) as caught:
        call()
    return f"{type(caught.value).__name__}: {caught.value}"


WRONG = {
    "one entry more": lambda s: torch.zeros(s.shape[0] + 1, *s.shape[1:]),
    "one feature more": lambda s: torch.zeros(*s.shape[:-1], s.shape[-1] + 1),
    "no features": lambda s: torch.zeros(*s.shape[:-1], 0),
    "one sequence more": lambda s: torch.zeros(s.shape[0], s.shape[1] + 1, *s.shape[2:]),
    "a dimension more": lambda s: s[None],
    "a dimension less": lambda s: s[0],
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("options", [{}, {"proj_size": 2}, {"bidirectional": True}, {"batch_first": True}], ids=str)
def test_lstm(options: dict[str, Any], batched: bool, which: int, wrong: str) -> None:
    entries = 2 * (2 if options.get("bidirectional") else 1)
    batch = (3,) if batched else ()
    good = [torch.zeros(entries, *batch, options.get("proj_size", 6)), torch.zeros(entries, *batch, 6)]
    good[which] = WRONG[wrong](good[which])
    x = torch.zeros(5, 3, 4) if batched else torch.zeros(5, 4)
    x = x.transpose(0, 1) if batched and options.get("batch_first") else x
    ours, theirs = (
        said(lambda package=package: package.LSTM(4, 6, 2, **options)(x, tuple(good)))
        for package in (dlkernels.nn, torch.nn)
    )
    assert ours == theirs


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", ["GRU", "RNN"])
def test_layers_of_one_state(name: str, wrong: str) -> None:
    state = WRONG[wrong](torch.zeros(2, 3, 6))
    ours, theirs = (
        said(lambda package=package: getattr(package, name)(4, 6, 2)(torch.zeros(5, 3, 4), state))
        for package in (dlkernels.nn, torch.nn)
    )
    assert ours == theirs


CELL_WRONG: dict[str, Tensor] = {
    "another batch": torch.zeros(4, 6), "one feature more": torch.zeros(3, 7), "three dimensions": torch.zeros(1, 3, 6),
}  # fmt: skip


@pytest.mark.parametrize("wrong", CELL_WRONG)
@pytest.mark.parametrize("which", [0, 1])
def test_lstm_cell(which: int, wrong: str) -> None:
    states = [torch.zeros(3, 6), torch.zeros(3, 6)]
    states[which] = CELL_WRONG[wrong]
    ours, theirs = (
        said(lambda package=package: package.LSTMCell(4, 6)(torch.zeros(3, 4), tuple(states)))
        for package in (dlkernels.nn, torch.nn)
    )
    assert ours == theirs
