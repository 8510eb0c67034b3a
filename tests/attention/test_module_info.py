"""Runs torch's own samples for MultiheadAttention, the Transformer modules and multi_head_attention_forward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import ModuleInfo, ModuleInput, module_db

import dlkernels
from tests.support.attention_modules import check, twin
from tests.support.instruction_sets import use_isa
from tests.support.module_samples import build, tensors

LAYERS = ("MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer")
STACKS = ("TransformerEncoder", "Transformer")
NAMES = LAYERS + STACKS
INFOS = {info.module_cls.__name__: info for info in module_db if info.module_cls in {getattr(nn, n) for n in NAMES}}
OP = next(op for op in op_db if op.name == "nn.functional.multi_head_attention_forward")

pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:Support for mismatched"),
    pytest.mark.o0_skip(reason="the layers are Python around functional.attention"),
]


def samples(info: ModuleInfo, dtype: torch.dtype, training: bool) -> Iterator[ModuleInput]:
    torch.manual_seed(0)
    yield from info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)


def build_theirs(name: str, sample: ModuleInput, dtype: torch.dtype, training: bool) -> nn.Module:
    if name != "TransformerEncoder":
        return build(nn, name, sample, dtype, training)
    encoder = nn.TransformerEncoder(*sample.constructor_input.args, **sample.constructor_input.kwargs)
    return encoder.to(dtype).train(training)


def test_every_entry_is_there() -> None:
    counts = {name: len(list(samples(INFOS[name], torch.float32, True))) for name in NAMES}
    assert min(counts.values()) >= 30, counts


def check_samples(name: str, dtype: torch.dtype, training: bool) -> None:
    for sample in samples(INFOS[name], dtype, training):
        theirs = build_theirs(name, sample, dtype, training)
        if name in LAYERS:
            ours = build(dlkernels.nn, name, sample, dtype, training)
            ours.load_state_dict(theirs.state_dict())
        else:
            ours = twin(theirs)
        check(ours, theirs, dtype, *sample.forward_input.args, **sample.forward_input.kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, dtype: torch.dtype, best_isa: str) -> None:
    with use_isa(best_isa):
        check_samples(name, dtype, True)


def test_attention_on_every_isa(isa: str) -> None:
    check_samples("MultiheadAttention", torch.float32, True)


@pytest.mark.parametrize("name", LAYERS)
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
    for sample in samples(INFOS[name], torch.float32, True):
        theirs = build_theirs(name, sample, torch.float32, False)
        args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
        with torch.no_grad(), use_isa(best_isa):
            torch.testing.assert_close(tensors(twin(theirs)(*args, **kwargs)), tensors(theirs(*args, **kwargs)))


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name: str, best_isa: str) -> None:
    for sample in list(samples(INFOS[name], torch.float64, True))[:: 3 if name in LAYERS else 9]:
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


class Seeded(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        torch.manual_seed(3)
        return self.module(*args, **kwargs)


def holder(sample: Any, dtype: torch.dtype) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Returns torch's module with the weights of a functional sample, and the other arguments of the sample."""
    (key, value, embed, heads, in_weight, in_bias, bias_k, bias_v, zero_attn, dropout, out_weight, out_bias) = (
        sample.args
    )
    kwargs = dict(sample.kwargs)
    module = nn.MultiheadAttention(embed, heads, dropout, add_bias_kv=True, add_zero_attn=zero_attn, dtype=dtype)
    module.train(kwargs.pop("training"))
    module._qkv_same_embed_dim = not kwargs.pop("use_separate_proj_weight")
    weights = {"in_proj_weight": in_weight, "in_proj_bias": in_bias, "bias_k": bias_k, "bias_v": bias_v}
    weights |= {f"{name}_proj_weight": kwargs.pop(f"{name}_proj_weight") for name in "qkv"}
    for name, weight in weights.items():
        setattr(module, name, None if weight is None else nn.Parameter(weight.detach().clone()))
    module.out_proj.weight, module.out_proj.bias = nn.Parameter(out_weight.detach()), nn.Parameter(out_bias.detach())
    return module, (sample.input, key, value), kwargs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "inputs require grad"])
def test_multi_head_attention_forward(dtype: torch.dtype, requires_grad: bool, best_isa: str) -> None:
    """Every OpInfo sample gives torch's results. With need_weights dropout is torch's own, so the same seed gives the
    same results."""
    count = 0
    for sample in OP.sample_inputs("cpu", dtype, requires_grad=requires_grad):
        theirs, args, kwargs = holder(sample, dtype)
        ours = twin(theirs)
        with use_isa(best_isa):
            check(Seeded(ours), Seeded(theirs), dtype, *args, **kwargs)
            # Without need_weights the dropout masks differ; attention/test_layers.py tests their statistics.
            if not theirs.dropout:
                check(ours, theirs, dtype, *args, **kwargs, need_weights=False)
        count += 1
    assert count == (1 if requires_grad else 192)
