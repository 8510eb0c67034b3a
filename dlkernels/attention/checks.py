"""Checks of the arguments of attention: shapes, dtypes and devices. Only `cu_values` reads the values of a tensor; the
operators check the values of cu_seqlens themselves.

The checks raise TypeError for arguments of a wrong type, ValueError for ranks, dtypes that no attention has, and values
out of range, RuntimeError for sizes, devices and dtypes that do not fit together. A message names the argument, what
was expected and what was given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dlkernels._core.checks import tensor as check_tensor

_CAUSAL = {False: 0, True: 1, "top_left": 1, "bottom_right": 2}
_LIMIT = 2**63


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    return value


def number(name: str, value: Any) -> Any:
    """Checks that `value` is a finite real number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return value


def _integer(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if not least <= value < _LIMIT:
        raise ValueError(f"{name}: expected an int of at least {least}, got {value}")
    return value  # type: ignore[return-value]


def probability(value: Any) -> float:
    number("dropout_p", value)
    if not 0 <= value <= 1:
        raise ValueError(f"dropout_p: expected a probability in 0..1, got {value}")
    return float(value)


def softcap(value: Any, dtype: torch.dtype) -> float:
    """dtype: that of q. The upper limit is the largest number whose reciprocal is normal in the dtype of the scores."""
    number("softcap", value)
    most = 1 / torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).tiny
    if not 0 <= value <= most:
        raise ValueError(f"softcap: expected 0 (none) or a positive number of at most {most:.2g}, got {value}")
    return float(value)


def scale(value: Any, width: int) -> float:
    """softmax_scale, 1 / sqrt(D) for None."""
    if value is not None:
        return float(number("softmax_scale", value))
    return 1.0 / math.sqrt(width) if width else 1.0


def causal(value: Any) -> int:
    """0 none, 1 top left, 2 bottom right."""
    if not isinstance(value, (bool, str)):
        raise TypeError(f"causal: expected a bool, 'top_left' or 'bottom_right', got {type(value).__name__}")
    if value not in _CAUSAL:
        raise ValueError(f"causal: expected a bool, 'top_left' or 'bottom_right', got {value!r}")
    return _CAUSAL[value]


def is_bias(mask: Any) -> bool:
    """Whether `mask` is a CausalBias, a subclass of Tensor that describes an alignment and holds no values. The test is
    by name because importing the class takes a second."""
    return type(mask).__name__ == "CausalBias" and type(mask).__module__ == "torch.nn.attention.bias"


def bias_alignment(bias: Any, causal: Any, queries: int, keys: int) -> str:
    """The value of `causal` that means the same as a CausalBias given as attn_mask."""
    if causal is not False:
        raise ValueError(f"causal: expected False, as attn_mask is a CausalBias, got {causal!r}")
    if (bias.seq_len_q, bias.seq_len_kv) != (queries, keys):
        raise RuntimeError(
            f"attn_mask: expected a CausalBias for {queries} queries and {keys} keys, got one for {bias.seq_len_q} and "
            f"{bias.seq_len_kv}"
        )
    return "top_left" if bias.variant.name == "UPPER_LEFT" else "bottom_right"


def window(value: Any) -> tuple[int, int]:
    """(left, right), -1 for unbounded."""
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"window: expected a pair (left, right), got {type(value).__name__}")
    if len(value) != 2:
        raise ValueError(f"window: expected a pair (left, right), got {len(value)} entries")
    left, right = (-1 if edge is None else _integer("window", edge, -1) for edge in value)
    return left, right


def bins(name: str, value: Any) -> int:
    return _integer(name, value, 1)


def max_seqlen(name: str, value: Any) -> int:
    return 0 if value is None else _integer(name, value, 0)


def no_lengths(**lengths: Any) -> None:
    for name, value in lengths.items():
        if value is not None:
            raise ValueError(f"{name}: expected None without cu_seqlens, got {value}")


def tensors(function: str, named: Sequence[tuple[str, Any]]) -> None:
    for name, value in named:
        check_tensor(function, name, value)
        dense(name, value)


def same_kind(q: Tensor, k: Tensor, v: Tensor | None) -> None:
    """Checks that the tensors have one floating dtype and one device."""
    floating("q", q)
    for name, tensor in (("k", k), ("v", v)):
        if tensor is None:
            continue
        if tensor.dtype != q.dtype:
            raise RuntimeError(f"{name}: expected {q.dtype} like q, got {tensor.dtype}")
        same_device(name, tensor, q)


def dense(name: str, tensor: Tensor) -> None:
    if tensor.is_nested:
        raise ValueError(f"{name}: expected a dense tensor (for ragged ones there is cu_seqlens), got a nested one")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got layout {tensor.layout}")


def floating(name: str, tensor: Tensor) -> None:
    if not tensor.dtype.is_floating_point:
        raise ValueError(f"{name}: expected a floating point dtype, got {tensor.dtype}")


