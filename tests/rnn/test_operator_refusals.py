"""Tests which arguments the operators reject when they are called directly, without the checks of the Python layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dlkernels.rnn import operators
from tests.support.rnn_op_calls import B, Call, CellCall, H, I, P, T, op

pytestmark = pytest.mark.usefixtures("native")

D = torch.float64


def zeros(*shape: int, dtype: torch.dtype = D) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


FORWARD_MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x of two dimensions": ({"x": zeros(T, I)}, RuntimeError, r"x must have shape \[T, B, input_size\]"),
    "x of wrong size": ({"x": zeros(T, B, I + 1)}, RuntimeError, r"w_ih must have shape \[24, 5\], got \[24, 4\]"),
    "x of integers": ({"x": zeros(T, B, I, dtype=torch.int64)}, RuntimeError, "x must be float32, .*got int64"),
    "x of another dtype": ({"x": zeros(T, B, I, dtype=torch.float32)}, RuntimeError, "w_ih must be float32"),
    "no steps": ({"x": zeros(0, B, I)}, RuntimeError, "at least one time step"),
    "h0 of wrong batch": ({"h0": zeros(1, 1, H)}, RuntimeError, r"h0 must have shape \[1, 3, 6\], got \[1, 1, 6\]"),
    "h0 of wrong rank": ({"h0": zeros(B, H)}, RuntimeError, "h0 must have shape"),
    "c0 of wrong size": ({"c0": zeros(1, B, H + 1)}, RuntimeError, "c0 must have shape"),
    "c0 elsewhere": ({"c0": zeros(1, B, H).to("meta")}, RuntimeError, "c0 must be on cpu, as .* is, got meta"),
    "no weights": ({"weights": []}, RuntimeError, "weights must hold"),
    "one weight": ({"weights": [zeros(24, I)]}, RuntimeError, "weights must hold .* got 1 tensor"),
    "w_hh of wrong size": (
        {"weights": [zeros(24, I), zeros(24, H + 1), zeros(24), zeros(24)]}, RuntimeError, "w_hh must have shape",
    ),
    "w_hh of one dimension": ({"weights": [zeros(24, I), zeros(24)]}, RuntimeError, "w_hh must have shape"),
    "hidden size 0": ({"weights": [zeros(0, I), zeros(0, 0)]}, RuntimeError, "hidden_size must be positive"),
    "w_hr of wrong rank": ({"weights": [zeros(24, I), zeros(24, H), zeros(H)]}, RuntimeError, "w_hr must have shape"),
    "biases of wrong size": (
        {"weights": [zeros(24, I), zeros(24, H), zeros(23), zeros(24)]}, RuntimeError, "b_ih must have shape",
    ),
    "one direction's weights for two": ({"bidirectional": True}, RuntimeError, "w_ih|w_hh|h0|weights"),
    "lengths too long": (
        {"lengths": torch.tensor([5, 0, 9])}, ValueError, r"lengths must lie in 0..T \(T=5\), got 9 at position 2",
    ),
    "lengths negative": ({"lengths": torch.tensor([5, -1, 2])}, ValueError, "got -1 at position 1"),
    "lengths of floats": ({"lengths": torch.tensor([1.0, 2.0, 3.0])}, RuntimeError, "lengths must be int64"),
    "lengths too few": ({"lengths": torch.tensor([1, 2])}, RuntimeError, r"lengths must have shape \[3\], got \[2\]"),
    "lengths of two dimensions": ({"lengths": torch.ones(1, 3).long()}, RuntimeError, "one-dimensional"),
    "batch_sizes for padded x": ({"batch_sizes": torch.tensor([3, 2])}, RuntimeError, "x must be packed"),
    "batch_sizes that grow": (
        {"x": zeros(5, I), "batch_sizes": torch.tensor([2, 3])}, RuntimeError, "must not increase, got 3 at step 1",
    ),
    "batch_sizes of 0": ({"x": zeros(5, I), "batch_sizes": torch.tensor([5, 0])}, RuntimeError, "must be positive"),
    "batch_sizes too large": ({"x": zeros(5, I), "batch_sizes": torch.tensor([2**62])}, RuntimeError, "batch_sizes"),
    "batch_sizes of another sum": ({"x": zeros(5, I), "batch_sizes": torch.tensor([3, 1])}, RuntimeError, "must sum"),
    "batch_sizes of a larger sum": ({"x": zeros(5, I), "batch_sizes": torch.tensor([3, 3])}, RuntimeError, "must sum"),
    "no batch_sizes": ({"x": zeros(0, I), "batch_sizes": torch.tensor([]).long()}, RuntimeError, "must not be empty"),
    "lengths and batch_sizes": (
        {"x": zeros(3, I), "batch_sizes": torch.tensor([3]), "lengths": torch.tensor([1, 1, 1])}, RuntimeError,
        "give one of them",
    ),
    "packed of floats": ({"packed": zeros(9)}, RuntimeError, "packed must be what"),
    "packed of nothing": ({"packed": zeros(9, dtype=torch.uint8)}, RuntimeError, "packed does not fit"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORWARD_MISTAKES)
def test_forward_refuses(name: str) -> None:
    changes, kind, message = FORWARD_MISTAKES[name]
    call = Call("lstm")
    with pytest.raises(kind, match=message):
        call.forward(**changes)
    if "packed" not in changes:
        args = {key: value for key, value in call.backward_args().items() if key not in changes}
        with pytest.raises(kind, match=message):
            op("lstm_backward")(**{**args, **changes})


def test_panels_of_another_cell_are_refused() -> None:
    call = Call("rnn_relu")
    packed = operators.pack("rnn_tanh", call.args["weights"], False)
    with pytest.raises(RuntimeError, match="it was packed for another cell"):
        call.forward(packed=packed)


BACKWARD_MISTAKES = {
    "dy of wrong size": ({"dy": zeros(T, B, H + 1)}, "dy must have shape"),
    "dy of another dtype": ({"dy": zeros(T, B, H, dtype=torch.float32)}, "dy must be float64"),
    "dh_n of wrong size": ({"dh_n": zeros(1, B + 1, H)}, "dh_n must have shape"),
    "dc_n of wrong size": ({"dc_n": zeros(2, B, H)}, "dc_n must have shape"),
    "saved of an inference run": ({"saved": zeros(0)}, r"saved must have shape \[1, 5, 3, 30\], got \[0\]"),
}


@pytest.mark.parametrize("name", BACKWARD_MISTAKES)
def test_backward_refuses(name: str) -> None:
    changes, message = BACKWARD_MISTAKES[name]
    with pytest.raises(RuntimeError, match=message):
        Call("lstm").backward(**changes)


def test_backward_refuses_negative_steps() -> None:
    with pytest.raises(ValueError, match="bptt_steps must not be negative, got -1"):
        Call("gru").backward(bptt_steps=-1)


CELL_MISTAKES = {
    "x of three dimensions": ({"x": zeros(1, B, I)}, "x must have shape"),
    "x of wrong size": ({"x": zeros(B, I + 1)}, "w_ih must have shape"),
    "h of wrong batch": ({"h": zeros(B + 1, H)}, "h must have shape"),
    "c of wrong size": ({"c": zeros(B, H + 1)}, "c must have shape"),
    "one bias": ({"b_hh": None}, "b_ih and b_hh must both"),
    "b_hh of wrong size": ({"b_hh": zeros(3)}, "b_hh must have shape"),
    "w_hh of wrong rank": ({"w_hh": zeros(24)}, "w_hh must have two dimensions"),
    "another dtype": ({"w_hh": zeros(24, H, dtype=torch.float32)}, "w_hh must be float64, got float32"),
    "another device": ({"h": zeros(B, H).to("meta")}, r"cell\w*: h must be on cpu, as (x|dh) is, got meta"),
}


@pytest.mark.parametrize("name", CELL_MISTAKES)
def test_cell_refuses(name: str) -> None:
    changes, message = CELL_MISTAKES[name]
    call = CellCall("lstm")
    with pytest.raises(RuntimeError, match=message):
        call.forward(**changes)
    with pytest.raises(RuntimeError, match=message):
        call.backward(**changes)


@pytest.mark.parametrize("mode", ["gru", "rnn_tanh", "rnn_relu"])
def test_only_the_lstm_has_a_cell_state_and_projections(mode: str) -> None:
    call = Call(mode)
    with pytest.raises(RuntimeError, match="c0 must be None"):
        call.forward(c0=zeros(1, B, H))
    with pytest.raises(RuntimeError, match="c must be None"):
        CellCall(mode).forward(c=zeros(B, H))
    with pytest.raises(RuntimeError, match="only lstm has projections"):
        call.forward(weights=[*call.args["weights"], zeros(P, H)])


def test_pack_refuses_an_unknown_mode() -> None:
    with pytest.raises(ValueError, match="unknown mode 'peephole', expected lstm, gru, rnn_tanh or rnn_relu"):
        operators.pack("peephole", [zeros(24, I), zeros(24, H)], False)
