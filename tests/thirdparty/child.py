"""Judges and times the cases of one user, in a process of its own: python -m tests.thirdparty.child USER [STAND_IN ...]

Prints a line for each case, "CASE" and JSON, and one for each package that got a stand-in, "STAND-IN" and why.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import time
import traceback
from collections import Counter
from typing import Any

import torch

import dlkernels
from dlkernels.bench.runner import Agreement
from dlkernels.bench.timing import Budget, alternate
from tests.thirdparty.case import Case, Step, cases_of
from tests.thirdparty.judgement import Results, by_nearness, by_reference, refusal
from tests.thirdparty.stand_ins import stand_in_for

BUDGET = Budget(seconds=1.5, max_pairs=40, max_seconds=10.0)


class Switched:
    """A step as a side of the timing. It turns the switch on or off when its turn begins."""

    def __init__(self, step: Step, on: bool) -> None:
        self.step, self.on = step, on

    def prepare(self) -> None:
        dlkernels.disable()
        if self.on:
            dlkernels.enable()

    def __call__(self) -> None:
        self.step()


@dataclasses.dataclass
class Outcome:
    agreements: dict[str, Agreement] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)
    gradients: int = 0
    served: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    left: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)

    def run_with_ours(self, case: Case, step: Step, dtype: torch.dtype) -> Results:
        """The results of the step with the switch on. Notes what was served and left."""
        with dlkernels.enable() as handle:
            ours = step()
        operators = {operator for operator, _ in handle.served}
        if missing := set(case.served) - operators:
            self.problems.append(f"{dtype}: our kernels have not served {', '.join(sorted(missing))}")
        if operators and not case.served:
            self.problems.append(f"{dtype}: reaches {', '.join(sorted(operators))}, which was not expected")
        self.served, self.left = handle.served, handle.left
        self.gradients = sum(name.startswith("d ") and bool(value.any()) for name, value in ours.items())
        return ours

    def judge(self, dtype: torch.dtype, agreement: Agreement) -> None:
        self.agreements[str(dtype).removeprefix("torch.")] = agreement
        if not agreement.ok:
            self.problems.append(f"{dtype}: {agreement}")


def judge(case: Case) -> Outcome:
    found = Outcome()
    if case.near is not None:
        step = case.make(torch.float32)
        theirs, again = step(), step()
        agreement = by_nearness(again, theirs, 0.0)
        if not agreement.ok:  # the comparison would mean nothing
            agreement = refusal(f"torch's own results differ from run to run: {agreement}")
        else:
            agreement = by_nearness(found.run_with_ours(case, step, torch.float32), theirs, case.near)
        found.judge(torch.float32, agreement)
        return found
    exact = case.make(torch.float64)()
    for dtype in (torch.float64, torch.float32):
        theirs = case.make(dtype)()
        ours = found.run_with_ours(case, case.make(dtype), dtype)
        found.judge(dtype, by_reference(ours, theirs, exact, dtype))
    return found


def run(case: Case) -> dict[str, Any]:
    found = judge(case)
    entry: dict[str, Any] = {
        "case": case.name,
        "problems": found.problems,
        "agreements": {dtype: dataclasses.asdict(agreement) for dtype, agreement in found.agreements.items()},
        "gradients": found.gradients,
        "served": [[operator, kernel, calls] for (operator, kernel), calls in sorted(found.served.items())],
        "left": [[operator, reason, calls] for (operator, reason), calls in sorted(found.left.items())],
    }
    if not found.problems:
        step = case.make(torch.float32)
        sides = Switched(step, on=False), Switched(step, on=True)
        sample = alternate(*sides, BUDGET, clock=time.process_time)
        dlkernels.disable()
        entry |= {"off_ms": sample.theirs * 1e3, "on_ms": sample.ours * 1e3, "speedup": sample.ratio}
    return entry


def main() -> None:
    user, *stand_ins = sys.argv[1:]
    for package in stand_ins:
        if why := stand_in_for(package):
            print(f"STAND-IN {package}: {why.splitlines()[0]}", flush=True)
    torch.set_num_threads(1)
    for case in cases_of(importlib.import_module(f"tests.thirdparty.users.{user}")):
        try:
            entry = run(case)
        except Exception:
            dlkernels.disable()
            entry = {"case": case.name, "problems": [traceback.format_exc()]}
        print("CASE " + json.dumps(entry), flush=True)


if __name__ == "__main__":
    main()
