"""Tests sorted and unsorted PackedSequence input and its equivalence to lengths= and to a batch of full length."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import dlkernels.nn
from tests.support.layer_cases import (
    DTYPES,
    MODES,
    Case,
    Results,
    check_case,
    make_data,
    new_layer,
    run_layer,
    torch_results,
)

pytestmark = pytest.mark.usefixtures("isa")

LENGTHS = {
    "sorted": (7, 6, 4, 4, 1),
    "ascending": (1, 2, 3, 5, 7),
    "unsorted": (2, 7, 1, 4, 4),
    "equal": (7, 7, 7, 7, 7),
    "one step of many": (1, 1, 1, 1, 1, 1, 1, 1, 1),
    "equal and short": (3, 3, 3, 3, 3),
    "all one": (1, 1, 1, 1, 1),
    "one sequence": (6,),
    "one long": (7, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1),
}


def case_for(mode: str, lengths: tuple[int, ...], **more) -> Case:
    I, H = 5, 13
    return Case(mode, T=7, B=len(lengths), I=I, H=H, P=4 if mode == "lstm_proj" else 0, lengths=lengths, **more)


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("mode", MODES)
def test_against_torch(mode: str, name: str) -> None:
    for dtype in DTYPES:
        for packed in (True, False):
            check_case(case_for(mode, LENGTHS[name], packed=packed, layers=2, bidirectional=True, dtype=dtype))


@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_the_result_is_packed_as_the_input(mode: str, enforce_sorted: bool) -> None:
    case = case_for(mode, LENGTHS["sorted" if enforce_sorted else "unsorted"])
    data = make_data(case)
    packed = pack_padded_sequence(data.x.float(), torch.tensor(case.lengths), enforce_sorted=enforce_sorted)
    hx = (data.h0.float(), data.c0.float()) if case.is_lstm else data.h0.float()
    ours, our_state = new_layer(case, data, torch.float32)(packed, hx)
    theirs, their_state = new_layer(case, data, torch.float32, torch.nn)(packed, hx)
    assert isinstance(ours, PackedSequence)
    torch.testing.assert_close(ours.data, theirs.data)
    assert torch.equal(ours.batch_sizes, theirs.batch_sizes)
    for index in ("sorted_indices", "unsorted_indices"):
        assert (getattr(ours, index) is None) == (getattr(theirs, index) is None) == enforce_sorted
        assert enforce_sorted or torch.equal(getattr(ours, index), getattr(theirs, index))
    torch.testing.assert_close(our_state, their_state)


@pytest.mark.parametrize("mode", MODES)
def test_training_from_a_list_of_sequences(mode: str) -> None:
    """Gradients reach the leaves that pack_sequence packed, from a loss on the packed data."""
    case = case_for(mode, LENGTHS["unsorted"], layers=2, bidirectional=True)
    data = make_data(case)
    results: list[Results] = []
    for package, dtype in ((dlkernels.nn, torch.float32), (torch.nn, torch.float64)):
        leaves = [data.x[:length, b].to(dtype).requires_grad_() for b, length in enumerate(case.lengths)]
        layer = new_layer(case, data, dtype, package)
        y, state = layer(pack_sequence(leaves, enforce_sorted=False))
        loss = y.data.square().sum() + sum(s.sum() for s in (state if isinstance(state, tuple) else (state,)))
        loss.backward()
        grads = {f"leaf {b}": leaf.grad for b, leaf in enumerate(leaves)}
        results.append({**grads, **{name: p.grad for name, p in layer.named_parameters()}})
    for name, value in results[0].items():
        torch.testing.assert_close(value.double(), results[1][name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("mode", MODES)
def test_lengths_equal_packing(mode: str, deterministic: None) -> None:
    """Padded input with lengths= and packed input give bit-equal results."""
    case = case_for(mode, LENGTHS["unsorted"], layers=2, bidirectional=True)
    data = make_data(case)
    padded = run_layer(case, data, case.dtype, dlkernels.nn)
    packed = run_layer(dataclasses.replace(case, packed=True), data, case.dtype, dlkernels.nn)
    for name in ("y", "h_n", "c_n", "dx", "dh0", "dc0"):
        if name in padded:
            assert torch.equal(padded[name], packed[name]), name


@pytest.mark.parametrize("mode", MODES)
def test_full_lengths_equal_none(mode: str, deterministic: None) -> None:
    case = case_for(mode, LENGTHS["equal"], bidirectional=True)
    data = make_data(case)
    given = run_layer(case, data, case.dtype, dlkernels.nn)
    none = run_layer(dataclasses.replace(case, lengths=None), data, case.dtype, dlkernels.nn)
    for name in ("y", "h_n", "c_n", "dx", "dh0", "dc0"):
        if name in given:
            assert torch.equal(given[name], none[name]), name


@pytest.mark.parametrize("mode", MODES)
def test_length_zero(mode: str) -> None:
    """A sequence of length 0 has output 0 and its initial state as final state, also if every length is 0."""
    for lengths in ((0, 3, 0, 7, 1), (0, 0, 0), (0,)):
        for hx in (True, False):
            case = case_for(mode, lengths, hx=hx, bidirectional=True, layers=2)
            check_case(case)
            data = make_data(case)
            results = run_layer(case, data, case.dtype, dlkernels.nn)
            for b, length in enumerate(lengths):
                if length == 0:
                    assert results["y"][:, b].eq(0).all()
                    expected = data.h0[:, b].float() if hx else torch.zeros_like(results["h_n"][:, b])
                    assert torch.equal(results["h_n"][:, b], expected)


@pytest.mark.parametrize("filler", [1e30, float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_padding_is_never_read(mode: str, filler: float) -> None:
    """No value in the padding of x or of the gradient of y changes a result."""
    case = case_for(mode, LENGTHS["unsorted"], bidirectional=True, layers=2)
    data = make_data(case)
    expected = run_layer(case, data, case.dtype, dlkernels.nn)
    padding = torch.arange(case.T)[:, None] >= torch.tensor(case.lengths)
    filled = dataclasses.replace(data, x=data.x.clone(), dy=data.dy.clone())
    filled.x[padding], filled.dy[padding] = filler, filler
    actual = run_layer(case, filled, case.dtype, dlkernels.nn)
    for name, value in actual.items():
        assert value.isfinite().all(), f"{name}: the padding leaks"
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_lengths_of_either_integer_type(dtype: torch.dtype) -> None:
    case = case_for("gru", LENGTHS["unsorted"])
    data = make_data(case)
    layer = new_layer(case, data, torch.float32)
    expected = run_layer(case, data, torch.float32, dlkernels.nn, grad=False, layer=layer)
    lengths = torch.tensor(case.lengths, dtype=dtype)
    y, _ = layer(data.x.float(), data.h0.float(), lengths=lengths)
    torch.testing.assert_close(y, expected["y"])
    strided = torch.stack([lengths, torch.zeros_like(lengths)], 1)[:, 0]
    torch.testing.assert_close(layer(data.x.float(), data.h0.float(), lengths=strided)[0], expected["y"])


def test_a_batch_that_torch_sorts() -> None:
    """The states of a packed call are in the order of the batch, not of the sorted data."""
    case = case_for("lstm", LENGTHS["ascending"], packed=True)
    data = make_data(case)
    ours, theirs = run_layer(case, data, torch.float32, dlkernels.nn), torch_results(case, data, torch.float32)
    torch.testing.assert_close(ours["h_n"], theirs["h_n"])
    torch.testing.assert_close(ours["c_n"], theirs["c_n"])


def test_unpadding_gives_each_sequence_back() -> None:
    layer = dlkernels.nn.GRU(3, 6, batch_first=True)
    x = torch.randn(4, 5, 3)
    lengths = torch.tensor([5, 2, 4, 1])
    y, h = layer(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
    padded, out_lengths = pad_packed_sequence(y, batch_first=True)
    assert torch.equal(out_lengths, lengths)
    for b, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(padded[b, length - 1], h[0, b])
