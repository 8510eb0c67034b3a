"""The process group of a call: this process's place in it, and the messages around the ring."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

__all__ = ["Ring", "Transfer", "ring_of"]


class Transfer:
    """A message to the right neighbour and one from the left, both under way."""

    def __init__(self, sent: Tensor, received: Tensor, works: list[Any]) -> None:
        # The tensor that is sent is kept until the message has left.
        self._sent, self._received, self._works = sent, received, works

    def wait(self) -> Tensor:
        """Returns what the left neighbour sent."""
        for work in self._works:
            work.wait()
        return self._received


class Ring(NamedTuple):
    """group: None is the default group. rank: of this process in the group. world: the number of processes."""

    group: Any
    rank: int
    world: int

    def source(self, step: int) -> int:
        """The rank whose shard of keys this process holds after so many steps."""
        return (self.rank - step) % self.world

    def pass_on(self, sent: Tensor, received: Tensor, tag: int) -> Transfer:
        """Begins to send a tensor to the next rank and to receive one from the rank before; both are contiguous."""
        right, left = (self.rank + 1) % self.world, (self.rank - 1) % self.world
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, sent, group=self.group, group_peer=right, tag=tag),
                dist.P2POp(dist.irecv, received, group=self.group, group_peer=left, tag=tag),
            ]
        )
        return Transfer(sent, received, works)


def ring_of(group: Any) -> Ring:
    """Checks `group`, and finds this process in it."""
    if not dist.is_available():
        raise RuntimeError("group: expected a torch with torch.distributed, got one that was built without it")
    if group is not None and group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group: expected a process group with this process in it, got one without it")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: expected a ProcessGroup or None, got {type(group).__name__}")
    if not dist.is_initialized():
        raise RuntimeError("group: expected a process group (torch.distributed.init_process_group), got none")
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("group: expected a process group with this process in it, got one without it")
    return Ring(group, rank, dist.get_world_size(group))
