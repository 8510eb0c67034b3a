"""A case: a small random model of a package, and one step of it whose results can be compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Runs the model once, from the same state each time. Gradients have names that begin with "d ".
Step = Callable[[], dict[str, Tensor]]


@dataclasses.dataclass(frozen=True)
class Case:
    """make: a step in this dtype. It starts from the same seed, and other dtypes have the same (rounded) values.
    served: operators of torch that our kernels must serve. Empty where the model reaches none of them.
    near: None where the rule of dlkernels.testing judges the results. A case that runs in float32 alone has no
        reference in float64; its results may differ from torch's by this part of the largest value.
    """

    name: str
    make: Callable[[torch.dtype], Step]
    served: tuple[str, ...] = ()
    near: float | None = None


def case(name: str, *served: str, near: float | None = None) -> Callable[[Callable[..., Step]], Case]:
    """Makes a case of a function that takes a dtype. It runs with the seed 0."""

    def made(function: Callable[..., Step]) -> Case:
        def make(dtype: torch.dtype) -> Step:
            torch.manual_seed(0)
            return function(dtype)

        return Case(name, make, served, near)

    return made


def cases_of(module: object) -> list[Case]:
    return [value for value in vars(module).values() if isinstance(value, Case)]


def decided(model: nn.Module) -> nn.Module:
    """Changes the weights of a new model of attention: with the usual ones all scores are near 0, and a mean of the
    values would do as well."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2.0) if weight.dim() >= 2 else weight.add_(0.1)
    return model


def tensors(value: Any, name: str = "y") -> dict[str, Tensor]:
    """The tensors in a result, with names by their place."""
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return {key: t for i, part in enumerate(value) for key, t in tensors(part, f"{name}{i}").items()}
    return {}


def training(model: nn.Module, call: Callable[..., Any], *inputs: Tensor, dtype: torch.dtype) -> Step:
    """Forward and backward: `call` gets the inputs in this dtype. The loss is a fixed random sum of all results, so
    that no gradient cancels. Results are the outputs and the gradients of the inputs and of all parameters."""
    model.to(dtype).train()
    leaves = [x.to(dtype).requires_grad_() for x in inputs]

    def step() -> dict[str, Tensor]:
        torch.manual_seed(1)  # for the dropout of the models that have some
        model.zero_grad()
        for leaf in leaves:
            leaf.grad = None
        outputs = {name: y for name, y in tensors(call(*leaves)).items() if y.is_floating_point()}
        generator = torch.Generator().manual_seed(2)
        loss = sum((y * torch.randn(y.shape, generator=generator).to(dtype)).sum() for y in outputs.values())
        assert isinstance(loss, Tensor)
        loss.backward()
        found = {name: y.detach().clone() for name, y in outputs.items()}
        named = [(f"input {i}", leaf) for i, leaf in enumerate(leaves)] + list(model.named_parameters())
        return found | {f"d {name}": p.grad.clone() for name, p in named if p.grad is not None}

    return step


def inference(model: nn.Module, call: Callable[..., Any], *inputs: Tensor, dtype: torch.dtype) -> Step:
    model.to(dtype).eval()
    given = [x.to(dtype) for x in inputs]

    def step() -> dict[str, Tensor]:
        with torch.no_grad():
            return {name: y.clone() for name, y in tensors(call(*given)).items()}

    return step
