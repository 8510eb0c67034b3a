"""Tests that the recurrent layers on a CUDA device can replace torch's: memory layouts, results edited before the
backward, and calls with tensors of several dtypes, as autocast makes them. Run in the same way as recurrent_cuda.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from device import CUDA_KERNELS, KINDS, best_plan
from recurrent_cases import a_case, uneven, with_cuda_kernels
from timing import DEVICE
from torch import Tensor
from turns import first_shard

import dlkernels
from dlkernels import reference
from dlkernels._core.dtypes import DTYPES
from dlkernels.rnn.dtypes import SAME, Types
from dlkernels.testing import within_rule
from tests.support.layer_cases import Case, assert_bit_equal, leaf, make_data, new_layer

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
MODES = ("lstm", "gru", "rnn_tanh", "rnn_relu")
FORMS = ("padded", "batch_first", "lengths", "packed")
# The dtypes of the products, x, h0, c0 and the weights.
MIXED = (
    (BF16, F32, F32, F32, F32), (F16, F32, F16, F32, F32), (BF16, BF16, F32, BF16, F32), (F16, F16, BF16, F32, BF16),
    (F32, F16, F32, BF16, BF16), (BF16, F16, BF16, BF16, F16),
)  # fmt: skip


@first_shard
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_results_lie_in_memory_as_those_of_torch(mode: str, batch_first: bool) -> None:
    case = a_case(mode, dtype=F32, batch_first=batch_first)
    data = make_data(case).to(DEVICE)
    ours, theirs = (new_layer(case, data, case.dtype, package) for package in (dlkernels.nn, torch.nn))
    x = leaf(data.x, case.dtype, True, batch_first)
    y, states = ours(x)
    peer, peer_states = theirs(x)
    assert (y.shape, y.stride()) == (peer.shape, peer.stride())
    if mode != "lstm":
        states, peer_states = (states,), (peer_states,)
    assert [state.stride() for state in states] == [state.stride() for state in peer_states]
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert dx.stride() == x.stride()


@first_shard
def test_input_that_lies_with_time_first() -> None:
    """The transposed output of a batch_first layer, passed on, gives the same results as a contiguous copy of it."""
    case = a_case("gru", batch_first=True)
    data = make_data(case).to(DEVICE)
    layer = new_layer(case, data, case.dtype)
    found = []
    for contiguous in (True, False):
        x = data.x.to(case.dtype).transpose(0, 1)
        x = (x.contiguous() if contiguous else x).detach().requires_grad_()
        assert x.is_contiguous() == contiguous
        y, h_n = layer(x)
        grads = torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])
        without_dx = torch.autograd.grad(layer(x.detach())[0].float().square().sum(), list(layer.parameters()))
        found.append([y.detach(), h_n.detach(), *grads, *without_dx])
    for i, (one, other) in enumerate(zip(*found, strict=True)):
        # Sums over rows in different orders differ in their last bits.
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02 * float(one.abs().max()), msg=f"result {i}")


@first_shard
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_results_may_be_edited_before_the_backward(mode: str, kind: str) -> None:
    case = a_case(mode)
    data = make_data(dataclasses.replace(case, lengths=uneven(case))).to(DEVICE)
    layer = new_layer(case, data, case.dtype)
    x, h0, c0 = (leaf(values, case.dtype, True) for values in (data.x, data.h0, data.c0))
    lengths = torch.tensor(uneven(case), device=DEVICE)
    leaves = [value for value in (x, h0, c0, *layer.parameters()) if value is not None]

    def grads(edit: bool) -> tuple[Tensor, ...]:
        y, states = layer(x, (h0, c0) if mode == "lstm" else h0, lengths=lengths)
        outputs = [y, *(states if mode == "lstm" else [states])]
        loss = sum((output * output.detach().clone()).float().sum() for output in outputs)
        if edit:
            with torch.no_grad():
                for output in outputs:
                    output.fill_(float("nan"))
        return torch.autograd.grad(loss, leaves)

    with best_plan(kind):
        assert all(map(torch.equal, grads(True), grads(False)))


@first_shard
@pytest.mark.parametrize("mode", MODES)
def test_results_of_cells_may_be_edited_before_the_backward(mode: str) -> None:
    B, I, H = 9, 5, 20
    name = {"lstm": "LSTMCell", "gru": "GRUCell"}.get(mode, "RNNCell")
    more = {"nonlinearity": mode[4:]} if mode.startswith("rnn") else {}
    cell = getattr(dlkernels.nn, name)(I, H, device=DEVICE, **more)
    x, h, c = (torch.randn(B, size, device=DEVICE, requires_grad=True) for size in (I, H, H))
    leaves = [x, h, *([c] if mode == "lstm" else []), *cell.parameters()]

    def grads(edit: bool) -> tuple[Tensor, ...]:
        out = cell(x, (h, c) if mode == "lstm" else h)
        outputs = out if mode == "lstm" else [out]
        loss = sum((output * output.detach().clone()).sum() for output in outputs)
        if edit:
            with torch.no_grad():
                for output in outputs:
                    output.fill_(float("nan"))
        return torch.autograd.grad(loss, leaves)

    assert all(map(torch.equal, grads(True), grads(False)))


@first_shard
@pytest.mark.parametrize("kind", KINDS)
def test_relu_passes_the_gradient_of_nan(kind: str) -> None:
    case = a_case("rnn_relu", dtype=F32, bidirectional=False)
    data = make_data(case).to(DEVICE)
    data.x[-1, 1, 0] = float("nan")
    found = []
    with best_plan(kind):
        for package in (dlkernels.nn, torch.nn):
            layer = new_layer(case, data, case.dtype, package)
            x = data.x.to(case.dtype).requires_grad_()
            found.append(torch.autograd.grad(layer(x)[0][-1, 1].sum(), [x, *layer.parameters()]))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert found[0][0][-1, 1].abs().min() > 0


def op(name: str) -> Any:
    return getattr(torch.ops.dlkernels, name).default


def numbers(product: torch.dtype) -> Types:
    """The dtypes of results under CUDA's autocast: all are that of the products."""
    return Types(*[DTYPES.index(product)] * 3)


