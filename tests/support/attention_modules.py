"""Attention modules of dlkernels beside torch.nn's: the same weights, the tolerance rule, and what was called."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.common_modules import FunctionInput, ModuleInput
from torch.utils._python_dispatch import TorchDispatchMode

import dlkernels
from dlkernels.attention import functional
from dlkernels.testing import FACTOR_GRAD, within_rule
from tests.support.layer_cases import acceptable_nearby
from tests.support.module_samples import errors_nearby, evaluate


def twin(theirs: nn.Module) -> nn.Module:
    """Ours with the weights of `theirs`."""
    ours = dlkernels.patch(copy.deepcopy(theirs))
    assert dlkernels.patch_report(ours).patched
    assert not dlkernels.patch_report(ours).skipped
    return ours


class Repeated(nn.Module):
    """A module given some of its arguments several times: `evaluate` makes new tensors, and identity matters here."""

    def __init__(self, module: nn.Module, places: list[int]) -> None:
        super().__init__()
        self.module = module
        self.places = places

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*(args[place] for place in self.places), **kwargs)


def check(ours: nn.Module, theirs: nn.Module, dtype: torch.dtype, *args: Any, **kwargs: Any) -> None:
    """Outputs, and the gradients of all parameters and of all inputs that require them, under the tolerance rule.

    torch's samples have logits up to 1e4, where no network has them, and the rule alone would then ask for more than a
    softmax can give: the backward makes each probability again from its logit and the row's lse, and both are rounded.
    torch escapes where one probability is exactly 1. So a gradient may also be off by the rule's multiple of a rounding
    of the largest logit, relative to the largest gradient, because these cancel.
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
    """A list of one number: the largest scaled product of a query and a key that `functional.attention` is given."""
    found, original = [0.0], functional.attention

    def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        with torch.no_grad():
            a, b = (x.transpose(0, 1) if x.dim() == 3 else x for x in (q.double(), k.double()))
            found[0] = max(found[0], (a @ b.mT).abs().max().item() / q.size(-1) ** 0.5)
        return original(q, k, v, **options)

    functional.attention = attention  # type: ignore[assignment]
    try:
        yield found
    finally:
        functional.attention = original  # type: ignore[assignment]


def error_of(call: Callable[[], Any]) -> type[BaseException] | None:
    """The type of the exception that `call` raises; it must say something."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call()
        except Exception as error:
            assert str(error)
            return type(error)
    return None


class Spy:
    """Every call of `functional.attention`: its arguments by name."""

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
    """The operators that run inside, and the elements of the largest buffer that one of them returned."""
    with _Operators() as mode:
        yield mode
