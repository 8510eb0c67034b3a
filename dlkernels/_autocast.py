"""What autocast asks of a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dlkernels.ops import DTYPES, SAME, Types

# On the CPU torch runs an LSTM either by oneDNN, wholly in autocast's dtype, or step by step, where c has the dtype
# that autocast's and its own promote to. A torch that was built without oneDNN has no such operators.
_HAS_ONEDNN = bool(torch._C._has_mkldnn)
_ONEDNN_TAKES_BF16 = _HAS_ONEDNN and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
_ONEDNN_TAKES_F16 = _HAS_ONEDNN and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What to cast to, or None outside of autocast for the device of x."""
    if not torch._C._is_any_autocast_enabled():
        return None
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def cast(tensor: Any, dtype: torch.dtype) -> Any:
    """As autocast casts the arguments of linear: every floating dtype but float64."""
    if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


def recurrent_types(
    mode: str, x: Tensor, h: Tensor | None, c: Tensor | None, weights: Sequence[Tensor | None], *, layer: bool = True,
    projected: bool = False, batch_sizes: Tensor | None = None,
) -> Types:  # fmt: skip
    """The dtypes of a recurrent call under autocast, SAME outside of it or where nothing differs.

    On CUDA torch casts all arguments. On the CPU it casts those of the matrix products; what the gates make of the
    state before has the dtype to which the two promote, and the first state is in the dtype of the input.
    """
    dtype = autocast_dtype(x)
    if dtype is None or dtype not in DTYPES or not x.is_floating_point() or x.dtype == torch.float64:
        return SAME
    of_h = of_c = dtype
    if x.device.type == "cpu":
        if mode == "gru":
            of_h = torch.promote_types(dtype, x.dtype if h is None else h.dtype)
        elif mode == "lstm" and (not layer or projected or not _runs_by_onednn(x, batch_sizes)):
            of_c = torch.promote_types(dtype, x.dtype if c is None else c.dtype)
            of_h = dtype if projected else of_c
    if of_h == of_c == dtype and all(t is None or t.dtype == dtype for t in (x, h, c, *weights)):
        return SAME
    return Types(*map(DTYPES.index, (dtype, of_h, of_c)))


def _runs_by_onednn(x: Tensor, batch_sizes: Tensor | None) -> bool:
    if x.numel() == 0 or not _HAS_ONEDNN:
        return False
    if not torch.compiler.is_compiling() and not torch._C._get_mkldnn_enabled():
        return False
    if batch_sizes is not None and (torch.compiler.is_compiling() or not _all_of_one_length(batch_sizes)):
        return False
    if x.dtype == torch.float32:
        return True
    return _ONEDNN_TAKES_BF16 if x.dtype == torch.bfloat16 else _ONEDNN_TAKES_F16 and not torch.is_grad_enabled()


def _all_of_one_length(batch_sizes: Tensor) -> bool:
    one_dimension = isinstance(batch_sizes, Tensor) and batch_sizes.dim() == 1 and batch_sizes.numel() > 0
    return one_dimension and bool(batch_sizes[0] == batch_sizes[-1])
