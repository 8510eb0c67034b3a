"""NaN and infinity in x spread to the same results as in torch.nn, and values in the padding affect no result."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import dlkernels.nn
from dlkernels import functional
from tests.support.layer_cases import MODES, OP_MODES

LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("LSTM", {}), "lstm_proj": ("LSTM", {"proj_size": 3}), "gru": ("GRU", {}), "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
}  # fmt: skip
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("LSTMCell", {}), "gru": ("GRUCell", {}), "rnn_tanh": ("RNNCell", {}),
    "rnn_relu": ("RNNCell", {"nonlinearity": "relu"}),
}  # fmt: skip
# (a value of x, sequences, dtype)
PLACES = [
    (math.nan, 1, torch.float32), (math.nan, 20, torch.float32), (math.nan, 5, torch.float64),
    (math.inf, 1, torch.float32), (-math.inf, 20, torch.float32),
]  # fmt: skip
places = pytest.mark.parametrize(("value", "B", "dtype"), PLACES, ids=str)


def pair(table: dict[str, tuple[str, dict[str, Any]]], mode: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Returns our module and torch's with the same weights."""
    name, options = table[mode]
    ours = getattr(dlkernels.nn, name)(4, 6, dtype=dtype, **options)
    theirs = getattr(torch.nn, name)(4, 6, dtype=dtype, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def results(module: Any, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    out = module(x)
    first = out if isinstance(out, Tensor) else out[0]
    leaves = {"x": x, **dict(module.named_parameters())}
    grads = torch.autograd.grad(first.sum(), list(leaves.values()))
    return {"out": first.detach(), **{f"d{name}": g for name, g in zip(leaves, grads, strict=True)}}


def assert_same_nan(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, expected in theirs.items():
        actual = ours[name]
        assert torch.equal(actual.isnan(), expected.isnan()), f"{name}: {actual} where torch has {expected}"
        torch.testing.assert_close(
            actual, expected, rtol=1e-4, atol=1e-5, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


@places
@pytest.mark.parametrize("mode", MODES)
def test_layers(mode: str, value: float, B: int, dtype: torch.dtype, isa: str) -> None:
    ours, theirs = pair(LAYERS, mode, dtype)
    x = torch.randn(3, B, 4, dtype=dtype)
    x[1, B // 2, 2] = value
    assert_same_nan(results(ours, x), results(theirs, x))


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_layers_in_16_bits(mode: str, step: int, isa: str) -> None:
    """A NaN reaches the same results as in float32, through the gates that are saved in 16 bits too. At the last step
    only the gates of a gru have it, not the products with h."""
    ours, theirs = pair(LAYERS, mode, torch.float32)
    x = torch.randn(3, 5, 4)
    x[step, 2, 2] = math.nan
    expected = results(theirs, x)
    for dtype in (torch.bfloat16, torch.float16):
        for name, actual in results(ours.to(dtype), x.to(dtype)).items():
            assert torch.equal(actual.isnan(), expected[name].isnan()), f"{name}: {actual}"


@places
@pytest.mark.parametrize("mode", CELLS)
def test_cells(mode: str, value: float, B: int, dtype: torch.dtype, isa: str) -> None:
    ours, theirs = pair(CELLS, mode, dtype)
    x = torch.randn(B, 4, dtype=dtype)
    x[B // 2, 2] = value
    assert_same_nan(results(ours, x), results(theirs, x))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("mode", MODES)
def test_padding(mode: str, value: float, isa: str) -> None:
    """Elements of x after the end of a sequence affect no result."""
    module, _ = pair(LAYERS, mode, torch.float64)
    lengths = torch.tensor([5, 2, 0, 3])
    x = torch.randn(5, 4, 4, dtype=torch.float64)
    outside = torch.arange(5)[:, None] >= lengths
    dirty = x.masked_fill(outside[..., None], value)

    def run(x: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        y, _ = module(x, lengths=lengths)
        return [y, *torch.autograd.grad(y.sin().sum(), [x, *module.parameters()])]

    for actual, expected in zip(run(dirty), run(x), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("mode", [mode for mode in MODES if OP_MODES[mode] == mode])
def test_padding_under_transforms(mode: str, value: float) -> None:
    """The formulas used under vmap(grad), grad(vmap) and vmap(jacrev) do not multiply with padding either."""
    module, _ = pair(LAYERS, mode, torch.float64)
    weights = list(module._flat_weights)
    lengths = torch.tensor([4, 1, 0, 3])
    outside = torch.arange(4)[:, None] >= lengths
    function = {"lstm": functional.lstm, "gru": functional.gru}.get(mode, functional.rnn)
    options = {"nonlinearity": mode.removeprefix("rnn_")} if mode.startswith("rnn") else {}

    def objective(x: Tensor, *weights: Tensor) -> Tensor:
        return function(x, None, list(weights), lengths=lengths, **options)[0].sin().sum()

    x = torch.randn(3, 4, 4, 4, dtype=torch.float64)
    dirty = x.masked_fill(outside[..., None], value)
    everything = tuple(range(1 + len(weights)))
    transforms = {
        "vmap(grad)": torch.vmap(torch.func.grad(objective, everything), (0, *(None for _ in weights))),
        "grad(vmap)": torch.func.grad(
            lambda x, *w: torch.vmap(objective, (0, *(None for _ in w)))(x, *w).sum(), everything
        ),
        "vmap(jacrev)": torch.vmap(torch.func.jacrev(objective, everything), (0, *(None for _ in weights))),
    }
    for name, transform in transforms.items():
        for actual, expected in zip(transform(dirty, *weights), transform(x, *weights), strict=True):
            torch.testing.assert_close(actual, expected, msg=lambda m, n=name: f"{n}: {m}")
