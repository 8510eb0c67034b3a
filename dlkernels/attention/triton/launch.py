"""Launches a kernel with little work in Python, which is what decoding waits for.

At each launch Triton looks at every argument to find out which compiled kernel serves it. That takes longer than all
else that the host code does. Here it is looked up by what can differ between two calls of our kernels: constants,
options, and each pointer's dtype and alignment. Numbers cannot (kernels/entry.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
from torch import Tensor

__all__ = ["Options", "launch"]

_compiled: dict[tuple[Any, ...], Any] = {}


class Options(NamedTuple):
    """Triton's launch options."""

    num_warps: int = 4
    num_stages: int = 3
    enable_fp_fusion: bool = True


def launch(
    kernel: Any, grid: tuple[int, int], tensors: tuple[Tensor | None, ...], numbers: tuple[float, ...],
    constants: tuple[Any, ...], options: Options,
) -> None:  # fmt: skip
    """kernel[grid](*tensors, *numbers, *constants, **options). The first tensor is not None."""
    if not isinstance(kernel, triton.JITFunction):  # the interpreter, or a test's replacement
        kernel[grid](*tensors, *numbers, *constants, **options._asdict())
        return
    key = compiled_key(kernel, tensors, constants, options)
    compiled = _compiled.get(key)
    if compiled is None:
        compiled = kernel.warmup(*tensors, *numbers, *constants, grid=grid, **options._asdict())
        _compiled[key] = compiled
    blocks = (*grid, 1)
    compiled[blocks](*tensors, *numbers, *constants)


def compiled_key(
    kernel: Any, tensors: tuple[Tensor | None, ...], constants: tuple[Any, ...], options: Options
) -> tuple[Any, ...]:
    """Launches with the same key may use the same compiled kernel. As Triton does, it distinguishes only whether a
    pointer is a multiple of 16 bytes."""
    first = tensors[0]
    assert first is not None
    pointers = [None if x is None else x.dtype if x.data_ptr() % 16 == 0 else (x.dtype,) for x in tensors]
    return (kernel, first.get_device(), constants, options, *pointers)