def same_device(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.device != q.device:
        raise RuntimeError(f"{name}: expected a tensor on {q.device} like q, got one on {tensor.device}")


def heads(q: Tensor, k: Tensor, v: Tensor | None, packed: bool, enable_gqa: bool) -> None:
    """Checks the ranks and sizes of q, k and v; v may be None."""
    rank, layout = (3, "[rows, heads, width] with cu_seqlens") if packed else (4, "[B, heads, rows, width]")
    named = [("q", q), ("k", k)] if v is None else [("q", q), ("k", k), ("v", v)]
    for name, tensor in named:
        if tensor.dim() != rank:
            raise ValueError(f"{name}: expected {rank} dimensions, {layout}, got shape {list(tensor.shape)}")
    width = rank - 1
    if k.shape[width] != q.shape[width]:
        raise RuntimeError(f"k: expected width {q.shape[width]} like q, got shape {list(k.shape)}")
    if not packed and k.shape[0] != q.shape[0]:
        raise RuntimeError(f"k: expected batch size {q.shape[0]} like q, got shape {list(k.shape)}")
    of_q, of_k = q.shape[1], k.shape[1]
    if of_q != of_k:
        if not enable_gqa:
            raise RuntimeError(f"k: expected {of_q} heads like q (enable_gqa is off), got shape {list(k.shape)}")
        if of_k == 0 or of_q % of_k:
            raise RuntimeError(f"k: expected a number of heads that divides the {of_q} of q, got shape {list(k.shape)}")
    if v is None:
        return
    if v.shape[:width] != k.shape[:width]:
        raise RuntimeError(
            f"v: expected the batch, heads and rows of k, whose shape is {list(k.shape)}, got shape {list(v.shape)}"
        )


def mask(function: str, value: Any, q: Tensor, keys: int) -> Tensor:
    """`value` as [B, H, M, N] with sizes of 1 where it is broadcast."""
    check_tensor(function, "attn_mask", value)
    dense("attn_mask", value)
    same_device("attn_mask", value, q)
    if value.dtype not in (torch.bool, q.dtype, torch.float32):
        raise RuntimeError(f"attn_mask: expected bool, {q.dtype} like q, or torch.float32, got {value.dtype}")
    full = (*q.shape[:3], keys)
    rank = value.dim()
    if not 2 <= rank <= 4:
        raise ValueError(f"attn_mask: expected 2 to 4 dimensions, got shape {list(value.shape)}")
    for size, expected in zip(value.shape, full[4 - rank :], strict=True):
        if size != expected and size != 1:
            raise RuntimeError(
                f"attn_mask: expected a shape that broadcasts to {list(full)}, got shape {list(value.shape)}"
            )
    return value[(None,) * (4 - rank)] if rank < 4 else value  # type: ignore[no-any-return]


def per_head(function: str, name: str, value: Any, q: Tensor, shapes: Sequence[tuple[int, ...]]) -> None:
    check_tensor(function, name, value)
    dense(name, value)
    floating(name, value)
    same_device(name, value, q)
    if not any(value.shape == shape for shape in shapes):
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise RuntimeError(f"{name}: expected shape {expected}, got {list(value.shape)}")


def cu_seqlens(cu_q: Any, cu_k: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Both as int32 on `device`."""
    for name, value, other in (("cu_seqlens_q", cu_q, "cu_seqlens_k"), ("cu_seqlens_k", cu_k, "cu_seqlens_q")):
        if value is None:
            raise ValueError(f"{name}: expected a tensor, as {other} is given, got None")
        check_tensor("attention", name, value)
        dense(name, value)
        if value.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name}: expected torch.int32 or torch.int64, got {value.dtype}")
        if value.dim() != 1 or value.shape[0] == 0:
            raise ValueError(f"{name}: expected shape [B + 1], got {list(value.shape)}")
    if cu_k.shape != cu_q.shape:
        raise RuntimeError(f"cu_seqlens_k: expected shape {list(cu_q.shape)} like cu_seqlens_q, got {list(cu_k.shape)}")
    return _int32(cu_q, device), _int32(cu_k, device)


def _int32(value: Tensor, device: torch.device) -> Tensor:
    if value.dtype == torch.int64:
        value = value.clamp(-1, 2**31 - 1)  # a value beyond int32 must not become a small one
    return value.to(device, torch.int32)


def cu_values(name: str, value: Tensor, rows: int, longest: int) -> Tensor:
    """Checks the values of cu_seqlens as the operators do, for calls that run on the reference. It reads values, so it
    is for eager calls. It returns the copy that it checked, because another thread may write to the caller's tensor."""
    value = value.clone()
    lengths = value[1:] - value[:-1]
    if int(value[0]) != 0 or bool((lengths < 0).any()) or int(value[-1]) > rows:
        raise ValueError(f"{name}: expected values from 0 to at most {rows} that never fall, got {value.tolist()}")
    if longest and lengths.numel() and int(lengths.max()) > longest:
        raise ValueError(f"{name}: expected sequences of at most {longest} rows (max_seqlen), got {lengths.tolist()}")
    return value
