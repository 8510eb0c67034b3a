"""Layer normalisation, zoneout and recurrent dropout against a float64 oracle that computes one sequence and one step
at a time."""

from __future__ import annotations

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
