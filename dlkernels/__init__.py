"""Fused recurrent layers and attention for PyTorch, drop-in for torch.nn.

dlkernels.nn            RNN, LSTM, GRU and their cells, MultiheadAttention, Transformer layers
dlkernels.functional    the same as functions, which take the weights as arguments
dlkernels.reference     the same in plain PyTorch, for tests
dlkernels.distributed   attention over a sequence that is divided among processes
dlkernels.patch         swaps the layers of a model, and `unpatch` swaps them back
dlkernels.quantize      keeps the weights of a model's recurrent layers in fewer bits
dlkernels.patch_attention  runs F.scaled_dot_product_attention on our kernels
dlkernels.explain       tells which kernel runs for an input, and why
"""

from __future__ import annotations

from dlkernels import distributed, functional, nn, reference
from dlkernels._core import extension
from dlkernels._version import __version__

# `explain` and `info` name both a function and the module that holds it. The modules are loaded here, so that a later
# `import dlkernels.explain` does not replace the function by the module.
from dlkernels.explain import explain
from dlkernels.info import info
from dlkernels.integrations import flash_registry, onnx
from dlkernels.integrations.enable import disable, enable
from dlkernels.integrations.patch import patch, patch_report, unpatch
from dlkernels.integrations.quantize import quantize
from dlkernels.integrations.sdpa_operator import patch_attention

__all__ = [
    "__version__",
    "disable",
    "distributed",
    "enable",
    "explain",
    "functional",
    "info",
    "nn",
    "patch",
    "patch_attention",
    "patch_report",
    "quantize",
    "reference",
    "unpatch",
]

flash_registry.register()
onnx.register()
if extension.flag("DLKERNELS_ENABLE"):
    enable()
