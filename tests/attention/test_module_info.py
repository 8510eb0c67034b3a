"""Runs torch's own samples for MultiheadAttention, the Transformer modules and multi_head_attention_forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dlkernels
from tests.support.attention_modules import OF_FUNCTION, Seeded, check, holder, twin
from tests.support.instruction_sets import use_isa
from tests.support.module_samples import ATTENTION, STACKS, build, build_theirs, samples, tensors

NAMES = ATTENTION + STACKS

pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:Support for mismatched"),
    pytest.mark.o0_skip(reason="the layers are Python around functional.attention"),
]


def test_every_entry_is_there() -> None:
    counts = {name: len(list(samples(name, torch.float32, True))) for name in NAMES}
    assert min(counts.values()) >= 30, counts


def check_samples(name: str, dtype: torch.dtype, training: bool) -> None:
    for sample in samples(name, dtype, training):
        theirs = build_theirs(name, sample, dtype, training)
        if name in ATTENTION:
            ours = build(dlkernels.nn, name, sample, dtype, training)
            ours.load_state_dict(theirs.state_dict())
        else:
            ours = twin(theirs)
        check(ours, theirs, dtype, *sample.forward_input.args, **sample.forward_input.kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", ATTENTION)
def test_layers(name: str, dtype: torch.dtype, best_isa: str) -> None:
    with use_isa(best_isa):
        check_samples(name, dtype, True)


def test_attention_on_every_isa(isa: str) -> None:
    check_samples("MultiheadAttention", torch.float32, True)


@pytest.mark.parametrize("name", ATTENTION)
def test_layers_in_eval_mode(name: str, best_isa: str) -> None:
    with use_isa(best_isa):
        check_samples(name, torch.float32, False)


@pytest.mark.parametrize("name", STACKS)
def test_stacks(name: str, best_isa: str) -> None:
    with use_isa(best_isa):
        check_samples(name, torch.float32, True)


@pytest.mark.parametrize("name", NAMES)
def test_inference(name: str, best_isa: str) -> None:
    """With eval and no_grad, results are close to torch's fast path, which rounds in other places than its slow
    path."""
    for sample in samples(name, torch.float32, True):
        theirs = build_theirs(name, sample, torch.float32, False)
        args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
        with torch.no_grad(), use_isa(best_isa):
            torch.testing.assert_close(tensors(twin(theirs)(*args, **kwargs)), tensors(theirs(*args, **kwargs)))


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name: str, best_isa: str) -> None:
    for sample in list(samples(name, torch.float64, True))[:: 3 if name in ATTENTION else 9]:
        theirs = build_theirs(name, sample, torch.float64, True)
        ours = twin(theirs)
        args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
        parameters = dict(ours.named_parameters())

        def call(
            *flat: Any, ours: Any = ours, names: Any = tuple(parameters), n: int = len(args), kw: Any = kwargs
        ) -> Any:
            return tuple(
                tensors(torch.func.functional_call(ours, dict(zip(names, flat[n:], strict=True)), flat[:n], kw))
            )

        leaves = [a.detach().clone().requires_grad_() for a in args]
        with use_isa(best_isa):
            assert torch.autograd.gradcheck(call, (*leaves, *parameters.values()), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "inputs require grad"])
def test_multi_head_attention_forward(dtype: torch.dtype, requires_grad: bool, best_isa: str) -> None:
    """Every OpInfo sample gives torch's results. With need_weights dropout is torch's own, so the same seed gives the
    same results."""
    count = 0
    for sample in OF_FUNCTION.sample_inputs("cpu", dtype, requires_grad=requires_grad):
        theirs, args, kwargs = holder(sample, dtype)
        ours = twin(theirs)
        with use_isa(best_isa):
            check(Seeded(ours), Seeded(theirs), dtype, *args, **kwargs)
            # Without need_weights the dropout masks differ; attention/test_layers.py tests their statistics.
            if not theirs.dropout:
                check(ours, theirs, dtype, *args, **kwargs, need_weights=False)
        count += 1
    assert count == (1 if requires_grad else 192)
