"""The arguments of the attention operators, as they travel from the checks to the kernels. The fields have the names of
the arguments in the operators' schemas. Tuples are cheap to make, and Dynamo can trace them."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["AttentionConfig", "AttentionInputs", "AttentionWanted"]


class AttentionInputs(NamedTuple):
    """The tensors of a call, in the order of the operators and the Functions.

    q: [B, H, M, D], k: [B, Hkv, N, D], v: [B, Hkv, N, Dv]; or [rows, heads, width] of sequences that follow each other,
        with cu_seqlens_q and cu_seqlens_k, int32 [B + 1].
    mask: bool (True = may attend) or added to the scores, [B, H, M, N] with a size of 1 wherever it is broadcast.
    alibi_slopes: [H] or [B, H]. sinks: [H].
    rng: int64 [2] on the CPU, seed and offset of the dropout mask.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    rng: Tensor | None = None


class AttentionConfig(NamedTuple):
    """What the operators are told besides the tensors, in their order.

    max_seqlen_q, max_seqlen_k: 0 for padded input.
    causal: 0 none, 1 top left, 2 bottom right.
    window_left, window_right: -1 unbounded.
    softcap: 0 none.
    contiguous: o is what torch's matrix products would return, contiguous and free to be edited in place. Otherwise it
        has the memory layout of q and the backward keeps it, as torch's fused attention does.
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
    def of_scores(self) -> tuple[float, int, int, int, float]:
        """What decides about the scores, from softmax_scale to softcap: all that the operator of the map takes."""
        return self[2:7]

    @property
    def of_both(self) -> tuple[int, int, float, int, int, int, float, float]:
        """What the forward and the backward operator take alike: everything but `contiguous`."""
        return self[:-1]

    @property
    def keywords(self) -> dict[str, Any]:
        """`of_scores` by name."""
        return dict(zip(self._fields[2:7], self[2:7], strict=True))


class AttentionWanted(NamedTuple):
    """Which gradients the backward computes; those of k and v come together."""

    need_q: bool
    need_kv: bool
    need_mask: bool
    need_slopes: bool
    need_sinks: bool

    @property
    def each(self) -> tuple[bool, ...]:
        """For each of the six gradients whether it is computed."""
        need_q, need_kv, *others = self
        return need_q, need_kv, need_kv, *others
