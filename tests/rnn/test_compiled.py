"""Tests the recurrent Functions under torch.compile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dlkernels import functional
from tests.support.differentiated_calls import (
    B,
    CellCase,
    H,
    I,
    T,
    all_close,
)

pytestmark = pytest.mark.o0_skip(
    reason="autograd, vmap and compilers are Python around the kernels, and higher derivatives are the reference's"
)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def call(mode: str, x: Tensor, h: Tensor, weights: list[Tensor]) -> Tensor:
    if mode == "lstm":
        y, (h_n, c_n) = functional.lstm(x, (h, h), weights, num_layers=2, batch_first=True)
        return y.sin().sum() + h_n.cos().sum() + c_n.sum()
    y, h_n = functional.gru(x, h, weights, num_layers=2, batch_first=True)
    return y.sin().sum() + h_n.cos().sum()


def compile_arguments(mode: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    layer = (torch.nn.LSTM if mode == "lstm" else torch.nn.GRU)(I, H, 2, batch_first=True)
    return torch.randn(B, T, I), torch.randn(2, B, H), [w.detach() for w in layer._flat_weights]  # type: ignore[union-attr]


@pytest.mark.parametrize("mode", ("lstm", "gru"))
@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
@pytest.mark.parametrize("training", (False, True))
def test_compiles_whole(mode: str, backend: str, training: bool) -> None:
    x, h, weights = compile_arguments(mode)
    leaves = [t.requires_grad_(training) for t in (x, h, *weights)]
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    got, expected = compiled(mode, x, h, weights), call(mode, x, h, weights)
    torch.testing.assert_close(got, expected)
    if training:
        all_close(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves))


@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
@pytest.mark.parametrize("training", (False, True))
def test_cell_compiles_whole(backend: str, training: bool) -> None:
    case = CellCase("lstm")
    leaves = [t.detach().requires_grad_(training) for t in case.tensors]

    def run(x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> Tensor:
        h, c = functional.lstm_cell(x, (h, c), *weights)
        return h.sin().sum() + c.cos().sum()

    got, expected = torch.compile(run, fullgraph=True, backend=backend)(*leaves), run(*leaves)
    torch.testing.assert_close(got, expected)
    if training:
        all_close(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves))


@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
@pytest.mark.parametrize("mapped", (False, True))
def test_compiled_functorch_gradients_are_right(backend: str, mapped: bool) -> None:
    """Dynamo silently drops a Function's own backward here, so the test compares values."""
    x, h, weights = compile_arguments("gru")

    def gradient(w: Tensor, x: Tensor) -> Tensor:
        return torch.func.grad(lambda w, x: call("gru", x, h, [w, *weights[1:]]))(w, x)

    function = torch.vmap(gradient, (None, 0)) if mapped else gradient
    argument = torch.stack([x, -x, 2 * x]) if mapped else x
    expected = function(weights[0], argument)
    got = torch.compile(function, fullgraph=True, backend=backend)(weights[0], argument)
    torch.testing.assert_close(got, expected)
    leaf = weights[0].clone().requires_grad_()
    plain = torch.autograd.grad(call("gru", x, h, [leaf, *weights[1:]]), leaf)[0]
    torch.testing.assert_close(got[0] if mapped else got, plain)


def test_compiled_function_inside_a_transform() -> None:
    x, h, weights = compile_arguments("gru")

    def run(w: Tensor) -> Tensor:
        return call("gru", x, h, [w, *weights[1:]])

    compiled = torch.compile(run, backend="aot_eager")
    torch.testing.assert_close(torch.func.grad(compiled)(weights[0]), torch.func.grad(run)(weights[0]))
