"""Check, then time: turns cases into results."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch

from . import attention, machine, workload
from .attention import AttentionCase, AttentionWorkload
from .cases import REGIMES, Case
from .checks import Agreement, Checker
from .timing import Budget, Sample, Side, alternate
from .workload import Build, Inputs, Workload

Status = Literal["ok", "disagree", "error", "no peer"]


@dataclasses.dataclass(frozen=True)
class Result:
    case: Case | AttentionCase
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
        """Their time over ours, None where nothing may be claimed. Against our padded run: per valid step."""
        return None if self.sample is None else self.sample.ratio * self._scale

    @property
    def spread(self) -> tuple[float, float] | None:
        return None if self.sample is None else tuple(r * self._scale for r in self.sample.spread)  # type: ignore[return-value]

    @property
    def reached(self) -> bool | None:
        """Whether the target is met; None where there is none."""
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
    ours: Build = workload.ours
    theirs: Build = workload.theirs
    our_attention: attention.Run = attention.ours
    their_attention: attention.Run = attention.theirs

    def run(self, cases: Iterable[Case | AttentionCase]) -> Iterator[Result]:
        """One result per case; torch's thread count and deterministic mode are put back at the end."""
        threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
        checker = Checker(self.theirs, self.their_attention)
        try:
            for case in cases:
                torch.set_num_threads(case.threads)
                if isinstance(case, AttentionCase):
                    yield self._attention(case, checker)
                else:
                    yield self._layer(case, checker)
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(deterministic)

    def _layer(self, case: Case, checker: Checker) -> Result:
        inputs = Inputs.make(case)

        def mine() -> tuple[Workload, Agreement]:
            side = Workload(case, inputs, self.ours, deterministic=case.against == "default")
            return side, checker(case, inputs, side)

        return self._one(case, lambda: self._peer(case, inputs), mine, machine.last_kernel)

    def _attention(self, case: AttentionCase, checker: Checker) -> Result:
        inputs = attention.make_inputs(case)

        def mine() -> tuple[AttentionWorkload, Agreement]:
            side = AttentionWorkload(case, inputs, self.our_attention)
            return side, checker.attention(case, inputs, side)

        def peer() -> AttentionWorkload:
            return AttentionWorkload(case, inputs, self.their_attention, padded=True)

        return self._one(case, peer, mine, machine.last_attention_kernel)

    def _one(
        self, case: Case | AttentionCase, make_peer: Callable[[], Side],
        make_mine: Callable[[], tuple[Side, Agreement]], last_kernel: Callable[[], dict[str, Any]],
    ) -> Result:  # fmt: skip
        try:
            peer = make_peer()
            peer()
        except Exception as problem:  # a missing dtype or op of the peer's is a fact to report, not a failure of ours
            return Result(case, "no peer", _first_line(problem))
        try:
            mine, agreement = make_mine()
            if not agreement.ok:
                return Result(case, "disagree", str(agreement), agreement=agreement)
            mine.prepare()
            mine()
            kernel = last_kernel()
            return Result(case, "ok", sample=alternate(peer, mine, self.budget), agreement=agreement, kernel=kernel)
        except Exception as problem:
            return Result(case, "error", _first_line(problem))

    def _peer(self, case: Case, inputs: Inputs) -> Workload:
        if case.against == "torch":
            return Workload(case, inputs, self.theirs)
        if case.against == "padded":
            padded = dataclasses.replace(case, packed=False)
            return Workload(padded, Inputs.make(padded), self.ours)
        return Workload(case, inputs, self.ours)


def geometric_mean(values: Sequence[float]) -> float | None:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def summarize(results: Sequence[Result]) -> dict[str, Any]:
    """Geometric means against torch, over all cases, per regime and per op."""
    rated = [(r.case, r.speedup) for r in results if r.case.against == "torch" and r.speedup is not None]

    def mean(kept: list[float]) -> dict[str, Any] | None:
        value = geometric_mean(kept)
        return None if value is None else {"speedup": round(value, 4), "cases": len(kept)}

    groups: dict[str, Any] = {"overall": mean([s for _, s in rated])}
    groups["regimes"] = {g: mean([s for c, s in rated if c.regime == g]) for g in REGIMES}
    groups["ops"] = {
        op: mean([s for c, s in rated if c.workload.split("-")[0] == op])
        for op in sorted({c.workload.split("-")[0] for c, _ in rated})
    }
    judged = [r.reached for r in results if r.reached is not None]
    groups["targets"] = {"reached": sum(judged), "of": len(judged)} if judged else None
    groups["wrong"] = [r.case.name for r in results if r.wrong]
    return groups


def _first_line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}".splitlines()[0][:200]
