"""The table of `--suite peers`, and what each class of its cells comes to beside its target."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from .engines import versions
from .peers import OURS, WALKS, PeerResult, grid
from .report import align, geometric_mean, kernel_text, milliseconds
from .runner import Result


@dataclasses.dataclass(frozen=True)
class Goal:
    """over: "best", the best peer of each cell, or "torch". Both numbers are that side's time divided by ours."""

    over: str
    mean: float
    least: float

    @property
    def needed(self) -> tuple[str, ...]:
        return PEERS if self.over == "best" else PEERS[:1]


PEERS = ("torch", "ONNX Runtime", "OpenVINO")
GOALS = {
    ("f32", False): Goal("best", 1.25, 0.97),
    ("f32", True): Goal("torch", 2.2, 1.0),
    ("bf16", False): Goal("torch", 3.0, 1.0),
    ("bf16", True): Goal("torch", 3.2, 1.0),
    ("int8", False): Goal("torch", 1.3, 1.0),
}
_MARKS = {"disagree": "disagrees", "error": "none", "not available": "none"}


def of_peers(results: Sequence[Result]) -> list[PeerResult]:
    return [result for result in results if isinstance(result, PeerResult)]


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """What a result file of this suite has besides: a list of classes, and why peers are missing in cells."""
    found = of_peers(results)
    if not found:
        return {}
    classes = [_class(precision, training, threads, group) for (precision, training, threads), group in _groups(found)]
    return {"classes": classes, "left_out": _left_out(found), "peer_versions": versions()}


def _groups(results: Sequence[PeerResult]) -> list[tuple[tuple[str, bool, int], list[PeerResult]]]:
    """The results by precision, use and thread count, in the order of GOALS."""
    groups: dict[tuple[str, bool, int], list[PeerResult]] = {}
    for result in results:
        case = result.case
        groups.setdefault((case.precision, case.training, case.threads), []).append(result)
    order = list(GOALS)
    return sorted(groups.items(), key=lambda item: (order.index(item[0][:2]), item[0][2]))


def class_name(entry: Mapping[str, Any]) -> str:
    use = "training" if entry["training"] else "inference"
    return f"{entry['precision']} {use}, {entry['threads']} thread{'s' * (entry['threads'] > 1)}"


def _class(precision: str, training: bool, threads: int, results: Sequence[PeerResult]) -> dict[str, Any]:
    goal = GOALS[precision, training]
    over_best = {r.case.name: r.speedup for r in results if r.speedup is not None}
    over_torch = {r.case.name: ratio for r in results if (ratio := _ratio(r, "torch")) is not None}
    judged = over_best if goal.over == "best" else over_torch
    worst = min(judged, key=lambda name: judged[name], default="")
    mean = geometric_mean(list(judged.values()))
    # A cell in which every peer of the target computes something else cannot be judged and is no gap.
    void = sum(all(_status(r, name) == "disagree" for name in goal.needed) for r in results)
    complete = len(judged) + void == size(precision, training)
    return {
        "precision": precision,
        "training": training,
        "threads": threads,
        "ours": results[0].case.ours,
        "over": goal.over,
        "cells": size(precision, training),
        "timed": len(judged),
        "mean": _rounded(mean),
        "worst": _rounded(judged.get(worst)),
        "worst_cell": worst,
        "mean_of_plain": _rounded(geometric_mean([r.plain for r in results if r.plain is not None])),
        "mean_over_best": _rounded(geometric_mean(list(over_best.values()))),
        "mean_over_torch": _rounded(geometric_mean(list(over_torch.values()))),
        "goal": dataclasses.asdict(goal),
        "verdict": _verdict(goal, results, mean, judged.get(worst), complete),
    }


def size(precision: str, training: bool) -> int:
    """The number of cells of a class in the whole grid."""
    whole = grid((1,), tuple(dtype for dtype, _ in WALKS))
    return sum(case.precision == precision and case.training == training for case in whole)


