"""The properties of each cell (gates, states, saved tensors), and the order of a layer's weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["GATES", "KINDS", "MODES", "DirectionWeights", "Kind", "kind_of", "rnn_mode", "sizes", "split_directions"]


class Kind(NamedTuple):
    """The properties of one cell. `mode` is its name and the prefix of its operators' names; `function` and `layer` are
    the names in torch.nn that errors use.

    gates: rows of the weight matrices per hidden unit, in torch's order: i, f, g, o and r, z, n.
    direct_path: whether h' depends on h directly, not only through the gates.
    slots: the values that the forward saves per row for the backward, [H] each; with a projection, the projected h'
        follows them. `records` has their layout.
    bounded, narrow: on the CPU so many slots at the start and at the end have 16 bits in a call of a 16-bit type: the
        gates, which are within [-1, 1]; h', which y rounds to 16 bits as well, and the hidden half of gru's n.
    state_follows: whether the backward of a step needs no state slot (c' or h') if it has the state before the step. On
        the CPU a cell's record then has none.
    gate_grads: the gradients of the gates that the backward returns on request; `of_input` and `of_hidden` are the
        indices of those that belong to W_ih x + b_ih and to W_hh h + b_hh.
    """

    mode: str
    function: str
    layer: str
    gates: int
    has_cell_state: bool
    direct_path: bool
    may_project: bool
    slots: tuple[str, ...]
    bounded: int
    narrow: int
    state_follows: bool
    gate_grads: tuple[str, ...]
    of_input: tuple[int, ...]
    of_hidden: tuple[int, ...]

    @property
    def weight_counts(self) -> tuple[int, ...]:
        """How many weights a direction may have: with or without biases, with or without a projection."""
        return (2, 3, 4, 5) if self.may_project else (2, 4)

    def hidden_of(self, record: Sequence[Tensor]) -> Tensor:
        """h' from the slots of a saved record; with a projection, h' before it is projected."""
        if self.has_cell_state:
            return record[self.slots.index("o")] * torch.tanh(record[self.slots.index("c'")])
        return record[self.slots.index("h'")]


_LSTM = Kind(
    "lstm", "lstm", "LSTM", 4, has_cell_state=True, direct_path=False, may_project=True,
    slots=("i", "f", "g", "o", "c'"), bounded=4, narrow=0, state_follows=True, gate_grads=("i", "f", "g", "o"),
    of_input=(0, 1, 2, 3), of_hidden=(0, 1, 2, 3),
)  # fmt: skip
# n = tanh(W_in x + b_in + r * (W_hn h + b_hn)): the input half and the hidden half of n have different gradients.
_GRU = Kind(
    "gru", "gru", "GRU", 3, has_cell_state=False, direct_path=True, may_project=False,
    slots=("r", "z", "n", "hidden half of n", "h'"), bounded=3, narrow=2, state_follows=True,
    gate_grads=("r", "z", "input half of n", "hidden half of n"), of_input=(0, 1, 2), of_hidden=(0, 1, 3),
)  # fmt: skip
_RNN_TANH = Kind(
    "rnn_tanh", "rnn", "RNN", 1, has_cell_state=False, direct_path=False, may_project=False, slots=("h'",), bounded=0,
    narrow=1, state_follows=False, gate_grads=("h'",), of_input=(0,), of_hidden=(0,),
)  # fmt: skip

KINDS = {kind.mode: kind for kind in (_LSTM, _GRU, _RNN_TANH, _RNN_TANH._replace(mode="rnn_relu"))}
MODES = tuple(KINDS)
GATES = {mode: kind.gates for mode, kind in KINDS.items()}


def kind_of(mode: str) -> Kind:
    if mode not in KINDS:
        raise ValueError(f"unknown mode {mode!r}")
    return KINDS[mode]


def rnn_mode(nonlinearity: str) -> str:
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    return "rnn_tanh" if nonlinearity == "tanh" else "rnn_relu"


class DirectionWeights(NamedTuple):
    """One direction of one layer: G gates, H hidden units, I input features, P projected units, O = P or H outputs."""

    w_ih: Tensor  # [G*H, I]
    w_hh: Tensor  # [G*H, O]
    b_ih: Tensor | None  # [G*H]
    b_hh: Tensor | None  # [G*H]
    w_hr: Tensor | None  # [P, H]


def split_directions(weights: Sequence[Tensor], directions: int) -> list[DirectionWeights]:
    """Splits the flat list of a layer's weights. A direction has 2 weights, 4 with biases, and one more with a
    projection, so the count tells which of them exist."""
    count = len(weights) // directions
    result = []
    for start in range(0, count * directions, count):
        w_ih, w_hh, *rest = weights[start : start + count]
        b_ih, b_hh = (rest[0], rest[1]) if len(rest) >= 2 else (None, None)
        result.append(DirectionWeights(w_ih, w_hh, b_ih, b_hh, rest[-1] if count % 2 else None))
    return result


def sizes(kind: Kind, weights: Sequence[Tensor], directions: int) -> tuple[int, int, int]:
    """H, P (0 without a projection) and O of a layer with these weights."""
    per_direction = len(weights) // directions
    hidden = weights[1].shape[0] // kind.gates
    proj = weights[per_direction - 1].shape[0] if per_direction % 2 else 0
    return hidden, proj, proj or hidden