def judge(named: dict[str, tuple[Tensor, Tensor, Tensor, torch.dtype]], product: torch.dtype) -> None:
    """Checks results by name: (ours, the same call with all tensors in one dtype, float64, the dtype that ours must
    have)."""
    for name, (ours, plain, exact, dtype) in named.items():
        assert ours.dtype == dtype, f"{name}: {ours.dtype}"
        coarser = max((product, dtype), key=lambda one: torch.finfo(one).eps)
        verdict = within_rule(ours, plain, exact, coarser, grad=name.startswith("d"))
        assert verdict.ok, f"{name}: {verdict}"


@first_shard
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", MODES)
def test_each_tensor_of_a_layer_in_a_dtype_of_its_own(mode: str, form: str) -> None:
    case = a_case(mode, dtype=BF16, batch_first=form == "batch_first")
    data = make_data(case).to(DEVICE)
    batch_first, lengths, sizes, lstm = form == "batch_first", None, None, mode == "lstm"
    x64, dy, resets = data.x, data.dy, (data.x[..., 0] < -0.5).contiguous()
    if batch_first:
        x64, dy = x64.transpose(0, 1), dy.transpose(0, 1)
    if form == "lengths":
        lengths = torch.tensor(uneven(case), device=DEVICE)
    if form == "packed":
        sizes = torch.arange(case.T, 0, -1).clamp(max=case.B)
        rows = int(sizes.sum())
        x64, dy, resets = x64.flatten(0, 1)[:rows], dy.flatten(0, 1)[:rows], resets.flatten()[:rows]
    B = case.B if sizes is None else int(sizes[0])
    dh_n, dc_n, dcells = data.dh[:, :B], *((data.dc[:, :B], dy.flip(0)) if lstm else (None, None))
    given64 = [x64, data.h0[:, :B], *([data.c0[:, :B]] if data.c0 is not None else []), *data.params.values()]

    def run(types: Types, dtypes: Sequence[torch.dtype], product: torch.dtype) -> list[Tensor]:
        of_x, of_h, of_c, of_weights = dtypes
        x, h0 = x64.to(of_x), given64[1].to(of_h)
        c0 = None if data.c0 is None else given64[2].to(of_c)
        weights = [value.to(of_weights) for value in data.params.values()]
        y, h_n, c_n, saved, cells = op(mode)(
            x, h0, c0, weights, None, sizes, lengths, True, batch_first, True, False, *types, resets, lstm
        )
        assert saved.dtype == F32
        grads = op(f"{mode}_backward")(
            dy.to(product), dh_n.to(product), None if dc_n is None else dc_n.to(product), x, h0, c0, weights,
            saved, sizes, lengths, True, batch_first, 0, False, True, True, True, False, types.product, resets,
            None if dcells is None else dcells.to(of_c),
        )  # fmt: skip
        return [y, h_n, *([c_n, cells] if lstm else []), *grads[: 3 if lstm else 2], *grads[3:]]

    leaves = [value.cpu().detach().requires_grad_() for value in given64]
    states = (leaves[1], leaves[2]) if lstm else (leaves[1], None)
    outputs = reference.sequence(
        mode, leaves[0], *states, leaves[len(given64) - len(data.params) :], sizes,
        None if lengths is None else lengths.cpu(), True, batch_first, resets=resets.cpu(), return_cells=lstm,
    )[: 4 if lstm else 2]  # fmt: skip
    cotangents = [value.cpu() for value in (dy, dh_n, dc_n, dcells) if value is not None]
    exact = [*outputs, *torch.autograd.grad(outputs, leaves, cotangents)]
    names = ["y", "h_n", *(["c_n", "cells"] if lstm else []), "dx", "dh0", *(["dc0"] if lstm else [])]
    names += [f"d{name}" for name in data.params]
    # The kind of plan and the half of MIXED rotate, so that each occurs with several modes and forms.
    turn = MODES.index(mode) + FORMS.index(form)
    with best_plan(KINDS[turn % 3]):
        for product, *dtypes in MIXED[turn % 2 :: 2]:
            ours, plain = run(numbers(product), dtypes, product), run(SAME, [product] * 4, product)
            states_of = dtypes[:3] if lstm else dtypes[:2]
            expected = [*[product] * len(outputs), *states_of, *[dtypes[3]] * len(data.params)]
            judge(dict(zip(names, zip(ours, plain, exact, expected, strict=True), strict=True)), product)
            if CUDA_KERNELS:  # these round their operands to the dtype of the products; the CPU kernels need not
                for name, mixed, same in list(zip(names, ours, plain, strict=True))[: len(outputs)]:
                    assert_bit_equal(f"{name}, products of {product}", mixed, same)


