"""Tests the records that the forward saves for each row; calls with 16-bit types have narrow slots in them."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import dlkernels.nn
from dlkernels._core.dtypes import DTYPES
from dlkernels.rnn import records
from dlkernels.rnn.dtypes import Types
from dlkernels.rnn.kinds import KINDS
from tests.support.rnn_op_calls import GATES, op

MODES = ("lstm", "gru", "rnn_tanh", "rnn_relu")
LAYERS = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN", "rnn_relu": "RNN"}
T, B, I = 4, 3, 6


def weights_of(mode: str, hidden: int, dtype: torch.dtype) -> list[Tensor]:
    rows = GATES[mode] * hidden
    shapes = ((rows, I), (rows, hidden), (rows,), (rows,))
    return [(0.5 * torch.randn(shape)).to(dtype) for shape in shapes]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32, torch.float64))
@pytest.mark.parametrize("hidden", (1, 5, 16))
def test_h_is_saved_as_y_has_it(mode: str, dtype: torch.dtype, hidden: int) -> None:
    x, weights = torch.randn(T, B, I).to(dtype), weights_of(mode, hidden, dtype)

    def forward(x: Tensor, weights: list[Tensor]) -> tuple[Tensor, ...]:
        return op(mode)(x, None, None, weights, None, None, None, False, False, True, False)

    y, _, _, saved, _ = forward(x, weights)
    short = dtype.itemsize == 2
    assert saved.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    halves = {"lstm": 6 if short else 10, "gru": 5 if short else 10}.get(mode, 1 if short else 2) * hidden
    assert saved.shape == (1, T, B, (halves + 1) // 2)
    slots = records.slots(KINDS[mode], saved, hidden, dtype)
    assert [slot.shape for slot in slots] == [(1, T, B, hidden)] * len(KINDS[mode].slots)
    if mode == "lstm":
        torch.testing.assert_close((slots[3] * slots[4].tanh())[0].to(dtype), y)
        i, f, g, _, c = (slot[0] for slot in slots)
        torch.testing.assert_close(c[1:], f[1:] * c[:-1] + i[1:] * g[1:], rtol=0, atol=1e-4 if short else 1e-6)
    else:
        assert torch.equal(slots[-1][0].to(dtype), y)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode_of_fakes:
        fakes = forward(mode_of_fakes.from_tensor(x), [mode_of_fakes.from_tensor(w) for w in weights])
    assert fakes[3].shape == saved.shape and fakes[3].dtype == saved.dtype


@pytest.mark.parametrize("mode", MODES)
def test_the_dtype_of_products_decides(mode: str) -> None:
    """x is float32 and products are bfloat16, as under autocast, and the other way round."""
    hidden = 5
    for of_x, product in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        x, weights = torch.randn(T, B, I).to(of_x), weights_of(mode, hidden, product)
        types = Types(DTYPES.index(product), 0, 0)
        saved = op(mode)(x, None, None, weights, None, None, None, False, False, True, False, *types)[3]
        assert saved.shape[-1] == records.size(KINDS[mode], hidden, 0, product, x.device)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("hidden", (5, 16))
def test_per_sample_gradients(mode: str, dtype: torch.dtype, hidden: int) -> None:
    """Under vmap, Python computes the gradients from the records; for a single sample the kernels compute them."""
    options = {"nonlinearity": "relu"} if mode == "rnn_relu" else {}
    layer = getattr(dlkernels.nn, LAYERS[mode])(I, hidden, bidirectional=True, **options).to(dtype)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    xs, lengths = torch.randn(3, T, B, I).to(dtype), torch.tensor([4, 2, 3])

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        y, h = torch.func.functional_call(layer, parameters, (x,), {"lengths": lengths})
        return y.float().square().sum() + (h[0] if mode == "lstm" else h).float().sum()

    grad = torch.func.grad(loss)
    got = torch.vmap(grad, (None, 0))(parameters, xs)
    alone = [grad(parameters, x) for x in xs]
    for name, values in got.items():
        expected = torch.stack([each[name] for each in alone]).float()
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            values.float(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
        )


@pytest.mark.parametrize("mode", ("lstm", "gru"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_gates_near_one(mode: str, dtype: torch.dtype, isa: str) -> None:
    """A forget or update gate of 0.999 for 200 steps. In bfloat16 it would be 1, its own gradient 0, and the gradient
    of the first state 20 % too large."""
    hidden, name = 16, LAYERS[mode]
    layer = getattr(dlkernels.nn, name)(I, hidden).to(dtype)
    with torch.no_grad():
        layer.bias_ih_l0[hidden : 2 * hidden] = 7
    exact = getattr(torch.nn, name)(I, hidden, dtype=torch.float64)
    exact.load_state_dict({key: value.double() for key, value in layer.state_dict().items()})
    x, first = torch.randn(200, B, I).to(dtype), torch.randn(1, B, hidden).to(dtype)

    def gradients(layer: torch.nn.Module, x: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        first = first.clone().requires_grad_()
        y, _ = layer(x, (torch.zeros_like(first), first) if mode == "lstm" else first)
        of_first, of_bias = torch.autograd.grad(y[-1].sum(), (first, layer.bias_ih_l0))
        return of_first.double(), of_bias[hidden : 2 * hidden].double()

    for got, want in zip(gradients(layer, x, first), gradients(exact, x.double(), first.double()), strict=True):
        assert (got - want).norm() < 0.03 * want.norm()
