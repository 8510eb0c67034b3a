"""Tests the stateless functions: results against torch.nn, dropout masks, autocast and wrong arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from dlkernels import functional, reference

pytestmark = pytest.mark.o0_skip(reason="the stateless forms are Python around the operators")

T, B, I, H = 6, 3, 4, 5
LAYERS: dict[str, Any] = {
    "lstm": (nn.LSTM, functional.lstm, {}, {}),
    "gru": (nn.GRU, functional.gru, {}, {}),
    "rnn_tanh": (nn.RNN, functional.rnn, {}, {}),
    "rnn_relu": (nn.RNN, functional.rnn, {"nonlinearity": "relu"}, {"nonlinearity": "relu"}),
}
CELLS: dict[str, Any] = {
    "lstm": (nn.LSTMCell, functional.lstm_cell),
    "gru": (nn.GRUCell, functional.gru_cell),
    "rnn_tanh": (nn.RNNCell, functional.rnn_cell),
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def flat(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [tensor for part in out for tensor in flat(part)]


def both(mode: str, x: Tensor, hx: Any = None, batch_sizes: Tensor | None = None, **options: Any) -> Any:
    """Returns torch.nn's outputs and ours for the same random numbers."""
    module, function, constructor, own = LAYERS[mode]
    layer = module(I, H, **constructor, **options)
    torch.manual_seed(7)
    if batch_sizes is None:
        expected = layer(x, hx)
    else:
        packed, hidden = layer(nn.utils.rnn.PackedSequence(x, batch_sizes), hx)
        expected = (packed.data, hidden)
    names = ("num_layers", "bidirectional", "batch_first", "dropout")
    torch.manual_seed(7)
    got = function(
        x, hx, layer._flat_weights, batch_sizes=batch_sizes, training=True, **own,
        **{name: options[name] for name in names if name in options},
    )  # fmt: skip
    return flat(expected), flat(got)


@pytest.mark.parametrize("mode", LAYERS)
@pytest.mark.parametrize("form", ("time-major", "batch-first", "unbatched", "unbatched-batch-first", "packed"))
@pytest.mark.parametrize("dropout", (0.0, 0.5, 1.0))
def test_layers_equal_torch_for_the_same_seed(mode: str, form: str, dropout: float) -> None:
    batch_sizes = None
    options = {"num_layers": 3, "bidirectional": True, "dropout": dropout, "batch_first": "batch-first" in form}
    if form == "packed":
        packed = pack_padded_sequence(torch.randn(T, B, I), torch.tensor([6, 4, 1]))
        x, batch_sizes = packed.data, packed.batch_sizes
    else:
        x = torch.randn((T, I) if "unbatched" in form else (B, T, I) if options["batch_first"] else (T, B, I))
    expected, got = both(mode, x, None, batch_sizes, **options)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("batch_first", (False, True))
def test_dropout_mask_is_torchs_bit_for_bit(batch_first: bool) -> None:
    # The second layer has identity weights and no bias, so its output is zero exactly where the mask is.
    eye, zero = torch.eye(4), torch.zeros(4, 4)
    weights = [eye, zero, eye, zero]
    x = torch.rand((8, 16, 4) if batch_first else (16, 8, 4)) + 0.5
    layer = nn.RNN(4, 4, 2, "relu", bias=False, batch_first=batch_first, dropout=0.3)
    for parameter, weight in zip(layer.parameters(), weights, strict=True):
        parameter.data.copy_(weight)
    torch.manual_seed(3)
    expected = layer(x)[0]
    torch.manual_seed(3)
    got = functional.rnn(
        x, None, weights, nonlinearity="relu", num_layers=2, batch_first=batch_first, dropout=0.3, training=True
    )[0]
    assert torch.equal(got == 0, expected == 0) and 0 < (got == 0).sum() < got.numel()
    assert got.stride() == expected.stride()


@pytest.mark.parametrize("mode", LAYERS)
def test_no_dropout_outside_of_training(mode: str) -> None:
    module, function, constructor, own = LAYERS[mode]
    weights = module(I, H, 2, **constructor)._flat_weights
    x = torch.randn(T, B, I)
    a, b = (flat(function(x, None, weights, num_layers=2, dropout=p, **own)) for p in (0.0, 0.9))
    assert all(map(torch.equal, a, b))


