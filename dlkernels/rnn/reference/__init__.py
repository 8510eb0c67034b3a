"""The recurrent operators as short PyTorch; `dlkernels.reference` exports it."""

from dlkernels.rnn.reference.cells import cell
from dlkernels.rnn.reference.sequences import sequence, stack
from dlkernels.rnn.reference.weights import GATES, DirectionWeights, split_directions

__all__ = ["GATES", "DirectionWeights", "cell", "sequence", "split_directions", "stack"]
