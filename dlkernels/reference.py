"""Short PyTorch for every operator: the oracle of the tests, the formula of double backward, and the path that runs
where no kernel does. Any floating dtype and device, differentiable any number of times, under functorch transforms too.

float16 and bfloat16 are computed in float32 and rounded at the end, as the kernels hold their state.
"""

from dlkernels.attention.reference import attention, attention_map
from dlkernels.rnn.reference import GATES, DirectionWeights, cell, sequence, split_directions, stack

__all__ = ["GATES", "DirectionWeights", "attention", "attention_map", "cell", "sequence", "split_directions", "stack"]
