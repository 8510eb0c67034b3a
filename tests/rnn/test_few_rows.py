"""Calls of a few rows, whose weights are not packed: rows share the weights that are read, and no row's result depends
on the rows beside it."""

from __future__ import annotations

import pytest
import torch

import dlkernels
from dlkernels._core import extension
from tests.support.layer_cases import MODES, Case, check_case

ROWS = tuple(range(1, 9))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("mode", MODES)
def test_against_torch(mode: str, rows: int, isa: str) -> None:
    """The sizes leave a part of a vector and make more than one vector of units, which the cells take two at a time."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for steps in {1, rows} if rows in (2, 3) else {1}:
            batch = rows // steps
            check_case(Case(mode, T=steps, B=batch, I=21, H=37, P=18 if mode == "lstm_proj" else 0, dtype=dtype))


@pytest.mark.parametrize("mode", MODES)
def test_more_rows_of_large_weights(mode: str, isa: str) -> None:
    """Some instruction sets take up to 16 rows of weights of more than 1 MB, in one step or in several."""
    for steps, batch in ((1, 9), (1, 16), (2, 8), (16, 1)):
        check_case(Case(mode, T=steps, B=batch, I=600, H=420, P=40 if mode == "lstm_proj" else 0))


@pytest.mark.skipif(not extension.HAVE_NATIVE, reason="the reference has no plans")
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_no_row_depends_on_the_others(name: str, isa: str) -> None:
    generator = torch.Generator().manual_seed(1)
    layer = getattr(dlkernels.nn, name)(21, 37)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.copy_(torch.rand(weight.shape, generator=generator) - 0.5)
        x = torch.randn(1, 8, 21, generator=generator)
        together = layer(x)[0]
        assert extension.native.last_run()["recurrence"] == "dot"
        for rows in ROWS[:-1]:
            assert torch.equal(layer(x[:, :rows])[0], together[:, :rows]), rows
