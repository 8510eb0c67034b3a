"""How the kernels that the host code launches take their numbers: each has one type and is never compiled in.

Triton by itself compiles a kernel anew if an integer becomes 1, a multiple of 16, or too large for 32 bits, which
strides do as lengths change. A compilation takes seconds.
"""

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

_INT32 = frozenset(
    ("B", "GROUP", "H", "M", "N", "left", "picture_cols", "picture_rows", "right", "splits", "tiles_m", "tiles_n")
)
_INT64 = frozenset(("offset", "seed", "threshold"))
_FLOAT32 = frozenset(("cap", "keep_scale", "scale", "softmax_scale"))


def _type(name: str) -> Any:
    if name.startswith("stride_") or name in _INT64:
        return tl.int64
    return tl.int32 if name in _INT32 else tl.float32 if name in _FLOAT32 else None


def entry(function: Callable[..., None]) -> Any:
    """triton.jit for a kernel whose parameters are pointers (`.._ptr`, `cu_..`), numbers with the names above, and
    constexpr."""
    numbers = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.annotation is not inspect.Parameter.empty or name.endswith("_ptr") or name.startswith("cu_"):
            continue
        kind = _type(name)
        if kind is None:
            raise TypeError(f"no type for the parameter {name} of {function.__name__}")
        function.__annotations__[name] = kind
        numbers.append(name)
    return triton.jit(do_not_specialize=numbers)(function)
