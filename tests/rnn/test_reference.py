"""Compares the reference implementation with torch.nn and with each sequence run alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from dlkernels import reference

pytestmark = pytest.mark.o0_skip(reason="no kernel runs")

MODES = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn_tanh": nn.RNN, "rnn_relu": nn.RNN}
CELLS = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn_tanh": nn.RNNCell, "rnn_relu": nn.RNNCell}
T, B, I, H = 5, 4, 3, 4
LENGTHS = torch.tensor([3, 5, 1, 2])


def make(mode: str, **options: object) -> nn.RNNBase:
    torch.manual_seed(0)
    if mode.startswith("rnn"):
        options["nonlinearity"] = mode[4:]
    return MODES[mode](I, H, dtype=torch.float64, **options)  # type: ignore[arg-type]


def states(layer: nn.RNNBase) -> tuple[Tensor, Tensor | None]:
    entries = layer.num_layers * (1 + layer.bidirectional)
    h0 = torch.randn(entries, B, layer.proj_size or H, dtype=torch.float64)
    return h0, torch.randn(entries, B, H, dtype=torch.float64) if layer.mode == "LSTM" else None


def run_torch(layer: nn.RNNBase, x: object, h0: Tensor, c0: Tensor | None) -> tuple[object, Tensor, Tensor | None]:
    y, h = layer(x, h0 if c0 is None else (h0, c0))
    return (y, h, None) if c0 is None else (y, *h)


def assert_same(ours: tuple[Tensor, Tensor, Tensor], y: Tensor, h: Tensor, c: Tensor | None) -> None:
    torch.testing.assert_close(ours[0], y)
    torch.testing.assert_close(ours[1], h)
    if c is None:
        assert ours[2].shape == (0,)
    else:
        torch.testing.assert_close(ours[2], c)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layers, bias, bidirectional, batch_first", [*itertools.product((1, 2), *[(False, True)] * 3)])
def test_layers_equal_torch(mode: str, layers: int, bias: bool, bidirectional: bool, batch_first: bool) -> None:
    layer = make(mode, num_layers=layers, bias=bias, bidirectional=bidirectional, batch_first=batch_first)
    x = torch.randn((B, T, I) if batch_first else (T, B, I), dtype=torch.float64)
    h0, c0 = states(layer)
    ours = reference.stack(
        mode, x, h0, c0, layer._flat_weights, layers, bidirectional=bidirectional, batch_first=batch_first
    )
    assert_same(ours, *run_torch(layer, x, h0, c0))  # type: ignore[arg-type]
    assert ours[0].transpose(0, 1).is_contiguous() if batch_first else ours[0].is_contiguous()


@pytest.mark.parametrize("bias, bidirectional", [*itertools.product((False, True), repeat=2)])
def test_projection_equals_torch(bias: bool, bidirectional: bool) -> None:
    layer = make("lstm", num_layers=2, bias=bias, bidirectional=bidirectional, proj_size=2)
    x = torch.randn(T, B, I, dtype=torch.float64)
    h0, c0 = states(layer)
    ours = reference.stack("lstm", x, h0, c0, layer._flat_weights, 2, bidirectional=bidirectional)
    assert_same(ours, *run_torch(layer, x, h0, c0))  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bidirectional", (False, True))
def test_packed_and_lengths_equal_torch_packed(mode: str, bidirectional: bool) -> None:
    layer = make(mode, bidirectional=bidirectional)
    x = torch.randn(T, B, I, dtype=torch.float64)
    h0, c0 = states(layer)
    weights = layer._flat_weights
    packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    y, h, c = run_torch(layer, packed, h0, c0)
    order = packed.sorted_indices
    ours = reference.sequence(
        mode, packed.data, h0[:, order], None if c0 is None else c0[:, order], weights, packed.batch_sizes,
        bidirectional=bidirectional,
    )  # fmt: skip
    assert_same(ours, y.data, h[:, order], None if c is None else c[:, order])  # type: ignore[attr-defined]

    padding = torch.arange(T)[:, None] >= LENGTHS
    padded = nn.utils.rnn.pad_packed_sequence(y, total_length=T)[0]  # type: ignore[arg-type]
    x[padding] = float("nan")  # no result may depend on padding
    ours = reference.sequence(mode, x, h0, c0, weights, None, LENGTHS, bidirectional)
    assert_same(ours, padded, h, c)


@pytest.mark.parametrize("mode", MODES)
def test_length_zero_returns_the_initial_state_and_padding_gets_no_gradient(mode: str) -> None:
    layer = make(mode, bidirectional=True)
    x = torch.full((T, B, I), float("nan"), dtype=torch.float64)
    x[:2, 1:] = torch.randn(2, B - 1, I, dtype=torch.float64)
    x.requires_grad_()
    lengths = torch.tensor([0, 2, 2, 2])
    h0, c0 = states(layer)
    y, h, c = reference.sequence(mode, x, h0, c0, layer._flat_weights, None, lengths, True)
    assert not y[:, 0].any() and not y[2:].any()
    assert torch.equal(h[:, 0], h0[:, 0])
    if c0 is not None:
        assert torch.equal(c[:, 0], c0[:, 0])
    grads = torch.autograd.grad(y.sum() + h.sum(), (x, *layer.parameters()))
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][2:].any() and not grads[0][:, 0].any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("k", (1, 2, 7))
def test_truncation_equals_detached_chunks(mode: str, k: int) -> None:
    layer = make(mode)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    h0, c0 = states(layer)
    y, *_ = reference.sequence(mode, x, h0, c0, layer._flat_weights, bptt_steps=k)
    chunks, h, c = [], h0, c0
    for chunk in x.split(k):
        out, h, c = run_torch(layer, chunk, h.detach(), None if c is None else c.detach())  # type: ignore[assignment]
        chunks.append(out)
    expected = torch.cat(chunks)  # type: ignore[arg-type]
    torch.testing.assert_close(y, expected)
    wrt = (x, *layer.parameters())
    for got, want in zip(
        torch.autograd.grad(y.square().sum(), wrt), torch.autograd.grad(expected.square().sum(), wrt), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("mode", MODES)
def test_truncation_with_lengths_equals_each_sequence_alone(mode: str) -> None:
    layer = make(mode, bidirectional=True)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    h0, c0 = states(layer)
    lengths = torch.tensor([1, 5, 3, 4])
    _, h, _ = reference.sequence(mode, x, h0, c0, layer._flat_weights, None, lengths, True, bptt_steps=2)
    alone = []
    for b, n in enumerate(lengths.tolist()):
        one = slice(b, b + 1)
        c = None if c0 is None else c0[:, one]
        alone.append(
            reference.sequence(mode, x[:n, one], h0[:, one], c, layer._flat_weights, None, None, True, bptt_steps=2)[1]
        )
    wrt = (x, *layer.parameters())
    for got, want in zip(
        torch.autograd.grad(h.sin().sum(), wrt), torch.autograd.grad(torch.cat(alone, 1).sin().sum(), wrt), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("mode", CELLS)
@pytest.mark.parametrize("bias", (False, True))
def test_cells_equal_torch(mode: str, bias: bool) -> None:
    torch.manual_seed(0)
    options = {"nonlinearity": mode[4:]} if mode.startswith("rnn") else {}
    cell = CELLS[mode](I, H, bias, dtype=torch.float64, **options)
    x, h, c = (torch.randn(B, n, dtype=torch.float64) for n in (I, H, H))
    got_h, got_c = reference.cell(
        mode, x, h, c if mode == "lstm" else None, cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh
    )
    want = cell(x, (h, c) if mode == "lstm" else h)
    torch.testing.assert_close(got_h, want[0] if mode == "lstm" else want)
    if mode == "lstm":
        torch.testing.assert_close(got_c, want[1])
    else:
        assert got_c is None


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_short_dtypes_are_computed_in_float32(dtype: torch.dtype) -> None:
    layer = make("lstm").to(dtype)
    x = torch.randn(T, B, I).to(dtype)
    outs = reference.sequence("lstm", x, None, None, layer._flat_weights)
    wide = reference.sequence("lstm", x.float(), None, None, [w.float() for w in layer._flat_weights])  # type: ignore[union-attr]
    for out, expected in zip(outs, wide, strict=True):
        assert out.dtype == dtype
        assert torch.equal(out, expected.to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reference.sequence("lstm", x, None, None, layer._flat_weights)[0], outs[0])
