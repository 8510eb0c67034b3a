"""Finds the calls of attention that a layer makes: its own forward runs with empty projections up to the attention."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from dlkernels._core.autocast import autocast_dtype
from dlkernels.attention.layers import MultiheadAttention
from dlkernels.attention.transformer import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = ["LAYERS", "AttentionCall", "attention_calls"]

LAYERS = (MultiheadAttention, TransformerEncoderLayer, TransformerDecoderLayer)


class AttentionCall(NamedTuple):
    """The call `functional.attention(q, k, v, **options)`, or, if there is a `reason`, a call that does not become one.
    q, k and v have the sizes and dtype of the real ones, and no values. `sources` are the tensors from which the real
    ones are computed."""

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]
    reason: str = ""
    sources: tuple[Tensor, ...] = ()


def attention_calls(layer: Module, *args: Any, **kwargs: Any) -> list[AttentionCall]:
    """The calls that `layer(*args, **kwargs)` would make, in order. A mistake raises the error of the layer itself."""
    given = inspect.signature(layer.forward).bind(*args, **kwargs)
    given.apply_defaults()
    a = given.arguments
    sources = (*(value for value in a.values() if isinstance(value, Tensor)), *layer.parameters())
    return [call._replace(sources=sources) for call in _calls_in(layer, a)]


def _calls_in(layer: Module, a: dict[str, Any]) -> list[AttentionCall]:
    """The calls of a layer with these arguments, by name."""
    if isinstance(layer, MultiheadAttention):
        return [_asked("attention", layer, a)]
    first = "src" if isinstance(layer, TransformerEncoderLayer) else "tgt"
    if isinstance(layer, TransformerEncoderLayer):
        masks = layer._masks(a["src"].dtype, a["src_mask"], a["src_key_padding_mask"])
        a["src_mask"], a["src_key_padding_mask"] = masks
    hint = a["is_causal" if first == "src" else "tgt_is_causal"]
    calls = [_inner(layer, "self_attn", a[first], a[first], a, first, hint)]
    if isinstance(layer, TransformerDecoderLayer):
        memory = (a["memory"], a, "memory", a["memory_is_causal"])
        calls.append(_inner(layer, "multihead_attn", a["tgt"], *memory))
    return calls


def _inner(
    layer: Module, name: str, query: Tensor, key: Tensor, given: dict[str, Any], of: str, hint: bool
) -> AttentionCall:  # fmt: skip
    attention = getattr(layer, name)
    if not isinstance(attention, MultiheadAttention):
        return AttentionCall(name, query, key, key, {}, f"{type(attention).__name__} is not a layer of dlkernels")
    return _asked(name, attention, {
        "query": query, "key": key, "value": key, "key_padding_mask": given[f"{of}_key_padding_mask"],
        "attn_mask": given[f"{of}_mask"], "need_weights": False, "is_causal": hint,
    })  # fmt: skip


def _asked(name: str, attention: MultiheadAttention, given: dict[str, Any]) -> AttentionCall:
    class Follower(_Follower, type(attention)):  # type: ignore[misc]
        pass

    # A module of another class that has the same attributes as `attention`, which itself is not changed.
    follower = object.__new__(Follower)
    object.__setattr__(follower, "__dict__", attention.__dict__)
    try:
        follower.forward(**given)
    except _Reached as reached:
        return AttentionCall(name, *reached.tensors, reached.options, reached.reason)
    raise AssertionError("forward ended without attention")


class _Reached(BaseException):
    def __init__(self, tensors: tuple[Tensor, Tensor, Tensor], options: dict[str, Any], reason: str) -> None:
        self.tensors, self.options, self.reason = tensors, options, reason


class _Follower:
    embed_dim: int
    _dropout_p: Callable[[], float]

    def _is_torchs(self, *inputs: Tensor) -> bool:
        return False

    def _private(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return inputs

    def _project(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.new_empty((*x.shape[:-1], self.embed_dim), dtype=_projected_dtype(x)) for x in inputs)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, need_weights: bool, **options: Any) -> Any:
        if need_weights:
            reason = "need_weights=True: PyTorch operations compute the weights, and the result from them"
            raise _Reached((q, k, v), options, reason)
        raise _Reached((q, k, v), {"dropout_p": self._dropout_p(), **options}, "")


def _projected_dtype(x: Tensor) -> torch.dtype:
    dtype = autocast_dtype(x)
    return x.dtype if dtype is None or x.dtype == torch.float64 else dtype
