"""Decides how a call of attention runs."""

from __future__ import annotations

from torch import Tensor

from dlkernels._core import extension
from dlkernels._core.dtypes import KERNEL_DTYPES
from dlkernels._core.routing import Route, no_kernel, or_torch, with_kernel
from dlkernels.attention import triton
from dlkernels.attention.arguments import AttentionConfig, AttentionInputs

__all__ = ["route", "route_of_call"]


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
    """How a call with these tensors, which have passed the checks, runs now."""
    reason = _why_no_kernel(q, v)
    return no_kernel(reason) if reason else with_kernel((q, k, v, *others))


def route_of_call(
    cfg: AttentionConfig, given: AttentionInputs, return_lse: bool = False, sources: tuple[Tensor, ...] = ()
) -> Route:
    """How a whole call runs now: on our operators, as `route` says, or on F.scaled_dot_product_attention of torch.
    `sources` stand for tensors of `given` that have no values, and may require a gradient or carry a tangent."""
    return or_torch(route(*given[:6], *sources), given.q, _missing(cfg, given, return_lse))


def _missing(cfg: AttentionConfig, given: AttentionInputs, return_lse: bool) -> str:
    """What torch's function lacks of what the call asks for. A window and slopes could be given to it as a mask, but no
    call may take memory for M x N elements that torch.nn would not take."""
    if return_lse:
        return "lse"
    if cfg.softcap:
        return "softcap"
    if given.sinks is not None:
        return "sinks"
    if given.alibi_slopes is not None:
        return "alibi_slopes"
    if cfg.window_left >= 0 or cfg.window_right >= 0:
        return "window"
    return "" if all(x.numel() for x in given[:3]) else "defined result without elements"
