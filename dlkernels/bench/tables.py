"""Results as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .cases import REGIME_TEXT, REGIMES
from .runner import Result

_AGAINST = {
    "padded": "packed against our own padded run, per valid step (1.00 = as fast)",
    "default": "deterministic mode against our own default mode (its cost)",
    "flash": "attention against torch's flash backend",
    "math": "attention against torch's math backend",
}


def results_table(results: Sequence[Result]) -> str:
    """Grouped per regime, then what is measured against ourselves."""
    parts = [
        _group(REGIME_TEXT[regime], [r for r in results if r.case.against == "torch" and r.case.regime == regime])
        for regime in REGIMES
    ]
    parts += [_group(text, [r for r in results if r.case.against == kind]) for kind, text in _AGAINST.items()]
    return "\n\n".join(part for part in parts if part)


def _group(title: str, results: Sequence[Result]) -> str:
    if not results:
        return ""
    peer = "own ms" if results[0].case.against in ("padded", "default") else "torch ms"
    rows = [["case", peer, "ours ms", "speed-up", "of block pairs", "target", "kernel"]]
    rows += [_row(result) for result in results]
    return title + "\n" + align(rows)


def _row(result: Result) -> list[str]:
    target = "" if result.case.target is None else f"{result.case.target:.2f} {verdict(result)}"
    if result.sample is None or result.speedup is None or result.spread is None:
        text = "results disagree: " if result.status == "disagree" else f"{result.status}: "
        return [result.case.name, "-", "-", "-", "", target, text + result.message]
    low, high = result.spread
    return [
        result.case.name,
        milliseconds(result.sample.theirs),
        milliseconds(result.sample.ours),
        f"{result.speedup:.2f}x",
        f"{low:.2f}..{high:.2f}",
        target,
        kernel_text(result.kernel),
    ]


def verdict(result: Result) -> str:
    return "pass" if result.reached else "MISSED"


def milliseconds(seconds: float) -> str:
    """Three significant figures."""
    value = seconds * 1e3
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else "0"


def kernel_text(kernel: dict[str, Any]) -> str:
    text = [str(kernel.get("kernel", ""))]
    text += [str(kernel[key]) for key in ("split", "recurrence") if kernel.get(key)]
    if kernel.get("members", 1) > 1:
        text.append(f"{kernel['members']} members")
    return " ".join(text)


def align(rows: Sequence[Sequence[str]]) -> str:
    """First and last column to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    last = len(widths) - 1
    lines = []
    for row in rows:
        cells = [c.ljust(w) if i in (0, last) else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def summary_text(summary: dict[str, Any]) -> str:
    lines = []
    if summary["overall"]:
        rows = [["speed-up over torch, geometric mean", "", ""]]
        named = list(summary["regimes"].items()) + list(summary["ops"].items()) + [("overall", summary["overall"])]
        rows += [[f"  {name}", f"{m['speedup']:.2f}x", f"({m['cases']} cases)"] for name, m in named if m]
        lines.append(align(rows))
    if summary["targets"]:
        lines.append(f"  targets reached: {summary['targets']['reached']} of {summary['targets']['of']}")
    if summary["wrong"]:
        lines.append("  WRONG RESULTS, no speed-up claimed: " + ", ".join(summary["wrong"]))
    return "\n".join(lines)
