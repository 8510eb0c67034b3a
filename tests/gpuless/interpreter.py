"""Corrects Triton's interpreter (`TRITON_INTERPRET=1`) for tests: bfloat16 arithmetic, and faults beyond a tensor's
end.

The interpreter stores bfloat16 as uint16 and computes on the bits, so that a product is off by 1e10 without an error.
And numpy, like a GPU, reads beyond the end of a tensor without an error.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.language import core
from triton.runtime import interpreter

assert os.environ.get("TRITON_INTERPRET") == "1", "Triton must find TRITON_INTERPRET=1 when it is imported"


def _widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _round(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    nearest_even = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), nearest_even)


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _up(handle: Any) -> Any:
    return interpreter.TensorHandle(_widen(handle.data), tl.float32) if _is_bf16(handle) else handle


def _down(handle: Any) -> Any:
    return interpreter.TensorHandle(_round(handle.data), tl.bfloat16)


def install_bfloat16() -> None:
    """Makes arithmetic on bfloat16 compute in float32 and round to nearest even, as on the GPU."""
    builder = interpreter.InterpreterBuilder
    cast, dot, binary, unary = builder.cast_impl, builder.create_dot, builder.binary_op, builder.unary_op

    def cast_impl(self: Any, src: Any, dst: Any) -> Any:
        if _is_bf16(src) and dst.scalar != tl.bfloat16:
            return _up(src) if dst.scalar == tl.float32 else cast(self, _up(src), dst)
        if dst.scalar == tl.bfloat16 and not _is_bf16(src):
            return interpreter.TensorHandle(_round(src.data.astype(np.float32)), tl.bfloat16)
        return cast(self, src, dst)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return dot(self, _up(a), _up(b), d, *rest)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if not (_is_bf16(lhs) or _is_bf16(rhs)):
            return binary(self, lhs, rhs, op)
        result = binary(self, _up(lhs), _up(rhs), op)
        return result if result.data.dtype == np.bool_ else _down(result)

    def unary_op(self: Any, arg: Any, op: Any) -> Any:
        return _down(unary(self, _up(arg), op)) if _is_bf16(arg) else unary(self, arg, op)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot
    builder.binary_op, builder.unary_op = binary_op, unary_op


def _patch_once() -> None:
    patch = interpreter._patch_lang
    patched: set[frozenset[int]] = set()

    def patch_lang(function: Any) -> Any:
        seen = frozenset(id(x) for x in function.__globals__.values() if x is tl or x is core)
        if seen in patched:
            return interpreter._LangPatchScope()
        scope = patch(function)
        patched.add(seen)
        restore = scope.restore

        def restore_all() -> None:
            patched.clear()
            restore()

        scope.restore = restore_all
        return scope

    interpreter._patch_lang = patch_lang


def _remember(known: dict[Any, Any], key: Any, make: Callable[[], Any]) -> Any:
    if key not in known:
        known[key] = make()
    return known[key]


def _number(x: Any) -> Any:
    return x.value if isinstance(x, core.constexpr) else x


def install_shortcuts() -> None:
    """Makes the interpreter twice as fast. Half of its time is repeated work: it patches the language at each call of a
    function inside a kernel, and it builds the types of each tensor anew. Here both are done once; results are
    the same."""
    _patch_once()
    dtypes, tuples, blocks, tensors = {}, {}, {}, {}  # type: ignore[var-annotated]
    dtype_of, tuple_type_of = interpreter._get_np_dtype, core._type_for_tuple_values
    new_block, new_tensor = core.block_type.__init__, core.tensor.__init__

    def type_for_tuple_values(values: Sequence[Any], fields: Any = None) -> Any:
        key = tuple(map(_number, values))
        if fields is not None or any(type(x) is not int for x in key):
            return tuple_type_of(values, fields)
        return _remember(tuples, key, lambda: tuple_type_of(values))

    def init_block(self: Any, element_ty: Any, shape: Sequence[Any]) -> None:
        def attributes() -> dict[str, Any]:
            new_block(self, element_ty, shape)
            return dict(self.__dict__)

        self.__dict__.update(_remember(blocks, (element_ty.name, tuple(map(_number, shape))), attributes))

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        def attributes() -> dict[str, Any]:
            new_tensor(self, handle, type)
            return dict(self.__dict__)

        self.__dict__.update(_remember(tensors, type.name, attributes))
        self.handle = handle

    interpreter._get_np_dtype = lambda dtype: _remember(dtypes, dtype.name, lambda: dtype_of(dtype))
    core._type_for_tuple_values = type_for_tuple_values
    core.block_type.__init__, core.tensor.__init__ = init_block, init_tensor


def guarded(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor, filled with NaN if its dtype has NaN, whose last byte is just before a protected page."""
    count = int(np.prod(shape, dtype=np.int64))
    if count == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    size = count * torch.empty(0, dtype=dtype).element_size()
    total = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, total + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(address + total), mmap.PAGESIZE, 0):
        raise OSError(ctypes.get_errno(), "mprotect failed")
    tensor = torch.frombuffer(memory, dtype=dtype, count=count, offset=total - size).view(tuple(shape))
    return tensor.fill_(float("nan")) if dtype.is_floating_point else tensor


def guard(x: Tensor) -> Tensor:
    """A copy of x with its elements in the same memory order, which ends at a protected page."""
    order = sorted(range(x.dim()), key=lambda dim: (-x.stride(dim), dim))
    copy = guarded([x.size(dim) for dim in order], x.dtype)
    back = [order.index(dim) for dim in range(x.dim())]
    copy = copy.permute(back)
    return copy.copy_(x)
