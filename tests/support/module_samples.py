"""Runs a module of ours or torch's on torch's sample inputs, and measures errors for slightly changed inputs."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.testing._internal.common_modules import FunctionInput, ModuleInfo, ModuleInput, module_db

from dlkernels.testing import error
from tests.support.layer_cases import NEIGHBOURS, neighbour

Nearby = list[list[tuple[float, float]]]

RECURRENT = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
ATTENTION = ("MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer")
STACKS = ("TransformerEncoder", "Transformer")
INFOS: dict[str, ModuleInfo] = {
    info.module_cls.__name__: info
    for info in module_db
    if info.module_cls in {getattr(nn, name) for name in (*RECURRENT, *ATTENTION, *STACKS)}
}


def samples(name: str, dtype: torch.dtype, training: bool) -> Iterator[ModuleInput]:
    """torch's own samples of a module of torch.nn."""
    # torch yields its packed samples only with this flag, which its own device tests set.
    packed = {"with_packed_sequence": True} if name in ("RNN", "GRU") else {}
    info = INFOS[name]
    torch.manual_seed(0)
    yield from info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training, **packed)


def tensors(value: Any) -> list[Tensor]:
    """Returns the tensors of an argument or a result, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, PackedSequence):
        return [value.data]
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in tensors(item)]
    if isinstance(value, dict):
        return [t for item in value.values() for t in tensors(item)]
    return []


def transform(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Applies `change` to every floating-point tensor of an argument."""
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else value
    if isinstance(value, PackedSequence):
        return PackedSequence(transform(value.data, change), *value[1:])
    if isinstance(value, (tuple, list)):
        return type(value)(transform(item, change) for item in value)
    if isinstance(value, dict):
        return {key: transform(item, change) for key, item in value.items()}
    return value


def cast(value: Any, dtype: torch.dtype) -> Any:
    return transform(value, lambda t: t.detach().to(dtype).requires_grad_(t.requires_grad))


def build(package: Any, name: str, sample: ModuleInput, dtype: torch.dtype, training: bool) -> torch.nn.Module:
    torch.manual_seed(1)
    module = getattr(package, name)(
        *sample.constructor_input.args, **sample.constructor_input.kwargs, dtype=torch.float32
    )
    return module.to(dtype).train(training)


def build_theirs(name: str, sample: ModuleInput, dtype: torch.dtype, training: bool) -> torch.nn.Module:
    if name != "TransformerEncoder":
        return build(nn, name, sample, dtype, training)
    encoder = nn.TransformerEncoder(*sample.constructor_input.args, **sample.constructor_input.kwargs)
    return encoder.to(dtype).train(training)


def evaluate(module: torch.nn.Module, sample: ModuleInput, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Returns outputs and the gradients of every input and parameter, with the same cotangents in every dtype."""
    args, kwargs = cast(sample.forward_input.args, dtype), cast(sample.forward_input.kwargs, dtype)
    outputs = tensors(module(*args, **kwargs))
    generator = torch.Generator().manual_seed(2)
    cotangents = [torch.randn(o.shape, generator=generator).to(dtype) for o in outputs]
    inputs = [t for t in tensors((args, kwargs)) if t.requires_grad] + list(module.parameters())
    grads = torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True)
    return outputs, [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, grads, strict=True)]


def errors_nearby(ours: torch.nn.Module, theirs: torch.nn.Module, sample: ModuleInput, dtype: torch.dtype) -> Nearby:
    """Returns the median errors of our outputs and gradients and of torch's, over neighbours of the sample."""
    generator = torch.Generator().manual_seed(3)

    def moved(value: Tensor) -> Tensor:
        return neighbour(value, dtype, generator).requires_grad_(value.requires_grad)

    errors: list[list[list[tuple[float, float]]]] = []
    for _ in range(NEIGHBOURS):
        state = {name: moved(p.detach()) for name, p in theirs.state_dict().items()}
        inputs = ModuleInput(
            sample.constructor_input,
            FunctionInput(
                *transform(sample.forward_input.args, moved), **transform(sample.forward_input.kwargs, moved)
            ),
        )
        results = []
        for module, own_dtype in ((ours, dtype), (theirs, dtype), (copy.deepcopy(theirs).double(), torch.float64)):
            copied = copy.deepcopy(module)
            copied.load_state_dict(state)
            results.append(evaluate(copied, inputs, own_dtype))
        groups = zip(*results, strict=True)
        errors.append([[(error(a, c), error(b, c)) for a, b, c in zip(*g, strict=True)] for g in groups])
    return [
        [
            (statistics.median(a for a, _ in draws), statistics.median(b for _, b in draws))
            for draws in zip(*group, strict=True)
        ]
        for group in zip(*errors, strict=True)
    ]
