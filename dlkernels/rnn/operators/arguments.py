"""The arguments of the operators, as they are passed from the checks to the kernel. They are tuples, because these are
cheap to make and Dynamo can trace them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from dlkernels.rnn.dtypes import SAME, Types

__all__ = ["CellConfig", "CellInputs", "Places", "SequenceConfig", "SequenceInputs", "VariantConfig", "Wanted"]


class VariantConfig(NamedTuple):
    """Layer normalisation, zoneout and recurrent dropout, and which tensors they add to `SequenceInputs.weights`:
    behind the plain weights of all directions the gains of all directions, then the masks that exist, each as
    `dlkernels.rnn.reference.variants.Variant` has it."""

    normalised: bool
    eps: float = 1e-5
    zoneout_c: float = 0.0  # rates, for calls without masks
    zoneout_h: float = 0.0
    dropout_mask: bool = False
    mask_c: bool = False
    mask_h: bool = False

    @property
    def masks(self) -> int:
        """How many masks there are."""
        return self.dropout_mask + self.mask_c + self.mask_h

    def plain_count(self, mode: str, count: int) -> int:
        """How many of the `count` weights of one direction are the plain ones, if the masks are left out."""
        if not self.normalised:
            return count
        return {"lstm": {5: 2, 8: 4}, "gru": {4: 2, 6: 4}}[mode][count]


class SequenceConfig(NamedTuple):
    """The arguments of a layer's operators besides their tensors; `mode` selects the operators."""

    mode: str  # "lstm", "gru", "rnn_tanh" or "rnn_relu"
    bidirectional: bool = False
    batch_first: bool = False
    bptt_steps: int = 0
    deterministic: bool = False
    types: Types = SAME
    cells: bool = False
    variant: VariantConfig | None = None

    @property
    def batch_dim(self) -> int:
        """The batch dimension of padded x, y, cells and their gradients. It is 1 for h0, c0, h_n, c_n and resets, and 2
        for the saved tensor."""
        return 0 if self.batch_first else 1


class SequenceInputs(NamedTuple):
    """The tensors of a layer.

    x: [T, B, I], or [B, T, I] if `batch_first`, or packed [rows, I] with `batch_sizes`, int64 [T]. h0: [D, B, O],
    c0: [D, B, H]; None is zeros. `packed`: `dlkernels.rnn.operators.pack` of the weights. `lengths`: int64 [B] within
    0..T. `weights`, per direction: w_ih, w_hh[, b_ih, b_hh][, w_hr], and behind these what `VariantConfig` says.
    `resets`: bool [T, B] even if `batch_first`, or [rows] of packed input: the steps that begin with a state of zeros.
    """

    x: Tensor
    h0: Tensor | None
    c0: Tensor | None
    packed: Tensor | None
    batch_sizes: Tensor | None
    lengths: Tensor | None
    weights: Sequence[Tensor]
    resets: Tensor | None = None


class Places(NamedTuple):
    """Which rows are steps of which sequence, and where the state is reset: what a formula of gradients needs of
    SequenceInputs besides the tensors that have gradients."""

    batch_sizes: Tensor | None
    lengths: Tensor | None
    resets: Tensor | None

    def inputs(self, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor]) -> SequenceInputs:
        return SequenceInputs(x, h0, c0, None, self.batch_sizes, self.lengths, weights, self.resets)


class CellConfig(NamedTuple):
    """The arguments of a step's operators besides their tensors; `mode` selects the operators."""

    mode: str
    deterministic: bool = False
    types: Types = SAME


class CellInputs(NamedTuple):
    """The tensors of a step, in the order of the operators and the Functions: x [B, I], h and c [B, H] or None."""

    x: Tensor
    h: Tensor | None
    c: Tensor | None
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None


class Wanted(NamedTuple):
    """Which gradients a backward computes.

    groups: 0 in general: weight gradients are summed over the batch. n > 0 if vmap folded n samples into the batch:
    weight gradients are then computed for each sample, [n, *shape], from the gate gradients.
    """

    x: bool
    state: bool
    weights: bool
    groups: int = 0

    @property
    def flags(self) -> tuple[bool, bool, bool, bool]:
        """need_x, need_state, need_weights and gate_grads, as the operators take them."""
        grouped = self.groups > 0
        return self.x, self.state, self.weights and not grouped, grouped
