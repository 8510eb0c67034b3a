"""torch's own sample inputs for its recurrent modules: our layers give the outputs and gradients of torch's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import NEIGHBOURS, neighbour, use_isa
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.testing._internal.common_modules import FunctionInput, ModuleInfo, ModuleInput, module_db

import dlkernels.nn
from dlkernels.testing import FACTOR_FORWARD, FACTOR_GRAD, error, floor, within_rule

NAMES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
INFOS = {
    info.module_cls.__name__: info for info in module_db if info.module_cls in {getattr(torch.nn, n) for n in NAMES}
}


def samples(info: ModuleInfo, dtype: torch.dtype, training: bool) -> Iterator[ModuleInput]:
    # The packed samples stand behind a flag that torch's own device tests set.
    packed = {"with_packed_sequence": True} if info.module_cls.__name__ in ("RNN", "GRU") else {}
    torch.manual_seed(0)
    yield from info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training, **packed)


def tensors(value: Any) -> list[Tensor]:
    """The tensors of an argument or a result, in order."""
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
    """`change` applied to every floating-point tensor of an argument."""
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


def evaluate(module: torch.nn.Module, sample: ModuleInput, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of every input and parameter for cotangents that are the same in every dtype."""
    args, kwargs = cast(sample.forward_input.args, dtype), cast(sample.forward_input.kwargs, dtype)
    outputs = tensors(module(*args, **kwargs))
    generator = torch.Generator().manual_seed(2)
    cotangents = [torch.randn(o.shape, generator=generator).to(dtype) for o in outputs]
    inputs = [t for t in tensors((args, kwargs)) if t.requires_grad] + list(module.parameters())
    grads = torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True)
    return outputs, [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, grads, strict=True)]


def test_every_entry_is_there() -> None:
    assert sorted(INFOS) == sorted(NAMES)
    for info in INFOS.values():
        assert len(list(samples(info, torch.float32, True))) >= 2


def neighbour_errors(theirs: torch.nn.Module, sample: ModuleInput, dtype: torch.dtype) -> list[list[float]]:
    """torch's largest errors in outputs and gradients over neighbours of the sample (see helpers.NEIGHBOURS)."""
    generator = torch.Generator().manual_seed(3)

    def moved(value: Tensor) -> Tensor:
        return neighbour(value, dtype, generator).requires_grad_(value.requires_grad)

    worst: list[list[float]] = []
    for _ in range(NEIGHBOURS):
        module = copy.deepcopy(theirs)
        for parameter in module.parameters():
            parameter.data = moved(parameter.detach()).to(dtype)
        inputs = ModuleInput(
            sample.constructor_input,
            FunctionInput(
                *transform(sample.forward_input.args, moved), **transform(sample.forward_input.kwargs, moved)
            ),
        )
        pairs = zip(evaluate(module, inputs, dtype), evaluate(module.double(), inputs, torch.float64), strict=True)
        errors = [[error(a, b) for a, b in zip(*pair, strict=True)] for pair in pairs]
        worst = [[max(m) for m in zip(*g, strict=True)] for g in zip(worst or errors, errors, strict=True)]
    return worst


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients(name: str, dtype: torch.dtype, training: bool, isa: str) -> None:
    for number, sample in enumerate(samples(INFOS[name], dtype, training)):
        ours = build(dlkernels.nn, name, sample, dtype, training)
        theirs = build(torch.nn, name, sample, dtype, training)
        ours.load_state_dict(theirs.state_dict())
        ref = copy.deepcopy(theirs).double()
        results = [evaluate(module, sample, d) for module, d in ((ours, dtype), (theirs, dtype), (ref, torch.float64))]
        worst: list[list[float]] = []
        for grad, group in enumerate(zip(*results, strict=True)):
            for index, (a, b, c) in enumerate(zip(*group, strict=True)):
                what = f"{name} sample {number}, {'gradient' if grad else 'output'} {index}"
                assert a.shape == b.shape, what
                verdict = within_rule(a, b, c, dtype, grad=bool(grad))
                if not verdict.ok:
                    worst = worst or neighbour_errors(theirs, sample, dtype)
                    factor = FACTOR_GRAD if grad else FACTOR_FORWARD
                    assert verdict.ours <= factor * worst[grad][index] + floor(c, dtype), f"{what}: {verdict}"


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NAMES)
def test_structure_of_the_result(name: str, training: bool, isa: str) -> None:
    """The same nesting, types and shapes as torch's, whatever form the input has."""

    def describe(value: Any) -> Any:
        if isinstance(value, Tensor):
            return tuple(value.shape), value.dtype
        if value is None:
            return None
        return type(value).__name__, [describe(item) for item in value]

    for sample in samples(INFOS[name], torch.float32, training):
        args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
        ours, theirs = (build(package, name, sample, torch.float32, training) for package in (dlkernels.nn, torch.nn))
        assert describe(ours(*args, **kwargs)) == describe(theirs(*args, **kwargs))


def grad_check(name: str, second_order: bool) -> None:
    for sample in samples(INFOS[name], torch.float64, True):
        module = build(dlkernels.nn, name, sample, torch.float64, True)
        names, parameters = zip(*module.named_parameters(), strict=True)
        args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
        inputs = [t for t in tensors((args, kwargs)) if t.requires_grad]
        count = len(inputs)

        def call(
            *flat: Tensor, module=module, names=names, args=args, kwargs=kwargs, count=count
        ) -> tuple[Tensor, ...]:
            remaining = iter(flat[:count])

            def substitute(value: Any) -> Any:
                if isinstance(value, Tensor):
                    return next(remaining) if value.requires_grad else value
                if isinstance(value, PackedSequence):
                    return PackedSequence(substitute(value.data), *value[1:])
                if isinstance(value, (tuple, list)):
                    return type(value)(substitute(item) for item in value)
                return value

            weights = dict(zip(names, flat[count:], strict=True))
            return tuple(tensors(torch.func.functional_call(module, weights, substitute(args), kwargs)))

        flat = (*(t.detach().clone().requires_grad_() for t in inputs), *parameters)
        check = torch.autograd.gradgradcheck if second_order else torch.autograd.gradcheck
        assert check(call, flat, fast_mode=second_order)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name: str, isa: str) -> None:
    grad_check(name, second_order=False)


@pytest.mark.heavy
@pytest.mark.parametrize("name", NAMES)
def test_gradgradcheck(name: str, best_isa: str) -> None:
    with use_isa(best_isa):
        grad_check(name, second_order=True)
