"""`resets=` and `return_cells=` of the layers against torch.nn, which computes every piece between two resets on its
own; and what both do in combination with other features."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import dlkernels
import dlkernels.nn
from tests.support.layer_cases import (
    DTYPES,
    MODES,
    Case,
    assert_bit_equal,
    disagreements,
    expected,
    run_layer,
)
from tests.support.settings import num_threads

# T, B, I, H, P: with remainders in every size; one sequence; more rows than a tile; units that are split among threads.
SHAPES = ((7, 4, 5, 11, 3), (9, 1, 6, 40, 8), (6, 37, 3, 24, 5), (5, 3, 20, 150, 40))
FORMS: tuple[dict[str, Any], ...] = (
    {},
    {"bidirectional": True, "batch_first": True},
    {"bidirectional": True, "lengths": True},
    {"bidirectional": True, "lengths": True, "packed": True},
    {"layers": 2, "bidirectional": True, "hx": False},
    {"bptt_steps": 2, "lengths": True, "bidirectional": True},
)


def case_of(mode: str, shape: tuple[int, ...], form: dict[str, Any], **more: Any) -> Case:
    T, B, I, H, P = shape
    options = {**form, **more}
    if options.get("lengths"):
        lengths = tuple(1 + (3 * b + T - 1) % T for b in range(B))
        options["lengths"] = lengths if options.get("packed") else (*lengths[:-1], 0)  # packing refuses a length of 0
    return Case(mode, T=T, B=B, I=I, H=H, P=P if mode == "lstm_proj" else 0, **options)


def differences(case: Case, dtype: torch.dtype) -> list[str]:
    data, theirs, exact = expected(case)
    return disagreements(case, data, run_layer(case, data, dtype, dlkernels.nn), theirs, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("mode", MODES)
def test_values_and_gradients(mode: str, dtype: torch.dtype, isa: str) -> None:
    """Each mode and dtype takes a third of the pairs of a shape and a form, so that three neighbours take all."""
    found: list[str] = []
    third = (MODES.index(mode) + DTYPES.index(dtype)) % 3
    for at, (shape, form) in enumerate(itertools.product(SHAPES, FORMS)):
        if (SHAPES.index(shape) + FORMS.index(form)) % 3 != third:
            continue
        case = case_of(mode, shape, form, dtype=dtype, resets=(0.1, 0.5, 1.0)[at % 3], seed=at)
        if mode.startswith("lstm"):
            case = case_of(mode, shape, form, dtype=dtype, resets=(0.0, 0.1, 0.5)[at % 3], cells=at % 2 == 0, seed=at)
        found += [f"{case}: {line}" for line in differences(case, dtype)]
    assert not found, "\n".join(found[:10])


@pytest.mark.parametrize("threads", (2, 3))
@pytest.mark.parametrize("mode", MODES)
def test_threads(mode: str, threads: int) -> None:
    with num_threads(threads):
        for shape, form in itertools.product(((9, 2, 8, 256, 64), (9, 65, 8, 64, 16)), FORMS[1:3]):
            case = case_of(mode, shape, form, resets=0.3, cells=mode.startswith("lstm"))
            assert not differences(case, torch.float32)


@pytest.mark.parametrize("mode", MODES)
def test_a_sequence_is_its_pieces(mode: str, deterministic: None, isa: str) -> None:
    """In deterministic mode the result is bit for bit that of the pieces between the resets."""
    case = case_of(mode, (8, 3, 5, 33, 7), {})
    data = expected(case)[0]
    layer = getattr(dlkernels.nn, {"lstm_proj": "LSTM"}.get(mode, mode.split("_")[0].upper()))
    options: dict[str, Any] = {"proj_size": 7} if mode == "lstm_proj" else {}
    if mode.startswith("rnn"):
        options["nonlinearity"] = mode.removeprefix("rnn_")
    module = layer(5, 33, **options)
    x = data.x.float()
    resets = torch.zeros(8, 3, dtype=torch.bool)
    resets[3] = resets[6] = True
    whole = module(x, resets=resets)
    pieces = [module(piece) for piece in x.split([3, 3, 2])]
    assert_bit_equal("y", whole[0], torch.cat([piece[0] for piece in pieces]))
    last = pieces[-1][1]
    for got, want in zip(*(state if isinstance(state, tuple) else (state,) for state in (whole[1], last)), strict=True):
        assert_bit_equal("the last state", got, want)


def test_no_gradient_crosses_a_reset() -> None:
    torch.manual_seed(0)
    for layer in (dlkernels.nn.LSTM(3, 4, bidirectional=True), dlkernels.nn.GRU(3, 4, bidirectional=True)):
        x = torch.randn(6, 2, 3, requires_grad=True)
        resets = torch.zeros(6, 2, dtype=torch.bool)
        resets[4, 1] = True
        y = layer(x, resets=resets)[0]
        (after,) = torch.autograd.grad(y[4:, 1].sum(), x, retain_graph=True)
        assert not after[:4, 1].any() and after[4:, 1].all() and not after[:, 0].any()
        (before,) = torch.autograd.grad(y[:4, 1].sum(), x)
        assert not before[4:, 1].any() and before[:4, 1].all()


def test_nan_does_not_cross_a_reset(isa: str) -> None:
    for layer in (dlkernels.nn.LSTM(3, 20, bidirectional=True), dlkernels.nn.GRU(3, 20, bidirectional=True)):
        x = torch.randn(6, 2, 3)
        x[1, 0] = float("nan")
        resets = torch.zeros(6, 2, dtype=torch.bool)
        resets[3, 0] = True
        y = layer(x.requires_grad_(), resets=resets)[0]
        assert y[:3, 0].isnan().any() and not y[3:].isnan().any() and not y[:, 1].isnan().any()
        (dx,) = torch.autograd.grad(y[3:].sum(), x)
        assert not dx[3:].isnan().any() and not dx[:, 1].isnan().any()


def test_the_first_step() -> None:
    """A flag at the first step drops the state that the caller gives, but not that of the reverse direction."""
    layer = dlkernels.nn.LSTM(3, 4, bidirectional=True, dtype=torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    h, c = (torch.randn(2, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    resets = torch.zeros(5, 2, dtype=torch.bool)
    resets[0, 0] = True
    y, _ = layer(x, (h, c), resets=resets)
    kept = torch.ones(2, 2, 1, dtype=torch.float64)
    kept[0, 0] = 0
    torch.testing.assert_close(y, layer(x, (h * kept, c * kept))[0])
    for grad in torch.autograd.grad(y.sum(), (h, c)):
        assert not grad[0, 0].any() and grad[0, 1].all() and grad[1].all()


@pytest.mark.parametrize("batch_first", (False, True))
def test_one_sequence_without_a_batch(batch_first: bool) -> None:
    layer = dlkernels.nn.LSTM(3, 4, batch_first=batch_first)
    x, resets = torch.randn(6, 3), torch.tensor([False, False, True, False, False, False])
    y, (h, c), cells = layer(x, resets=resets, return_cells=True)
    assert y.shape == cells.shape == (6, 4) and h.shape == c.shape == (1, 4)
    torch.testing.assert_close(y[2:], layer(x[2:])[0])
    assert torch.equal(cells[-1], c[0])


def test_cells_of_packed_input_are_packed() -> None:
    layer = dlkernels.nn.LSTM(3, 4, num_layers=2, bidirectional=True)
    x, lengths = torch.randn(5, 3, 3), torch.tensor([2, 5, 4])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    y, (_, c_n), cells = layer(packed, return_cells=True)
    assert isinstance(cells, PackedSequence) and torch.equal(cells.batch_sizes, y.batch_sizes)
    padded = torch.nn.utils.rnn.pad_packed_sequence(cells)[0]
    for b, length in enumerate(lengths.tolist()):
        assert torch.equal(padded[length - 1, b, :4], c_n[2, b]) and torch.equal(padded[0, b, 4:], c_n[3, b])


def test_mixed_dtypes_under_autocast() -> None:
    layer = dlkernels.nn.LSTM(8, 16)
    x, resets = torch.randn(6, 3, 8, requires_grad=True), torch.rand(6, 3) < 0.4
    with torch.autocast("cpu", torch.bfloat16):
        y, (_, c_n), cells = layer(x, resets=resets, return_cells=True)
    assert cells.dtype == c_n.dtype and torch.equal(cells[-1], c_n[0])
    (y.sum() + cells.sum()).backward()
    got, x.grad = x.grad, None
    y, _, cells = layer(x, resets=resets, return_cells=True)
    (y.sum() + cells.sum()).backward()
    torch.testing.assert_close(got, x.grad, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("weights", (None, torch.bfloat16, torch.int8))
def test_prepacked(weights: torch.dtype | None, isa: str) -> None:
    layer = dlkernels.nn.LSTM(24, 40).requires_grad_(False)
    x, resets = torch.randn(7, 5, 24), torch.rand(7, 5) < 0.3
    want = layer(x, resets=resets, return_cells=True)
    packed = copy.deepcopy(layer)
    packed.prepack() if weights is None else packed.prepack(weights=weights)
    got = packed(x, resets=resets, return_cells=True)
    tolerance = {} if weights is None else {"atol": 0.05, "rtol": 0.05}
    torch.testing.assert_close(got[0], want[0], **tolerance)
    torch.testing.assert_close(got[2], want[2], **tolerance)


@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
def test_compiled(backend: str) -> None:
    layer = dlkernels.nn.LSTM(3, 4, bidirectional=True)
    x, resets = torch.randn(6, 2, 3, requires_grad=True), torch.rand(6, 2) < 0.4

    def call(x: Tensor, resets: Tensor) -> Tensor:
        y, (h, _), cells = layer(x, resets=resets, return_cells=True)
        return y.sum() + h.sin().sum() + (cells * cells).sum()

    compiled = torch.compile(call, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x, resets), call(x, resets))
    (got,), (want,) = (torch.autograd.grad(f(x, resets), x) for f in (compiled, call))
    torch.testing.assert_close(got, want)


def test_exported() -> None:
    layer = dlkernels.nn.LSTM(3, 4).requires_grad_(False)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, resets: Tensor) -> tuple[Tensor, Tensor]:
            y, _, cells = self.layer(x, resets=resets, return_cells=True)
            return y, cells

    x, resets = torch.randn(6, 2, 3), torch.rand(6, 2) < 0.4
    program = torch.export.export(Model(), (x, resets))
    other = torch.rand(6, 2) < 0.4
    for got, want in zip(program.module()(x, other), Model()(x, other), strict=True):
        torch.testing.assert_close(got, want)


def test_all_flags_false_change_nothing(isa: str) -> None:
    for name in ("LSTM", "GRU", "RNN"):
        layer = getattr(dlkernels.nn, name)(8, 24, num_layers=2, bidirectional=True)
        x = torch.randn(9, 5, 8, requires_grad=True)
        plain = layer(x)[0]
        with_flags = layer(x, resets=torch.zeros(9, 5, dtype=torch.bool))[0]
        assert torch.equal(plain, with_flags)
        plain_dx, flags_dx = (torch.autograd.grad(y.sin().sum(), x)[0] for y in (plain, with_flags))
        assert torch.equal(plain_dx, flags_dx)


def test_explain_names_them() -> None:
    layer, x = dlkernels.nn.LSTM(3, 4), torch.randn(5, 2, 3)
    text = str(dlkernels.explain(layer, x, resets=torch.zeros(5, 2, dtype=torch.bool), return_cells=True))
    assert "with resets" in text and "c of every step returned" in text and "torch" not in text.split("native")[0]
    with pytest.raises(TypeError, match="unexpected keyword argument 'reset'"):
        dlkernels.explain(layer, x, reset=None)


@pytest.mark.parametrize(
    ("resets", "error", "text"),
    (
        ([[True]], TypeError, "resets should be a tensor, got: list"),
        (torch.zeros(5, 2), TypeError, "resets should be of dtype torch.bool, got: torch.float32"),
        (torch.zeros(2, 5, dtype=torch.bool), RuntimeError, r"Expected resets of size \(5, 2\), one for each row"),
        (torch.zeros(5, dtype=torch.bool), RuntimeError, r"Expected resets of size \(5, 2\), one for each row"),
    ),
)
def test_refusals(resets: Any, error: type[Exception], text: str) -> None:
    for layer in (dlkernels.nn.LSTM(3, 4), dlkernels.nn.GRU(3, 4)):
        with pytest.raises(error, match=text):
            layer(torch.randn(5, 2, 3), resets=resets)


@pytest.mark.parametrize("grad", (False, True))
@pytest.mark.parametrize("name", ("LSTMCell", "GRUCell", "RNNCell"))
def test_cells_walk_as_layers(name: str, grad: bool) -> None:
    cell = getattr(dlkernels.nn, name)(3, 4, dtype=torch.float64)
    layer = getattr(dlkernels.nn, name.removesuffix("Cell"))(3, 4, dtype=torch.float64)
    layer.load_state_dict({f"{key}_l0": value for key, value in cell.state_dict().items()})
    x, resets = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=grad), torch.rand(6, 2) < 0.4
    state, outputs = None, []
    with torch.set_grad_enabled(grad):
        for step, flags in zip(x, resets, strict=True):
            state = cell(step, state, resets=flags)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        y = layer(x, resets=resets)[0]
    torch.testing.assert_close(torch.stack(outputs), y)
    if grad:
        got, want = (torch.autograd.grad(out.sin().sum(), x)[0] for out in (torch.stack(outputs), y))
        torch.testing.assert_close(got, want)
    alone = cell(x[0, 0], state[0] if name == "GRUCell" else None, resets=torch.tensor(True))
    torch.testing.assert_close(alone, cell(x[0, 0]))
    with pytest.raises(RuntimeError, match=r"Expected resets of size \(2,\)"):
        cell(x[0], state, resets=resets)


def test_refusals_of_cells() -> None:
    x = torch.randn(5, 2, 3)
    with pytest.raises(TypeError, match="return_cells should be of type bool, got: int"):
        dlkernels.nn.LSTM(3, 4)(x, return_cells=1)
    with pytest.raises(TypeError, match="return_cells"):
        dlkernels.nn.GRU(3, 4)(x, return_cells=True)


def test_refusals_by_the_operator() -> None:
    x, weights = torch.randn(5, 2, 3), [w.detach() for w in torch.nn.GRU(3, 4)._flat_weights]  # type: ignore[union-attr]
    arguments = (x, None, None, weights, None, None, None, False, False, False, False, -1, -1, -1)
    gru = torch.ops.dlkernels.gru
    with pytest.raises(RuntimeError, match=r"resets must have shape \[5, 2\], got \[2, 5\]"):
        gru(*arguments, torch.zeros(2, 5, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="resets must be bool, got float32"):
        gru(*arguments, torch.zeros(5, 2))
    with pytest.raises(RuntimeError, match="cells must be False: gru has no cell state"):
        gru(*arguments, None, True)
