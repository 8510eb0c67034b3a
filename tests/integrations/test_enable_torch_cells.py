"""What PyTorch's own tests try with packed sequences, cells and wrong arguments, with `dlkernels.enable` off and on."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

from tests.support.enabled_calls import flat
from tests.support.enabled_calls import off_again as off_again
from tests.support.torch_cases import (
    CELLS,
    LAYERS,
    MARKS_OF_CASES,
    B,
    Case,
    H,
    I,
    T,
    compare,
    error,
    gradients,
    into,
    state,
)
from tests.support.torch_cases import in_double as in_double

pytestmark = MARKS_OF_CASES

OF_PACKED: dict[str, Case] = {}
OF_CELLS: dict[str, Case] = {}
MISTAKES: dict[str, Case] = {}


@into(OF_PACKED)
def sequences_one_by_one(mode: str) -> Any:
    """A packed batch gives what its sequences give alone, in any order of lengths."""
    found = []
    for lengths, both in itertools.product(([6, 5, 3, 3, 1], [1, 6, 3], [2, 2], [1], [1, 1, 1]), (False, True)):
        layer = LAYERS[mode](I, H, 2, bidirectional=both)
        rows = [torch.randn(n, I, requires_grad=True) for n in lengths]
        y, hx = layer(pack_sequence(rows, enforce_sorted=False))
        padded, back = pad_packed_sequence(y)
        assert back.tolist() == lengths
        for b, row in enumerate(rows):
            alone, of_one = layer(row[:, None])
            torch.testing.assert_close(padded[: len(row), b], alone[:, 0])
            torch.testing.assert_close(flat(hx)[0][:, b], flat(of_one)[0][:, 0])
        found.append((y.data, hx, gradients((y.data, hx), *rows, *layer.parameters())))
    return found


@into(OF_PACKED)
def packed_with_a_state(mode: str) -> Any:
    layer, x, hx = LAYERS[mode](I, H, batch_first=True), torch.randn(B, T, I), state(mode, 1, B, H)
    packed = pack_padded_sequence(x, [2, 5, 3], batch_first=True, enforce_sorted=False)
    y, last = layer(packed, hx)
    assert isinstance(y, PackedSequence) and y.sorted_indices is packed.sorted_indices
    padded, _ = pad_packed_sequence(y, batch_first=True, padding_value=-7.0)
    assert (padded[0, 2:] == -7.0).all()
    return padded, last


@into(OF_PACKED)
def packed_with_dropout(mode: str) -> Any:
    layer = LAYERS[mode](I, H, 3, dropout=0.4)
    return layer(pack_padded_sequence(torch.randn(T, B, I), [5, 4, 1]))


@pytest.mark.parametrize("mode", LAYERS)
@pytest.mark.parametrize("name", OF_PACKED)
def test_packed(name: str, mode: str) -> None:
    alone = [f"{mode}.input"] if name == "sequences_one_by_one" else []
    compare(OF_PACKED[name], mode, f"{mode}.data", *alone)


@into(OF_CELLS)
def steps(mode: str) -> Any:
    found = []
    for bias in (True, False):
        cell, x = CELLS[mode](I, H, bias=bias), torch.randn(B, I, requires_grad=True)
        first = state(mode, B, H)
        leaves = [x, *(t.requires_grad_() for t in flat(first))]
        hx = first
        for _ in range(T):
            hx = cell(x, hx)
        found.append((hx, gradients(hx, *leaves, *cell.parameters())))
    return found


@into(OF_CELLS)
def one_row_without_a_batch(mode: str) -> Any:
    cell, x, hx = CELLS[mode](I, H), torch.randn(I), state(mode, H)
    results = cell(x, hx)
    batched = cell(x[None], tuple(t[None] for t in hx) if mode == "lstm" else hx[None])
    torch.testing.assert_close(flat(results), [t[0] for t in flat(batched)])
    return results, cell(x)


@into(OF_CELLS)
def no_rows(mode: str) -> Any:
    cell = CELLS[mode](I, H)
    results = cell(torch.randn(0, I))
    assert flat(results)[0].shape == (0, H)
    return results, gradients(results, *cell.parameters())


@into(OF_CELLS)
def cells_are_a_layer(mode: str) -> Any:
    layer, cell, x = LAYERS[mode](I, H), CELLS[mode](I, H), torch.randn(T, B, I)
    cell.load_state_dict({name.removesuffix("_l0"): p for name, p in layer.state_dict().items()})
    hx, rows = None, []
    for row in x:
        hx = cell(row, hx)
        rows.append(flat(hx)[0])
    torch.testing.assert_close(torch.stack(rows), layer(x)[0])
    return rows


@into(OF_CELLS)
def second_derivatives_of_cells(mode: str) -> Any:
    cell, x = CELLS[mode](2, 3), torch.randn(2, 2, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: flat(cell(x))[0], (x,))
    return cell(x)


@pytest.mark.parametrize("mode", CELLS)
@pytest.mark.parametrize("name", OF_CELLS)
def test_cells(name: str, mode: str) -> None:
    layer = [f"{mode}.input"] if name == "cells_are_a_layer" else []
    compare(OF_CELLS[name], mode, f"{mode}_cell", *layer)


@into(MISTAKES)
def no_steps(mode: str) -> Any:
    return [error(lambda both=both: LAYERS[mode](I, H, bidirectional=both)(torch.randn(0, B, I))) for both in (0, 1)]


@into(MISTAKES)
def wrong_inputs_of_layers(mode: str) -> Any:
    layer = LAYERS[mode](I, H, 2)
    wrong = [torch.randn(T, B, I + 1), torch.randn(1, T, B, I), torch.randn(I), torch.ones(T, B, I, dtype=torch.int64)]
    return [error(lambda x=x: layer(x)) for x in (*wrong, torch.randn(T, B, I, dtype=torch.float32))]


@into(MISTAKES)
def wrong_states_of_layers(mode: str) -> Any:
    layer, x = LAYERS[mode](I, H, 2), torch.randn(T, B, I)
    shapes = [(1, B, H), (2, B + 1, H), (2, B, H + 1), (2, H), (2, 1, B, H)]
    return [error(lambda shape=shape: layer(x, state(mode, *shape))) for shape in shapes]


@into(MISTAKES)
def wrong_arguments_of_cells(mode: str) -> Any:
    cell, x = CELLS[mode](I, H), torch.randn(B, I)
    wrong: list[Callable[[], Any]] = [
        lambda: cell(torch.randn(B, I + 1)), lambda: cell(torch.randn(1, B, I)),
        lambda: cell(x, state(mode, B, H + 1)), lambda: cell(x, state(mode, 1, H)),
        lambda: cell(x, state(mode, B + 1, H)), lambda: cell(x, state(mode, H)), lambda: cell(x, state(mode, B, 1)),
    ]  # fmt: skip
    return [error(call) for call in wrong]


@into(MISTAKES)
def wrong_constructions(mode: str) -> Any:
    make = LAYERS[mode]
    wrong: list[Callable[[], Any]] = [
        lambda: make(I, H, 0), lambda: make(I, 0), lambda: make(I, H, dropout=1.5), lambda: make(I, H, 2, dropout=-1),
        lambda: make(I, H, proj_size=-1), lambda: make(I, H, proj_size=H), lambda: make(I, 2.5),
    ]  # fmt: skip
    return [error(call) for call in wrong]


@into(MISTAKES)
def parameters_on_another_device(mode: str) -> Any:
    layer, x = LAYERS[mode](I, H), torch.randn(T, B, I)
    return error(lambda: layer(x, (state(mode, 1, B, H)[0].to("meta"),) * 2 if mode == "lstm" else x[:1].to("meta")))


@pytest.mark.parametrize("mode", LAYERS)
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str, mode: str) -> None:
    compare(MISTAKES[name], mode)


def test_mistakes_with_projections() -> None:
    def case(_: str) -> Any:
        layer, x = nn.LSTM(I, H, proj_size=2), torch.randn(T, B, I)
        sizes = [(H, H), (2, 2), (2, H + 1), (1, H)]
        found = [error(lambda h=h, c=c: layer(x, (torch.randn(1, B, h), torch.randn(1, B, c)))) for h, c in sizes]
        return found + [error(lambda kind=kind: kind(I, H, proj_size=2)(x)) for kind in (nn.GRU, nn.RNN)]

    compare(case, "lstm")


def test_mistakes_with_packed_sequences() -> None:
    def case(mode: str) -> Any:
        layer, data = LAYERS[mode](I, H), torch.randn(6, I)
        wrong = [torch.tensor([3.0, 2.0, 1.0]), torch.tensor([], dtype=torch.int64), torch.tensor([[3, 2, 1]])]
        found = [error(lambda sizes=sizes: layer(PackedSequence(data, sizes))) for sizes in wrong]
        return [*found, error(lambda: layer(PackedSequence(data[:, 1:], torch.tensor([3, 2, 1]))))]

    for mode in LAYERS:
        compare(case, mode)
