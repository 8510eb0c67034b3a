"""Valid calls of the recurrent operators, which tests modify, and torch's layer with the same weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

T, B, I, H, P = 5, 3, 4, 6, 2
LENGTHS = (5, 2, 4)
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
SLOTS = {"lstm": 5, "gru": 5, "rnn_tanh": 1, "rnn_relu": 1}


def op(name: str) -> Any:
    return getattr(torch.ops.dlkernels, name).default


def peer(mode: str, proj: int = 0, bidirectional: bool = False, **options: Any) -> torch.nn.RNNBase:
    """Returns torch's layer of the same kind, in float64."""
    options = {"bidirectional": bidirectional, "dtype": torch.float64, **options}
    if mode == "lstm":
        return torch.nn.LSTM(I, H, proj_size=proj, **options)
    if mode == "gru":
        return torch.nn.GRU(I, H, **options)
    return torch.nn.RNN(I, H, nonlinearity=mode.removeprefix("rnn_"), **options)


class Call:
    """Holds the arguments of the forward operator by name and makes those of the backward operator."""

    def __init__(self, mode: str, proj: int = 0, bidirectional: bool = False, layout: str = "padded") -> None:
        self.mode, self.layout, self.directions = mode, layout, 2 if bidirectional else 1
        self.peer = peer(mode, proj, bidirectional, batch_first=layout == "batch_first")
        out = proj or H
        x = torch.randn((B, T, I) if layout == "batch_first" else (T, B, I), dtype=torch.float64)
        h0 = torch.randn(self.directions, B, out, dtype=torch.float64)
        c0 = torch.randn(self.directions, B, H, dtype=torch.float64) if mode == "lstm" else None
        batch_sizes = lengths = None
        if layout.startswith("packed"):
            self.packed_x = pack_padded_sequence(x, torch.tensor(sorted(LENGTHS, reverse=True)))
            x, batch_sizes = self.packed_x.data, self.packed_x.batch_sizes
        if layout == "packed":
            h0 = c0 = None
        if layout == "lengths":
            lengths = torch.tensor(LENGTHS)
        self.args = {
            "x": x, "h0": h0, "c0": c0, "weights": [w.detach() for w in self.peer._flat_weights], "packed": None,
            "batch_sizes": batch_sizes, "lengths": lengths, "bidirectional": bidirectional,
            "batch_first": layout == "batch_first", "save": True, "deterministic": False,
        }  # fmt: skip

    def forward(self, **changes: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return op(self.mode)(*{**self.args, **changes}.values())

    def backward_args(self, **changes: Any) -> dict[str, Any]:
        y, h_n, c_n, saved, _ = self.forward()
        a = self.args
        args = {
            "dy": torch.randn_like(y), "dh_n": torch.randn_like(h_n),
            "dc_n": torch.randn_like(c_n) if self.mode == "lstm" else None, "x": a["x"], "h0": a["h0"], "c0": a["c0"],
            "weights": a["weights"], "saved": saved, "batch_sizes": a["batch_sizes"], "lengths": a["lengths"],
            "bidirectional": a["bidirectional"], "batch_first": a["batch_first"], "bptt_steps": 0,
            "deterministic": False, "need_x": True, "need_state": True, "need_weights": True, "gate_grads": False,
        }  # fmt: skip
        return {**args, **changes}

    def backward(self, **changes: Any) -> list[Tensor]:
        return op(f"{self.mode}_backward")(*self.backward_args(**changes).values())


class CellCall:
    def __init__(self, mode: str, bias: bool = True, states: bool = True, batch: int = B, hidden: int = H) -> None:
        self.mode = mode

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64)

        g = GATES[mode] * hidden
        self.args = {
            "x": draw(batch, I), "h": draw(batch, hidden) if states else None,
            "c": draw(batch, hidden) if states and mode == "lstm" else None, "w_ih": draw(g, I),
            "w_hh": draw(g, hidden), "b_ih": draw(g) if bias else None, "b_hh": draw(g) if bias else None, "save": True,
            "deterministic": False,
        }  # fmt: skip

    def forward(self, **changes: Any) -> list[Tensor]:
        return op(f"{self.mode}_cell")(*{**self.args, **changes}.values())

    def backward_args(self, **changes: Any) -> dict[str, Any]:
        h, *others = self.forward()
        inputs = dict(list(self.args.items())[:7])
        args = {
            "dh": torch.randn_like(h), "dc": torch.randn_like(others[0]) if self.mode == "lstm" else None, **inputs,
            "saved": others[-1], "deterministic": False, "need_x": True, "need_state": True,
            "need_weights": True, "gate_grads": True,
        }  # fmt: skip
        return {**args, **changes}

    def backward(self, **changes: Any) -> list[Tensor]:
        return op(f"{self.mode}_cell_backward")(*self.backward_args(**changes).values())
