"""Tests first and higher derivatives of the recurrent Functions, and the path that `route` chooses for a call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from dlkernels._core import extension
from dlkernels.rnn.routing import route
from tests.support.differentiated_calls import (
    MODES,
    VARIANTS,
    Case,
    CellCase,
    all_close,
    cases,
    loss,
    smooth_loss,
)

pytestmark = pytest.mark.o0_skip(
    reason="autograd, vmap and compilers are Python around the kernels, and higher derivatives are the reference's"
)


@pytest.mark.parametrize("mode, variant", cases())
def test_first_derivative(mode: str, variant: str) -> None:
    case = Case(mode, **VARIANTS[variant])
    all_close(case(*case.tensors), case.expected(*case.tensors))
    all_close(
        torch.autograd.grad(loss(case(*case.tensors)), case.tensors),
        torch.autograd.grad(loss(case.expected(*case.tensors)), case.tensors),
    )
    if not case.cfg.bptt_steps:  # a truncated gradient is not the derivative of the outputs
        assert gradcheck(case, case.tensors, fast_mode=True)


@pytest.mark.parametrize("mode, variant", cases())
def test_second_derivative(mode: str, variant: str) -> None:
    case = Case(mode, **VARIANTS[variant])
    assert gradgradcheck(case, case.tensors, fast_mode=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", ({}, {"bias": False}, {"state": False}), ids=("plain", "no-bias", "no-state"))
def test_cell_derivatives(mode: str, variant: dict[str, bool]) -> None:
    case = CellCase(mode, **variant)
    all_close(case(*case.tensors), case.expected(*case.tensors))
    assert gradcheck(case, case.tensors)
    assert gradgradcheck(case, case.tensors)


def test_truncated_second_derivative_in_full() -> None:
    case = Case("lstm", bptt_steps=2, bidirectional=True)
    assert gradgradcheck(case, case.tensors)


@pytest.mark.parametrize("mode", MODES)
def test_truncated_second_derivative_without_kernels(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "HAVE_NATIVE", False)
    case = Case(mode, bptt_steps=2, bidirectional=True)
    assert case(*case.tensors)[0].grad_fn is not None
    assert gradgradcheck(case, case.tensors, fast_mode=True)


def test_third_derivative() -> None:
    case = Case("lstm", lengths=True)

    def second(*tensors: Tensor) -> Tensor:
        grads = torch.autograd.grad(smooth_loss(case(*tensors)), tensors, create_graph=True)
        return torch.stack([grad.square().sum() for grad in grads]).sum()

    assert gradgradcheck(second, case.tensors, fast_mode=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("output", (0, 1))
def test_outputs_without_a_gradient(mode: str, output: int) -> None:
    case = Case(mode)
    all_close(
        torch.autograd.grad(case(*case.tensors)[output].sin().sum(), case.tensors),
        torch.autograd.grad(case.expected(*case.tensors)[output].sin().sum(), case.tensors),
    )


@pytest.mark.parametrize("mode", MODES)
def test_only_what_is_needed_gets_a_gradient(mode: str) -> None:
    case = Case(mode, bidirectional=True)
    for i, wanted in enumerate(case.tensors):
        tensors = [t.detach().requires_grad_(t is wanted) for t in case.tensors]
        got = torch.autograd.grad(loss(case(*tensors)), tensors[i], create_graph=True)
        expected = torch.autograd.grad(loss(case.expected(*tensors)), tensors[i], create_graph=True)
        all_close(got, expected)
        if got[0].requires_grad:
            second, expected_second = (torch.autograd.grad(g[0].sin().sum(), tensors[i]) for g in (got, expected))
            all_close(second, expected_second)


def test_routes() -> None:
    case = Case("lstm")
    with torch.no_grad():
        direct = route(*case.tensors)
    if not direct.native:
        assert "no compiled kernels" in direct.reason
        return
    assert direct.path == "op"
    assert route(*case.tensors).path == "eager"
    assert route(*(t.detach() for t in case.tensors), None).path == "op"
    seen = []

    def spy(x: Tensor) -> Tensor:
        seen.append(route(x, *case.tensors[1:]).path)
        return x.sum()

    torch.func.grad(spy)(case.tensors[0].detach())
    assert seen == ["function"]
    meta = route(torch.empty(1, device="meta"))
    assert meta.path == "reference" and "meta" in meta.reason
    assert "no kernel for torch.float8" in route(torch.empty(1, dtype=torch.float8_e4m3fn)).reason