def _verdict(goal: Goal, results: Sequence[PeerResult], mean: float | None, worst: float | None, complete: bool) -> str:
    """A class is "met" only if all its cells were measured beside every peer of its target."""
    if any(r.wrong for r in results):
        return "missed"
    if mean is None or worst is None:
        return "not measured"
    if mean < goal.mean or worst < goal.least:
        return "missed"
    absent = {name for r in results for name in goal.needed if _status(r, name) not in ("ok", "disagree")}
    if absent:
        return f"open: {', '.join(sorted(absent))} missing"
    return "met" if complete else "open: cells missing"


def _status(result: PeerResult, side: str) -> str:
    return result.sides[side].status if side in result.sides else "not available"


def _ratio(result: PeerResult, side: str) -> float | None:
    return result.sides[side].ratio if side in result.sides else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _left_out(results: Sequence[PeerResult]) -> list[dict[str, Any]]:
    """Sides that were not measured, with the reason and the cells: one entry for each side and reason."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for result in results:
        for name, outcome in result.sides.items():
            if outcome.status != "ok":
                # A disagreement has numbers in its reason, so that each is an entry of its own.
                found.setdefault((name, outcome.status, outcome.reason), []).append(result.case.name)
    return [
        {"side": ("ours, " if side in OURS else "") + side, "status": status, "reason": reason, "cells": cells}
        for (side, status, reason), cells in found.items()
    ]


def table(results: Sequence[Result]) -> str:
    parts = []
    for (precision, training, threads), group in _groups(of_peers(results)):
        named = class_name({"precision": precision, "training": training, "threads": threads})
        shown = [side for side in (*OURS, *PEERS) if any(side in r.sides for r in group)]
        head = ["cell, ms", *shown, "best peer", *(f"best / {side}" for side in OURS if side in shown)]
        head += ["of rounds", "of bound", "error", "torch's", "kernel"]
        parts.append(named + "\n" + align([head, *(_row(r, shown) for r in group)]))
    return "\n\n".join(parts)


def _row(result: PeerResult, shown: Sequence[str]) -> list[str]:
    cells = [result.case.name]
    for side in shown:
        outcome = result.sides.get(side)
        if outcome is None:
            cells.append("-")
        else:
            cells.append(_MARKS.get(outcome.status, "-") if outcome.seconds is None else milliseconds(outcome.seconds))
    cells.append(result.best or "-")
    cells += [_times(result.plain if side == OURS[0] else result.speedup) for side in OURS if side in shown]
    spread = result.spread
    cells += [f"{spread[0]:.2f}..{spread[1]:.2f}" if spread else ""]
    cells += [_part(result)]
    check = result.agreement
    cells += [f"{check.ours:.1e}", f"{check.theirs:.1e}"] if check else ["-", "-"]
    text = {"disagree": "results disagree: "}.get(result.status, f"{result.status}: ") + result.message
    return [*cells, kernel_text(result.kernel) if result.status == "ok" else text]


def _part(result: PeerResult) -> str:
    """How much of our time is the bound's."""
    ours = result.sample.ours if result.sample else None
    return "-" if ours is None or result.bound is None else f"{result.bound / ours:.0%}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def summary_text(found: Mapping[str, Any]) -> str:
    """The classes, and below them who was left out and why."""
    if not found:
        return ""
    rows = [["class", "ours", "over", "cells", "mean", "worst", "best / plain", "torch / ours", "target", "verdict"]]
    for entry in found["classes"]:
        goal = entry["goal"]
        rows.append([
            class_name(entry), entry["ours"], entry["over"], f"{entry['timed']} of {entry['cells']}",
            _times(entry["mean"]), _times(entry["worst"]), _times(entry["mean_of_plain"]),
            _times(entry["mean_over_torch"]), f"{goal['mean']:.2f}x, {goal['least']:.2f}x", entry["verdict"],
        ])  # fmt: skip
    lines = ["geometric mean and worst cell of each class over the peer of its target", align(rows)]
    for entry in found["left_out"]:
        cells = entry["cells"]
        where = cells[0] if len(cells) == 1 else f"{len(cells)} cells"
        lines.append(f"  {entry['side']}, {where}: {entry['status']}: {entry['reason']}")
    return "\n".join(lines)


def missed(found: Mapping[str, Any]) -> bool:
    return any(entry["verdict"] == "missed" for entry in found.get("classes", ()))
