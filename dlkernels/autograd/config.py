"""What a call of a Function is told besides its tensors. Tuples: cheap to make, and Dynamo can trace them."""

from __future__ import annotations

from typing import NamedTuple

from dlkernels.ops import SAME, Types


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


class AttentionConfig(NamedTuple):
    """Sequence lengths are 0 for padded input; the others as `dlkernels.ops.attention` has them.

    contiguous: o is what torch's matrix products would leave, contiguous and free to be edited in place. Else it lies
    in memory as q does and the backward keeps it, as with torch's fused attention.
    """

    max_seqlen_q: int
    max_seqlen_k: int
    softmax_scale: float
    causal: int = 0
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    dropout_p: float = 0.0
    contiguous: bool = False

    @property
    def rules(self) -> tuple[int, int, float, int, int, int, float, float]:
        """What forward and backward have in common."""
        return self[:-1]


class AttentionWanted(NamedTuple):
    """Which gradients the backward computes; those of k and v come together."""

    q: bool
    kv: bool
    mask: bool
    slopes: bool
    sinks: bool
