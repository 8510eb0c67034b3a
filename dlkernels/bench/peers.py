"""`bench --suite peers`: our layers beside torch, ONNX Runtime, OpenVINO and torch's int8 layers."""

from __future__ import annotations

import dataclasses
import inspect
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..testing import Verdict, error, within_rule
from . import bounds, layers, machine, timing
from .cases import SHORT_DTYPE
from .engines import OnnxRuntime, OpenVino, Unavailable
from .layers import MODES, Inputs, LayerCase, Workload
from .runner import Agreement, Checked, Checker, Result, Runner, compare, first_line
from .timing import Sample

BATCHES = (1, 2, 4, 8, 16, 64, 200)
STEPS = (1, 20, 60)
HIDDEN = (64, 96, 128, 256, 512, 1024)
WIDTHS: tuple[Callable[[int], int], ...] = (lambda H: H, lambda H: H // 8, lambda H: 4 * H)
INT8_BATCHES, INT8_HIDDEN, INT8_MODES = (1, 8, 32), (256, 512, 1024), ("lstm", "gru")
# Which steps of the walk (`at`) each kind of cell takes.
WALKS = {
    ("float32", False): range(27),
    ("float32", True): range(3, 15),
    ("bfloat16", False): range(36, 45),
    ("bfloat16", True): range(45, 54),
}
OURS = ("plain", "prepacked")
# A peer's error may be this many times the limit of our own. Sums taken in another order are no wrong results, and
# leaving out a peer would favour us: in a cell of 64 outputs OpenVINO is at 1.3 of the limit.
PEER_SLACK = 4.0
# With these a round of five sides takes 0.2 s, and the 150 cells less than 25 minutes on two cores.
SECONDS, MAX_SECONDS = 5.0, 12.0


@dataclasses.dataclass(frozen=True)
class PeerCase(LayerCase):
    """weights: "int8", or empty for weights of the case's dtype."""

    against: str = "peers"
    weights: str = ""

    @property
    def precision(self) -> str:
        return self.weights or SHORT_DTYPE[self.dtype]

    @property
    def workload(self) -> str:
        return f"{self.mode}-{'train' if self.training else 'infer'}-{self.precision}-{self.shape_text}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]

    @property
    def item_bytes(self) -> int:
        """The bytes of a weight."""
        return 1 if self.weights == "int8" else self.torch_dtype.itemsize

    @property
    def ours(self) -> str:
        """The side that counts as ours: a server prepacks, and in training the weights change."""
        return OURS[0] if self.training else OURS[1]


def at(step: int) -> tuple[str, int, int, int, int]:
    """Mode, B, T, I and H of a step of a walk through all sizes. Nine steps that begin at a multiple of nine have each
    pair of mode, T and kind of I once, and all B and H. The first 27 have also each pair of mode or T with B or H, and
    no pair of B and H twice."""
    H = HIDDEN[(step + step // 9) % 6]
    I = WIDTHS[(step + step // 3 + step // 9) % 3](H)
    return MODES[step % 3], BATCHES[step % 7], STEPS[step // 3 % 3], I, H


def grid(threads: Sequence[int], dtypes: Sequence[str], quick: bool = False) -> list[PeerCase]:
    """150 cells for two thread counts, which vary fastest, so that they share a reference. The int8 cells come with
    float32, the dtype of their input."""
    made = [
        PeerCase(*at(step), training=training, dtype=dtype)
        for (dtype, training), steps in WALKS.items()
        for step in (steps[6:9:2] if quick else steps)
        if dtype in dtypes
    ]
    if "float32" in dtypes:
        made += _int8()[:2] if quick else _int8()
    return [dataclasses.replace(case, threads=count) for case in made for count in (threads[-1:] if quick else threads)]


def _int8() -> list[PeerCase]:
    """torch has int8 weights for LSTM and GRU only."""
    return [
        PeerCase(mode, B, STEPS[(i + j) % 3], H, H, weights="int8")
        for i, B in enumerate(INT8_BATCHES)
        for j, H in enumerate(INT8_HIDDEN)
        for mode in INT8_MODES
    ]


Make = Callable[[], Checked]


def sides(case: PeerCase, inputs: Inputs) -> Mapping[str, Make]:
    """The sides of a cell by name, ours first. Each raises `Unavailable`, or an exception of its library, if it cannot
    be made."""
    if case.weights == "int8":
        return {"prepacked": lambda: int8(case, inputs), "torch": lambda: torch_int8(case, inputs)}

    def plain() -> Workload:
        return Workload(case, inputs, layers.ours)

    def prepacked() -> Workload:
        made = plain()
        made.module.prepack()  # type: ignore[operator]
        return made

    def theirs() -> Workload:
        return Workload(case, inputs, layers.theirs)

    if case.training:
        return {"plain": plain, "torch": theirs}
    return {
        "plain": plain,
        "prepacked": prepacked,
        "torch": theirs,
        "ONNX Runtime": lambda: OnnxRuntime(case, inputs),
        "OpenVINO": lambda: OpenVino(case, inputs),
    }


def int8(case: PeerCase, inputs: Inputs) -> Workload:
    made = Workload(case, inputs, layers.ours)
    prepack: Any = made.module.prepack
    if "weights" not in inspect.signature(prepack).parameters:
        raise Unavailable("prepack() has no weights=torch.int8 in this version")
    prepack(weights=torch.int8)
    return made


def torch_int8(case: PeerCase, inputs: Inputs) -> Workload:
    made = Workload(case, inputs, layers.theirs)
    with warnings.catch_warnings():
        # torch.ao is to move into a package of its own.
        warnings.simplefilter("ignore")
        # `quantize_dynamic` converts the children of a module.
        quantize: Any = torch.ao.quantization.quantize_dynamic
        made.module = quantize(nn.Sequential(made.module), {type(made.module)}, dtype=torch.qint8)[0]
    return made


def loosely(result: Tensor, theirs: Tensor, ref: Tensor, dtype: torch.dtype, grad: bool) -> Verdict:
    """The rule for peers."""
    found = within_rule(result, theirs, ref, dtype, grad)
    limit = PEER_SLACK * found.limit
    return found._replace(ok=found.ours <= limit, limit=limit)


def no_worse(result: Tensor, theirs: Tensor, ref: Tensor, dtype: torch.dtype, grad: bool) -> Verdict:
    """The rule for int8: the largest error of ours is at most that of torch's int8 layer."""
    mine, limit = error(result, ref), error(theirs, ref)
    return Verdict(mine <= limit, mine, limit, limit)


class Int8Checker:
    """Compares results with those of torch's float32 layer, all outputs together."""

    def __init__(self, case: PeerCase, inputs: Inputs):
        self.reference = Workload(case, inputs, layers.theirs).results()
        self.theirs = torch_int8(case, inputs).results()

    def __call__(self, side: Checked) -> Agreement:
        found = side.results()
        for name, ref in self.reference.items():
            if name not in found or found[name].shape != ref.shape:
                return Agreement(False, f"{name} (missing or of another shape)", float("inf"), 0.0, 0.0)
        mine, theirs, reference = (_together(results) for results in (found, self.theirs, self.reference))
        return compare(mine, theirs, reference, torch.float32, no_worse)


def _together(results: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"outputs": torch.cat([results[name].flatten() for name in sorted(results)])}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a side. ratio: its time divided by ours, the median over rounds."""

    status: str
    reason: str = ""
    agreement: Agreement | None = None
    seconds: float | None = None
    ratio: float | None = None

    def as_json(self) -> dict[str, Any]:
        entry: dict[str, Any] = {"status": self.status, "reason": self.reason}
        if self.agreement:
            entry |= {"error": self.agreement.ours, "limit": self.agreement.limit}
        if self.seconds is not None:
            entry["ms"] = round(self.seconds * 1e3, 6)
        if self.ratio is not None:
            entry["ratio"] = round(self.ratio, 4)
        return entry


@dataclasses.dataclass(frozen=True)
class PeerResult(Result):
    """`sample` has the best peer and ours. plain: the best peer's time divided by that of our plain layer. bound: the
    least seconds of a call on this machine (bounds.py)."""

    case: PeerCase
    sides: Mapping[str, Outcome] = dataclasses.field(default_factory=dict)
    best: str = ""
    plain: float | None = None
    bound: float | None = None

    def as_json(self) -> dict[str, Any]:
        entry = super().as_json()
        if self.best:
            entry["best"] = self.best
        if self.plain is not None:
            entry["speedup_plain"] = round(self.plain, 4)
        if self.bound is not None:
            entry["bound_ms"] = round(self.bound * 1e3, 6)
        return entry | {"sides": {name: outcome.as_json() for name, outcome in self.sides.items()}}


@dataclasses.dataclass
class PeerRunner(Runner):
    """Measures PeerCase too."""

    sides: Callable[[PeerCase, Inputs], Mapping[str, Make]] = sides

    def one(self, case: Any, checker: Checker) -> Result:
        return self._peers(case, checker) if isinstance(case, PeerCase) else super().one(case, checker)

    def _peers(self, case: PeerCase, checker: Checker) -> PeerResult:
        inputs = Inputs.make(case)
        try:
            judge = Int8Checker(case, inputs) if case.weights else None
        except Exception as problem:
            return PeerResult(case, "no peer", first_line(problem))
        ready: dict[str, Checked] = {}
        found: dict[str, Outcome] = {}
        kernel: dict[str, Any] = {}
        for name, make in self.sides(case, inputs).items():
            rule = within_rule if name in OURS else loosely
            try:
                side = make()
                agreement = judge(side) if judge else checker(case, inputs, side, rule)
            except Unavailable as reason:
                found[name] = Outcome("not available", str(reason))
                continue
            except Exception as problem:
                found[name] = Outcome("error", first_line(problem))
                continue
            if name == case.ours:
                kernel = machine.last_kernel()
            if agreement.ok:
                ready[name], found[name] = side, Outcome("ok", "", agreement)
            else:
                found[name] = Outcome("disagree", str(agreement), agreement)
        for name in OURS:
            if name in found and found[name].status in ("disagree", "error"):
                outcome = found[name]
                status: Any = outcome.status
                return PeerResult(case, status, f"{name}: {outcome.reason}", None, outcome.agreement, sides=found)
        return self._timed(case, ready, found, kernel)

    def _timed(
        self, case: PeerCase, ready: Mapping[str, Checked], found: dict[str, Outcome], kernel: dict[str, Any]
    ) -> PeerResult:
        budget = dataclasses.replace(self.budget, max_seconds=min(self.budget.max_seconds, MAX_SECONDS))
        # A program that serves a model enters the mode once. For the smallest layers that takes a quarter of a call.
        with torch.inference_mode(not case.training):
            rounds = timing.rotate(list(ready.values()), budget, settle=timing.until_quiet) if ready else []
        blocks = dict(zip(ready, rounds, strict=True))
        mine = blocks.get(case.ours)
        samples: dict[str, Sample] = {}
        for name, kept in blocks.items():
            seconds = statistics.median(t for block in kept for t in block)
            if mine is not None:
                samples[name] = timing.summarize(kept, mine)
            ratio = samples[name].ratio if name in samples else None
            found[name] = dataclasses.replace(found[name], seconds=seconds, ratio=ratio)
        own = found[case.ours]
        if mine is None:
            return PeerResult(case, "not available", own.reason, sides=found)
        best = min((name for name in samples if name not in OURS), key=lambda name: samples[name].ratio, default="")
        if not best:
            reasons = "; ".join(f"{name}: {outcome.reason}" for name, outcome in found.items() if outcome.reason)
            return PeerResult(case, "no peer", reasons, sides=found)
        plain = timing.summarize(blocks[best], blocks[OURS[0]]).ratio if OURS[0] in blocks else None
        bound = bounds.seconds(
            case.mode, case.B, case.T, case.I, case.H, case.training, case.torch_dtype, case.item_bytes, case.threads
        )
        return PeerResult(case, "ok", "", samples[best], own.agreement, kernel, found, best, plain, bound)