@pytest.mark.parametrize("mode", LAYERS)
def test_lengths_and_truncation_reach_every_layer(mode: str) -> None:
    module, function, constructor, own = LAYERS[mode]
    weights = module(I, H, 2, bidirectional=True, dtype=torch.float64, **constructor)._flat_weights
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([2, 6, 0], dtype=torch.int32)
    got = flat(function(x, None, weights, num_layers=2, bidirectional=True, lengths=lengths, bptt_steps=2, **own))
    expected = reference.stack(mode, x, None, None, weights, 2, None, lengths.long(), True, False, 2)
    for a, b in zip(got, expected, strict=False):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(*(torch.autograd.grad(out[0].square().sum(), (x, *weights)) for out in (got, expected)))


@pytest.mark.parametrize("mode", CELLS)
@pytest.mark.parametrize("shape", ((B, I), (I,), (0, I)))
@pytest.mark.parametrize("state", (False, True))
@pytest.mark.parametrize("bias", (False, True))
def test_cells_equal_torch(mode: str, shape: tuple[int, ...], state: bool, bias: bool) -> None:
    module, function = CELLS[mode]
    cell = module(I, H, bias)
    x = torch.randn(shape)
    hx: Any = None
    if state:
        h = torch.randn(*shape[:-1], H)
        hx = (h, h.cos()) if mode == "lstm" else h
    got, expected = flat(function(x, hx, *cell.parameters())), flat(cell(x, hx))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_cell_with_one_bias() -> None:
    cell = nn.GRUCell(I, H)
    x, h = torch.randn(B, I), torch.randn(B, H)
    for biases in ((cell.bias_ih, None), (None, cell.bias_hh)):
        expected = torch._VF.gru_cell(x, h, cell.weight_ih, cell.weight_hh, *biases)  # type: ignore[attr-defined]
        torch.testing.assert_close(functional.gru_cell(x, h, cell.weight_ih, cell.weight_hh, *biases), expected)


@pytest.mark.parametrize("mode", LAYERS)
def test_autocast_decides_the_dtype(mode: str) -> None:
    module, function, constructor, own = LAYERS[mode]
    layer = module(I, H, 2, **constructor)
    x = torch.randn(T, B, I, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flat(function(x, None, layer._flat_weights, num_layers=2, **own))
    # As in torch, LSTM (by oneDNN) and RNN return autocast's dtype, and GRU returns its state's dtype, here float32.
    assert {tensor.dtype for tensor in out} == {torch.float32 if mode == "gru" else torch.bfloat16}
    cast = [weight.bfloat16() for weight in layer._flat_weights]
    rounded = function(x.bfloat16(), None, cast, num_layers=2, **own)[0]
    torch.testing.assert_close(out[0].float(), rounded.float(), rtol=0.02, atol=0.02)
    out[0].sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())
    wide = layer.double()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as with torch's linear, float64 stays float64
        assert function(x.double(), None, wide._flat_weights, num_layers=2, **own)[0].dtype == torch.float64


def test_autocast_of_cells() -> None:
    cell = nn.LSTMCell(I, H)
    x = torch.randn(B, I)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h, c = functional.lstm_cell(x, (torch.randn(B, H), torch.randn(B, H)), *cell.parameters())
    assert h.dtype == c.dtype == torch.float32  # the dtype of the state
    (h.sum() + c.sum()).backward()
    assert cell.weight_hh.grad is not None and cell.weight_hh.grad.dtype == torch.float32


