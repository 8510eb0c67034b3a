"""Tests the drop-in contract under torch.compile, which does not check versions of tensors. If a program edits results
or inputs after a call, the gradients are those of the values at the call. Where torch raises in eager mode, ours may
raise too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dlkernels
from dlkernels import functional
from tests.support.contract_entries import (
    ENTRIES,
    Entry,
    assert_same,
    doubles_its_inputs,
    gradients,
    outcome,
    tensors,
    uses_doubled_inputs,
    weighted,
)

pytestmark = pytest.mark.o0_skip(reason="what compilers and autograd do around the kernels is the same")

BY_NAME = {entry.name: entry for entry in ENTRIES}
# These are compiled with more backends than "eager". Dynamo does not compile torch.nn's recurrent layers, so the oracle
# is their eager run without edits.
DEEPER = [
    *((BY_NAME[name], "aot_eager") for name in ("RNN", "LSTM", "GRU", "LSTMCell", "sdpa", "sdpa learned mask")),
    *((BY_NAME[name], "inductor") for name in ("LSTM", "sdpa")),
]
COMPILED = [*((entry, "eager") for entry in ENTRIES), *DEEPER]
every = pytest.mark.parametrize("entry, backend", COMPILED, ids=[f"{entry}-{backend}" for entry, backend in COMPILED])
deeper = pytest.mark.parametrize("entry, backend", DEEPER, ids=[f"{entry}-{backend}" for entry, backend in DEEPER])


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def check(
    entry: Entry, backend: str, edited: Callable[..., Tensor], pure: Callable[..., Tensor], fullgraph: bool = True
) -> None:
    theirs, ours = entry.pair(torch.float64)
    inputs = entry.draw(torch.float64)
    right = gradients(theirs, inputs, pure)
    compiled = torch.compile(edited, backend=backend, fullgraph=fullgraph)
    found = outcome(lambda: gradients(ours, inputs, compiled))
    if isinstance(found, Exception):
        assert "modified by an inplace operation" in str(found), found
        refused = outcome(lambda: gradients(theirs, inputs, edited))
        assert isinstance(refused, RuntimeError), "torch allows it"
        return
    assert_same(found, right)


@every
def test_results_edited(entry: Entry, backend: str) -> None:
    def edited(module: nn.Module, *inputs: Tensor) -> Tensor:
        results = tensors(module(*inputs))
        for result in results:
            result.mul_(3)
        results[0][0] = 0
        return weighted(results) if len(results) > 1 else (results[0] * results[0].detach()).sum()

    def pure(module: nn.Module, *inputs: Tensor) -> Tensor:
        results = [result * 3 for result in tensors(module(*inputs))]
        results[0] = torch.cat((torch.zeros_like(results[0][:1]), results[0][1:]))
        return weighted(results) if len(results) > 1 else (results[0] * results[0].detach()).sum()

    check(entry, backend, edited, pure, fullgraph="packed" not in entry.name)


@every
def test_inputs_edited(entry: Entry, backend: str) -> None:
    check(entry, backend, doubles_its_inputs, uses_doubled_inputs, fullgraph="packed" not in entry.name)


@deeper
@pytest.mark.parametrize("follow", [False, True], ids=["data", "activations"])
def test_inputs_of_the_graph_edited(entry: Entry, backend: str, follow: bool) -> None:
    """Gradients are right if the edited inputs are data. If autograd tracks the inputs, an error is allowed as well,
    but never a wrong gradient."""
    theirs, ours = entry.pair(torch.float64)
    weights = list(ours.parameters()) or [torch.ones((), dtype=torch.float64, requires_grad=True)]

    def program(module: nn.Module, edit: bool, *inputs: Tensor) -> Tensor:
        given = inputs if list(ours.parameters()) else (weights[0] * inputs[0], *inputs[1:])
        results = tensors(module(*given))
        if edit:
            for x in inputs:
                x.mul_(2)
        return weighted([result * result.detach() for result in results])

    def drawn() -> list[Tensor]:
        return [(x.requires_grad_() * 1) if follow else x for x in entry.draw(torch.float64)]

    right = torch.autograd.grad(program(ours, False, *drawn()), weights)
    compiled = torch.compile(program, backend=backend, fullgraph="packed" not in entry.name)
    found = outcome(lambda: list(torch.autograd.grad(compiled(ours, True, *drawn()), weights)))
    if isinstance(found, Exception):
        assert "modified by an inplace operation" in str(found), found
        assert follow or isinstance(outcome(lambda: program(theirs, True, *drawn()).backward()), RuntimeError), found
        return
    assert_same(found, list(right))


def _all_edited(of_cell: bool, edits: bool, *given: Tensor) -> Tensor:
    """Calls an LSTM and then sets its arguments to zero if `edits`."""
    args = [value.clone() for value in given]
    x, h0, c0, *weights, lengths, resets = args
    if of_cell:
        results = list(functional.lstm_cell(x[0], (h0[0], c0[0]), *weights))
    else:
        y, state, *cells = functional.lstm(x, (h0, c0), weights, lengths=lengths, resets=resets, return_cells=True)
        results = [y, *state, *cells]
    for value in args if edits else ():
        value.zero_()
    return weighted(results)


@pytest.mark.parametrize("of_cell", [False, True], ids=["layer", "cell"])
def test_states_lengths_resets_and_weights_edited(of_cell: bool) -> None:
    shapes = ((4, 3, 5), (1, 3, 6), (1, 3, 6), (24, 5), (24, 6), (24,), (24,))
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    given = [*leaves, torch.tensor([4, 1, 2]), torch.rand(4, 3) < 0.5]
    right = torch.autograd.grad(_all_edited(of_cell, False, *given), leaves)
    compiled = torch.compile(_all_edited, backend="aot_eager", fullgraph=True)
    assert_same(list(torch.autograd.grad(compiled(of_cell, True, *given), leaves)), list(right))


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "LSTM", "GRU", "sdpa"])
def test_one_tensor_given_twice(name: str) -> None:
    """One tensor is passed twice, as in `hx = (zeros, zeros)` or a cell that gets its state as input. It is compiled as
    one graph, and the gradients of both uses are added."""
    size = 6

    def program(module: nn.Module | None, x: Tensor) -> Tensor:
        if module is None:
            return functional.scaled_dot_product_attention(x, x, x).square().sum()
        state = x[:1] if name in ("LSTM", "GRU") else x[0]
        hx: Any = (state, state) if "LSTM" in name else state
        return weighted(tensors(module(state, hx)))

    module = None if name == "sdpa" else getattr(dlkernels.nn, name)(size, size, dtype=torch.float64)
    x = torch.randn(2, 3, size, dtype=torch.float64, requires_grad=True)
    leaves = [x, *(() if module is None else module.parameters())]
    right = torch.autograd.grad(program(module, x), leaves)
    compiled = torch.compile(program, backend="aot_eager", fullgraph=True)
    assert_same(list(torch.autograd.grad(compiled(module, x), leaves)), list(right))
