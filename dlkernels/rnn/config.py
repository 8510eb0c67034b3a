"""What a call of a Function is told besides its tensors. Tuples: cheap to make, and Dynamo can trace them."""

from __future__ import annotations

from typing import NamedTuple

from dlkernels.rnn.dtypes import SAME, Types

__all__ = ["CellConfig", "SequenceConfig", "Wanted"]


class SequenceConfig(NamedTuple):
    mode: str  # "lstm", "gru", "rnn_tanh" or "rnn_relu"
    bidirectional: bool = False
    batch_first: bool = False
    bptt_steps: int = 0
    deterministic: bool = False
    types: Types = SAME

    @property
    def batch_dim(self) -> int:
        """Of x, y and dy when padded; 1 for h0, c0, h_n, c_n and 2 for what the forward saved."""
        return 0 if self.batch_first else 1


class CellConfig(NamedTuple):
    mode: str
    deterministic: bool = False
    types: Types = SAME


class Wanted(NamedTuple):
    """Which gradients a backward computes.

    groups: 0 for weight gradients summed over the batch, as always; n > 0 when vmap folded n samples into the batch:
    then the weight gradients come one per sample, [n, *shape].
    """

    x: bool
    state: bool
    weights: bool
    groups: int = 0
