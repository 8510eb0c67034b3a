"""Layer normalisation, zoneout and recurrent dropout against a float64 oracle that computes one sequence and one step
at a time."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import dlkernels
from dlkernels._core import extension
from dlkernels._core.routing import no_kernel
from dlkernels.rnn import routing
from dlkernels.rnn.operators import sequence as sequence_operators
from dlkernels.testing import within_rule
from tests.support.variant_cases import FORMS, SEED, Case, check, in_form, results, variants

VARIANTS = variants()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_reference_equals_the_oracle(variant: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence_operators, "route", lambda *tensors, **others: no_kernel("for this test"))
    check(in_form(VARIANTS[variant], form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_equal_the_oracle(variant: str, form: str, isa: str) -> None:
    check(in_form(VARIANTS[variant], form))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_dtype(variant: str, dtype: torch.dtype, isa: str) -> None:
    check(replace(VARIANTS[variant], dtype=dtype, H=33, I=20, T=8))


# 33 units are whole vectors and a rest, 64 are whole panels; with 2 and 3 threads the step is shared by rows or units.
SIZES: dict[str, dict[str, Any]] = {
    "whole": {"H": 64, "I": 16, "T": 30, "B": 20, "dtype": torch.float32},
    "rest": {"H": 33, "I": 70, "T": 3, "B": 2, "dtype": torch.float32},
    "one": {"H": 1, "I": 1},
}


@pytest.mark.parametrize("threads_count", (1, 2, 3))
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", ("LayerNormLSTM-all", "LayerNormGRU-all", "LSTM-dropout", "GRU-zoneout"))
def test_sizes_and_threads(
    variant: str, size: str, threads_count: int, threads: Callable[[int], None], isa: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    threads(threads_count)
    case = replace(VARIANTS[variant], bidirectional=True, **SIZES[size])
    ours = results(case, case.dtype)
    monkeypatch.setattr(sequence_operators, "route", lambda *tensors, **others: no_kernel("for this test"))
    theirs, ref = results(case, case.dtype), results(case, torch.float64)
    for name, value in ours.items():
        verdict = within_rule(value, theirs[name], ref[name], case.dtype, grad=name.startswith("d"))
        # The largest error is mostly chance; the tests of every dtype look at the median.
        assert verdict.ours <= 2 * verdict.limit, f"{case}\n{name}: {verdict}"


@pytest.mark.parametrize("variant", ("LayerNormLSTM-all", "LayerNormGRU-all", "LSTM-dropout", "GRU-zoneout"))
def test_bfloat16_in_whole_panels(variant: str, isa: str) -> None:
    check(replace(VARIANTS[variant], dtype=torch.bfloat16, H=64, I=32, T=28, B=14))


@pytest.mark.parametrize("variant", ("LayerNormLSTM-all", "LayerNormGRU-all", "LSTM-zoneout", "GRU-dropout"))
@pytest.mark.parametrize("form", ("bidirectional", "lengths"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_threads_change_nothing(
    variant: str, form: str, dtype: torch.dtype, threads: Callable[[int], None], isa: str
) -> None:  # fmt: skip
    case = replace(in_form(VARIANTS[variant], form), dtype=dtype, H=65, I=40)
    threads(1)
    expected = results(case, dtype)
    for count in (2, 3):
        threads(count)
        for name, value in results(case, dtype).items():
            assert torch.equal(value, expected[name]), (count, name)


@pytest.mark.parametrize("variant", ("LayerNormLSTM-all-evaluated", "LayerNormGRU-all-evaluated", "GRU-zoneout-rates"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_sequence_does_not_depend_on_its_batch(variant: str, dtype: torch.dtype, isa: str) -> None:
    case = replace(VARIANTS[variant], dtype=dtype, H=65, I=40, B=13)
    module = case.module(dtype)
    x, states, _ = case.arguments(dtype)
    assert states is not None
    x.requires_grad_()
    y, _ = module(x, states if case.lstm else states[0])
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    for b in (0, 12):
        alone = x[:, b : b + 1].detach().requires_grad_()
        single = tuple(state[:, b : b + 1] for state in states)
        y_alone, _ = module(alone, single if case.lstm else single[0])
        assert torch.equal(y_alone, y[:, b : b + 1])
        (grad,) = torch.autograd.grad(y_alone.square().sum(), alone)
        assert torch.equal(grad, dx[:, b : b + 1])


@pytest.mark.parametrize("chunk", (1, 3))
def test_chunks(chunk: int) -> None:
    """About 384 rows make a chunk, so that these sizes take several chunks, of which the last is shorter."""
    for variant in ("LayerNormLSTM-all", "LayerNormGRU-all", "LSTM-zoneout-rates"):
        check(replace(in_form(VARIANTS[variant], "no-hx"), B=385 // chunk, T=3 * chunk + 1, H=3, I=2))


@pytest.mark.parametrize("variant", VARIANTS)
def test_derivatives(variant: str) -> None:
    case = replace(VARIANTS[variant], T=3, B=2, I=2, H=3)
    module = case.module(torch.float64)
    x, states, _ = case.arguments(torch.float64)
    assert states is not None
    names = [name for name, _ in module.named_parameters()]

    def run(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        hx = tensors[: 1 + case.lstm]
        torch.manual_seed(SEED)
        y, last = torch.func.functional_call(
            module, dict(zip(names, tensors[1 + case.lstm :], strict=True)), (x, hx if case.lstm else hx[0])
        )
        return (y, *last) if case.lstm else (y, last)

    tensors = [t.detach().requires_grad_() for t in (x, *states, *module.parameters())]
    assert gradcheck(run, tensors, check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(run, tensors, fast_mode=True)


@pytest.mark.parametrize("variant", ("LayerNormLSTM-all-evaluated", "LayerNormGRU-all-evaluated"))
def test_transforms_are_those_of_plain_operations(variant: str) -> None:
    case = replace(VARIANTS[variant], hx=False)
    module = case.module(torch.float64)
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    alone = torch.stack([module(one)[0] for one in x])
    torch.testing.assert_close(torch.vmap(lambda one: module(one)[0])(x), alone)
    tangent = torch.randn_like(x[0])
    _, pushed = torch.func.jvp(lambda one: module(one)[0], (x[0],), (tangent,))
    jacobian: Any = torch.autograd.functional.jacobian(lambda one: module(one)[0], x[0])
    torch.testing.assert_close(pushed, (jacobian * tangent).sum((-3, -2, -1)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_unbatched_input(variant: str) -> None:
    case = replace(VARIANTS[variant], B=1)
    module = case.module(torch.float64)
    x, states, _ = case.arguments(torch.float64)
    assert states is not None
    torch.manual_seed(SEED)
    y, last = module(x, states if case.lstm else states[0])
    single = tuple(state[:, 0] for state in states)
    torch.manual_seed(SEED)
    y1, last1 = module(x[:, 0], single if case.lstm else single[0])
    assert torch.equal(y1, y[:, 0])
    for ours, theirs in zip(last1 if case.lstm else (last1,), last if case.lstm else (last,), strict=True):
        assert torch.equal(ours, theirs[:, 0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_seed_repeats_the_masks(variant: str) -> None:
    case = replace(VARIANTS[variant], layers=2)
    first, again = results(case, torch.float64), results(case, torch.float64)
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
    if case.training and (case.zoneout or case.recurrent_dropout):
        module = case.module(torch.float64)
        x = case.arguments(torch.float64)[0]
        assert not torch.equal(module(x)[0], module(x)[0])


@pytest.mark.parametrize("name", ("LayerNormLSTM", "LayerNormGRU"))
@pytest.mark.parametrize("zoneout", (0.0, 0.3))
@pytest.mark.parametrize("training", (False, True))
def test_cells_are_one_step_of_the_layer(name: str, zoneout: float, training: bool) -> None:
    layer = Case(name, zoneout=zoneout, training=training).module(torch.float64)
    cell = getattr(dlkernels.nn, f"{name}Cell")(4, 6, zoneout=zoneout, dtype=torch.float64).train(training)
    cell.load_state_dict({key.removesuffix("_l0"): value for key, value in layer.state_dict().items()})
    x = torch.randn(3, 4, dtype=torch.float64)
    states = tuple(torch.randn(3, 6, dtype=torch.float64) for _ in range(2))
    lstm = name.endswith("LSTM")
    torch.manual_seed(SEED)
    _, expected = layer(x[None], tuple(s[None] for s in states) if lstm else states[0][None])
    torch.manual_seed(SEED)
    found = cell(x, states if lstm else states[0])
    for ours, theirs in zip(found if lstm else (found,), expected if lstm else (expected,), strict=True):
        assert torch.equal(ours, theirs[0])
    one = cell.eval()(x[0], tuple(s[0] for s in states) if lstm else states[0][0])
    all_of_them = cell(x, states if lstm else states[0])
    torch.testing.assert_close(one[0] if lstm else one, all_of_them[0][0] if lstm else all_of_them[0])
    torch.testing.assert_close(cell(x), cell(x, tuple(torch.zeros_like(s) for s in states) if lstm else 0 * states[0]))


@pytest.mark.parametrize("name", ("LSTM", "GRU"))
def test_zoneout_of_everything_keeps_the_state(name: str) -> None:
    case = Case(name, zoneout=1.0)
    module = case.module(torch.float64)
    x, states, _ = case.arguments(torch.float64)
    assert states is not None
    y, last = module(x, states if case.lstm else states[0])
    assert torch.equal(y, states[0].expand(5, -1, -1))
    for now, then in zip(last if case.lstm else (last,), states, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("name", ("LSTM", "GRU"))
def test_recurrent_dropout_of_everything_leaves_no_recurrence(name: str) -> None:
    module = Case(name, recurrent_dropout=1.0).module(torch.float64)
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    with torch.no_grad():
        module.weight_hh_l0.fill_(torch.nan)
        module(x)
        module.weight_hh_l0.zero_()
    expected = Case(name).module(torch.float64)
    expected.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(x), expected(x))


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


def test_truncated_gradients_stop_at_the_cuts() -> None:
    case = replace(VARIANTS["LayerNormLSTM-all-evaluated"], hx=False)
    module = case.module(torch.float64)
    x = case.arguments(torch.float64)[0].requires_grad_()
    y, _ = module(x, bptt_steps=2)
    torch.testing.assert_close(y, module(x)[0])
    grad = torch.autograd.grad(y[3].sum(), x)[0]
    assert grad[:2].eq(0).all()
    assert grad[2].ne(0).all()


def test_lengths_hide_what_is_behind_them() -> None:
    for variant in ("LayerNormLSTM-all", "LayerNormGRU-all", "LSTM-zoneout"):
        case = in_form(VARIANTS[variant], "lengths")
        module = case.module(torch.float64)
        x, states, lengths = case.arguments(torch.float64)
        assert states is not None
        assert lengths is not None
        hx: Any = states if case.lstm else states[0]
        torch.manual_seed(SEED)
        expected = module(x, hx, lengths=lengths)[0]
        for b, length in enumerate(lengths.tolist()):
            x[length:, b] = torch.nan
        x.requires_grad_()
        torch.manual_seed(SEED)
        y = module(x, hx, lengths=lengths)[0]
        assert torch.equal(y, expected)
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()


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


@pytest.mark.filterwarnings("ignore:dlkernels runs a call on its PyTorch reference path")
@pytest.mark.parametrize("variant", ("LayerNormLSTM-all-evaluated", "LayerNormGRU-all-evaluated", "LSTM-zoneout-rates"))
def test_resets_and_cells_run_on_the_reference(variant: str) -> None:
    case = replace(VARIANTS[variant], layers=2)
    module = case.module(torch.float64)
    x, states, _ = case.arguments(torch.float64)
    assert states is not None
    hx: Any = states if case.lstm else states[0]
    resets = torch.zeros(5, 3, dtype=torch.bool)
    resets[3] = True
    options = {"return_cells": True} if case.lstm else {}
    y, last, *cells = module(x, hx, resets=resets, **options)
    first, second = module(x[:3], hx), module(x[3:])
    torch.testing.assert_close(y, torch.cat((first[0], second[0])))
    torch.testing.assert_close(last, second[1])
    if case.lstm:
        torch.testing.assert_close(cells[0][4], last[1][1])
        torch.testing.assert_close(cells[0][2], first[1][1][1])
    if extension.HAVE_NATIVE:
        explained = dlkernels.explain(module, x, hx, resets=resets)
        assert explained.kernel == "reference"
        assert "have no kernel with layer normalisation" in str(explained)
    (grad,) = torch.autograd.grad(y[3:].sum(), module.weight_ih_l0)
    (alone,) = torch.autograd.grad(second[0].sum(), module.weight_ih_l0)
    torch.testing.assert_close(grad, alone)


@pytest.mark.parametrize("name", ("LSTM", "GRU"))
def test_zoneout_of_cells_is_that_of_layers(name: str) -> None:
    rates: Any = (0.3, 0.6) if name == "LSTM" else 0.4
    cell = getattr(dlkernels.nn, f"{name}Cell")(5, 7, zoneout=rates, dtype=torch.float64)
    layer = getattr(dlkernels.nn, name)(5, 7, zoneout=rates, dtype=torch.float64)
    layer.load_state_dict({f"{key}_l0": value for key, value in cell.state_dict().items()})
    assert f"zoneout={rates}" in repr(cell) and "zoneout" not in repr(getattr(dlkernels.nn, f"{name}Cell")(5, 7))
    x = torch.randn(6, 3, 5, dtype=torch.float64, requires_grad=True)
    h, c = (torch.randn(3, 7, dtype=torch.float64) for _ in range(2))
    state: Any = (h, c) if name == "LSTM" else h
    # In training a cell draws the masks of a layer of one step.
    torch.manual_seed(SEED)
    after = cell(x[0], state)
    torch.manual_seed(SEED)
    of_layer = layer(x[:1], (h[None], c[None]) if name == "LSTM" else h[None])[1]
    for got, want in zip(*(each if isinstance(each, tuple) else (each,) for each in (after, of_layer)), strict=True):
        torch.testing.assert_close(got, want[0])
    cell.eval(), layer.eval()
    state, outputs = None, []
    for step in x:
        state = cell(step, state)
        outputs.append(state[0] if isinstance(state, tuple) else state)
    y = layer(x)[0]
    torch.testing.assert_close(torch.stack(outputs), y)
    got, want = (torch.autograd.grad(out.sin().sum(), x)[0] for out in (torch.stack(outputs), y))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(cell(x[0, 0]), cell(x[0])[0] if name == "GRU" else tuple(s[0] for s in cell(x[0])))
    with pytest.raises(ValueError, match="zoneout should be a number"):
        getattr(dlkernels.nn, f"{name}Cell")(5, 7, zoneout=2)
