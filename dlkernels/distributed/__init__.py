"""Attention over a sequence that is divided among the processes of a group of torch.distributed."""

from dlkernels.distributed.functional import ring_attention
from dlkernels.distributed.layout import shard, unshard

__all__ = ["ring_attention", "shard", "unshard"]
