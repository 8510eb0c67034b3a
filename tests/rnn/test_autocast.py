"""Tests autocast: results have torch's dtypes in every combination, kernels take each tensor in its own dtype, and no
copy of the weights is kept after a call."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import dlkernels
from dlkernels import reference
from dlkernels._core.dtypes import DTYPES
from dlkernels.rnn.dtypes import Types
from dlkernels.testing import within_rule
from tests.support.contract_entries import outcome, tensors
from tests.support.layer_cases import CELL_MODES, MODES
from tests.support.rnn_op_calls import op

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "LSTM": (nn.LSTM, {}), "LSTM projected": (nn.LSTM, {"proj_size": 2}), "GRU": (nn.GRU, {}), "RNN": (nn.RNN, {}),
    "LSTMCell": (nn.LSTMCell, {}), "GRUCell": (nn.GRUCell, {}), "RNNCell": (nn.RNNCell, {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_results_have_torchs_dtypes(kind: str, autocast: torch.dtype) -> None:
    cls, options = KINDS[kind]
    is_cell, compared = "Cell" in kind, 0
    refused: list[str] = []
    states = (None, *FLOATS)
    for of_weights, of_x, of_state, packed, grad in itertools.product(
        FLOATS[:2], FLOATS, states, (False,) if is_cell else (False, True), (True, False)
    ):
        theirs = cls(4, 6, **options).to(of_weights)
        ours = dlkernels.patch(theirs, copy=True)
        x: Any = torch.randn(3, 2, 4).to(of_x)
        x = x[0] if is_cell else pack_padded_sequence(x, torch.tensor([3, 2])) if packed else x
        hx: Any = None
        if of_state is not None:
            lead = (2,) if is_cell else (1, 2)
            h, c = (torch.randn(*lead, n).to(of_state) for n in (options.get("proj_size", 6), 6))
            hx = (h, c) if "LSTM" in kind else h
        with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=autocast):
            expected = outcome(lambda module=theirs, args=(x, hx): tensors(module(*args)))
            found = tensors(ours(x, hx))
        where = f"weights {of_weights}, input {of_x}, state {of_state}, packed {packed}, grad {grad}"
        if not isinstance(expected, Exception):  # torch lacks kernels for some processors; ours must work
            compared += 1
            assert [t.dtype for t in found] == [t.dtype for t in expected], where
            for mine, other in zip(found, expected, strict=True):
                torch.testing.assert_close(
                    mine, other, rtol=0.05, atol=0.05, msg=lambda text, at=where: f"{at}: {text}"
                )
        else:
            refused.append(f"{where}: {expected}")
        if grad:
            sum(t.double().sum() for t in found).backward()
            assert all(p.grad is not None and p.grad.dtype == of_weights for p in ours.parameters())
    if refused:
        calls = compared + len(refused)
        warnings.warn(f"{kind}: {len(refused)} of {calls} not compared, torch raises: {refused[0]}", stacklevel=1)
    assert compared > 10


def _random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return (torch.rand(shape, dtype=torch.float64) * 2 - 1).mul(0.5).to(dtype)


def _numbers(*dtypes: torch.dtype) -> Types:
    return Types(*map(DTYPES.index, dtypes))


def _on_branches_of(y: Tensor, x: Tensor, h0: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor, None]:
    """Computes a relu layer whose units are active where those of y are. Gradients need this reference, because
    rounding can change the sign of a pre-activation near 0."""
    w_ih, w_hh, b_ih, b_hh = weights
    steps = [h0[0]]
    for step, out in zip(x, y, strict=True):
        steps.append((step @ w_ih.T + b_ih + steps[-1] @ w_hh.T + b_hh) * (out > 0))
    return torch.stack(steps[1:]), steps[-1][None], None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("product", FLOATS, ids=str)
@pytest.mark.parametrize("B, H", [(1, 8), (5, 6), (17, 34)], ids=str)
def test_operators_take_each_tensor_in_its_dtype(isa: str, mode: str, product: torch.dtype, B: int, H: int) -> None:
    """Results differ from float64 by no more than rounding to `product` and to the results' dtypes explains."""
    T, I, P = 5, 4, 2 if mode == "lstm_proj" else 0
    name, gates = mode.removesuffix("_proj"), {"lstm": 4, "gru": 3}.get(mode.removesuffix("_proj"), 1)
    combinations = [
        (torch.float32, torch.float32, torch.float32, torch.float32), (torch.bfloat16, torch.float32, torch.float32,
        torch.bfloat16), (torch.float32, torch.bfloat16, torch.float16, torch.float32), (torch.float16, torch.float32,
        torch.bfloat16, torch.float16),
    ]  # fmt: skip
    for of_x, of_weights, of_state, of_h in combinations:
        x, h0 = _random((T, B, I), of_x), _random((1, B, P or H), of_state)
        c0 = _random((1, B, H), torch.float32) if name == "lstm" else None
        shapes = [(gates * H, I), (gates * H, P or H), (gates * H,), (gates * H,), *([(P, H)] if P else [])]
        weights = [_random(shape, of_weights) for shape in shapes]
        types = _numbers(product, of_h, torch.float32)
        y, h_n, c_n, saved, _ = op(name)(x, h0, c0, weights, None, None, None, False, False, True, False, *types)
        dy, dh_n, dc_n = _random(tuple(y.shape), of_h), _random(tuple(h_n.shape), of_h), None
        if c0 is not None:
            dc_n = _random(tuple(c_n.shape), torch.float32)
        grads = op(f"{name}_backward")(
            dy, dh_n, dc_n, x, h0, c0, weights, saved, None, None, False, False, 0, False, True, True, True, False,
            types.product,
        )  # fmt: skip
        wide = [None if t is None else t.double().requires_grad_() for t in (x, h0, c0, *weights)]
        exact = reference.sequence(name, *wide[:3], wide[3:])  # type: ignore[arg-type]
        source = _on_branches_of(y, *(t for t in wide if t is not None)) if name == "rnn_relu" else exact
        kept = [(a, b) for a, b in zip(source, (dy, dh_n, dc_n), strict=True) if b is not None]
        leaves = [t for t in wide if t is not None]
        expected = torch.autograd.grad([a for a, _ in kept], leaves, [b.double() for _, b in kept])
        results = [(y, exact[0]), (h_n, exact[1]), *([(c_n, exact[2])] if c0 is not None else [])]
        found = [g for g, t in zip(grads, wide, strict=True) if t is not None]
        for mine, other in [*results, *zip(found, expected, strict=True)]:
            other = other.detach()
            unit = max(torch.finfo(mine.dtype).eps, torch.finfo(product).eps)
            top, off = float(other.abs().max()), float((mine.double() - other).abs().max())
            # The second bound makes the test fail if a small gradient is replaced by zeros.
            assert off <= min(8 * unit * max(1.0, top), 0.5 * top + 8 * torch.finfo(torch.float32).eps)
        assert [g.dtype for g in found] == [t.dtype for t in (x, h0, c0, *weights) if t is not None]
        assert (y.dtype, h_n.dtype) == (of_h, of_h) and (c0 is None or c_n.dtype == torch.float32)


