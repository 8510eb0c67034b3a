"""Calls of layers past torch's dispatcher, and the contexts and inputs in which they are not plain calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dlkernels.rnn.operators import direct
from tests.support.rnn_op_calls import B, H, peer


def layer_of(mode: str, proj: int = 0, **options: Any) -> torch.nn.RNNBase:
    return peer(mode, proj, dtype=torch.float32, **options)


def call(layer: torch.nn.RNNBase, x: Tensor, states: tuple[Tensor, ...] = (), **others: Any) -> list[Tensor] | None:
    h0, c0 = (*states, None, None)[:2]
    return direct.layers(
        layer.mode.lower(), x, h0, c0, layer._flat_weights, others.get("packed"), others.get("batch_sizes"),
        others.get("lengths"), layer.num_layers, layer.bidirectional, layer.batch_first,
    )  # fmt: skip


def states_of(layer: torch.nn.RNNBase, batch: int = B) -> tuple[Tensor, ...]:
    entries = layer.num_layers * (2 if layer.bidirectional else 1)
    sizes = [layer.proj_size or H, H] if layer.mode == "LSTM" else [H]
    return tuple(torch.randn(entries, batch, size) for size in sizes)


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class WatchFunctions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def profiled() -> Iterator[None]:
    with torch.profiler.profile():
        yield


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "dispatch mode": Watch,
    "function mode": WatchFunctions,
    "profiler": profiled,
    "forward mode": forward_ad.dual_level,
}


class Mine(Tensor):
    pass


def zero_data(x: Tensor) -> Tensor:
    freed = x.clone()
    freed.untyped_storage().resize_(0)
    return freed


INPUTS: dict[str, Callable[[Tensor], Any]] = {
    "not a tensor": lambda x: x.numpy(),
    "a subclass": lambda x: x.as_subclass(Mine),
    "a negative view": torch._neg_view,
    "a tensor of zeros without memory": lambda x: torch._efficientzerotensor(x.shape),
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "freed storage": zero_data,
    "another dtype than the weights": lambda x: x.double(),
    "integers": lambda x: x.int(),
    "another rank": lambda x: x[0],
    "another number of features": lambda x: x[..., 1:],
    "no step": lambda x: x[:0],
    "a gradient is wanted": lambda x: x.clone().requires_grad_(),
}
