"""The tolerance rule: the one place that says how far a result may be from the float64 reference.

A result is right when its largest error against float64 is at most a small multiple of the error that torch's own
op makes in the same dtype, plus a floor for the cases where torch happens to round to the reference exactly.
The tests, the benchmark's checks and users who add a kernel all use it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "FACTOR_FORWARD",
    "FACTOR_GRAD",
    "FLOOR_EPS",
    "Verdict",
    "assert_close_to_reference",
    "error",
    "floor",
    "within_rule",
]

FACTOR_FORWARD = 2.0
FACTOR_GRAD = 3.0

# The floor is FLOOR_EPS[dtype] * eps(dtype) * max|reference|.
FLOOR_EPS: dict[torch.dtype, float] = {
    torch.float32: 1.0,
    torch.bfloat16: 1.0,
    torch.float16: 1.0,
    # The reference is float64 too: it carries rounding errors of this size itself and torch's error against it can
    # be exactly zero, so a sum taken in another order (K up to about 1000 terms) must be allowed for.
    torch.float64: 1024.0,
}


class Verdict(NamedTuple):
    ok: bool
    ours: float
    theirs: float
    limit: float


def error(actual: Tensor, ref: Tensor) -> float:
    """Largest absolute difference, in float64. Equal infinities and NaN where `ref` has NaN count as no error; any
    other NaN or infinity gives inf."""
    if actual.shape != ref.shape:
        raise AssertionError(f"shape {tuple(actual.shape)} where the reference has {tuple(ref.shape)}")
    if ref.numel() == 0:
        return 0.0
    a, r = actual.detach().double().cpu(), ref.detach().double().cpu()
    same = (a == r) | (a.isnan() & r.isnan())
    worst = (a - r).abs().masked_fill(same, 0.0).max().item()
    return math.inf if math.isnan(worst) else worst


def floor(ref: Tensor, dtype: torch.dtype) -> float:
    """The error that is allowed even if torch makes none."""
    finite = ref.detach().double().abs()
    finite = finite[finite.isfinite()]
    largest = finite.max().item() if finite.numel() else 0.0
    return FLOOR_EPS[dtype] * torch.finfo(dtype).eps * largest


def within_rule(ours: Tensor, theirs: Tensor, ref: Tensor, dtype: torch.dtype, grad: bool = False) -> Verdict:
    """Judges `ours` against the float64 `ref`, with `theirs` (torch's op in `dtype`) as the measure."""
    ours_err, theirs_err = error(ours, ref), error(theirs, ref)
    # A peer that overflowed must not widen the limit to infinity.
    measure = theirs_err if math.isfinite(theirs_err) else 0.0
    limit = (FACTOR_GRAD if grad else FACTOR_FORWARD) * measure + floor(ref, dtype)
    return Verdict(ours_err <= limit, ours_err, theirs_err, limit)


def assert_close_to_reference(
    name: str, ours: Tensor, theirs: Tensor, ref64: Tensor, dtype: torch.dtype, grad: bool = False
) -> None:
    """Raises AssertionError naming `name` and the three errors unless `ours` is within the rule."""
    verdict = within_rule(ours, theirs, ref64, dtype, grad)
    if not verdict.ok:
        raise AssertionError(
            f"{name} ({dtype}): error {verdict.ours:.3e} against float64 exceeds {verdict.limit:.3e} "
            f"(torch's own error {verdict.theirs:.3e})"
        )
