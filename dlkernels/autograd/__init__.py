"""The differentiable operators and the decision how a call runs."""

from dlkernels.autograd.attention import attention, attention_map
from dlkernels.autograd.cell import cell
from dlkernels.autograd.config import AttentionConfig, CellConfig, SequenceConfig
from dlkernels.autograd.routing import Route, attention_route, route
from dlkernels.autograd.sequence import sequence

__all__ = [
    "AttentionConfig",
    "CellConfig",
    "Route",
    "SequenceConfig",
    "attention",
    "attention_map",
    "attention_route",
    "cell",
    "route",
    "sequence",
]
