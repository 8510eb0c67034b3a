"""With torch's own sample inputs for its recurrent modules, our layers give torch's outputs and gradients."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.testing._internal.common_modules import ModuleInput

import dlkernels.nn
from dlkernels.testing import within_rule
from tests.support.instruction_sets import use_isa
from tests.support.layer_cases import acceptable_nearby
from tests.support.module_samples import RECURRENT, Nearby, build, errors_nearby, evaluate, samples, tensors


def test_every_entry_is_there() -> None:
    for name in RECURRENT:
        assert len(list(samples(name, torch.float32, True))) >= 2


@functools.cache
def of_torch(name: str, dtype: torch.dtype, training: bool, number: int) -> tuple[torch.nn.Module, Any, Any]:
    """Returns torch's module for a sample, its results and those in float64, computed once for all ISAs."""
    sample = next(itertools.islice(samples(name, dtype, training), number, None))
    module = build(torch.nn, name, sample, dtype, training)
    ref = evaluate(copy.deepcopy(module).double(), sample, torch.float64)
    return module, evaluate(module, sample, dtype), ref


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", RECURRENT)
def test_outputs_and_gradients(name: str, dtype: torch.dtype, training: bool, isa: str) -> None:
    for number, sample in enumerate(samples(name, dtype, training)):
        ours = build(dlkernels.nn, name, sample, dtype, training)
        theirs, *expected = of_torch(name, dtype, training, number)
        ours.load_state_dict(theirs.state_dict())
        results = [evaluate(ours, sample, dtype), *expected]
        nearby: Nearby = []
        for grad, group in enumerate(zip(*results, strict=True)):
            for index, (a, b, c) in enumerate(zip(*group, strict=True)):
                what = f"{name} sample {number}, {'gradient' if grad else 'output'} {index}"
                assert a.shape == b.shape, what
                verdict = within_rule(a, b, c, dtype, grad=bool(grad))
                if not verdict.ok:
                    nearby = nearby or errors_nearby(ours, theirs, sample, dtype)
                    assert acceptable_nearby(verdict, nearby[grad][index], c, dtype, bool(grad)), f"{what}: {verdict}"


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", RECURRENT)
def test_structure_of_the_result(name: str, training: bool, isa: str) -> None:
    """Results have torch's nesting, types and shapes for every form of input."""

    def describe(value: Any) -> Any:
        if isinstance(value, Tensor):
            return tuple(value.shape), value.dtype
        if value is None:
            return None
        return type(value).__name__, [describe(item) for item in value]

    for sample in samples(name, torch.float32, training):
        args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
        ours, theirs = (build(package, name, sample, torch.float32, training) for package in (dlkernels.nn, torch.nn))
        assert describe(ours(*args, **kwargs)) == describe(theirs(*args, **kwargs))


def with_new_pairs(given: Iterator[ModuleInput]) -> Iterator[ModuleInput]:
    """Yields the samples with a new pair of two constructor arguments, or of one argument and the form of the input."""
    seen: set[Any] = set()
    for sample in given:
        form = [(type(t).__name__, getattr(t, "ndim", None)) for t in sample.forward_input.args]
        facts = [("args", sample.constructor_input.args), *sample.constructor_input.kwargs.items(), ("form", *form)]
        pairs = {tuple(map(str, pair)) for pair in itertools.combinations(facts, 2)}
        if pairs - seen:
            seen |= pairs
            yield sample


def grad_check(name: str, second_order: bool, fast: bool, every: bool = False) -> None:
    chosen = samples(name, torch.float64, True)
    for sample in chosen if every else with_new_pairs(chosen):
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
        assert check(call, flat, fast_mode=fast)


@pytest.mark.parametrize("name", RECURRENT)
def test_gradcheck(name: str, isa: str, best_isa: str) -> None:
    # A random projection of the Jacobian of all samples, and on the best ISA the full Jacobian of some.
    grad_check(name, second_order=False, fast=True, every=True)
    if isa == best_isa:
        grad_check(name, second_order=False, fast=False)


@pytest.mark.heavy
@pytest.mark.o0_skip(reason="slow, and the second derivative is the reference's")
@pytest.mark.parametrize("name", RECURRENT)
def test_gradgradcheck(name: str, best_isa: str) -> None:
    with use_isa(best_isa):
        grad_check(name, second_order=True, fast=True)
