"""Invalid calls of the recurrent operators, which must raise the same exception with the same message on the CPU and on
a CUDA device.

Under emulation the test's library has replaced the operators of the CPU, so those are called in another process: run as
a script, this file prints their outcomes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import torch
from torch import Tensor

from dlkernels.rnn.kinds import MODES

T, B, I, H = 4, 5, 3, 2
ROWS = T * B
Mistake = tuple[str, dict[str, Any]]


def weights(gates: int, *others: tuple[int, ...]) -> list[Tensor]:
    shapes = ((gates * H, I), (gates * H, H), (gates * H,), (gates * H,), *others)
    return [torch.zeros(shape) for shape in shapes]


def forward(gates: int = 4) -> dict[str, Any]:
    return {
        "x": torch.zeros(T, B, I), "h0": None, "c0": None, "weights": weights(gates), "packed": None,
        "batch_sizes": None, "lengths": None, "bidirectional": False, "batch_first": False, "save": True,
        "deterministic": False, "product_dtype": -1, "h_dtype": -1, "c_dtype": -1, "resets": None, "cells": False,
    }  # fmt: skip


def backward(gates: int = 4, slots: int = 5) -> dict[str, Any]:
    return {
        "dy": torch.zeros(T, B, H), "dh_n": None, "dc_n": None, "x": torch.zeros(T, B, I), "h0": None, "c0": None,
        "weights": weights(gates), "saved": torch.zeros(1, T, B, slots * H),
        "batch_sizes": None, "lengths": None, "bidirectional": False, "batch_first": False, "bptt_steps": 0,
        "deterministic": False, "need_x": True, "need_state": True, "need_weights": True, "gate_grads": False,
        "product_dtype": -1, "resets": None, "dcells": None,
    }  # fmt: skip


def step(gates: int = 4) -> dict[str, Any]:
    w_ih, w_hh, b_ih, b_hh = weights(gates)
    return {"x": torch.zeros(B, I), "h": None, "c": None, "w_ih": w_ih, "w_hh": w_hh, "b_ih": b_ih, "b_hh": b_hh,
            "save": True, "deterministic": False}  # fmt: skip


def step_backward(gates: int = 4, slots: int = 5) -> dict[str, Any]:
    inputs = {name: value for name, value in step(gates).items() if name not in ("save", "deterministic")}
    return {
        "dh": torch.zeros(B, H), "dc": None, **inputs, "saved": torch.zeros(B, slots * H),
        "deterministic": False, "need_x": True, "need_state": True, "need_weights": True, "gate_grads": False,
    }  # fmt: skip


def of_variant(gates: int) -> dict[str, Any]:
    """Layer normalisation and all masks."""
    mask = torch.zeros(1, T, B, H, dtype=torch.bool)
    return {
        "x": torch.zeros(T, B, I), "h0": None, "c0": None, "weights": weights(gates),
        "gains": [torch.zeros(n * H) for n in ((4, 4, 1, 1) if gates == 4 else (3, 3))],
        "dropout": torch.zeros(1, B, H), "mask_c": mask if gates == 4 else None, "mask_h": mask,
    }  # fmt: skip


OF_ROWS = {"batch_sizes": None, "lengths": None, "eps": 1e-5, "zoneout_c": 0.0, "zoneout_h": 0.0,
           "bidirectional": False, "batch_first": False}  # fmt: skip


def variant(gates: int = 4) -> dict[str, Any]:
    return {**of_variant(gates), **OF_ROWS, "save": True}


def variant_backward(gates: int = 4, slots: int = 7) -> dict[str, Any]:
    return {
        "dy": torch.zeros(T, B, H), "dh_n": None, "dc_n": None, **of_variant(gates),
        "saved": torch.zeros(1, T, B, (slots + 2 * gates) * H + 8), **OF_ROWS, "bptt_steps": 0, "need_x": True,
        "need_state": True, "need_weights": True,
    }  # fmt: skip


CALLS = {
    "lstm_variant": variant(), "gru_variant": variant(3), "lstm_variant_backward": variant_backward(),
    "gru_variant_backward": variant_backward(3, 5),
    "lstm": forward(), "gru": forward(3), "lstm_backward": backward(), "gru_backward": backward(3),
    "lstm_cell": step(), "gru_cell": step(3), "lstm_cell_backward": step_backward(),
    "gru_cell_backward": step_backward(3), "rnn_relu_cell_backward": step_backward(1, 1),
}  # fmt: skip
LAYER = ("lstm", "lstm_backward")


def packed(sizes: Any, rows: int = ROWS) -> dict[str, Any]:
    return {"x": torch.zeros(rows, I), "batch_sizes": sizes if isinstance(sizes, Tensor) else torch.tensor(sizes)}


OF_LAYERS: dict[str, dict[str, Any]] = {
    "batch_sizes that grow": packed([8, 12]),
    "batch_sizes that grow later": packed([10, 4, 6]),
    "batch_sizes of 0": packed([20, 0]),
    "negative batch_sizes": packed([21, -1]),
    "batch_sizes above the rows": packed([21]),
    "batch_sizes of another sum": packed([12, 5]),
    "batch_sizes far above": packed([2**62, 2**62, 2**62]),
    "no batch_sizes": packed(torch.zeros(0, dtype=torch.int64)),
    "more batch_sizes than rows": packed(torch.ones(1, dtype=torch.int64).expand(2**40)),
    "batch_sizes of int32": packed(torch.tensor([10, 10], dtype=torch.int32)),
    "batch_sizes of floats": packed([10.0, 10.0]),
    "batch_sizes of two dimensions": packed([[10, 10]]),
    "batch_sizes of no dimension": packed(torch.tensor(20)),
    "batch_sizes for padded x": {"batch_sizes": torch.tensor([10, 10])},
    "packed x without batch_sizes": {"x": torch.zeros(ROWS, I)},
    "lengths and batch_sizes": {**packed([10, 10]), "lengths": torch.tensor([1, 2])},
    "lengths too few": {"lengths": torch.ones(4, dtype=torch.int64)},
    "lengths far too many": {"lengths": torch.ones(1, dtype=torch.int64).expand(2**40)},
    "lengths of int32": {"lengths": torch.ones(B, dtype=torch.int32)},
    "lengths of two dimensions": {"lengths": torch.ones(1, B, dtype=torch.int64)},
    "no steps": {"x": torch.zeros(0, B, I)},
    "x of another size": {"x": torch.zeros(T, B, I + 1)},
    "x of four dimensions": {"x": torch.zeros(1, T, B, I)},
    "no weights": {"weights": []},
    "one weight": {"weights": weights(4)[:1]},
    "six weights": {"weights": weights(4, (1,), (1,))},
    "weights of one direction for two": {"bidirectional": True},
    "w_hh of one dimension": {"weights": [torch.zeros(8, I), torch.zeros(8)]},
    "w_hh of other rows": {"weights": [torch.zeros(8, I), torch.zeros(7, H)]},
    "no hidden size": {"weights": [torch.zeros(0, I), torch.zeros(0, 0)]},
    "w_hh of other columns": {"weights": [torch.zeros(8, I), torch.zeros(8, H + 1)]},
    "w_ih of bfloat16": {"weights": [torch.zeros(8, I, dtype=torch.bfloat16), torch.zeros(8, H)]},
    "b_hh of another size": {"weights": [*weights(4)[:3], torch.zeros(7)]},
    "w_hr of one dimension": {"weights": weights(4, (H,))},
    "h0 of another batch": {"h0": torch.zeros(1, B + 1, H)},
    "h0 of two dimensions": {"h0": torch.zeros(B, H)},
    "c0 of another dtype": {"c0": torch.zeros(1, B, H, dtype=torch.float64)},
    "resets of bytes": {"resets": torch.zeros(T, B, dtype=torch.uint8)},
    "resets of another batch": {"resets": torch.zeros(T, B + 1, dtype=torch.bool)},
    "resets of batch-first x in its order": {
        "x": torch.zeros(B, T, I), "batch_first": True, "resets": torch.zeros(B, T, dtype=torch.bool),
    },
    "resets of one dimension": {"resets": torch.zeros(ROWS, dtype=torch.bool)},
    "resets of packed x in two dimensions": {**packed([10, 10]), "resets": torch.zeros(2, 10, dtype=torch.bool)},
    "resets of fewer rows": {**packed([10, 10]), "resets": torch.zeros(ROWS - 1, dtype=torch.bool)},
}  # fmt: skip
MISTAKES: dict[str, Mistake] = {
    **{f"{operator}, {name}": (operator, changes) for operator in LAYER for name, changes in OF_LAYERS.items()},
    "gru, projection": ("gru", {"weights": weights(3, (1, H))}),
    "gru, c0": ("gru", {"c0": torch.zeros(1, B, H)}),
    "gru_backward, c0": ("gru_backward", {"c0": torch.zeros(1, B, H)}),
    "gru_backward, dc_n": ("gru_backward", {"dc_n": torch.zeros(1, B, H)}),
    "gru, cells": ("gru", {"cells": True}),
    "gru_backward, dcells": ("gru_backward", {"dcells": torch.zeros(T, B, H)}),
    "lstm_backward, dcells of another size": ("lstm_backward", {"dcells": torch.zeros(T, B, H + 1)}),
    "lstm_backward, dcells of another dtype": ("lstm_backward", {"dcells": torch.zeros(T, B, H).double()}),
    "lstm_backward, dy of another dtype": ("lstm_backward", {"dy": torch.zeros(T, B, H, dtype=torch.bfloat16)}),
    "lstm_backward, dh_n of another size": ("lstm_backward", {"dh_n": torch.zeros(1, B, H + 1)}),
    "lstm_backward, saved of nothing": ("lstm_backward", {"saved": torch.zeros(0)}),
    "lstm_backward, saved of another order": ("lstm_backward", {"saved": torch.zeros(1, B, T, 5 * H)}),
    "lstm_backward, saved of bfloat16": (
        "lstm_backward", {"saved": torch.zeros(1, T, B, 5 * H, dtype=torch.bfloat16)},
    ),
    "lstm_backward, bptt_steps": ("lstm_backward", {"bptt_steps": -1}),
    **{
        f"{operator}, {name}": (operator, changes) for operator in ("lstm", "lstm_cell")
        for name, changes in {
            "product_dtype of float64": {"product_dtype": 1},
            "product_dtype of nothing": {"product_dtype": 7},
            "product_dtype far below": {"product_dtype": -(2**40)},
            "h_dtype without product_dtype": {"product_dtype": -1, "h_dtype": 2},
            "c_dtype of float64": {"product_dtype": 2, "h_dtype": 2, "c_dtype": 1},
        }.items()
    },
    "lstm, weights of two dtypes": ("lstm", {"weights": [*weights(4)[:3], torch.zeros(8).half()], "product_dtype": 2}),
    "lstm_cell, weights of two dtypes": ("lstm_cell", {"w_hh": torch.zeros(8, H).half(), "product_dtype": 2}),
    "lstm, h0 of float64": ("lstm", {"h0": torch.zeros(1, B, H).double(), "product_dtype": 2}),
    "lstm_backward, product_dtype of float64": ("lstm_backward", {"product_dtype": 1}),
    "lstm_cell_backward, product_dtype of float64": ("lstm_cell_backward", {"product_dtype": 1}),
    "lstm_backward, dy of another dtype, mixed": (
        "lstm_backward", {"dy": torch.zeros(T, B, H).double(), "product_dtype": 2},
    ),
    **{
        f"{operator}, {name}": (operator, changes) for operator in ("lstm_cell", "lstm_cell_backward")
        for name, changes in {
            "x of one dimension": {"x": torch.zeros(I)},
            "x of another size": {"x": torch.zeros(B, I + 1)},
            "h of another batch": {"h": torch.zeros(B + 1, H)},
            "c of bfloat16": {"c": torch.zeros(B, H, dtype=torch.bfloat16)},
            "w_hh of one dimension": {"w_hh": torch.zeros(8)},
            "one bias": {"b_hh": None},
            "b_ih of another size": {"b_ih": torch.zeros(7)},
        }.items()
    },
    **{
        f"lstm_variant{way}, {name}": (f"lstm_variant{way}", changes) for way in ("", "_backward")
        for name, changes in {
            "one gain": {"gains": [torch.zeros(4 * H)]},
            "a gain of another size": {"gains": [torch.zeros(n * H) for n in (4, 3, 1, 1)]},
            "a gain of another dtype": {"gains": [torch.zeros(4 * H).double(), *variant()["gains"][1:]]},
            "dropout of another size": {"dropout": torch.zeros(1, B, H + 1)},
            "dropout of float64": {"dropout": torch.zeros(1, B, H).double()},
            "mask_h of floats": {"mask_h": torch.zeros(1, T, B, H)},
            "mask_c of another size": {"mask_c": torch.zeros(1, B, T, H, dtype=torch.bool)},
            "negative eps": {"eps": -1.0},
            "zoneout_h above 1": {"zoneout_h": 1.5},
            "zoneout_c below 0": {"zoneout_c": -0.5},
        }.items()
    },
    "gru_variant, zoneout_c": ("gru_variant", {"zoneout_c": 0.5}),
    "gru_variant, mask_c": ("gru_variant", {"mask_c": torch.zeros(1, T, B, H, dtype=torch.bool)}),
    "lstm_variant_backward, saved of a layer without gains": (
        "lstm_variant_backward", {"saved": torch.zeros(1, T, B, 7 * H)},
    ),
    "gru_cell, c": ("gru_cell", {"c": torch.zeros(B, H)}),
    "gru_cell_backward, dc": ("gru_cell_backward", {"dc": torch.zeros(B, H)}),
    "lstm_cell_backward, dh": ("lstm_cell_backward", {"dh": torch.zeros(B, H, dtype=torch.float64)}),
    "lstm_cell_backward, saved": ("lstm_cell_backward", {"saved": torch.zeros(B, 4 * H)}),
    "lstm_cell_backward, saved of bfloat16": (
        "lstm_cell_backward", {"saved": torch.zeros(B, 5 * H, dtype=torch.bfloat16)},
    ),
}  # fmt: skip


def placed(name: str, value: Any, device: str) -> Any:
    if isinstance(value, list):
        return [placed(name, item, device) for item in value]
    return value.to(device) if isinstance(value, Tensor) and name != "batch_sizes" else value


def outcome(name: str, device: str, on_cpu: bool = False) -> list[str]:
    """The type and the message of the exception that a call raises, or an empty list. Where `name` is an operator
    instead of a mistake, the call is valid. `on_cpu`: the CPU's kernels run, whose records of LSTM and GRU cells have
    one slot less. The sizes of such records are left out of the message."""
    operator, changes = MISTAKES.get(name, (name, {}))
    call = {key: placed(key, value, device) for key, value in {**CALLS[operator], **changes}.items()}
    of_cell = operator in ("lstm_cell_backward", "gru_cell_backward")
    if of_cell and on_cpu:
        call["saved"] = call["saved"][:, H:]
    try:
        getattr(torch.ops.dlkernels, operator).default(*call.values())
    except Exception as error:
        text = re.sub(rf"\[{B}, \d+\]", "[B, a record]", str(error)) if of_cell and "saved" in name else str(error)
        return [type(error).__name__, text]
    return []


def of_the_cpu() -> dict[str, list[str]]:
    """The outcomes of all calls on the CPU, from a process without emulation."""
    environment = {name: value for name, value in os.environ.items() if name != "DLKERNELS_EMULATED"}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    assert MODES
    print(json.dumps({name: outcome(name, "cpu", on_cpu=True) for name in (*CALLS, *MISTAKES)}))