@pytest.mark.parametrize("mode", CELL_MODES)
def test_cells_with_weights_of_another_dtype_are_those_with_the_same_numbers(isa: str, mode: str) -> None:
    """float32 weights whose values are exact in bfloat16 give bit-equal results to the same weights in bfloat16."""
    gates, B, I, H = {"lstm": 4, "gru": 3}.get(mode, 1), 3, 4, 6
    x, h = _random((B, I), torch.bfloat16), _random((B, H), torch.bfloat16)
    c = _random((B, H), torch.bfloat16) if mode == "lstm" else None
    short = [_random(s, torch.bfloat16) for s in ((gates * H, I), (gates * H, H), (gates * H,), (gates * H,))]
    wide = [w.float() for w in short]
    types = _numbers(*[torch.bfloat16] * 3)
    one = op(f"{mode}_cell")(x, h, c, *short, True, True)
    other = op(f"{mode}_cell")(x, h, c, *wide, True, True, *types)
    assert all(map(torch.equal, one, other))
    dh, dc = torch.ones_like(one[0]), None if c is None else torch.ones_like(c)
    args = (True, True, True, True, False)
    grads = op(f"{mode}_cell_backward")(dh, dc, x, h, c, *short, one[-1], *args)
    mixed = op(f"{mode}_cell_backward")(dh, dc, x, h, c, *wide, other[-1], *args, types.product)
    for grad, twin in zip(grads, mixed, strict=True):
        assert torch.equal(grad, twin.to(grad.dtype))


