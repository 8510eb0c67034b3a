"""Converts nested tensors [B, *, E], strided and jagged, to rows [total, E] and back; both are differentiable."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from dlkernels._core.private_torch import jagged_dim, jagged_longest, nested_like, strided_sizes

__all__ = ["Ragged", "from_rows", "to_rows"]


class Ragged(NamedTuple):
    """The sequences of a nested tensor, one after the other."""

    rows: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    @property
    def lengths(self) -> Tensor:
        return self.cu_seqlens.diff()

    def places(self) -> Tensor:
        """The places of the rows in a padded batch: bool [B, max_seqlen]."""
        return torch.arange(self.max_seqlen, device=self.rows.device) < self.lengths[:, None]


def to_rows(nested: Any) -> Ragged:
    """Raises AssertionError unless `nested` has three dimensions of which only the second is ragged."""
    if nested.dim() != 3:
        raise AssertionError(f"query should be unbatched 2D or batched 3D tensor but received {nested.dim()}-D tensor")
    nested = nested.contiguous()
    if nested.layout == torch.jagged:
        if jagged_dim(nested) != 1:
            raise AssertionError("expected a nested tensor whose sequences differ in length, not in features")
        return Ragged(nested.values(), nested.offsets().to(torch.int32), jagged_longest(nested))
    sizes = strided_sizes(nested)
    lengths, features = sizes[:, 0], int(sizes[0, 1])
    if bool((sizes[:, 1] != features).any()):
        raise AssertionError(f"expected sequences with the same number of features, got {sizes[:, 1].tolist()}")
    cu_seqlens = pad(lengths.cumsum(0), (1, 0)).to(nested.device, torch.int32)
    return Ragged(nested.values().view(-1, features), cu_seqlens, int(lengths.max()))


def from_rows(rows: Tensor, like: Any) -> Tensor:
    """A nested tensor of `rows`, with the sequences and features of `like`."""
    like = like.contiguous()
    if like.layout == torch.jagged:
        longest = jagged_longest(like)
        return torch.nested.nested_tensor_from_jagged(rows, offsets=like.offsets(), max_seqlen=longest)
    return nested_like(rows.reshape(-1), like)
