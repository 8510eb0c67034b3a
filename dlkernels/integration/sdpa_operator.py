"""A switch that runs aten::scaled_dot_product_attention on our kernels, for models that call torch's function.

While it is on, our kernels are registered in the dispatcher, where they take precedence over torch's composite kernel.
So they serve calls from every thread, from C++ and TorchScript, and from the recomputation that torch.utils.checkpoint
does during a backward.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import os
import threading
from typing import Any

import torch
from torch import Tensor
from torch.library import Library
from torch.overrides import TorchFunctionMode

from dlkernels._core import compile_cache
from dlkernels._core.private_torch import (
    are_transforms_active,
    has_saved_tensors_hooks,
    is_in_backward,
    skip_in_dynamo,
    unregister,
)
from dlkernels.attention.sdpa import scaled_dot_product_attention

__all__ = ["AttentionPatch", "patch_attention"]

_OPERATOR = torch.ops.aten.scaled_dot_product_attention.default
# Both the keys with and without autograd are needed, because inference mode skips the autograd keys.
_KEYS = ("AutogradCPU", "CPU", "AutogradCUDA", "CUDA")
# The switch's tag in the keys of Inductor's caches, which see torch's operator but not ours, to which it is traced.
_TAG = "patch_attention"
# The most draws that are remembered, at 100 bytes each. No model has as many calls that wait for their backward.
_MOST_DRAWS = 2**16


class _State:
    """The switch's state in the process. `users` counts the blocks that are entered. `draws` maps a state of the random
    number generator (hashed) to what is known of the dropout mask drawn from it. False: our kernel drew it, and no
    backward has drawn it again. True: a backward has drawn it again. None: torch also drew a mask from the same state,
    so a backward cannot tell which of the two it has to draw again.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.library: Library | None = None
        self.draws: dict[int, bool | None] = {}

    def renew_lock(self) -> None:
        """Replaces the lock in a forked child, where the thread that held it may not exist."""
        self.lock = threading.Lock()


class _Running(threading.local):
    """The switch's state in this thread. `inside` tells whether our function is running. `depth` counts the blocks that
    the thread entered and did not leave. torch's configuration, which holds the tag, is thread-local as well."""

    inside = False
    depth = 0


_state = _State()
_running = _Running()
os.register_at_fork(after_in_child=_state.renew_lock)


class AttentionPatch(contextlib.ContextDecorator):
    """The context that `patch_attention` returns. It may be entered repeatedly and nested, and left in any order and by
    any thread."""

    def __enter__(self) -> AttentionPatch:
        with _state.lock:
            if _state.library is None:
                _state.library = _register()
            _state.users += 1
        _running.depth += 1
        compile_cache.add(_TAG)
        return self

    def __exit__(self, *_: object) -> None:
        with _state.lock:
            _state.users -= 1
            off = _state.users == 0
            # The kernels stay registered while another thread may be about to call one, and while draws are remembered:
            # a later recomputation must find out whether our kernel drew its dropout mask.
            if off and _state.library is not None and not _thread._count() and not _state.draws:
                unregister(_state.library)
                _state.library = None
        _running.depth = 0 if off else max(_running.depth - 1, 0)
        if _running.depth == 0:
            compile_cache.remove(_TAG)

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


def _register() -> Library:
    library = Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    try:
        for key in _KEYS:
            library.impl("scaled_dot_product_attention", _kernel, key)  # type: ignore[no-untyped-call]
    except BaseException:
        unregister(library)
        raise
    return library


def _kernel(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    # Our function passes calls that it does not serve to torch's function, which dispatches to this kernel again.
    if _running.inside or not _is_ours(query, dropout_p):
        return _OPERATOR.decompose(  # type: ignore[no-any-return]
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    _running.inside = True
    try:
        return scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    finally:
        _running.inside = False


def _is_ours(query: Tensor, dropout_p: float) -> bool:
    on = _state.users > 0
    # A torch.func transform that has reached this level of dispatch can no longer handle an autograd.Function.
    if are_transforms_active():
        return False
    if type(query) not in (Tensor, torch.nn.Parameter):
        # The call is traced, and its result may be cached under a key that has the tag of this thread.
        if not on:
            compile_cache.remove(_TAG)  # another thread left the block that this one entered
        return on and compile_cache.contains(_TAG)
    if dropout_p <= 0:
        return on
    if is_in_backward():
        return _was_ours()
    if not torch.is_grad_enabled() or has_saved_tensors_hooks():
        _remember(on)
    return on


def _remember(ours: bool) -> None:
    """Records a call whose dropout mask may be drawn again in a backward: in either kind of checkpoint, or in a
    Function of the user."""
    draws, draw = _state.draws, _draw()
    with _state.lock:
        if ours:
            draws[draw] = False
            if len(draws) > _MOST_DRAWS:
                draws.pop(next(iter(draws)))
        elif draws.get(draw, True):
            draws.pop(draw, None)
        else:
            draws[draw] = None


def _was_ours() -> bool:
    """Whether the mask that a backward draws again was drawn by our kernel."""
    draws, draw = _state.draws, _draw()
    with _state.lock:
        if draw not in draws:
            return False
        if draws[draw] is None:
            raise RuntimeError(
                "scaled_dot_product_attention: cannot tell whether a dropout mask that is to be drawn again was drawn "
                "inside or outside of dlkernels.patch_attention(), as calls of both kinds started from the same state "
                "of the random number generator; run the backward of checkpointed calls inside of the block"
            )
        draws[draw] = True
    return True


def _draw() -> int:
    """A hash of the generator's state. It identifies the dropout mask that would be drawn now, because checkpoint
    restores the state."""
    state = torch.get_rng_state()
    return hash(ctypes.string_at(state.data_ptr(), state.numel()))


# Dynamo must not trace the kernel where a compiled program calls the operator outside of its graphs.
skip_in_dynamo(_kernel)
