"""How the flat weight list of a layer is read, in torch's order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

# Rows of the weight matrices per hidden unit; the order of the gates is torch's: i, f, g, o and r, z, n.
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


class DirectionWeights(NamedTuple):
    """One direction of one layer: G gates, H hidden units, I input features, P projected units, O = P or H outputs."""

    w_ih: Tensor  # [G*H, I]
    w_hh: Tensor  # [G*H, O]
    b_ih: Tensor | None  # [G*H]
    b_hh: Tensor | None  # [G*H]
    w_hr: Tensor | None  # [P, H]


def split_directions(weights: Sequence[Tensor], directions: int) -> list[DirectionWeights]:
    """Per direction 2 weights, 4 with biases, one more with a projection: the count alone tells which are there."""
    count = len(weights) // directions
    result = []
    for start in range(0, count * directions, count):
        w_ih, w_hh, *rest = weights[start : start + count]
        b_ih, b_hh = (rest[0], rest[1]) if len(rest) >= 2 else (None, None)
        result.append(DirectionWeights(w_ih, w_hh, b_ih, b_hh, rest[-1] if count % 2 else None))
    return result
