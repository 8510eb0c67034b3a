"""No speed without agreement: a case's results against torch.nn and float64, before it is timed."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..testing import Verdict, within_rule
from .attention import AttentionCase, AttentionWorkload, Run, Tensors, exact
from .attention import theirs as torch_attention
from .cases import Case
from .workload import Build, Inputs, Workload


@dataclasses.dataclass(frozen=True)
class Agreement:
    """The worst tensor of a check: the one whose error is the largest part of its limit."""

    ok: bool
    worst: str
    ours: float
    theirs: float
    limit: float

    def __str__(self) -> str:
        return f"{self.worst}: error {self.ours:.2e}, torch's {self.theirs:.2e}, limit {self.limit:.2e}"


class Checker:
    """Keeps the float64 reference and torch's results of the last workload: cases that differ in their thread count
    only come one after another and share them."""

    def __init__(self, theirs: Build, their_attention: Run = torch_attention):
        self.theirs = theirs
        self.their_attention = their_attention
        self._key = ""
        self._reference: dict[str, Tensor] = {}
        self._measure: dict[str, Tensor] = {}

    def __call__(self, case: Case, inputs: Inputs, ours: Workload) -> Agreement:
        if case.workload != self._key:
            plain = dataclasses.replace(case, against="torch")
            self._reference = Workload(plain, inputs, self.theirs, dtype=torch.float64).results()
            self._measure = Workload(plain, inputs, self.theirs).results()
            self._key = case.workload
        return compare(ours.results(), self._measure, self._reference, getattr(torch, case.dtype))

    def attention(self, case: AttentionCase, inputs: Tensors, ours: AttentionWorkload) -> Agreement:
        if case.workload != self._key:
            self._reference = AttentionWorkload(case, inputs, exact, dtype=torch.float64).results()
            # With dropout the peer draws another mask; plain PyTorch with ours is the measure then.
            peer = exact if case.dropout else self.their_attention
            self._measure = AttentionWorkload(case, inputs, peer, padded=not case.dropout).results()
            self._key = case.workload
        return compare(ours.results(), self._measure, self._reference, getattr(torch, case.dtype))


def compare(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], reference: dict[str, Tensor], dtype: torch.dtype
) -> Agreement:
    if ours.keys() != reference.keys():
        missing = ", ".join(sorted(ours.keys() ^ reference.keys()))
        return _refusal(f"not in both: {missing}")
    worst, verdict = "", Verdict(True, 0.0, 0.0, 0.0)
    share = -1.0
    for name, ref in reference.items():
        if problem := _unusable(ours[name], ref, dtype):
            return _refusal(f"{name} ({problem})")
        one = within_rule(ours[name], theirs[name], ref, dtype, grad=name.startswith("d"))
        one = _bounded(one, ref)
        part = one.ours / one.limit if one.limit > 0 else (0.0 if one.ours == 0 else float("inf"))
        if part > share:
            worst, verdict, share = name, one, part
    return Agreement(verdict.ok, worst, verdict.ours, verdict.theirs, verdict.limit)


def _refusal(why: str) -> Agreement:
    return Agreement(False, why, float("inf"), 0.0, 0.0)


def _unusable(value: Tensor, ref: Tensor, dtype: torch.dtype) -> str:
    """Why a result cannot be judged by its error: a case's numbers are ordinary, so each side's have to be finite."""
    if value.shape != ref.shape:
        return f"shape {tuple(value.shape)} where the reference has {tuple(ref.shape)}"
    if value.dtype != dtype:
        return f"{value.dtype} where the case is {dtype}"
    for side, tensor in (("ours", value), ("the reference", ref)):
        if not bool(tensor.isfinite().all()):
            return f"{side} has NaN or infinity"
    return ""


def _bounded(verdict: Verdict, ref: Tensor) -> Verdict:
    """A limit at which a tensor of zeros would pass shows nothing, however wrong the peer is: it is not granted."""
    largest = ref.abs().max().item() if ref.numel() else 0.0
    limit = min(verdict.limit, largest / 2)
    return verdict._replace(ok=verdict.ours <= limit, limit=limit)
