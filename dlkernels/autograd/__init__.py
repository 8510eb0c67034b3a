"""The differentiable operators and the decision how a call runs."""

from dlkernels.autograd.cell import cell
from dlkernels.autograd.config import CellConfig, SequenceConfig
from dlkernels.autograd.routing import Route, route
from dlkernels.autograd.sequence import sequence

__all__ = ["CellConfig", "Route", "SequenceConfig", "cell", "route", "sequence"]
