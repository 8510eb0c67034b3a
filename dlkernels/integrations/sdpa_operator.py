"""Our kernels in the place of aten::scaled_dot_product_attention, for models that call torch's function."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dlkernels._core import extension
from dlkernels._core.private_torch import (
    are_transforms_active,
    composite,
    has_saved_tensors_hooks,
    is_in_backward,
    skip_in_dynamo,
)
from dlkernels._core.routing import ONLY_SCALAR
from dlkernels.attention.sdpa import Call, arrange, run, scaled_dot_product_attention
from dlkernels.integrations import counts
from dlkernels.integrations.switch import PLAIN, SMALL, Kernels, Switch

__all__ = ["SWITCH", "AttentionPatch", "kernel_name", "patch_attention"]

_NAME = "scaled_dot_product_attention"
_torchs = composite(torch.ops.aten.scaled_dot_product_attention.default)
# The most draws that are remembered, at 100 bytes each. No model has as many calls that wait for their backward.
_MOST_DRAWS = 2**16


class Least(NamedTuple):
    """How many scores a call on the CPU has to have: of float32 and float64, and of 16-bit tensors without and with a
    gradient. With fewer, torch computes it in less time than the Python code around our kernel takes."""

    wide: int
    narrow: int
    narrow_training: int


def least_scores() -> Least:
    """As measured for the kind of machine (csrc/core/plan_constants.def)."""
    return Least(*(extension.plan_constant(f"sdpa_least_scores{of}") for of in ("", "_16_bit", "_16_bit_training")))


LEAST_SCORES = least_scores()

# What is known of the dropout mask that was drawn from a state of the random number generator (hashed). False: our
# kernel drew it, and no backward has drawn it again. True: a backward has drawn it again. None: torch also drew a mask
# from the same state, so a backward cannot tell which of the two it has to draw again.
_draws: dict[int, bool | None] = {}


def _register() -> Kernels:
    return Kernels({_NAME: _kernel})


# The kernels are needed while draws are remembered: a later recomputation must find out whether ours drew its mask.
SWITCH = Switch("attention", _register, is_needed=lambda: bool(_draws))


class AttentionPatch(contextlib.ContextDecorator):
    """The context that `patch_attention` returns. It may be entered repeatedly and nested, and left in any order and by
    any thread."""

    def __enter__(self) -> AttentionPatch:
        SWITCH.enter()
        return self

    def __exit__(self, *_: object) -> None:
        SWITCH.leave()

    def _recreate_cm(self) -> Any:
        return patch_attention()


def patch_attention() -> AttentionPatch:
    """`with dlkernels.patch_attention():` runs models that call torch.nn.functional.scaled_dot_product_attention on our
    kernels, however they call it. This includes torch.nn.MultiheadAttention and the Transformer layers where they call
    it, C++ and TorchScript, all threads, recomputation by torch.utils.checkpoint, and what is compiled inside of the
    block. It also works as a decorator. Calls that our kernels do not serve run in torch, which also raises the errors.

    Run the backward of checkpointed calls inside of the block as well. After it, torch recomputes calls without
    dropout, which raises CheckpointError unless `use_reentrant=True`; calls with dropout are recomputed by the kernel
    that drew the mask. A compiled graph keeps the kernels that it was compiled with. A thread that compiles must enter
    the block itself.
    """
    if torch.compiler.is_compiling():
        return _Traced()  # type: ignore[return-value]
    return AttentionPatch()


class _Traced(TorchFunctionMode):
    """The switch inside of a function that torch.compile traces: Dynamo puts our function into its graph."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            func = scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def _kernel(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    call: Call | str | None = _why_not(query, dropout_p)
    if call is None and _is_small(query, key, dropout_p):
        call = SMALL
    if call is None:
        call = arrange(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if isinstance(call, str):
        counts.count_left(_NAME, call)
        return _torchs(  # type: ignore[no-any-return]
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    isa = extension.native.isa() if query.is_cpu else ""  # type: ignore[union-attr]
    counts.count_served(_NAME, kernel_name(isa, query.dtype))
    return run(call)


@functools.cache
def kernel_name(isa: str, dtype: torch.dtype) -> str:
    """Of the kernel that large calls take; `isa` is the instruction set in force, empty on CUDA."""
    if not isa:
        return "cuda/triton/attention"
    plan = extension.native.attention_plan(dtype, 1, 1, 1, 64, 64, 64, 64)  # type: ignore[union-attr]
    return str(plan["kernel"]).removesuffix("/tiles")


def _is_small(query: Tensor, key: Tensor, dropout_p: float) -> bool:
    """Whether torch is faster. With dropout it takes its slowest path."""
    if dropout_p or type(query) not in PLAIN or not query.is_cpu or query.is_nested or query.dim() < 2 or key.dim() < 2:
        return False
    least = LEAST_SCORES.wide
    if query.itemsize == 2:
        training = torch.is_grad_enabled() and query.requires_grad
        least = LEAST_SCORES.narrow_training if training else LEAST_SCORES.narrow
    return query.numel() // max(query.shape[-1], 1) * key.shape[-2] < least


def _why_not(query: Tensor, dropout_p: float) -> str | None:
    """Why a call is left to torch; None if our kernels may serve it."""
    # A torch.func transform that has reached this level of dispatch can no longer handle an autograd.Function.
    if are_transforms_active():
        return "inside a torch.func transform"
    reason = SWITCH.why_not(query)
    if reason is None and extension.prefers_torch and query.is_cpu:
        reason = ONLY_SCALAR
    if dropout_p <= 0 or type(query) not in PLAIN:
        return reason
    if is_in_backward():
        return None if _was_ours() else "recomputes a call that torch served"
    if not torch.is_grad_enabled() or has_saved_tensors_hooks():
        _remember(reason is None)
    return reason


def _remember(ours: bool) -> None:
    """Records a call whose dropout mask may be drawn again in a backward: in either kind of checkpoint, or in a
    Function of the user."""
    draw = _draw()
    with SWITCH.lock:
        if ours:
            _draws[draw] = False
            if len(_draws) > _MOST_DRAWS:
                _draws.pop(next(iter(_draws)))
        elif _draws.get(draw, True):
            _draws.pop(draw, None)
        else:
            _draws[draw] = None


def _was_ours() -> bool:
    """Whether the mask that a backward draws again was drawn by our kernel."""
    draw = _draw()
    with SWITCH.lock:
        if draw not in _draws:
            return False
        if _draws[draw] is None:
            raise RuntimeError(
                "scaled_dot_product_attention: cannot tell whether a dropout mask that is to be drawn again was drawn "
                "inside or outside of dlkernels.patch_attention(), as calls of both kinds started from the same state "
                "of the random number generator; run the backward of checkpointed calls inside of the block"
            )
        _draws[draw] = True
    return True


def _draw() -> int:
    """A hash of the generator's state. It identifies the dropout mask that would be drawn now, because checkpoint
    restores the state."""
    state = torch.get_rng_state()
    return hash(ctypes.string_at(state.data_ptr(), state.numel()))


# Dynamo must not trace the kernel where a compiled program calls the operator outside of its graphs.
skip_in_dynamo(_kernel)
