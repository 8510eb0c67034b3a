"""The recurrent operators in plain PyTorch; `dlkernels.reference` exports them."""

from dlkernels.rnn.kinds import GATES, DirectionWeights, split_directions
from dlkernels.rnn.reference.cells import cell
from dlkernels.rnn.reference.sequences import sequence, stack, states_are_reset
from dlkernels.rnn.reference.variants import Gains, Variant

__all__ = [
    "GATES",
    "DirectionWeights",
    "Gains",
    "Variant",
    "cell",
    "sequence",
    "split_directions",
    "stack",
    "states_are_reset",
]
