"""Every operator in plain PyTorch. It is the oracle of the tests, the formula that double backward differentiates, and
the path of calls that no kernel serves. It takes any floating dtype and device, is differentiable any number of times,
and works under functorch transforms.

float16 and bfloat16 are computed in float32 and rounded at the end, because the kernels keep their state in float32.
"""

from dlkernels.attention.reference import attention, attention_map
from dlkernels.rnn.reference import GATES, DirectionWeights, Gains, Variant, cell, sequence, split_directions, stack

__all__ = [
    "GATES",
    "DirectionWeights",
    "Gains",
    "Variant",
    "attention",
    "attention_map",
    "cell",
    "sequence",
    "split_directions",
    "stack",
]