@pytest.mark.parametrize("mode", CELL_MODES)
def test_gradients_of_a_cell_have_the_dtypes_of_its_tensors(mode: str) -> None:
    gates, B, I, H = {"lstm": 4, "gru": 3}.get(mode, 1), 3, 4, 6
    x, h, dh = _random((B, I), torch.bfloat16), _random((B, H), torch.float16), _random((B, H), torch.bfloat16)
    c = _random((B, H), torch.float32) if mode == "lstm" else None
    weights = [_random(s, torch.float32) for s in ((gates * H, I), (gates * H, H), (gates * H,), (gates * H,))]
    types = _numbers(torch.bfloat16, torch.bfloat16, torch.float32)
    saved = op(f"{mode}_cell")(x, h, c, *weights, True, False, *types)[-1]
    grads = op(f"{mode}_cell_backward")(dh, c, x, h, c, *weights, saved, False, True, True, True, False, types.product)
    for grad, tensor in zip(grads, (x, h, c, *weights), strict=True):
        assert tensor is None or (grad.dtype == tensor.dtype and grad.shape == tensor.shape and grad.isfinite().all())


def test_float64_is_left_alone() -> None:
    layer = dlkernels.nn.LSTM(4, 6, dtype=torch.float64)
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x)[0].dtype == torch.float64
        with pytest.raises(ValueError, match="does not match weight dtype"):
            layer.float()(x)


def bytes_held(cell: nn.Module, steps: int, batch: int, size: int) -> int:
    """Returns the bytes that autograd holds after `steps` steps of a cell under autocast, without parameters and x."""
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(batch, size)
    own = {t.untyped_storage().data_ptr() for t in (x, *cell.parameters())}
    state: Any = None
    alive = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(steps):
            state = cell(x, state)
            alive.append(state)
    return sum(size for at, size in held.items() if at not in own)


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_a_loop_of_cells_holds_no_copies_of_the_weights(kind: str) -> None:
    theirs = getattr(nn, kind)(256, 256)
    ours = dlkernels.patch(theirs, copy=True)
    copy = 2 * sum(p.numel() for p in ours.parameters())  # bytes of the weights in bfloat16
    assert 0 < bytes_held(ours, 30, 1, 256) < copy
    assert bytes_held(ours, 30, 16, 256) <= 2 * bytes_held(theirs, 30, 16, 256)


def test_within_rule_is_asked_of_autocast_too() -> None:
    """Our results keep the tolerance rule of dlkernels.testing: about twice torch's error against float64."""
    for kind in ("GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"):
        cls, options = KINDS[kind]
        theirs = cls(4, 6, **options)
        ours = dlkernels.patch(theirs, copy=True)
        x = torch.randn(*((2,) if "Cell" in kind else (3, 2)), 4)
        wide = cls(4, 6, **options).double()
        wide.load_state_dict({name: p.double() for name, p in theirs.state_dict().items()})
        exact = tensors(wide(x.double()))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            pairs = zip(tensors(ours(x)), tensors(theirs(x)), exact, strict=True)
            assert all(within_rule(a, b, c, torch.bfloat16, grad=False).ok for a, b, c in pairs)
