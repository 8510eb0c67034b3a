"""Judges what a model computes with `dlkernels.enable()` on, by the rule of dlkernels.testing and for whole models a
little more."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dlkernels.bench.runner import Agreement
from dlkernels.testing import within_rule

# A model has tensors of a few numbers, in which torch's own error may be near 0 by chance. So an error of a few
# roundings of the largest value is allowed as well.
ROUNDINGS = 16
# Some gradients are 0 but for rounding: what is added to all scores of a softmax changes nothing. Such a gradient,
# smaller than this part of the largest one of the model, is judged by the size of the largest one.
VANISHING = 1e-12

Results = Mapping[str, Tensor]


def refusal(why: str) -> Agreement:
    return Agreement(False, why, math.inf, 0.0, 0.0)


def unusable(ours: Results, theirs: Results) -> str:
    """Why results cannot be compared by their errors, or what whole numbers (tokens, actions) differ; empty if nothing
    does."""
    if ours.keys() != theirs.keys():
        return f"not on both sides: {', '.join(sorted(ours.keys() ^ theirs.keys()))}"
    for name, value in theirs.items():
        mine = ours[name]
        if mine.shape != value.shape or mine.dtype != value.dtype:
            return f"{name}: {mine.dtype} {tuple(mine.shape)} where torch has {value.dtype} {tuple(value.shape)}"
        if not value.is_floating_point():
            if not torch.equal(mine, value):
                return f"{name}: other numbers than torch's"
        elif not (bool(mine.isfinite().all()) and bool(value.isfinite().all())):
            return f"{name} has NaN or infinity"
    return ""


def largest(value: Tensor) -> float:
    return value.abs().max().item() if value.numel() else 0.0


def worse(a: Agreement, b: Agreement) -> Agreement:
    """The one that fails, or else the one whose error is the larger part of its limit."""
    if a.ok != b.ok:
        return b if a.ok else a
    return b if b.ours * a.limit > a.ours * b.limit else a


def by_reference(ours: Results, theirs: Results, exact: Results, dtype: torch.dtype) -> Agreement:
    """exact: torch's results in float64. Names of gradients begin with "d "."""
    if problem := unusable(ours, theirs) or unusable(exact, exact):
        return refusal(problem)
    eps = torch.finfo(dtype).eps
    gradients = max((largest(value) for name, value in exact.items() if name.startswith("d ")), default=0.0)
    worst = Agreement(True, "", 0.0, 0.0, 1.0)
    for name, reference in exact.items():
        if not reference.is_floating_point():
            continue
        gradient, size = name.startswith("d "), largest(reference)
        verdict = within_rule(ours[name], theirs[name], reference, dtype, grad=gradient)
        if gradient and size < VANISHING * gradients:
            limit = ROUNDINGS * eps * gradients
        else:  # a limit above half of the value would let zeros pass
            limit = min(max(verdict.limit, ROUNDINGS * eps * size), size / 2)
        worst = worse(worst, Agreement(verdict.ours <= limit, name, verdict.ours, verdict.theirs, limit))
    return worst


def by_nearness(ours: Results, theirs: Results, part: float) -> Agreement:
    """Without a reference: the difference from torch's results may be this part of the largest value."""
    if problem := unusable(ours, theirs):
        return refusal(problem)
    worst = Agreement(True, "", 0.0, 0.0, 1.0)
    for name, value in theirs.items():
        if value.is_floating_point():
            error, limit = largest(ours[name] - value), part * largest(value)
            worst = worse(worst, Agreement(error <= limit, name, error, 0.0, limit))
    return worst
