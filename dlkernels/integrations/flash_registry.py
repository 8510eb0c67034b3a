"""Our attention among the implementations of `torch.nn.attention.activate_flash_attention_impl`, under the name
"dlkernels". Releases of torch without that registry get nothing."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from dlkernels._core import extension
from dlkernels._core.private_torch import unregister
from dlkernels.attention import operators
from dlkernels.attention.arguments import AttentionConfig, AttentionInputs, AttentionWanted
from dlkernels.attention.checks import scale as scale_of

__all__ = ["NAME", "register"]

NAME = "dlkernels"
_TOP_LEFT = 1


class _Handle:
    """The kernels in the dispatcher, until torch's registry removes them."""

    def __init__(self) -> None:
        self._library: Library | None = Library("aten", "IMPL")  # type: ignore[no-untyped-call]
        flash = "_scaled_dot_product_flash_attention"
        kernels = [(f"{flash}_for_cpu", _forward_cpu, "CPU"), (f"{flash}_for_cpu_backward", _backward_cpu, "CPU")]
        if torch.version.cuda is not None:
            kernels += [(flash, _forward_cuda, "CUDA"), (f"{flash}_backward", _backward_cuda, "CUDA")]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*overriding a previously registered kernel")
            for name, kernel, key in kernels:
                self._library.impl(name, kernel, key, allow_override=True)  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        if self._library is not None:
            unregister(self._library)
            self._library = None


def register() -> None:
    """Makes the name known to torch's registry. No kernel is registered before it is activated."""
    try:
        from torch.nn.attention import register_flash_attention_impl
    except ImportError:
        return
    register_flash_attention_impl(NAME, register_fn=_activate)


def _activate() -> _Handle:
    if not extension.HAVE_NATIVE:
        raise RuntimeError(f"dlkernels has no compiled module: {extension.why_not}")
    return _Handle()


def _config(q: Tensor, dropout_p: float, is_causal: bool, scale: float | None) -> AttentionConfig:
    if dropout_p:
        raise RuntimeError("scaled_dot_product_flash_attention of dlkernels: dropout_p must be 0")
    return AttentionConfig(0, 0, scale_of(scale, q.shape[-1]), _TOP_LEFT if is_causal else 0)


def _given(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> AttentionInputs:
    mask = None if attn_mask is None else attn_mask[(None,) * (4 - attn_mask.dim())]
    return AttentionInputs(q, k, v, mask)


# csrc/attention/cpu/scores.h has the same constant.
_LEAST_FACTOR = 1e-20


def _unit(given: AttentionInputs, cfg: AttentionConfig) -> float:
    """One nat in the units of the kernels' scores. The Triton kernels for 16-bit types have scores in base 2. The CPU
    kernels multiply a score by the scale only if something is added to it or the scale is tiny."""
    if given.q.is_cuda:
        return math.log2(math.e) if given.q.dtype.itemsize == 2 else 1.0
    added = given.mask is not None and given.mask.dtype != torch.bool
    return 1.0 if added or not cfg.softmax_scale > _LEAST_FACTOR else 1 / cfg.softmax_scale


def _gradients(
    do: Tensor, given: AttentionInputs, o: Tensor, lse: Tensor, cfg: AttentionConfig
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    # Our forward keeps the maximum of a row's scores and the weight of a score that reaches it. torch keeps only the
    # logarithm of their sum, a score of weight 1.
    empty = lse == -math.inf
    top = torch.where(empty, math.inf, lse * _unit(given, cfg))
    stats = torch.stack((top, (~empty).to(lse.dtype)), 2)
    wanted = AttentionWanted(True, True, False, False, False)
    dq, dk, dv, *_ = operators.run_backward(do, None, given, o, stats, cfg, wanted)
    return dq, dk, dv


def _forward_cpu(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False, *,
    attn_mask: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    o, lse, _ = operators.run_forward(_given(query, key, value, attn_mask), _config(query, dropout_p, is_causal, scale))
    return o, lse.transpose(1, 2).contiguous().transpose(1, 2)  # torch's layout


def _backward_cpu(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, dropout_p: float,
    is_causal: bool, *, attn_mask: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    cfg = _config(query, dropout_p, is_causal, scale)
    return _gradients(grad_out, _given(query, key, value, attn_mask), out, logsumexp, cfg)


def _forward_cuda(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False,
    return_debug_mask: bool = False, *, scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    if return_debug_mask:
        raise RuntimeError("scaled_dot_product_flash_attention of dlkernels: return_debug_mask must be False")
    o, lse, _ = operators.run_forward(_given(query, key, value, None), _config(query, dropout_p, is_causal, scale))
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    unused = torch.zeros((), dtype=torch.uint64, device=query.device)
    return o, lse, None, None, query.shape[2], key.shape[2], state, unused, query.new_empty(0)


def _backward_cuda(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor,
    cum_seq_q: Tensor | None, cum_seq_k: Tensor | None, max_q: int, max_k: int, dropout_p: float, is_causal: bool,
    philox_seed: Tensor, philox_offset: Tensor, *, scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    cfg = _config(query, dropout_p, is_causal, scale)
    return _gradients(grad_out, _given(query, key, value, None), out, logsumexp, cfg)
