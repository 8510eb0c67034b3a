"""The walk around the ring, forward and backward, and the autograd Function of the two.

At step t a rank has the keys of the rank t places before it. It begins to send them to the next rank and to receive
those of the next step, and computes its block meanwhile. In the backward the gradients of these keys follow them one
message later, each rank adds its own share, and after `world` messages they are back where the keys came from.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dlkernels._core.dtypes import compute_dtype
from dlkernels.attention.arguments import AttentionConfig
from dlkernels.distributed import blocks
from dlkernels.distributed.group import Ring, Transfer
from dlkernels.distributed.layout import Part, part_of

__all__ = ["Call", "RingAttention"]

# The tags of the two kinds of messages, which may be under way at the same time.
_KEYS, _GRADIENTS = 0, 1


class Call(NamedTuple):
    """A call whose arguments are checked. cfg is without `causal`. lengths: the rows of the keys of each rank.
    need_q, need_kv: which gradients the backward computes."""

    cfg: AttentionConfig
    ring: Ring
    lengths: tuple[int, ...]
    layout: str
    causal: bool
    native: bool
    need_q: bool
    need_kv: bool

    def part(self, source: int, queries: int) -> Part | None:
        return part_of(self.layout, self.causal, self.ring.rank, source, queries, self.lengths[source])

    def block_cfg(self, part: Part) -> AttentionConfig:
        return self.cfg._replace(causal=int(part.causal))


class _Shards:
    """Keys and values of one rank as one message, flat: those of k, then those of v. `like` gives the sizes that all
    ranks have in common."""

    def __init__(self, call: Call, k: Tensor, v: Tensor) -> None:
        self._lengths = call.lengths
        self._heads, self._widths = k.shape[:2], (k.shape[3], v.shape[3])
        self._like = k

    def pack(self, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat((k.reshape(-1), v.reshape(-1)))

    def empty(self, source: int, dtype: torch.dtype) -> Tensor:
        """A buffer for the message with the shards of this rank."""
        return self._like.new_empty((sum(self._sizes(source)),), dtype=dtype)

    def unpack(self, source: int, message: Tensor) -> list[Tensor]:
        """k and v of a message, as views."""
        parts = torch.split(message, self._sizes(source))
        rows = self._lengths[source]
        return [part.view(*self._heads, rows, width) for part, width in zip(parts, self._widths, strict=True)]

    def _sizes(self, source: int) -> list[int]:
        of_width = self._heads.numel() * self._lengths[source]
        return [of_width * width for width in self._widths]


def _forward(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(o, lse, stats) over the keys of all ranks."""
    ring, shards = call.ring, _Shards(call, k, v)
    joined = blocks.Joined(q, v.shape[3])
    message = shards.pack(k, v)
    for step in range(ring.world):
        source = ring.source(step)
        transfer = _next_keys(call, shards, step, message)
        part = call.part(source, q.shape[2])
        if part is not None:
            queries, keys, _ = part
            k, v = (tensor[:, :, keys] for tensor in shards.unpack(source, message))
            joined.add(queries, *blocks.forward(call.native, call.block_cfg(part), q[:, :, queries], k, v))
        if transfer is not None:
            message = transfer.wait()
    return joined.result()


def _backward(
    call: Call, do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, stats: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """(dq, [dk, dv]) in the compute type; zeros where they are not wanted."""
    ring, shards, dtype = call.ring, _Shards(call, k, v), compute_dtype(q.dtype)
    dq = torch.zeros_like(q, dtype=dtype)
    message = shards.pack(k, v)
    gradients = shards.empty(ring.rank, dtype).zero_()
    following: Transfer | None = None
    for step in range(ring.world):
        source = ring.source(step)
        transfer = _next_keys(call, shards, step, message)
        part = call.part(source, q.shape[2])
        found: list[Tensor] = []
        if part is not None:
            rows, keys, _ = part
            k, v = (tensor[:, :, keys] for tensor in shards.unpack(source, message))
            dq_part, *found = blocks.backward(
                call.native, call.block_cfg(part), do[:, :, rows], None if dlse is None else dlse[:, :, rows],
                q[:, :, rows], k, v, o[:, :, rows], stats[..., rows], call.need_q, call.need_kv,
            )  # fmt: skip
            if call.need_q:
                dq[:, :, rows] += dq_part
        if call.need_kv:
            if following is not None:
                gradients = following.wait()
            if part is not None:
                for into, value in zip(shards.unpack(source, gradients), found, strict=True):
                    into[:, :, part.keys] += value
            following = ring.pass_on(gradients, shards.empty(ring.source(step + 1), dtype), _GRADIENTS)
        if transfer is not None:
            message = transfer.wait()
    if following is not None:
        gradients = following.wait()
    return dq, shards.unpack(ring.rank, gradients)


def _next_keys(call: Call, shards: _Shards, step: int, message: Tensor) -> Transfer | None:
    """Passes the keys of this step on, and begins to receive those of the next step, if there is one."""
    ring = call.ring
    if step + 1 == ring.world:
        return None
    return ring.pass_on(message, shards.empty(ring.source(step + 1), message.dtype), _KEYS)


class RingAttention(torch.autograd.Function):
    """(call, q, k, v) -> (o, lse). It can be differentiated once."""

    @staticmethod
    def forward(ctx: Any, call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        o, lse, stats = _forward(call, q, k, v)
        ctx.save_for_backward(q, k, v, o, stats)
        ctx.set_materialize_grads(False)
        ctx.call = call
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        q, k, v, o, stats = ctx.saved_tensors
        dq, (dk, dv) = _backward(call, torch.zeros_like(o) if do is None else do, dlse, q, k, v, o, stats)
        wanted = zip((dq, dk, dv), (q, k, v), ctx.needs_input_grad[1:], strict=True)
        return (None, *(grad.to(x.dtype) if need else None for grad, x, need in wanted))
