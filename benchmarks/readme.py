"""Rewrites the benchmark block of README.md from committed result files.

    python -m benchmarks.readme benchmarks/results/<machine>/<file>.json ...
    python -m benchmarks.readme --check

The block lists its files. It begins with those of the suites `peers` and `models`. `--check` fails if the block differs
from what they give.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlkernels.bench.cases import REGIMES, SHORT_DTYPE
from dlkernels.bench.machine import headline
from dlkernels.bench.peers_report import class_name
from dlkernels.bench.report import geometric_mean, milliseconds

from . import result_files

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
_SOURCES = re.compile(r"<!-- from: (.*?) -->")
_FIRST = ("peers", "models")
# How many cells of the suite `peers` are shown at each end.
_ENDS = 4
_OP_ORDER = ("lstm", "gru", "rnn", "lstmcell", "grucell", "rnncell", "attention")


def render(docs: dict[str, dict[str, Any]]) -> str:
    """The text between the markers, made from {path: result file}."""
    parts = [f"<!-- from: {' '.join(docs)} -->"]
    for doc in sorted(docs.values(), key=lambda doc: (*_FIRST, doc["suite"]).index(doc["suite"])):
        parts.append(f"{headline(doc['machine'], doc['versions'])} ({doc['date'][:10]}).")
        if doc["suite"] == "peers":
            parts.append(_peers(doc))
        elif doc["suite"] == "models":
            parts.append(_models(doc))
        elif doc["suite"].endswith("targets"):
            parts.append(_targets(doc))
        elif doc["results"]:
            parts.append(_regimes(doc))
        if doc["charlm"]:
            parts.append(_jobs(doc))
    return "\n\n".join(parts)


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "| --- |" + " ---: |" * (len(rows[0]) - 1))
    return "\n".join(lines)


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _peers(doc: dict[str, Any]) -> str:
    """A row for each class of cells, and the cells at both ends."""
    rows = [["class", "cells", "ours over", "geometric mean", "worst cell", "target"]]
    for entry in doc["summary"]["classes"]:
        goal = entry["goal"]
        over = "the best peer of each cell" if entry["over"] == "best" else "torch"
        cells = f"{entry['timed']} of {entry['cells']}"
        target = f"{_times(goal['mean'])}, no cell under {_times(goal['least'])}: {entry['verdict']}"
        rows.append([class_name(entry), cells, over, _times(entry["mean"]), _times(entry["worst"]), target])
    libraries = ", ".join(f"{name} {version}" for name, version in doc["summary"]["peer_versions"].items())
    text = (
        "Recurrent layers beside torch, ONNX Runtime, OpenVINO and torch's int8 layers: the peer's time divided by "
        f"ours (inference with prepacked weights, which a server would use; {libraries})."
    )
    left_out = [
        f"- {entry['side']}, {len(entry['cells'])} cell{'s' * (len(entry['cells']) > 1)}: {entry['reason']}"
        for entry in doc["summary"]["left_out"]
    ]
    tail = "\n\nLeft out:\n\n" + "\n".join(left_out) if left_out else ""
    return f"{text}\n\n{_table(rows)}\n\n{_cells(doc)}{tail}"


def _cells(doc: dict[str, Any]) -> str:
    """The cells in which ours is furthest behind and ahead of the best peer."""
    rated = sorted((e for e in doc["results"] if "speedup" in e), key=lambda e: e["speedup"])
    ends = rated if len(rated) <= 2 * _ENDS else rated[:_ENDS] + rated[-_ENDS:]
    rows = [["cell", "ours, ms", "best peer", "its ms", "best peer / ours"]]
    for e in ends:
        ours, theirs = (milliseconds(e[key] / 1e3) for key in ("ours_ms", "theirs_ms"))
        rows.append([f"`{e['name']}`", ours, e["best"], theirs, _times(e["speedup"])])
    return f"The cells at both ends:\n\n{_table(rows)}"


def _models(doc: dict[str, Any]) -> str:
    """A row for each model, a column for each dtype and thread count."""
    cells: dict[str, dict[tuple[str, int], str]] = {}
    for e in doc["results"]:
        case = e["case"]
        column = (SHORT_DTYPE[case["dtype"]], case["threads"])
        mark = "" if e.get("reached", True) else f" (target {case['target']:.2f})"
        cells.setdefault(case["model"], {})[column] = (_times(e["speedup"]) if "speedup" in e else e["status"]) + mark
    order = sorted({column for found in cells.values() for column in found}, key=lambda c: (c[0] != "f32", c))
    titles = [f"{dtype}, {n} thread{'s' * (n > 1)}" for dtype, n in order]
    rows = [["model", *titles]]
    rows += [[model, *(found.get(column, "") for column in order)] for model, found in cells.items()]
    overall = doc["summary"]["overall"]
    tail = f"\n\nGeometric mean: {_times(overall['speedup'])}." if overall else ""
    return f"Training steps of whole models, `dlkernels.enable()` off / on:\n\n{_table(rows)}{tail}"


def _regimes(doc: dict[str, Any]) -> str:
    """A table of geometric means, operators by regimes, and the overall mean."""
    rated = [e for e in doc["results"] if "speedup" in e and e["case"]["against"] == "torch"]
    rows = [["speed-up over torch", *REGIMES]]
    for op in _OP_ORDER:
        mine = [e for e in rated if _op(e) == op]
        for pick, label in ((False, "inference"), (True, "training")):
            found = [e for e in mine if e["case"]["training"] is pick]
            if found:
                means = [geometric_mean([e["speedup"] for e in found if e["regime"] == r]) for r in REGIMES]
                rows.append([f"{_title(op)} {label}", *map(_times, means)])
    overall = doc["summary"]["overall"]
    tail = f"\n\nGeometric means; over all {overall['cases']} cases: {_times(overall['speedup'])}." if overall else ""
    return _table(rows) + tail


def _targets(doc: dict[str, Any]) -> str:
    """One table for the layers and one for attention."""
    of_layers = [e for e in doc["results"] if e["case"]["mode"] != "attention"]
    of_attention = [e for e in doc["results"] if e["case"]["mode"] == "attention"]
    parts = []
    if of_layers:
        parts.append(f"Speed-up over torch.nn:\n\n{_target_table(of_layers, '(B, T, I, H)')}")
    if of_attention:
        table = _target_table(of_attention, "(B, H, M, D)")
        parts.append(f"Speed-up over torch's scaled_dot_product_attention:\n\n{table}")
    reached = doc["summary"]["targets"]
    tail = f"\n\nTargets reached: {reached['reached']} of {reached['of']}." if reached else ""
    return "\n\n".join(parts) + tail


def _target_table(entries: Sequence[dict[str, Any]], sizes: str) -> str:
    """A row for each shape and op, a column for each use (inference, training) and thread count."""
    cells: dict[tuple[str, str, str, str], dict[tuple[bool, int], str]] = {}
    columns: set[tuple[bool, int]] = set()
    for e in entries:
        case = e["case"]
        layout = "packed" if case["packed"] else ""
        if case["against"] == "padded":
            layout = "packed over our own padded, per valid step"
        shape = _shape(case)
        if case["mode"] == "attention":
            layout = ", ".join(_features(case))
        key = (shape, layout, _op(e), SHORT_DTYPE[case["dtype"]])
        column = (case["training"], case["threads"])
        columns.add(column)
        mark = "" if e.get("reached", True) else " (target " + f"{case['target']:.2f})"
        cells.setdefault(key, {})[column] = (_times(e["speedup"]) if "speedup" in e else e["status"]) + mark
    order = sorted(columns)
    titles = [f"{'training' if t else 'inference'}, {n} thread{'s' * (n > 1)}" for t, n in order]
    rows = [[sizes, "op", *titles]]
    for (shape, layout, op, dtype), found in cells.items():
        notes = [text for text in (layout, "" if dtype == "f32" else dtype) if text]
        rows.append([shape, ", ".join([_title(op), *notes]), *(found.get(column, "") for column in order)])
    return _table(rows)


def _jobs(doc: dict[str, Any]) -> str:
    rows = [["training a character model", "torch.nn", "dlkernels.patch", "speed-up", "bits per character"]]
    for job in doc["charlm"]:
        if not job["agree"]:
            rows.append([f"{job['mode'].upper()}: loss curves disagree", "", "", "", ""])
            continue
        label = f"{job['mode'].upper()}, {job['steps']} steps, {job['threads']} thread{'s' * (job['threads'] > 1)}"
        seconds = [f"{job['seconds'][side]:.1f} s" for side in ("torch", "dlkernels")]
        bits = ", ".join(f"{job['validation'][side]:.3f}" for side in ("torch", "dlkernels"))
        rows.append([label, *seconds, _times(job["speedup"]), bits])
    return _table(rows)


def _shape(case: dict[str, Any]) -> str:
    names = "BHMD" if case["mode"] == "attention" else "BTIH"
    return f"({', '.join(str(case[name]) for name in names)})"


def _features(case: dict[str, Any]) -> list[str]:
    """The features of an attention case, besides its shape."""
    found = ["causal"] * case["causal"] + ["packed"] * case["packed"]
    found += [{"bool": "bool mask", "bias": "bias", "grad": "trained bias"}[case["mask"]]] if case["mask"] else []
    found += [f"dropout {case['dropout']:g}"] if case["dropout"] else []
    found += [f"{name} = {case[name]}" for name in ("N", "Hkv", "Dv") if case[name]]
    return found + ([f"against {case['against']}"] if case["against"] != "torch" else [])


def _op(entry: dict[str, Any]) -> str:
    return str(entry["case"]["mode"]) + ("cell" if entry["case"]["cell"] else "")


def _title(op: str) -> str:
    if op == "attention":
        return op
    return op[:-4].upper() + "Cell" if op.endswith("cell") else op.upper()


def split(text: str) -> tuple[str, str, str]:
    """Splits README into the text before the block, the block, and the text after it."""
    before, found_begin, rest = text.partition(BEGIN)
    block, found_end, after = rest.partition(END)
    if not found_begin or not found_end:
        raise ValueError(f"no {BEGIN} ... {END} block")
    return before, block.strip("\n"), after


def sources(block: str) -> list[str]:
    found = _SOURCES.search(block)
    return found.group(1).split() if found else []


def rewrite(text: str, docs: dict[str, dict[str, Any]]) -> str:
    before, _, after = split(text)
    return f"{before}{BEGIN}\n{render(docs)}\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__.splitlines()[0])
    p.add_argument("files", nargs="*", help="result files, relative to the README; default: those the block came from")
    p.add_argument("--readme", type=Path, default=Path("README.md"))
    p.add_argument("--check", action="store_true", help="change nothing; fail if the block is out of date")
    args = p.parse_args(argv)
    old = args.readme.read_text()
    block = split(old)[1]
    paths = args.files or sources(block)
    if not paths:
        print("no result file named, here or in the README's block", file=sys.stderr)
        return 2
    new = rewrite(old, {path: result_files.load(args.readme.parent / path) for path in paths})
    if args.check:
        if new != old:
            print(f"{args.readme}: the benchmark block is not what {' '.join(paths)} give", file=sys.stderr)
        return int(new != old)
    args.readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