def lstm_arguments() -> tuple[Tensor, Any, list[Any]]:
    return torch.randn(T, B, I), (torch.zeros(1, B, H), torch.zeros(1, B, H)), list(nn.LSTM(I, H)._flat_weights)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"input": torch.randn(T, B, I, 1)}, ValueError, "LSTM: Expected input to be 2D or 3D, got 4D"),
        ({"input": torch.randn(T, B, I + 1)}, RuntimeError, "input.size\\(-1\\) must be equal to input_size"),
        ({"input": torch.randn(0, B, I)}, RuntimeError, "Expected sequence length to be larger than 0 in RNN"),
        ({"input": torch.randn(T, B, I).double()}, ValueError, "RNN input dtype .* does not match weight dtype"),
        ({"input": [1]}, TypeError, "argument 'input' must be Tensor, not list"),
        ({"hx": torch.zeros(1, B, H)}, TypeError, "tuple of two tensors"),
        ({"hx": (torch.zeros(1, B, H),)}, RuntimeError, "expects two hidden states"),
        ({"hx": (torch.zeros(1, 9, H), torch.zeros(1, B, H))}, RuntimeError, "Expected hidden\\[0\\] size"),
        ({"hx": (torch.zeros(1, B, H), torch.zeros(2, B, H))}, RuntimeError, "Expected hidden\\[1\\] size"),
        ({"hx": (torch.zeros(B, H), torch.zeros(B, H))}, RuntimeError, "3-D but got \\(2-D, 2-D\\)"),
        ({"hx": (torch.zeros(1, B, H).double(), torch.zeros(1, B, H))}, RuntimeError, "not the same dtype"),
        ({"hx": (torch.zeros(1, B, H, device="meta"), torch.zeros(1, B, H))}, RuntimeError, "not at the same device"),
        ({"weights": "no"}, TypeError, "weights"),
        ({"num_layers": 3}, RuntimeError, "weights: expected"),
        ({"num_layers": 0}, ValueError, "num_layers must be greater than zero"),
        ({"num_layers": 1.0}, TypeError, "num_layers"),
        ({"dropout": 1.5}, ValueError, "dropout should be a number in range"),
        ({"bptt_steps": -1}, ValueError, "bptt_steps"),
        ({"bptt_steps": 1.0}, TypeError, "bptt_steps"),
        ({"bptt_steps": True}, TypeError, "bptt_steps"),
        ({"lengths": [1, 2, 3]}, TypeError, "lengths should be a tensor"),
        ({"lengths": torch.ones(B)}, TypeError, "lengths should be of an integer dtype"),
        ({"lengths": torch.ones(B + 1, dtype=torch.int64)}, RuntimeError, "Expected lengths of size \\(3,\\)"),
        ({"lengths": torch.tensor([0, T + 1, 1])}, ValueError, "lengths must lie in 0..T"),
        ({"lengths": torch.tensor([0, -1, 1])}, ValueError, "lengths must lie in 0..T"),
        ({"input": torch.randn(T, I), "hx": None, "lengths": torch.ones(1)}, ValueError, "lengths: needs batched"),
        ({"batch_sizes": torch.tensor([3])}, RuntimeError, "input must have 2 dimensions"),
        ({"input": torch.randn(4, I), "hx": None, "batch_sizes": [3, 1]}, TypeError, "batch_sizes should be a tensor"),
        ({"input": torch.randn(4, I), "hx": None, "batch_sizes": torch.tensor([3.0])}, RuntimeError, "batch_sizes"),
        ({"input": torch.randn(4, I), "hx": None, "batch_sizes": torch.tensor([1, 3])}, RuntimeError, "batch_sizes"),
        ({"input": torch.randn(4, I), "hx": None, "batch_sizes": torch.tensor([3, 3])}, RuntimeError, "batch_sizes"),
        (
            {"input": torch.randn(0, I), "hx": None, "batch_sizes": torch.zeros(0, dtype=torch.int64)},
            RuntimeError, "Expected sequence length to be larger than 0 in RNN",
        ),
    ],
    ids=lambda value: None if not isinstance(value, dict) else "-".join(value),
)  # fmt: skip
def test_mistakes(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    x, hx, weights = lstm_arguments()
    arguments = {"input": x, "hx": hx, "weights": weights, **changes}
    for training in (False, True):
        with torch.set_grad_enabled(training), pytest.raises(error, match=message):
            functional.lstm(**arguments)


@pytest.mark.parametrize("index, shape", ((0, (21, I)), (0, (20,)), (1, (20, 4)), (2, (1,)), (3, (20, 1))))
def test_weights_of_wrong_sizes(index: int, shape: tuple[int, ...]) -> None:
    x, _, weights = lstm_arguments()
    weights[index] = torch.zeros(shape)
    with pytest.raises(RuntimeError, match="weights of layer 0"):
        functional.lstm(x, None, weights)


def test_nonlinearity_is_checked() -> None:
    weights = nn.RNN(I, H)._flat_weights
    with pytest.raises(ValueError, match="Unknown nonlinearity"):
        functional.rnn(torch.randn(T, B, I), None, weights, nonlinearity="sin")  # type: ignore[arg-type]
