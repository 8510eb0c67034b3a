"""The dtypes of a recurrent call under autocast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dlkernels._core.autocast import autocast_dtype
from dlkernels._core.dtypes import DTYPES
from dlkernels._core.private_torch import HAS_ONEDNN, is_onednn_enabled, onednn_takes_bf16, onednn_takes_f16
from dlkernels.rnn.kinds import kind_of

__all__ = ["SAME", "Types", "dtype_of", "recurrent_types", "torch_has_no_lstm"]

# On the CPU torch runs an LSTM either by oneDNN, wholly in autocast's dtype, or step by step; then c has the dtype to
# which autocast's dtype and the dtype of c promote. A torch without oneDNN lacks the operators that answer these
# questions.
_ONEDNN_TAKES_BF16 = HAS_ONEDNN and onednn_takes_bf16()
_ONEDNN_TAKES_F16 = HAS_ONEDNN and onednn_takes_f16()


class Types(NamedTuple):
    """The dtypes that autocast requires of a call, as indices in DTYPES (-1: that of x): `product` for the operands of
    matrix products, `h` for y and h_n, `c` for c_n."""

    product: int = -1
    h: int = -1
    c: int = -1


SAME = Types()


def dtype_of(number: int, x: Tensor) -> torch.dtype:
    """The dtype for which a field of `Types` stands in a call with this x."""
    return x.dtype if number < 0 else DTYPES[number]


def recurrent_types(
    mode: str, x: Tensor, h: Tensor | None, c: Tensor | None, weights: Sequence[Tensor | None], *, layer: bool = True,
    projected: bool = False, batch_sizes: Tensor | None = None,
) -> Types:  # fmt: skip
    """The dtypes of a recurrent call under autocast; SAME outside of autocast or if all dtypes are the same.

    On CUDA torch casts all arguments. On the CPU it casts the arguments of the matrix products; the new state, which
    the gates compute from the previous one, has the dtype to which autocast's dtype and that of the previous state
    promote. A default initial state has the dtype of the input.
    """
    dtype = autocast_dtype(x)
    if dtype is None or dtype not in DTYPES or not x.is_floating_point() or x.dtype == torch.float64:
        return SAME
    kind, of_h, of_c = kind_of(mode), dtype, dtype
    if x.device.type == "cpu":
        if kind.direct_path:
            of_h = torch.promote_types(dtype, x.dtype if h is None else h.dtype)
        elif kind.has_cell_state and (not layer or projected or not _runs_by_onednn(x, batch_sizes)):
            of_c = torch.promote_types(dtype, x.dtype if c is None else c.dtype)
            of_h = dtype if projected else of_c
    if of_h == of_c == dtype and all(t is None or t.dtype == dtype for t in (x, h, c, *weights)):
        return SAME
    return Types(*map(DTYPES.index, (dtype, of_h, of_c)))


def torch_has_no_lstm(x: Tensor) -> bool:
    """Whether torch raises for an LSTM with this input under autocast: it leaves the call to oneDNN, which does not
    take autocast's dtype on every processor."""
    dtype = autocast_dtype(x)
    return dtype is not None and not (_ONEDNN_TAKES_BF16 if dtype == torch.bfloat16 else _ONEDNN_TAKES_F16)


def _runs_by_onednn(x: Tensor, batch_sizes: Tensor | None) -> bool:
    if x.numel() == 0 or not HAS_ONEDNN:
        return False
    if not torch.compiler.is_compiling() and not is_onednn_enabled():
        return False
    if batch_sizes is not None and (torch.compiler.is_compiling() or not _all_of_one_length(batch_sizes)):
        return False
    if x.dtype == torch.float32:
        return True
    return _ONEDNN_TAKES_BF16 if x.dtype == torch.bfloat16 else _ONEDNN_TAKES_F16 and not torch.is_grad_enabled()


def _all_of_one_length(batch_sizes: Tensor) -> bool:
    one_dimension = isinstance(batch_sizes, Tensor) and batch_sizes.dim() == 1 and batch_sizes.numel() > 0
    return one_dimension and bool(batch_sizes[0] == batch_sizes[-1])
