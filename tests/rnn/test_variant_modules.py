"""Layers and cells with layer normalisation, zoneout and recurrent dropout as modules and functions: their parameters,
copies, settings, errors, plans, autocast and traces. test_variants.py tests their values."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

import dlkernels
from dlkernels._core import extension
from dlkernels._core.routing import no_kernel
from dlkernels.rnn import routing
from dlkernels.rnn.operators import sequence as sequence_operators
from tests.support.variant_cases import SEED, variants

VARIANTS = variants()


@pytest.mark.parametrize("name", ("LSTM", "GRU"))
def test_evaluation_without_zoneout_is_the_plain_layer(name: str) -> None:
    module = getattr(dlkernels.nn, name)(4, 6, recurrent_dropout=0.5).eval()
    plain = getattr(dlkernels.nn, name)(4, 6)
    plain.load_state_dict(module.state_dict())
    x = torch.randn(5, 3, 4)
    assert torch.equal(module(x)[0], plain(x)[0])
    if extension.HAVE_NATIVE:
        assert dlkernels.explain(module, x).native


@pytest.mark.parametrize("name", ("LSTM", "GRU"))
def test_plain_layers_have_no_more_attributes(name: str) -> None:
    ours, theirs = getattr(dlkernels.nn, name)(4, 6, zoneout=0.0), getattr(torch.nn, name)(4, 6)
    extra = ours.__dict__.keys() - theirs.__dict__.keys()
    assert not {key for key in extra if not key.startswith("_")}
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("name", ("LayerNormLSTM", "LayerNormGRU"))
def test_parameters(name: str, bias: bool) -> None:
    module = getattr(dlkernels.nn, name)(4, 6, 2, bias, bidirectional=True)
    lstm = name.endswith("LSTM")
    gates = 4 if lstm else 3
    plain = getattr(torch.nn, name.removeprefix("LayerNorm"))(4, 6, 2, bias, bidirectional=True)
    expected = {key: value.shape for key, value in plain.state_dict().items()}
    for suffix in ("l0", "l0_reverse", "l1", "l1_reverse"):
        expected |= {f"norm_ih_{suffix}": (gates * 6,), f"norm_hh_{suffix}": (gates * 6,)}
        if lstm:
            expected[f"norm_c_{suffix}"] = (6,)
        if lstm and bias:
            expected[f"bias_c_{suffix}"] = (6,)
    assert {key: tuple(value.shape) for key, value in module.state_dict().items()} == {
        key: tuple(shape) for key, shape in expected.items()
    }
    for key, value in module.state_dict().items():
        if key.startswith("norm"):
            assert value.eq(1).all()
        elif key.startswith("bias_c"):
            assert value.eq(0).all()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(5)
    module.reset_parameters()
    assert module.norm_ih_l0.eq(1).all()
    assert module.weight_ih_l0.abs().max() <= 6**-0.5
    assert [name for group in module._all_weights for name in group] == module._flat_weights_names
    assert len(module.all_weights) == 4


@pytest.mark.parametrize("variant", VARIANTS)
def test_copies_and_pickles(variant: str) -> None:
    case = VARIANTS[variant]
    module = case.module(torch.float64)
    x = case.arguments(torch.float64)[0]
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    copies = (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(saved, weights_only=False))
    torch.manual_seed(SEED)
    y = module(x)[0]
    for other in copies:
        torch.manual_seed(SEED)
        assert torch.equal(other(x)[0], y)
        assert repr(other) == repr(module)


def test_repr() -> None:
    nn = dlkernels.nn
    assert repr(nn.LSTM(2, 3, zoneout=(0.1, 0.2), recurrent_dropout=0.5)) == (
        "LSTM(2, 3, zoneout=(0.1, 0.2), recurrent_dropout=0.5)"
    )
    assert repr(nn.LayerNormGRU(2, 3, 2, batch_first=True)) == "LayerNormGRU(2, 3, num_layers=2, batch_first=True)"
    assert repr(nn.LayerNormLSTM(2, 3, eps=0.1, zoneout=0.1)) == "LayerNormLSTM(2, 3, zoneout=0.1, eps=0.1)"
    assert repr(nn.LayerNormLSTMCell(2, 3, eps=0.1, zoneout=0.1)) == "LayerNormLSTMCell(2, 3, eps=0.1, zoneout=0.1)"
    assert repr(nn.LayerNormGRUCell(2, 3)) == "LayerNormGRUCell(2, 3)"


@pytest.mark.parametrize(
    "make, message",
    (
        (lambda nn: nn.LSTM(2, 3, zoneout=1.5), r"zoneout should be a number in range \[0, 1\].*got 1.5"),
        (lambda nn: nn.LSTM(2, 3, zoneout=(0.1, 0.2, 0.3)), "zoneout should be .* of c and of h, got"),
        (lambda nn: nn.GRU(2, 3, zoneout=(0.1, 0.2)), "zoneout should be a number"),
        (lambda nn: nn.GRU(2, 3, recurrent_dropout=-1), "recurrent_dropout should be a number .*got -1"),
        (lambda nn: nn.LSTM(2, 3, proj_size=1, zoneout=0.1), "take no proj_size, got proj_size=1"),
        (lambda nn: nn.LayerNormLSTM(2, 3, proj_size=1), "LayerNormLSTM has no projection"),
        (lambda nn: nn.LayerNormLSTM(2, 3, eps=-1), "eps should be a number that is not negative, got -1"),
        (lambda nn: nn.LayerNormGRUCell(2, 3, zoneout="a"), "zoneout should be a number"),
    ),
)
def test_refused_settings(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(dlkernels.nn)


def test_rnn_takes_no_zoneout() -> None:
    with pytest.raises(TypeError):
        dlkernels.nn.RNN(2, 3, zoneout=0.1)


def test_functions_are_the_layers() -> None:
    for case in (*VARIANTS.values(), replace(VARIANTS["LayerNormLSTM-all"], layers=2, bidirectional=True)):
        module = case.module(torch.float64)
        x, states, _ = case.arguments(torch.float64)
        assert states is not None
        hx: Any = states if case.lstm else states[0]
        prefix = "layer_norm_" if case.normalised else ""
        function = getattr(dlkernels.functional, prefix + ("lstm" if case.lstm else "gru"))
        options = {"eps": case.eps} if case.normalised else {}
        torch.manual_seed(SEED)
        expected = module(x, hx)
        torch.manual_seed(SEED)
        found = function(
            x, hx, module._flat_weights, num_layers=case.layers, bidirectional=case.bidirectional,
            training=case.training, zoneout=case.zoneout, recurrent_dropout=case.recurrent_dropout, **options,
        )  # fmt: skip
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_refused_weights() -> None:
    module = dlkernels.nn.LayerNormLSTM(4, 6)
    x, weights = torch.randn(5, 3, 4), module._flat_weights
    run = dlkernels.functional.layer_norm_lstm
    with pytest.raises(
        RuntimeError, match=r"expected w_ih, w_hh, .*norm_ih, norm_hh, norm_c, then bias_c.*got 7 tensors"
    ):
        run(x, None, weights[:-1])
    with pytest.raises(RuntimeError, match=r"expected norm_hh of size \(24,\), got \(23,\)"):
        run(x, None, [*weights[:5], weights[5][:-1], *weights[6:]])
    with pytest.raises(RuntimeError, match="not the same dtype"):
        run(x, None, [*weights[:6], weights[6].double(), weights[7]])
    with pytest.raises(TypeError, match="argument 'weights' must be tuple of Tensors"):
        run(x, None, weights[0])
    with pytest.raises(ValueError, match="take no projection"):
        projected = dlkernels.nn.LSTM(4, 6, proj_size=2)
        dlkernels.functional.lstm(x, None, projected._flat_weights, zoneout=0.5)


@pytest.mark.parametrize("name", ("LSTM", "GRU"))
def test_autocast(name: str) -> None:
    """The results have the dtypes of the plain layer's."""
    module, plain = getattr(dlkernels.nn, f"LayerNorm{name}")(4, 6), getattr(dlkernels.nn, name)(4, 6)
    x = torch.randn(5, 3, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        (y, state), (plain_y, plain_state) = module(x), plain(x)
    assert y.dtype == plain_y.dtype
    assert [one.dtype for one in state] == [one.dtype for one in plain_state]
    torch.testing.assert_close(y.float(), module(x)[0], rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert {p.grad.dtype for p in module.parameters()} == {torch.float32}


@pytest.mark.skipif(not extension.HAVE_NATIVE, reason="without a compiled module another warning tells it")
def test_a_call_without_a_kernel_is_announced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "_reasons_announced", set())
    decided = no_kernel(routing.NO_MORE_OF_VARIANTS, warns=True)
    monkeypatch.setattr(sequence_operators, "route", lambda *tensors, **others: decided)
    module, x = dlkernels.nn.LayerNormLSTM(4, 6), torch.randn(5, 3, 4)
    with pytest.warns(RuntimeWarning, match="reference path, which is slow: resets= and return_cells= have no kernel"):
        module(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(x)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_plan_explained_is_the_plan_that_ran(variant: str, isa: str) -> None:
    module = VARIANTS[variant].module(torch.float32)
    x = torch.randn(5, 3, 4)
    explained = dlkernels.explain(module, x).layers[0]
    assert explained.path == "native"
    y, _ = module(x)
    ran = extension.native.last_run()
    assert {key: ran[key] for key in explained.forward} == explained.forward
    y.sum().backward()
    ran = extension.native.last_run()
    assert ran["backward"]
    assert {key: ran[key] for key in explained.backward} == explained.backward


@pytest.mark.usefixtures("native")
def test_cells_are_explained() -> None:
    assert dlkernels.explain(dlkernels.nn.LayerNormGRUCell(4, 6), torch.randn(3, 4)).native
    assert dlkernels.explain(dlkernels.nn.LayerNormLSTMCell(4, 6), torch.randn(4)).native


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("variant", ("LayerNormGRU-all-evaluated", "LSTM-zoneout-rates"))
def test_traced(variant: str) -> None:
    """A trace records PyTorch's operations, not the operator of the plain layer."""
    module = VARIANTS[variant].module(torch.float32)
    x = torch.randn(5, 3, 4)
    traced = torch.jit.trace(module, (x,))  # type: ignore[no-untyped-call]
    torch.testing.assert_close(traced(x)[0], module(x)[0])


@pytest.mark.parametrize("name", ("LSTM", "GRU"))
def test_settings_may_change_later(name: str) -> None:
    module = getattr(dlkernels.nn, name)(4, 6).eval()
    x = torch.randn(5, 3, 4)
    with torch.no_grad():
        plain = module(x)[0]
        module.zoneout = 1.0
        assert module(x)[0].eq(0).all()
        module.zoneout = 0.0
        assert torch.equal(module(x)[0], plain)
