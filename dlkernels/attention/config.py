"""What a call of a Function is told besides its tensors. Tuples: cheap to make, and Dynamo can trace them."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["AttentionConfig", "AttentionWanted"]


class AttentionConfig(NamedTuple):
    """Sequence lengths are 0 for padded input; the others as `dlkernels.attention.operators` has them.

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
