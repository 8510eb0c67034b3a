"""Reports results: a table and a summary for the terminal, and the result file."""

from __future__ import annotations

import datetime
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import machine
from .cases import REGIME_TEXT, REGIMES
from .runner import Result

SCHEMA = 1
_AGAINST = {
    "padded": "packed against our own padded run, per valid step (1.00 = as fast)",
    "default": "deterministic mode against our own default mode (its cost)",
    "flash": "attention against torch's flash backend",
    "math": "attention against torch's math backend",
}


def results_table(results: Sequence[Result]) -> str:
    """One group of rows per regime for cases against torch, then one for each other peer."""
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
        text.append(f"{kernel['members']} threads")
    return " ".join(text)


def align(rows: Sequence[Sequence[str]]) -> str:
    """Aligns the first and the last column to the left and the others, which are numbers, to the right."""
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


def document(
    suite: str, results: Sequence[Result], charlm: Sequence[dict[str, Any]], host: dict[str, Any]
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "suite": suite,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": host,
        "versions": machine.versions(),
        "summary": summarize(results),
        "charlm": list(charlm),
        "results": [result.as_json() for result in results],
    }


def home() -> Path:
    """benchmarks/results of the checkout, or of the current folder for an installed package."""
    checkout = Path(__file__).resolve().parents[2]
    return (checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()) / "benchmarks" / "results"


def folder(root: Path, host: dict[str, Any]) -> Path:
    """<root>/<machine>, created if it does not exist. Raises OSError if no file can be written to it."""
    found = root / machine.slug(host["cpu"], host["isa"])
    found.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=found):
        pass
    return found


def write(doc: dict[str, Any], root: Path) -> Path:
    """Writes <root>/<machine>/<date>-<suite>.json with one case per line, so that diffs are readable."""
    path = folder(root, doc["machine"]) / f"{doc['date'][:10]}-{doc['suite']}.json"
    lists = ("charlm", "results")
    head = json.dumps({k: v for k, v in doc.items() if k not in lists}, indent=1)
    for key in lists:
        body = ",\n".join("  " + json.dumps(entry) for entry in doc[key])
        head = head[:-2] + f',\n "{key}": [\n{body}\n ]\n}}'
    path.write_text(head + "\n")
    return path
