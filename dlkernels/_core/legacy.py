"""Batched gradients: torch.autograd.grad(..., is_grads_batched=True), functional.jacobian(vectorize=True),
gradcheck(check_batched_grad=True).

These run a backward once on "legacy" batched tensors, the wrappers of the vmap that preceded torch.func. Operators
without a batching rule refuse them, and autograd loses the history of what a Function computes from them. Therefore a
backward unwraps them, runs under torch.vmap, for which the Functions have rules, and wraps the results again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dlkernels._core import extension, tangents
from dlkernels._core.private_torch import (
    add_batch_dim,
    are_transforms_active,
    enter_vmap_level,
    forward_ad,
    is_legacy_batched,
    leave_vmap_level,
    remove_batch_dim,
    unwrap_dead_wrappers,
)

__all__ = ["differentiate", "is_batched", "map_samples", "run_backward"]


def is_batched(tensors: Sequence[Any]) -> bool:
    for tensor in tensors:  # noqa: SIM110  # runs in every backward; a generator costs more than the loop
        if isinstance(tensor, Tensor) and is_legacy_batched(tensor):
            return True
    return False


def run_backward(
    function: Any, cotangents: Sequence[Tensor | None], args: tuple[Any, ...], apply: Callable[..., Any]
) -> Sequence[Tensor]:
    """Runs `function`, the Function of a backward, in the cheapest way that is correct in the current mode. `apply` is
    its C++ apply without the Python around it."""
    if torch.compiler.is_compiling():
        return function.forward(*args)  # type: ignore[no-any-return]
    if is_batched(cotangents):
        return map_samples(function.apply, args)
    if forward_ad._current_level >= 0 and tangents.are_carried(args):
        extension.announce_forward_mode()
        return function.by_reference(*unwrap_dead_wrappers(args))  # type: ignore[no-any-return]
    if are_transforms_active():
        return function.apply(*args)  # type: ignore[no-any-return]
    if torch.is_grad_enabled():
        return apply(*unwrap_dead_wrappers(args))  # type: ignore[no-any-return]
    return function.forward(*args)  # type: ignore[no-any-return]


def map_samples(call: Callable[..., Sequence[Tensor]], args: Sequence[Any]) -> tuple[Tensor, ...]:
    """Runs `call(*args)` under torch.vmap over the legacy batched tensors among `args`, and wraps the results.

    Raises NotImplementedError if a tensor is batched twice.
    """
    # The level of the innermost legacy vmap is the nesting depth, which can only be read by entering one more.
    level = enter_vmap_level() - 1
    leave_vmap_level()
    size = _batch_size(args, level)
    batched = [isinstance(arg, Tensor) and is_legacy_batched(arg) for arg in args]
    plain = [remove_batch_dim(arg, level, size, 0) if is_it else arg for arg, is_it in zip(args, batched, strict=True)]
    if is_batched(plain):
        raise NotImplementedError("dlkernels: gradients that are batched twice (is_grads_batched within itself)")
    mapped = [arg for arg, is_it in zip(plain, batched, strict=True) if is_it]

    def one_sample(*samples: Tensor) -> tuple[Tensor, ...]:
        rest = iter(samples)
        return tuple(call(*(next(rest) if is_it else arg for arg, is_it in zip(plain, batched, strict=True))))

    results = torch.vmap(one_sample)(*mapped)
    return tuple(add_batch_dim(result, 0, level) for result in results)


def differentiate(
    call: Callable[..., Sequence[Tensor | None]], cotangents: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    """Runs `call(*cotangents)`, through `map_samples` if they are batched. Some of the results may be None."""
    if torch.compiler.is_compiling() or not is_batched(cotangents):
        return call(*cotangents)
    present: list[int] = []

    def without_none(*given: Tensor | None) -> list[Tensor]:
        results = call(*given)
        present[:] = [at for at, result in enumerate(results) if result is not None]
        count[:] = [len(results)]
        return [result for result in results if result is not None]

    count: list[int] = []
    grads = map_samples(without_none, cotangents)
    full: list[Tensor | None] = [None] * count[0]
    for at, grad in zip(present, grads, strict=True):
        full[at] = grad
    return full


def _batch_size(args: Sequence[Any], level: int) -> int:
    for arg in args:
        if isinstance(arg, Tensor) and is_legacy_batched(arg):
            return int(remove_batch_dim(arg, level, 1, 0).shape[0])
    raise AssertionError("no batched tensor among the arguments")
