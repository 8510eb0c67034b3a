"""Decides how a call of attention runs."""

from __future__ import annotations

from torch import Tensor

from dlkernels._core import extension
from dlkernels._core.dtypes import KERNEL_DTYPES
from dlkernels._core.routing import Route, no_kernel, with_kernel
from dlkernels.attention import triton

__all__ = ["route"]


def _why_no_kernel(q: Tensor, v: Tensor) -> str:
    """Why no kernel serves these tensors; empty if one does."""
    if q.is_cuda:
        return triton.why_not(q, v)
    if not extension.HAVE_NATIVE:
        return f"no compiled kernels: {extension.why_not}"
    kind = q.device.type
    if kind != "cpu":
        return f"no kernel for {kind} tensors"
    return "" if q.dtype in KERNEL_DTYPES else f"no kernel for {q.dtype} on {kind}"


def route(q: Tensor, k: Tensor, v: Tensor, *others: Tensor | None) -> Route:
    """How a call with these tensors, which have passed the checks, runs now.

    Raises NotImplementedError if one of them carries a forward-mode tangent.
    """
    reason = _why_no_kernel(q, v)
    return no_kernel(reason) if reason else with_kernel((q, k, v, *others))
