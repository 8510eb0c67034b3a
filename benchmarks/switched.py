"""Training steps of whole models, with `dlkernels.enable()` off and on.

The two sides are the same model: only the switch differs. Before the time is measured, loss and gradients of both are
compared with float64, without dropout, because the two sides draw different masks.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import dlkernels
from dlkernels.bench.cases import SHORT_DTYPE
from dlkernels.bench.peers import PeerRunner
from dlkernels.bench.runner import Agreement, Result
from dlkernels.testing import FACTOR_GRAD

from .models import MODELS, Batch


@dataclasses.dataclass(frozen=True)
class ModelCase:
    """dtype: float32, or bfloat16 for autocast of a float32 model."""

    model: str
    dtype: str = "float32"
    threads: int = 1
    target: float | None = 1.0
    training: bool = True
    against: str = "torch"
    cell: bool = False
    regime: str = "GEMM-bound"
    valid_fraction: float = 1.0

    @property
    def mode(self) -> str:
        return self.model

    @property
    def workload(self) -> str:
        return f"{self.model}-train-{SHORT_DTYPE[self.dtype]}"

    @property
    def name(self) -> str:
        return f"{self.workload}-{self.threads}t"


def cases(models: Sequence[str], dtypes: Sequence[str], threads: Sequence[int], target: float) -> list[ModelCase]:
    return [
        ModelCase(model, dtype, count, target)
        for model in models
        for dtype in dtypes
        if dtype in ("float32", "bfloat16")
        for count in threads
    ]


class Step:
    """A training step: loss, backward, AdamW. `prepare` turns the switch as this side needs it."""

    def __init__(self, case: ModelCase, model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer, on: bool):
        self.case, self.model, self.batch, self.optimizer, self.on = case, model, batch, optimizer, on
        self.loss = MODELS[case.model].loss

    def prepare(self) -> None:
        dlkernels.disable()
        if self.on:
            self.handle = dlkernels.enable()

    def __call__(self) -> None:
        self.gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradients(self) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if self.case.dtype == "bfloat16" else nullcontext():
            loss = self.loss(self.model, *self.batch)
        torch.autograd.backward(loss)
        return loss.detach()


def results(step: Step) -> list[Tensor]:
    """The loss and the gradients of all parameters, without dropout."""
    step.prepare()
    step.model.eval()
    step.optimizer.zero_grad()
    try:
        found = [step.gradients()]
        found += [p.grad.clone() for p in step.model.parameters() if p.grad is not None]
        return found
    finally:
        step.optimizer.zero_grad()
        step.model.train()


def distance(found: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """The length of the difference of all tensors together, divided by that of the reference."""
    difference = sum(float((a.double() - r).square().sum()) for a, r in zip(found, reference, strict=True))
    return math.sqrt(difference / sum(float(r.square().sum()) for r in reference))


def agreement(case: ModelCase, off: Step, on: Step) -> Agreement:
    exact = copy.deepcopy(off.model).double()
    inputs = tuple(t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in off.batch)
    plain = dataclasses.replace(case, dtype="float32")
    reference = results(Step(plain, exact, inputs, torch.optim.SGD(exact.parameters()), on=False))
    theirs, ours = results(off), results(on)
    worst, ok, figures = "", True, (0.0, 0.0, 0.0)
    for name, part in (("loss", slice(0, 1)), ("gradients", slice(1, None))):
        measure = distance(theirs[part], reference[part])
        mine = distance(ours[part], reference[part])
        limit = FACTOR_GRAD * measure + torch.finfo(getattr(torch, case.dtype)).eps
        if not worst or not mine <= limit:
            worst, ok, figures = name, mine <= limit, (mine, measure, limit)
    return Agreement(ok, worst, *figures)


class ModelRunner(PeerRunner):
    """Measures ModelCase and PeerCase too."""

    def one(self, case: Any, checker: Any) -> Result:
        if not isinstance(case, ModelCase):
            return super().one(case, checker)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, batch = MODELS[case.model].make(), MODELS[case.model].batch()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        off, on = (Step(case, model, batch, optimizer, switch) for switch in (False, True))

        def mine() -> tuple[Step, Agreement]:
            return on, agreement(case, off, on)

        def served() -> dict[str, Any]:
            return {"kernel": ", ".join(sorted({kernel for _, kernel in on.handle.served}))}

        try:
            return self.measure(case, lambda: off, mine, served)
        finally:
            dlkernels.disable()
