"""Tests the forward of a module in one call of the extension: it returns what the functions of test_direct.py return
for the module's weights and options, and declines every module and call that is not plain."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrizations

import dlkernels
from dlkernels.rnn.operators import direct
from tests.support.direct_calls import CONTEXTS, INPUTS, call, states_of
from tests.support.rnn_op_calls import B, H, I, T

pytestmark = [
    pytest.mark.usefixtures("native"),
    pytest.mark.o0_skip(reason="the way to kernels that other tests call as well"),
]

LAYERS: dict[str, Callable[..., Any]] = {
    "LSTM": dlkernels.nn.LSTM,
    "GRU": dlkernels.nn.GRU,
    "RNN": dlkernels.nn.RNN,
    "RNN relu": lambda *a, **k: dlkernels.nn.RNN(*a, **{"nonlinearity": "relu", **k}),
    "LSTM projected": lambda *a, **k: dlkernels.nn.LSTM(*a, **{"proj_size": 2, **k}),
}
CELLS: dict[str, Callable[..., Any]] = {
    "LSTM": dlkernels.nn.LSTMCell,
    "GRU": dlkernels.nn.GRUCell,
    "RNN": dlkernels.nn.RNNCell,
    "RNN relu": lambda *a, **k: dlkernels.nn.RNNCell(*a, **{"nonlinearity": "relu", **k}),
}
PREPACK: dict[str, Callable[[Any], Any]] = {
    "plain": lambda module: module,
    "prepacked": lambda module: module.prepack(),
    "bf16": lambda module: module.prepack(weights=torch.bfloat16),
    "int8": lambda module: module.prepack(weights=torch.int8),
}


def called(layer: Any, x: Any, hx: Any = None, resets: Any = None) -> Any:
    return direct.layer_module(layer.__dict__, x, hx, resets)


def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [part for item in result for part in tensors(item)]


def argument(states: tuple[Tensor, ...]) -> Any:
    return None if not states else states[0] if len(states) == 1 else states


@pytest.mark.parametrize("prepack", PREPACK)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("options", [
    {}, {"num_layers": 3, "bidirectional": True, "dropout": 0.5}, {"num_layers": 2, "batch_first": True, "bias": False},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("with_states", [False, True], ids=["zeros", "states"])
def test_layers(name: str, options: dict[str, Any], with_states: bool, prepack: str) -> None:
    layer = PREPACK[prepack](LAYERS[name](I, H, **options).eval())
    x = torch.randn((B, T, I) if layer.batch_first else (T, B, I))
    states = states_of(layer) if with_states else ()
    with torch.no_grad():
        found = called(layer, x, argument(states))
        assert found is not None
        assert type(found) is tuple
        assert isinstance(found[1], tuple) == name.startswith("LSTM")
        packed = None if layer._prepacked is None else layer._prepacked.buffers
        expected = call(layer, x, states, packed=packed)
    assert expected is not None
    torch.testing.assert_close(tensors(found), expected, rtol=0, atol=0)
    assert [one.stride() for one in tensors(found)] == [one.stride() for one in expected]


@pytest.mark.parametrize("prepack", PREPACK)
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("with_states", [False, True], ids=["zeros", "states"])
def test_cells(name: str, bias: bool, with_states: bool, prepack: str) -> None:
    cell = PREPACK[prepack](CELLS[name](I, H, bias))
    mode, x = cell._mode, torch.randn(B, 2 * I)[:, ::2]
    states = tuple(torch.randn(B, 2 * H)[:, 1::2] for _ in range(2 if name == "LSTM" else 1)) if with_states else ()
    with torch.no_grad():
        found = direct.cell_module(mode, cell.__dict__, x, argument(states))
        assert found is not None
        h, c = (*states, None, None)[:2]
        if prepack == "plain":
            expected = direct.cell(mode, x, h, c, *(cell._parameters[name] for name in cell._parameters))
        else:
            steps = [None if state is None else state[None] for state in (h, c)]
            weights = cell.weight_list()
            out = direct.layers(mode, x[None], *steps, weights, cell._prepacked.buffers, None, None, 1, False, False)
            assert out is not None
            expected = [state[0] for state in out[1:]]
    assert expected is not None
    assert isinstance(found, tuple) == (name == "LSTM")
    torch.testing.assert_close(tensors(found), expected, rtol=0, atol=0)
    assert all(one.is_contiguous() for one in tensors(found))


@pytest.mark.parametrize("name", CONTEXTS)
def test_declines_in(name: str) -> None:
    layer, cell, x = dlkernels.nn.GRU(I, H), dlkernels.nn.GRUCell(I, H), torch.randn(T, B, I)
    with torch.no_grad():
        with CONTEXTS[name]():
            assert called(layer, x) is None
            assert direct.cell_module("gru", cell.__dict__, x[0], None) is None
        assert called(layer, x) is not None
        assert direct.cell_module("gru", cell.__dict__, x[0], None) is not None


@pytest.mark.parametrize("name", INPUTS)
def test_declines_inputs(name: str) -> None:
    layer, x = dlkernels.nn.GRU(I, H).requires_grad_(False), torch.randn(T, B, I)
    assert called(layer, INPUTS[name](x)) is None
    assert called(layer.prepack(), INPUTS[name](x)) is None
    cell = dlkernels.nn.GRUCell(I, H).requires_grad_(False)
    if name != "no step":  # for a cell that is a batch of size 0
        assert direct.cell_module("gru", cell.__dict__, INPUTS[name](x[0]), None) is None


ONE, OTHER = torch.zeros(1, B, H), torch.zeros(B, H)


@pytest.mark.parametrize("hx", [
    ONE, (ONE,), [ONE, ONE], (None, ONE), (ONE, None), (ONE, ONE, ONE), (OTHER, OTHER), (torch.zeros(2, B, H),) * 2, 3,
])  # fmt: skip
def test_declines_states_of_layers(hx: Any) -> None:
    layer, x = dlkernels.nn.LSTM(I, H).requires_grad_(False), torch.randn(T, B, I)
    assert called(layer, x, (ONE, ONE)) is not None
    assert called(layer, x, hx) is None


@pytest.mark.parametrize("hx", [
    OTHER, (OTHER,), [OTHER, OTHER], (None, OTHER), (OTHER, None), (OTHER, OTHER, OTHER), (ONE, ONE), 3,
])  # fmt: skip
@pytest.mark.parametrize("prepack", ["plain", "prepacked"])
def test_declines_states_of_cells(hx: Any, prepack: str) -> None:
    cell, x = PREPACK[prepack](dlkernels.nn.LSTMCell(I, H).requires_grad_(False)), torch.randn(B, I)
    assert direct.cell_module("lstm", cell.__dict__, x, (OTHER, OTHER)) is not None
    assert direct.cell_module("lstm", cell.__dict__, x, hx) is None


def no_weight(layer: Any) -> None:
    layer.weight_ih_l0 = None


CHANGES: dict[str, Callable[[Any], Any]] = {
    "trained": lambda layer: layer.requires_grad_(),
    "one weight trained": lambda layer: layer.bias_hh_l1.requires_grad_(),
    "parametrized": lambda layer: parametrizations.weight_norm(layer, "weight_hh_l0"),
    "weight removed": lambda layer: layer._parameters.pop("weight_hh_l1"),
    "no weight": no_weight,
    "weights assigned as a list": lambda layer: layer._flat_weights,
    "dropout drawn": lambda layer: layer.train(),
    "dropout of another type": lambda layer: setattr(layer, "dropout", "0.5"),
    "dropout too large": lambda layer: setattr(layer, "dropout", 1.5),
    "bidirectional of another type": lambda layer: setattr(layer, "bidirectional", 0),
    "batch_first of another type": lambda layer: setattr(layer, "batch_first", None),
    "another mode": lambda layer: setattr(layer, "mode", "gru2"),
    "mode of another type": lambda layer: setattr(layer, "mode", 1),
    "another number of layers": lambda layer: setattr(layer, "num_layers", 3),
    "number of layers of another type": lambda layer: setattr(layer, "num_layers", "2"),
    "no names": lambda layer: setattr(layer, "_flat_weights_names", []),
    "another dtype": lambda layer: setattr(layer, "weight_hh_l0", torch.nn.Parameter(layer.weight_hh_l0.double())),
}


@pytest.mark.parametrize("name", CHANGES)
def test_declines_modules(name: str) -> None:
    layer, x = dlkernels.nn.LSTM(I, H, num_layers=2, dropout=0.5).eval().requires_grad_(False), torch.randn(T, B, I)
    assert called(layer, x) is not None
    CHANGES[name](layer)
    assert called(layer, x) is None


def replace_weight(module: Any) -> None:
    """The new weight has been written to as often as the old one."""
    weight = torch.nn.Parameter(module.weight_hh * 2, False)
    while weight._version < module.weight_hh._version:
        weight.add_(0)
    module.weight_hh = weight


STALE: dict[str, Callable[[Any], Any]] = {
    "written to": lambda module: module.weight_hh.add_(1),
    "replaced": replace_weight,
}


@pytest.mark.parametrize("name", STALE)
@pytest.mark.parametrize("prepack", ["prepacked", "bf16", "int8"])
def test_packed_weights_that_are_out_of_date(name: str, prepack: str) -> None:
    cell, x = dlkernels.nn.GRUCell(I, H).requires_grad_(False), torch.randn(B, I)
    PREPACK[prepack](cell)
    assert direct.cell_module("gru", cell.__dict__, x, None) is not None
    STALE[name](cell)
    assert direct.cell_module("gru", cell.__dict__, x, None) is None
    torch.testing.assert_close(cell(x), copy.deepcopy(cell)(x))


def test_packed_weights_of_inference_tensors() -> None:
    with torch.inference_mode():
        layer, x = dlkernels.nn.GRU(I, H).prepack(), torch.randn(T, B, I)
        found, expected = called(layer, x), copy.deepcopy(layer)(x)
    assert found is not None
    torch.testing.assert_close(found, expected)


def test_gradient_of_the_input() -> None:
    """With frozen weights the gradient of x is still recorded."""
    layer, x = dlkernels.nn.GRU(I, H).requires_grad_(False), torch.randn(T, B, I, requires_grad=True)
    layer(x)[0].sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("batch_first", (False, True))
@pytest.mark.parametrize("name", ("LSTM", "GRU", "RNN"))
def test_resets(name: str, batch_first: bool) -> None:
    layer = getattr(dlkernels.nn, name)(I, H, num_layers=2, bidirectional=True, batch_first=batch_first)
    x = torch.randn((B, T, I) if batch_first else (T, B, I))
    resets = torch.rand(x.shape[:2]) < 0.5
    want = tensors(layer(x, resets=resets))
    with torch.no_grad():
        got = tensors(called(layer, x, None, resets))
        assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
        for wrong in (resets.T, resets[0], resets.float(), resets.tolist()):
            assert called(layer, x, None, wrong) is None


def test_declines_wrong_arguments() -> None:
    x = torch.randn(T, B, I)
    for wrong in ((), (None, x, None), ({}, x, None), ({"_parameters": 3}, x, None), ({"_parameters": {}}, x, None)):
        assert direct.layer_module(*wrong, None) is None
        assert direct.cell_module("gru", *wrong) is None
    cell = dlkernels.nn.GRUCell(I, H).requires_grad_(False)
    assert direct.cell_module("gru2", cell.__dict__, x[0], None) is None
    assert direct.cell_module(None, cell.__dict__, x[0], None) is None


def test_nothing_is_kept_alive() -> None:
    layer, cell = dlkernels.nn.LSTM(I, H).requires_grad_(False), dlkernels.nn.LSTMCell(I, H).requires_grad_(False)
    watched = []
    for prepack in ("plain", "prepacked"):
        PREPACK[prepack](layer), PREPACK[prepack](cell)
        for features in (I, I + 1):
            x, hx = torch.randn(T, B, features), states_of(layer)
            found = [called(layer, x, hx), direct.cell_module("lstm", cell.__dict__, x[0], (hx[0][0], hx[1][0]))]
            served = [out for out in found if out is not None]
            assert len(served) == (2 if features == I else 0)
            watched += [weakref.ref(tensor) for tensor in (x, *hx, *tensors(served))]
            del x, hx, found, served
    watched += [weakref.ref(weight) for weight in (*layer.parameters(), *cell.parameters())]
    del layer, cell
    gc.collect()
    assert [ref() for ref in watched] == [None] * len(watched)
