"""The drop-in contract under torch.compile, which checks no versions: whatever a program edits after a call, results
and inputs, the gradients are those of the values at the call."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from contract import ENTRIES, Entry, assert_same, gradients, tensors, weighted
from torch import Tensor, nn

BY_NAME = {entry.name: entry for entry in ENTRIES}
# torch.nn's layers are no match for a compiler, so the oracle is their eager run without edits.
COMPILED = [
    *((entry, "eager") for entry in ENTRIES),
    *((BY_NAME[name], "aot_eager") for name in ("RNN", "LSTM", "GRU", "LSTMCell", "sdpa", "sdpa learned mask")),
    *((BY_NAME[name], "inductor") for name in ("LSTM", "GRUCell", "sdpa")),
]
every = pytest.mark.parametrize("entry, backend", COMPILED, ids=[f"{entry}-{backend}" for entry, backend in COMPILED])


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
    assert_same(gradients(ours, inputs, compiled), right)


@every
def test_results_edited(entry: Entry, backend: str) -> None:
    def edited(module: nn.Module, *inputs: Tensor) -> Tensor:
        results = tensors(module(*inputs))
        for result in results:
            torch.relu_(result)
        results[0][0] = 0
        return weighted(results) if len(results) > 1 else (results[0] * results[0].detach()).sum()

    def pure(module: nn.Module, *inputs: Tensor) -> Tensor:
        results = [torch.relu(result) for result in tensors(module(*inputs))]
        results[0] = torch.cat((torch.zeros_like(results[0][:1]), results[0][1:]))
        return weighted(results) if len(results) > 1 else (results[0] * results[0].detach()).sum()

    check(entry, backend, edited, pure, fullgraph="packed" not in entry.name)


@every
def test_inputs_edited(entry: Entry, backend: str) -> None:
    def edited(module: nn.Module, *inputs: Tensor) -> Tensor:
        copies = [x * 1 for x in inputs]
        results = tensors(module(*copies))
        for x in copies:
            x.mul_(2)
        return weighted([*results, *copies])

    def pure(module: nn.Module, *inputs: Tensor) -> Tensor:
        return weighted([*tensors(module(*(x * 1 for x in inputs))), *(x * 2 for x in inputs)])

    check(entry, backend, edited, pure, fullgraph="packed" not in entry.name)
