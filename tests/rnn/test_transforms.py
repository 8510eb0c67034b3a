"""Tests the recurrent Functions under vmap and functorch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dlkernels import reference
from dlkernels.rnn.operators.arguments import SequenceInputs
from dlkernels.rnn.operators.sequence import sequence
from dlkernels.rnn.routing import route
from tests.support.differentiated_calls import (
    LENGTHS,
    MODES,
    RESETS,
    VARIANTS,
    Case,
    CellCase,
    all_close,
    cases,
    loss,
    smooth_loss,
)


def per_sample_grads(case: Any, run: Callable[..., tuple[Tensor, ...]], n: int) -> tuple[Any, Any]:
    """Returns vmap(grad) over n inputs and states, and the same from a loop over the reference."""
    tensors = [t.detach() for t in case.tensors]
    batched = 1 + case.states
    inputs = [torch.randn(n, *t.shape, dtype=t.dtype) for t in tensors[:batched]]
    names = tuple(range(len(tensors)))

    def objective(*args: Tensor) -> Tensor:
        return loss(run(*args))

    in_dims = (*(0 for _ in inputs), *(None for _ in tensors[batched:]))
    got = torch.vmap(torch.func.grad(objective, argnums=names), in_dims)(*inputs, *tensors[batched:])
    each = []
    for i in range(n):
        leaves = [t.clone().requires_grad_() for t in (*(t[i] for t in inputs), *tensors[batched:])]
        each.append(torch.autograd.grad(loss(case.expected(*leaves)), leaves))
    return got, [torch.stack(grads) for grads in zip(*each, strict=True)]


@pytest.mark.parametrize("mode, variant", [case for case in cases() if "packed" not in case.id])
def test_per_sample_gradients(mode: str, variant: str) -> None:
    case = Case(mode, **VARIANTS[variant])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        all_close(*per_sample_grads(case, case, 3))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bias, state", ((True, True), (False, False)))
def test_per_sample_gradients_of_cells(mode: str, bias: bool, state: bool) -> None:
    case = CellCase(mode, bias, state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        all_close(*per_sample_grads(case, case, 3))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch_first", (False, True))
def test_vmap_forward(mode: str, batch_first: bool) -> None:
    case = Case(mode, batch_first=batch_first, bidirectional=True)
    x, *rest = (t.detach() for t in case.tensors)
    xs = torch.randn(x.shape[0], 4, *x.shape[1:], dtype=x.dtype)
    got = torch.vmap(case, (1, *(None for _ in rest)), 0)(xs, *rest)
    alone = [case.expected(xs[:, i], *rest) for i in range(4)]
    all_close(got, [torch.stack(outs) for outs in zip(*alone, strict=True)])


def test_vmap_over_states_lengths_and_two_levels() -> None:
    case = Case("lstm", lengths=True, bidirectional=True)
    x, h0, c0, weights = case.split(tuple(t.detach() for t in case.tensors))
    lengths = torch.tensor([[1, 3], [2, 0], [3, 3]])
    got = torch.vmap(lambda n: sequence(case.cfg, SequenceInputs(x, h0, c0, None, None, n, weights)))(lengths)
    for i, n in enumerate(lengths):
        all_close([t[i] for t in got[:3]], reference.sequence("lstm", x, h0, c0, weights, None, n, True))
    hs = torch.randn(3, 2, *h0.shape, dtype=h0.dtype)  # type: ignore[union-attr]
    inner = torch.vmap(lambda h: sequence(case.cfg, SequenceInputs(x, h, c0, None, None, LENGTHS, weights)))
    got = torch.vmap(inner)(hs)
    all_close([t[2, 1] for t in got[:3]], reference.sequence("lstm", x, hs[2, 1], c0, weights, None, LENGTHS, True))


@pytest.mark.parametrize("batch_first", (False, True))
def test_vmap_over_resets(batch_first: bool) -> None:
    case = Case("lstm", bidirectional=True, batch_first=batch_first, cells=True)
    x, h0, c0, weights = case.split(case.tensors)
    resets = torch.rand(4, *RESETS.shape) < 0.5

    def call(flags: Tensor) -> tuple[Tensor, ...]:
        return sequence(case.cfg, SequenceInputs(x, h0, c0, None, None, None, weights, flags))

    def expected(flags: Tensor) -> tuple[Tensor, ...]:
        return reference.sequence(
            "lstm", x, h0, c0, weights, None, None, True, batch_first, resets=flags, return_cells=True
        )

    got, want = torch.vmap(call)(resets), [torch.stack(each) for each in zip(*map(expected, resets), strict=True)]
    all_close(got, want)
    cotangents = [torch.randn_like(out) for out in want]
    all_close(torch.autograd.grad(got, case.tensors, cotangents), torch.autograd.grad(want, case.tensors, cotangents))


def test_vmap_in_vmap_of_grad() -> None:
    case = Case("gru", lengths=True, bidirectional=True)
    tensors = tuple(t.detach() for t in case.tensors)
    xs = torch.randn(2, 3, *tensors[0].shape, dtype=torch.float64)
    grad = torch.func.grad(lambda w, x: loss(case(x, tensors[1], w, *tensors[3:])))
    expected = torch.func.grad(lambda w, x: loss(case.expected(x, tensors[1], w, *tensors[3:])))
    got = torch.vmap(torch.vmap(grad, (None, 0)), (None, 0))(tensors[2], xs)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(got[i, j], expected(tensors[2], xs[i, j]))


@pytest.mark.parametrize("make", (Case, CellCase))
def test_vmap_over_weights_is_an_ensemble(make: Any) -> None:
    case = make("lstm")
    x, *rest = (t.detach() for t in case.tensors)
    many = [torch.stack([t, 2 * t, -t]) for t in rest]
    grad = torch.func.grad(lambda *ts: loss(case(*ts)), argnums=(0, len(rest)))
    got = torch.vmap(grad, (None, *(0 for _ in rest)))(x, *many)
    expected = torch.func.grad(lambda *ts: loss(case.expected(*ts)), argnums=(0, len(rest)))
    all_close(got, [torch.stack(g) for g in zip(*(expected(x, *(t[i] for t in many)) for i in range(3)), strict=True)])


@pytest.mark.parametrize("make", (Case, CellCase))
def test_derivatives_through_per_sample_gradients(make: Any) -> None:
    """The gradient of a gradient penalty is right, with functorch and with plain autograd as the outer derivative."""
    case = make("gru")
    tensors = tuple(t.detach() for t in case.tensors)
    xs = torch.randn(3, *tensors[0].shape, dtype=torch.float64)

    def penalty(run: Any, w: Tensor) -> Tensor:
        inner = torch.func.grad(lambda w, x: smooth_loss(run(x, tensors[1], w, *tensors[3:])), argnums=(0, 1))
        per_sample = torch.vmap(inner, (None, 0))(w, xs)
        return torch.stack([g.square().sum() for g in per_sample]).sum()

    w = tensors[2]
    expected = torch.func.grad(lambda w: penalty(case.expected, w))(w)
    torch.testing.assert_close(torch.func.grad(lambda w: penalty(case, w))(w), expected)
    leaf = w.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(penalty(case, leaf), leaf)[0], expected)


@pytest.mark.parametrize("variant", ({}, {"bptt_steps": 1}, {"packed": True}), ids=("plain", "truncated", "packed"))
def test_jacrev_and_hessian(variant: dict[str, Any]) -> None:
    case = Case("lstm", **variant)
    x, *rest = (t.detach() for t in case.tensors)
    torch.testing.assert_close(
        torch.func.jacrev(lambda x: case(x, *rest)[0])(x), torch.func.jacrev(lambda x: case.expected(x, *rest)[0])(x)
    )
    if not variant:
        got = torch.func.jacrev(torch.func.grad(lambda x: smooth_loss(case(x, *rest))))(x)
        want = torch.func.jacrev(torch.func.grad(lambda x: smooth_loss(case.expected(x, *rest))))(x)
        torch.testing.assert_close(got, want)


def test_vjp_function_used_after_the_transform() -> None:
    case = Case("lstm")
    tensors = [t.detach() for t in case.tensors]
    outs, pull = torch.func.vjp(case, *tensors)
    expected_outs, expected_pull = torch.func.vjp(case.expected, *tensors)
    ones = tuple(torch.ones_like(out) for out in outs)
    all_close(outs, expected_outs)
    all_close(pull(ones), expected_pull(ones))


def test_vjp_function_used_inside_of_a_later_transform() -> None:
    """Its tensors are in wrappers of a transform that has ended."""
    for case in (Case("gru", bptt_steps=1, lengths=True, bidirectional=True), CellCase("lstm")):
        tensors = [t.detach() for t in case.tensors]
        seconds = []
        for run in (case, case.expected) if isinstance(case, CellCase) else (case,):
            outs, pull = torch.func.vjp(run, *tensors)
            _, second = torch.func.vjp(lambda *cotangents: pull(cotangents), *outs)  # noqa: B023
            seconds.append(second(tuple(map(torch.ones_like, tensors))))
        for found in seconds[1:]:
            all_close(found, seconds[0])


def test_packed_data_under_vmap_is_refused() -> None:
    case = Case("gru", packed=True)
    if not route(*case.tensors).native:
        pytest.skip("the reference maps over anything")
    x, *rest = case.tensors
    with pytest.raises(NotImplementedError, match="PackedSequence"):
        torch.vmap(case, (0, *(None for _ in rest)))(torch.stack([x, x]), *rest)
