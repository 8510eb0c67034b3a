"""Compares attention modules of dlkernels with those of torch.nn, and records which calls they make."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import FunctionInput, ModuleInput
from torch.utils._python_dispatch import TorchDispatchMode

import dlkernels
from dlkernels.attention import functional
from dlkernels.attention import operators as attention_operators
from dlkernels.attention.arguments import AttentionConfig, AttentionInputs
from dlkernels.testing import FACTOR_GRAD, within_rule
from tests.support.layer_cases import acceptable_nearby
from tests.support.module_samples import errors_nearby, evaluate

OF_FUNCTION = next(op for op in op_db if op.name == "nn.functional.multi_head_attention_forward")


def twin(theirs: nn.Module) -> nn.Module:
    """Returns our module with the weights of `theirs`."""
    ours = dlkernels.patch(copy.deepcopy(theirs))
    assert dlkernels.patch_report(ours).patched
    assert not dlkernels.patch_report(ours).skipped
    return ours


class Repeated(nn.Module):
    """Passes some arguments to a module several times. `evaluate` copies each tensor, but attention modules test
    whether query, key and value are the same object."""

    def __init__(self, module: nn.Module, places: list[int]) -> None:
        super().__init__()
        self.module = module
        self.places = places

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*(args[place] for place in self.places), **kwargs)


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


def check(ours: nn.Module, theirs: nn.Module, dtype: torch.dtype, *args: Any, **kwargs: Any) -> None:
    """Asserts that outputs and gradients of all parameters and of inputs that require them keep the tolerance rule.

    torch's samples have logits up to 1e4, larger than those of any network, and there the rule alone demands more than
    a softmax can give: the backward recomputes each probability from its logit and the row's lse, and both are rounded.
    torch has no such error where one probability is exactly 1. A gradient may therefore also be off by the rule's
    factor times a rounding of the largest logit, relative to the largest gradient, because the gradients cancel.
    """
    distinct = list({id(arg): arg for arg in args}.values())
    if len(distinct) < len(args):
        places = [next(at for at, other in enumerate(distinct) if other is arg) for arg in args]
        ours, theirs = Repeated(ours, places), Repeated(theirs, places)
    sample = ModuleInput(FunctionInput(), FunctionInput(*distinct, **kwargs))
    double = copy.deepcopy(theirs).double()
    with largest_logit() as logit:
        found = evaluate(ours, sample, dtype)
    results = [found, evaluate(theirs, sample, dtype), evaluate(double, sample, torch.float64)]
    nearby: Any = None
    for grad, group in enumerate(zip(*results, strict=True)):
        for index, (a, b, c) in enumerate(zip(*group, strict=True)):
            what = f"{'gradient' if grad else 'output'} {index}"
            assert a.shape == b.shape, f"{what}: {tuple(a.shape)} against {tuple(b.shape)}"
            assert a.dtype == b.dtype, f"{what}: {a.dtype} against {b.dtype}"
            verdict = within_rule(a, b, c, dtype, grad=bool(grad))
            if verdict.ok:
                continue
            largest = max(gradient.abs().max().item() for gradient in results[2][1])
            rounding = FACTOR_GRAD * logit[0] * torch.finfo(dtype).eps * largest
            rounded = bool(grad) and verdict.ours <= verdict.limit + rounding
            if rounded and logit[0] > 100:
                continue
            nearby = nearby or errors_nearby(ours, theirs, sample, dtype)
            near = acceptable_nearby(verdict, nearby[grad][index], c, dtype, bool(grad))
            assert near or rounded, f"{what}: {verdict}, logits to {logit[0]}"


@contextmanager
def largest_logit() -> Iterator[list[float]]:
    """Yields a list of one number: the largest scaled product of query and key in the calls of our attention."""
    found, original = [0.0], attention_operators.attention

    def attention(cfg: AttentionConfig, given: AttentionInputs) -> Any:
        with torch.no_grad():
            a, b = (x.transpose(0, 1) if x.dim() == 3 else x for x in (given.q.double(), given.k.double()))
            found[0] = max(found[0], (a @ b.mT).abs().max().item() * cfg.softmax_scale)
        return original(cfg, given)

    attention_operators.attention = attention
    try:
        yield found
    finally:
        attention_operators.attention = original


def error_of(call: Callable[[], Any]) -> type[BaseException] | None:
    """Returns the type of the exception that `call` raises, or None; the message must not be empty."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call()
        except Exception as error:
            assert str(error)
            return type(error)
    return None


class Spy:
    """Records the arguments, by name, of every call of `functional.attention`."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def mask_shapes(self) -> list[tuple[int, ...] | None]:
        return [None if call.get("attn_mask") is None else tuple(call["attn_mask"].shape) for call in self.calls]


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    seen, original = Spy(), functional.attention

    def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        seen.calls.append({"q": q, "k": k, "v": v, **options})
        return original(q, k, v, **options)

    monkeypatch.setattr(functional, "attention", attention)
    return seen


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._schema.name)
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor) and not value.is_nested:
                storage = value.untyped_storage().nbytes() // value.element_size()
                self.largest = max(self.largest, storage)
        return result


@contextmanager
def operators() -> Iterator[_Operators]:
    """Records the operators that run in the block, and the number of elements of the largest buffer they return."""
    with _Operators() as mode:
        yield mode
