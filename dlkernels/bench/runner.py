"""Turns cases into results: a case is checked first and then timed. If its results disagree with torch.nn and float64,
it is not timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..testing import Verdict, within_rule
from . import attention, layers, machine
from .attention import AttentionCase, AttentionWorkload, Run, Tensors
from .layers import Inputs, LayerCase, Workload
from .timing import Budget, Sample, Side, alternate

AnyCase = LayerCase | AttentionCase
Status = Literal["ok", "disagree", "error", "no peer", "not available"]
Rule = Callable[[Tensor, Tensor, Tensor, torch.dtype, bool], Verdict]


@dataclasses.dataclass(frozen=True)
class Agreement:
    """The outcome of a check and its worst tensor, whose error is the largest part of its limit."""

    ok: bool
    worst: str
    ours: float
    theirs: float
    limit: float

    def __str__(self) -> str:
        return f"{self.worst}: error {self.ours:.2e}, torch's {self.theirs:.2e}, limit {self.limit:.2e}"


class Checked(Side, Protocol):
    """A side whose results can be checked."""

    def results(self) -> dict[str, Tensor]: ...


class Checker:
    """Compares results with the float64 reference, with torch's error as the measure. It keeps the reference and
    torch's results of the last workload, because cases that differ only in their thread count follow each other."""

    def __init__(self, theirs: layers.Build, their_attention: Run = attention.theirs):
        self.theirs = theirs
        self.their_attention = their_attention
        self._key = ""
        self._reference: dict[str, Tensor] = {}
        self._measure: dict[str, Tensor] = {}

    def __call__(self, case: LayerCase, inputs: Inputs, ours: Checked, rule: Rule = within_rule) -> Agreement:
        if case.workload != self._key:
            plain = dataclasses.replace(case, against="torch")
            self._reference = Workload(plain, inputs, self.theirs, dtype=torch.float64).results()
            self._measure = Workload(plain, inputs, self.theirs).results()
            self._key = case.workload
        return compare(ours.results(), self._measure, self._reference, getattr(torch, case.dtype), rule)

    def attention(self, case: AttentionCase, inputs: Tensors, ours: AttentionWorkload) -> Agreement:
        if case.workload != self._key:
            self._reference = AttentionWorkload(case, inputs, attention.exact, dtype=torch.float64).results()
            # With dropout the peer draws another mask. Then the measure is the reference in the case's dtype, which
            # uses our mask.
            peer = attention.exact if case.dropout else self.their_attention
            self._measure = AttentionWorkload(case, inputs, peer, padded=not case.dropout).results()
            self._key = case.workload
        return compare(ours.results(), self._measure, self._reference, getattr(torch, case.dtype))


def compare(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], reference: dict[str, Tensor], dtype: torch.dtype,
    rule: Rule = within_rule,
) -> Agreement:  # fmt: skip
    if ours.keys() != reference.keys():
        missing = ", ".join(sorted(ours.keys() ^ reference.keys()))
        return _refusal(f"not in both: {missing}")
    worst, verdict = "", Verdict(True, 0.0, 0.0, 0.0)
    share = -1.0
    for name, ref in reference.items():
        if problem := _unusable(ours[name], ref, dtype):
            return _refusal(f"{name} ({problem})")
        one = _bounded(rule(ours[name], theirs[name], ref, dtype, name.startswith("d")), ref)
        part = one.ours / one.limit if one.limit > 0 else (0.0 if one.ours == 0 else float("inf"))
        if part > share:
            worst, verdict, share = name, one, part
    return Agreement(verdict.ok, worst, verdict.ours, verdict.theirs, verdict.limit)


def _refusal(why: str) -> Agreement:
    return Agreement(False, why, float("inf"), 0.0, 0.0)


def _unusable(value: Tensor, ref: Tensor, dtype: torch.dtype) -> str:
    """Why a result cannot be judged by its error; empty if it can. The inputs of a case are of ordinary size, so the
    results of both sides must be finite."""
    if value.shape != ref.shape:
        return f"shape {tuple(value.shape)} where the reference has {tuple(ref.shape)}"
    if value.dtype != dtype:
        return f"{value.dtype} where the case is {dtype}"
    for side, tensor in (("ours", value), ("the reference", ref)):
        if not bool(tensor.isfinite().all()):
            return f"{side} has NaN or infinity"
    return ""


def _bounded(verdict: Verdict, ref: Tensor) -> Verdict:
    """Lowers the limit to at most half of the largest reference value, however wrong the peer is: a check that a tensor
    of zeros would pass shows nothing."""
    largest = ref.abs().max().item() if ref.numel() else 0.0
    limit = min(verdict.limit, largest / 2)
    return verdict._replace(ok=verdict.ours <= limit, limit=limit)


