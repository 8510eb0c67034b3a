"""With `dlkernels.enable`, torch's modules and functions give torch's outputs and gradients for torch's own samples.

rnn/test_module_info.py, attention/test_module_info.py and attention/test_sdpa.py run the same samples on our layers."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal.common_methods_invocations import op_db

import dlkernels
from tests.support.attention_modules import OF_FUNCTION, Seeded, check, holder
from tests.support.enabled_calls import MARKS, served
from tests.support.enabled_calls import off_again as off_again
from tests.support.module_samples import ATTENTION, RECURRENT, STACKS, build_theirs, samples, tensors

pytestmark = [
    *MARKS,
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:Support for mismatched"),
]

OF_ATTENTION = next(op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")
TRANSFORMERS = ATTENTION + STACKS
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
# The Transformer modules have many samples, of which an even choice is as good here.
STEP = {"TransformerEncoderLayer": 5, "TransformerDecoderLayer": 5, "Transformer": 5, "TransformerEncoder": 3}


class Switched(nn.Module):
    """A module whose forward runs with `enable` on or off."""

    def __init__(self, module: nn.Module, on: bool) -> None:
        super().__init__()
        self.module = module
        self.on = on

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with dlkernels.enable() if self.on else contextlib.nullcontext():
            return self.module(*args, **kwargs)


class Attention(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return nn.functional.scaled_dot_product_attention(*args, **kwargs)


def calls_in(module: nn.Module, dtype: torch.dtype, *args: Any, **kwargs: Any) -> dict[str, int]:
    """Compares the module with enable on and off, and returns which operators our kernels served."""
    with dlkernels.enable(recurrent=False, attention=False) as counter:
        check(Switched(copy.deepcopy(module), True), Switched(module, False), dtype, *args, **kwargs)
    assert not counter.left, counter.report()
    return served(counter)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@DTYPES
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_modules(name: str, dtype: torch.dtype, training: bool) -> None:
    for sample in samples(name, dtype, training):
        module = build_theirs(name, sample, dtype, training)
        assert calls_in(module, dtype, *sample.forward_input.args, **sample.forward_input.kwargs)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@DTYPES
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformer_modules(name: str, dtype: torch.dtype, training: bool) -> None:
    """nn.MultiheadAttention computes the weights that it is asked for by other operators than attention."""
    for sample in list(samples(name, dtype, training))[:: STEP.get(name, 1)]:
        module = build_theirs(name, sample, dtype, training)
        args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
        if name == "MultiheadAttention":
            assert not calls_in(module, dtype, *args, **kwargs)
            kwargs = {**kwargs, "need_weights": False}
        assert set(calls_in(module, dtype, *args, **kwargs)) == {"scaled_dot_product_attention"}


@DTYPES
def test_attention(dtype: torch.dtype) -> None:
    """Our kernels draw other dropout masks than torch, which attention/test_sdpa.py tests."""
    count = 0
    for sample in OF_ATTENTION.sample_inputs("cpu", torch.float32, requires_grad=True):
        if not sample.kwargs["dropout_p"]:
            calls = calls_in(Attention(), dtype, sample.input, *sample.args, **sample.kwargs)
            assert set(calls) == {"scaled_dot_product_attention"}
            count += 1
    assert count >= 10


def test_multi_head_attention_forward() -> None:
    for sample in list(OF_FUNCTION.sample_inputs("cpu", torch.float32, requires_grad=False))[::4]:
        module, args, kwargs = holder(sample, torch.float32)
        calls_in(Seeded(module), torch.float32, *args, **kwargs)
        if not module.dropout:
            assert calls_in(module, torch.float32, *args, **kwargs, need_weights=False)


@pytest.mark.parametrize("name", (*RECURRENT, "MultiheadAttention", "TransformerEncoderLayer"))
def test_gradcheck(name: str) -> None:
    """Numerical and analytical gradients agree, of inputs that are no packed sequences and of parameters."""
    every = list(samples(name, torch.float64, True))
    for sample in every[:: max(1, len(every) // 4)]:
        module = build_theirs(name, sample, torch.float64, True)
        args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
        names, parameters = zip(*module.named_parameters(), strict=True)
        leaf = args[0].detach().clone().requires_grad_() if isinstance(args[0], torch.Tensor) else None

        def call(
            *weights: Any, module: Any = module, args: Any = args, kwargs: Any = kwargs, names: Any = names,
            count: int = len(parameters),
        ) -> Any:  # fmt: skip
            given = (*weights[count:], *args[len(weights) - count :])
            named = dict(zip(names, weights[:count], strict=True))
            return tuple(tensors(torch.func.functional_call(module, named, given, kwargs)))

        with dlkernels.enable() as handle:
            assert torch.autograd.gradcheck(call, (*parameters, *([] if leaf is None else [leaf])), fast_mode=True)
        assert handle.served or name == "MultiheadAttention"
