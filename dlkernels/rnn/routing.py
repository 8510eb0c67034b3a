"""Decides how a recurrent call runs."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dlkernels._core import extension
from dlkernels._core.dtypes import CUDA_KERNEL_DTYPES, KERNEL_DTYPES
from dlkernels._core.routing import Route, is_for_torch, no_kernel, or_torch, with_kernel
from dlkernels.rnn.dtypes import torch_has_no_lstm

__all__ = ["NO_EXTRAS", "Extras", "is_call_for_torch", "route", "route_of_call"]


class Extras(NamedTuple):
    """The arguments of a layer's call that torch's operators do not have; see `functional.lstm`."""

    lengths: Tensor | None = None
    bptt_steps: int | None = 0
    resets: Tensor | None = None
    return_cells: bool = False

    @property
    def named(self) -> str:
        """One of those that are given, or nothing."""
        if self.lengths is not None:
            return "lengths="
        if self.bptt_steps:
            return "bptt_steps="
        if self.resets is not None:
            return "resets="
        return "return_cells=" if self.return_cells else ""


NO_EXTRAS = Extras()


def _why_no_kernel(x: Tensor, projected: bool) -> str:
    """Why there is no kernel for this input; empty if there is one."""
    kind = x.device.type
    if kind not in ("cpu", "cuda"):
        return f"no kernel for {kind} tensors"
    if kind == "cuda" and not extension.HAVE_CUDA_KERNELS:
        return f"the compiled module has no CUDA kernels: {extension.why_no_cuda}"
    if x.dtype not in (KERNEL_DTYPES if kind == "cpu" else CUDA_KERNEL_DTYPES):
        return f"no kernel for {x.dtype} on {kind}"
    if kind == "cuda" and projected:
        return "no CUDA kernel for projections"
    return ""


NO_MORE_OF_VARIANTS = "resets= and return_cells= have no kernel with layer normalisation, zoneout or recurrent dropout"


def route(*tensors: Tensor | None, projected: bool = False, more: bool = False) -> Route:
    """The route of a call with these tensors, made now. The first tensor is the input, and all have one device and
    dtype. `projected` tells that the layer has a proj_size, and `more` that it has resets or returns c of every step
    beside layer normalisation, zoneout or recurrent dropout."""
    x = tensors[0]
    assert x is not None
    if not extension.HAVE_NATIVE:
        return no_kernel(f"no compiled kernels: {extension.why_not}")
    reason = _why_no_kernel(x, projected)
    if more and not reason:
        return no_kernel(NO_MORE_OF_VARIANTS, warns=True)
    return no_kernel(reason) if reason else with_kernel(tensors)


def is_call_for_torch(mode: str, x: Tensor, extras: Extras = NO_EXTRAS) -> bool:
    """Whether torch's operator runs a call of layers or of a cell with this input. It serves a whole stack at once."""
    return is_for_torch(x) and not _missing(mode, x, extras)


def route_of_call(
    mode: str, *tensors: Tensor | None, projected: bool = False, varies: bool = False, extras: Extras = NO_EXTRAS
) -> Route:  # fmt: skip
    """The route of a whole call: that of our operators, as `route` says, or torch's operator."""
    x = tensors[0]
    assert x is not None
    missing = _missing(mode, x, extras)
    if varies:
        missing = "layer normalisation, zoneout or recurrent dropout"
    more = varies and (extras.resets is not None or extras.return_cells)
    return or_torch(route(*tensors, projected=projected, more=more), x, missing)


def _missing(mode: str, x: Tensor, extras: Extras) -> str:
    """What torch's operator lacks of what the call asks for."""
    if extras.named:
        return extras.named
    return "LSTM in autocast's dtype on this processor" if mode == "lstm" and torch_has_no_lstm(x) else ""
