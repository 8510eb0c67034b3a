"""Fake implementations of operators that refuse tensors on different devices. A call with one tensor on the meta device
is dispatched to the fake whatever device the others are on, and without the check would return uninitialised memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dlkernels._core import compile_cache
from dlkernels._core.private_torch import schema_of

__all__ = ["register_fake"]

# Arguments that the kernels may want on the CPU while the others are on another device.
_ANYWHERE = frozenset(("batch_sizes", "lengths", "cu_seqlens_q", "cu_seqlens_k", "rng"))


def register_fake(name: str, fake: Callable[..., Any]) -> None:
    """Registers `fake` for the operator dlkernels::`name`. `fake` takes the arguments of the schema by name and
    collects those that it does not use in `**others`."""
    schema = schema_of(getattr(torch.ops.dlkernels, name).default)
    names = [argument.name for argument in schema.arguments]

    @functools.wraps(fake)
    def checked(*args: Any, **kwargs: Any) -> Any:
        arguments = dict(zip(names, args, strict=False)) | kwargs
        _check(name, arguments)
        compile_cache.add()
        return fake(**arguments)

    torch.library.register_fake(f"dlkernels::{name}", checked)


def _check(op: str, arguments: dict[str, Any]) -> None:
    first, device = "", None
    for name, value in arguments.items():
        if name in _ANYWHERE:
            continue
        for tensor in value if isinstance(value, (list, tuple)) else (value,):
            if not isinstance(tensor, Tensor):
                continue
            if device is None:
                first, device = name, tensor.device
            elif tensor.device != device:
                raise RuntimeError(f"{op}: {name} must be on {device}, as {first} is, got {tensor.device}")