@dataclasses.dataclass(frozen=True)
class Result:
    case: AnyCase
    status: Status
    message: str = ""
    sample: Sample | None = None
    agreement: Agreement | None = None
    kernel: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def wrong(self) -> bool:
        return self.status in ("disagree", "error")

    @property
    def speedup(self) -> float | None:
        """Their time divided by ours; None if the case was not timed. Against our padded run it is per valid step."""
        return None if self.sample is None else self.sample.ratio * self._scale

    @property
    def spread(self) -> tuple[float, float] | None:
        return None if self.sample is None else tuple(r * self._scale for r in self.sample.spread)  # type: ignore[return-value]

    @property
    def reached(self) -> bool | None:
        """Whether the target is met; None if the case has none."""
        if self.case.target is None:
            return None
        return self.speedup is not None and self.speedup >= self.case.target

    @property
    def _scale(self) -> float:
        return self.case.valid_fraction if self.case.against == "padded" else 1.0

    def as_json(self) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "name": self.case.name,
            "case": dataclasses.asdict(self.case),
            "regime": self.case.regime,
            "status": self.status,
            "message": self.message,
            "kernel": self.kernel,
        }
        if self.agreement:
            entry["check"] = dataclasses.asdict(self.agreement)
        if self.sample:
            assert self.speedup is not None and self.spread is not None
            entry |= {
                "theirs_ms": round(self.sample.theirs * 1e3, 6),
                "ours_ms": round(self.sample.ours * 1e3, 6),
                "speedup": round(self.speedup, 4),
                "spread": [round(r, 4) for r in self.spread],
                "ratio_of_all": round(self.sample.theirs / self.sample.ours * self._scale, 4),
                "quartiles": [round(r * self._scale, 4) for r in self.sample.quartiles],
                "pairs": len(self.sample.pair_ratios),
                "calls": list(self.sample.calls),
            }
        if self.case.target is not None:
            entry["reached"] = self.reached
        return entry


@dataclasses.dataclass
class Runner:
    budget: Budget = dataclasses.field(default_factory=Budget)
    ours: layers.Build = layers.ours
    theirs: layers.Build = layers.theirs
    our_attention: Run = attention.ours
    their_attention: Run = attention.theirs

    def run(self, cases: Iterable[AnyCase]) -> Iterator[Result]:
        """One result per case; torch's thread count and deterministic mode are put back at the end."""
        threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
        checker = Checker(self.theirs, self.their_attention)
        try:
            for case in cases:
                torch.set_num_threads(case.threads)
                yield self.one(case, checker)
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(deterministic)

    def one(self, case: Any, checker: Checker) -> Result:
        """Checks and measures one case. Derived classes know other kinds of cases."""
        if isinstance(case, AttentionCase):
            return self._attention(case, checker)
        return self._layer(case, checker)

    def _layer(self, case: LayerCase, checker: Checker) -> Result:
        inputs = Inputs.make(case)

        def mine() -> tuple[Workload, Agreement]:
            side = Workload(case, inputs, self.ours, deterministic=case.against == "default")
            return side, checker(case, inputs, side)

        return self.measure(case, lambda: self._peer(case, inputs), mine, machine.last_kernel)

    def _attention(self, case: AttentionCase, checker: Checker) -> Result:
        inputs = attention.make_inputs(case)

        def mine() -> tuple[AttentionWorkload, Agreement]:
            side = AttentionWorkload(case, inputs, self.our_attention)
            return side, checker.attention(case, inputs, side)

        def peer() -> AttentionWorkload:
            return AttentionWorkload(case, inputs, self.their_attention, padded=True)

        return self.measure(case, peer, mine, machine.last_attention_kernel)

    def measure(
        self, case: Any, make_peer: Callable[[], Side],
        make_mine: Callable[[], tuple[Side, Agreement]], last_kernel: Callable[[], dict[str, Any]],
    ) -> Result:  # fmt: skip
        """The result of a case whose sides these functions make; `last_kernel` is asked after a call of ours."""
        try:
            peer = make_peer()
            peer.prepare()
            peer()
        except Exception as problem:  # a dtype or op that the peer lacks is reported, but is no failure of ours
            return Result(case, "no peer", first_line(problem))
        try:
            mine, agreement = make_mine()
            if not agreement.ok:
                return Result(case, "disagree", str(agreement), agreement=agreement)
            mine.prepare()
            mine()
            kernel = last_kernel()
            with torch.inference_mode(not case.training):  # once, as in a program that serves a model
                sample = alternate(peer, mine, self.budget)
            return Result(case, "ok", sample=sample, agreement=agreement, kernel=kernel)
        except Exception as problem:
            return Result(case, "error", first_line(problem))

    def _peer(self, case: LayerCase, inputs: Inputs) -> Workload:
        if case.against == "torch":
            return Workload(case, inputs, self.theirs)
        if case.against == "padded":
            padded = dataclasses.replace(case, packed=False)
            return Workload(padded, Inputs.make(padded), self.ours)
        return Workload(case, inputs, self.ours)


def first_line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}".splitlines()[0][:200]