@first_shard
@pytest.mark.parametrize("mode", MODES)
def test_each_tensor_of_a_cell_in_a_dtype_of_its_own(mode: str) -> None:
    lstm = mode == "lstm"
    data = make_data(Case(mode, T=1, B=9, I=6, H=20, dtype=BF16)).to(DEVICE)
    given64 = [data.x[0], data.h0[0], *([data.c0[0]] if data.c0 is not None else []), *data.params.values()]
    cotangents = [data.dh[0], *([data.dc[0]] if lstm else [])]

    def run(types: Types, dtypes: Sequence[torch.dtype], product: torch.dtype) -> list[Tensor]:
        of_x, of_h, of_c, of_weights = dtypes
        x, h = given64[0].to(of_x), given64[1].to(of_h)
        c = given64[2].to(of_c) if lstm else None
        weights = [value.to(of_weights) for value in data.params.values()]
        *outputs, saved = op(f"{mode}_cell")(x, h, c, *weights, True, False, *types)
        dh, dc = cotangents[0].to(product), cotangents[1].to(product) if lstm else None
        grads = op(f"{mode}_cell_backward")(
            dh, dc, x, h, c, *weights, saved, False, True, True, True, False, types.product
        )
        return [*outputs, *grads[: 3 if lstm else 2], *grads[3:]]

    leaves = [value.cpu().detach().requires_grad_() for value in given64]
    outputs = reference.cell(mode, leaves[0], leaves[1], leaves[2] if lstm else None, *leaves[3 if lstm else 2 :])
    outputs = outputs[: 2 if lstm else 1]
    exact = [*outputs, *torch.autograd.grad(outputs, leaves, [value.cpu() for value in cotangents])]
    names = ["h", "c", "dx", "dh", "dc"] if lstm else ["h", "dx", "dh"]
    names += [f"d{name}" for name in data.params]
    for product, *dtypes in MIXED:
        ours, plain = run(numbers(product), dtypes, product), run(SAME, [product] * 4, product)
        expected = [*[product] * len(outputs), *dtypes[: 3 if lstm else 2], *[dtypes[3]] * len(data.params)]
        judge(dict(zip(names, zip(ours, plain, exact, expected, strict=True), strict=True)), product)


@with_cuda_kernels
@first_shard
@pytest.mark.parametrize("mode", MODES)
def test_results_in_other_dtypes_than_the_products(mode: str) -> None:
    """Result dtypes that autocast on CUDA never produces: the results are converted."""
    case = a_case(mode, dtype=F32)
    data = make_data(case).to(DEVICE)
    args: tuple[Any, ...] = (
        data.x.float(), None, None, [value.float() for value in data.params.values()], None, None, None, True, False,
        False, False,
    )  # fmt: skip
    types = Types(DTYPES.index(BF16), DTYPES.index(F32), DTYPES.index(F16))
    found, plain = (op(mode)(*args, *t) for t in (types, numbers(BF16)))
    assert_bit_equal("y", found[0], plain[0].float())
    assert_bit_equal("h_n", found[1], plain[1].float())
    assert_bit_equal("c_n", found[2], plain[2].to(F16 if mode == "lstm" else F32))


@first_shard
@pytest.mark.parametrize("mode", MODES)
def test_autocast_trains_weights_of_float32(mode: str) -> None:
    case = a_case(mode, dtype=F32)
    data = make_data(case).to(DEVICE)
    results = []
    for package in (dlkernels.nn, torch.nn):
        layer = new_layer(case, data, F32, package)
        x, h0, c0 = (leaf(values, F32, True) for values in (data.x, data.h0, data.c0))
        # A rehearsal on the CPU disables oneDNN, which has no bfloat16 kernel for some of these layers.
        with torch.autocast(DEVICE, BF16), torch.backends.mkldnn.flags(enabled=False):
            y, states = layer(x, (h0, c0) if mode == "lstm" else h0)
        outputs = [y, *(states if mode == "lstm" else [states])]
        leaves = [value for value in (x, h0, c0, *layer.parameters()) if value is not None]
        grads = torch.autograd.grad(sum(output.float().square().sum() for output in outputs), leaves)
        results.append([*outputs, *grads])
    for i, (ours, theirs) in enumerate(zip(*results, strict=True)):
        assert ours.dtype == theirs.dtype, f"{i}: {ours.dtype} for {theirs.dtype}"
        assert (ours - theirs).abs().max() <= 0.05 * theirs.abs().max(), i
