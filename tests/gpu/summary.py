"""summary.json of `make gpu-check`: what the parts found, small enough to be committed, with the predictions and the
targets beside the measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SCHEMA = 1
Row = dict[str, Any]
_PART = {"status": str, "seconds": float, "limit": float, "cases": int, "failed": list, "not_run": int,
         "problems": list}  # fmt: skip
_TOP = {"schema": int, "rehearsal": bool, "environment": dict, "parts": dict, "smoke": dict, "recurrent": dict,
        "attention": dict, "tiles": list, "ncu": dict, "off_by_more_than_a_third": list, "targets": list}  # fmt: skip
# For an H200. (what, the most microseconds a step or the least TFLOP/s)
STEP = ((512, 0.9), (1024, 1.5))  # 16-bit LSTM and GRU forward with H up to this, B up to 64
TFLOPS = {("forward", False): 450.0, ("forward", True): 380.0, ("backward", False): 250.0, ("backward", True): 250.0}


def write(out: Path) -> None:
    order = {file.stem: json.loads(file.read_text()) for file in sorted(out.glob("*.json")) if file.stem not in _OWN}
    cases = {name: part["cases"] for name, part in order.items()}
    environment = json.loads((out / "environment.json").read_text())
    recurrent, attention = cases.get("recurrent", {}), cases.get("attention", {})
    whole = {
        "schema": SCHEMA, "rehearsal": environment["rehearsal"], "environment": environment,
        "parts": {
            name: {
                **{key: part[key] for key in ("status", "seconds", "limit", "problems")}, "cases": len(part["cases"]),
                "failed": [f"{key}: {part['cases'].get(key, {}).get('failed', '')}" for key in part["failed"]],
                "not_run": len(part["not_run"]),
            }
            for name, part in order.items()
        },
        "smoke": cases.get("smoke", {}), "recurrent": recurrent,
        "attention": {key: row for key, row in attention.items() if key.split()[0] in _CALLS},
        "tiles": tiles(attention), "ncu": cases.get("ncu", {}),
        "off_by_more_than_a_third": [
            key for key, row in recurrent.items() if row.get("forward", {}).get("off_by_more_than_a_third")
        ],
        "targets": targets(recurrent, attention),
    }  # fmt: skip
    (out / "summary.json").write_text(json.dumps(whole, indent=1))


_OWN = ("summary", "environment")
_CALLS = ("attention", "tutorial", "decode")  # the first words of the cases that are not of the sweep


def tiles(rows: dict[str, Row]) -> list[Row]:
    """For each kernel, width and mask the shipped time and the fastest tiles of the sweep."""
    found: dict[tuple[Any, ...], Row] = {}
    for key, row in rows.items():
        if "us" not in row or key.split()[0] not in ("shipped", "tile"):
            continue
        one = found.setdefault((row["kernel"], row["D"], row["causal"]), {"fastest": [], "shipped": None})
        if row["tile"] is None:
            one["shipped"] = {"us": row["us"], "tflops": row["tflops"]}
        else:
            one["fastest"].append({"tile": row["tile"], "us": row["us"], "tflops": row["tflops"]})
    return [
        {"kernel": kernel, "D": width, "causal": causal, "shipped": one["shipped"],
         "fastest": sorted(one["fastest"], key=lambda tile: tile["us"])[:5]}
        for (kernel, width, causal), one in found.items()
    ]  # fmt: skip


def targets(recurrent: dict[str, Row], attention: dict[str, Row]) -> list[Row]:
    """What was measured beside what is wanted of an H200."""
    found = []

    def add(what: str, target: float, measured: float, met: bool) -> None:
        found.append({"what": what, "target": target, "measured": measured, "met": met})

    for key, row in recurrent.items():
        if row.get("layer") not in ("LSTM", "GRU") or "forward_speedup" not in row:
            continue
        limit = next((most for hidden, most in STEP if row["H"] <= hidden), None)
        if limit is not None and row["B"] <= 64 and row["dtype"] == "bfloat16" and not key.endswith("packed"):
            time = row["forward"].get("recurrence") or row["forward"]["us_per_step"]
            add(f"{key}, microseconds a step", limit, time, time <= limit)
        for what in ("forward", "training"):
            add(f"{key}, {what} against cuDNN", 1.0, row[f"{what}_speedup"], row[f"{what}_speedup"] >= 1)
    for key, row in attention.items():
        if row.get("D") != 128 or row.get("dtype") != "bfloat16" or "causal" not in row or "dlkernels" not in row:
            continue
        for what in ("forward", "backward"):
            least = TFLOPS[what, row["causal"]]
            speed = row["dlkernels"][what]["tflops"]
            if row["M"] >= 4096:
                add(f"{key}, {what} TFLOP/s", least, speed, speed >= least)
    return found


def problems(whole: Row, ran: list[str]) -> list[str]:
    """What is wrong with the form of a summary of these parts."""
    found = [f"{key} should be {kind.__name__}" for key, kind in _TOP.items() if not isinstance(whole.get(key), kind)]
    if found:
        return found
    found += [f"no result of the part {name}" for name in ran if name not in whole["parts"]]
    for name, part in whole["parts"].items():
        found += [f"{name}: {key} should be {kind.__name__}" for key, kind in _PART.items()
                  if not isinstance(part.get(key), kind)]  # fmt: skip
        against = [part.get(key) for key in ("failed", "not_run", "problems")]
        if part.get("status") == "passed" and (any(against) or not part.get("cases")):
            found.append(f"{name}: passed, with {part.get('cases')} cases and with {against}")
    for name, key in (("recurrent", "layer"), ("attention", "D")):
        found += [f"{name}: {case} has no {key}" for case, row in whole[name].items()
                  if key not in row and "failed" not in row]  # fmt: skip
    return found


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def tables(whole: Row) -> list[str]:
    """The measurements as lines of text."""
    head = f"{'microseconds a step':44} {'ours':>8} {'alone':>8} {'predicted':>10} {'cuDNN':>8}"
    lines = [f"{head} {'training':>9} {'cuDNN':>8}"]
    for key, row in whole["recurrent"].items():
        if "forward" not in row:
            lines.append(f"{key:44} {row.get('failed') or row.get('left_out') or row.get('host_us') or ''}"[:150])
            continue
        ours, cudnn = row["forward"], row["cudnn"]
        peer = [cudnn[what]["us_per_step"] if what in cudnn else None for what in ("forward", "training")]
        mark = " *" if ours.get("off_by_more_than_a_third") else ""
        lines.append(
            f"{key:44} {_number(ours['us_per_step']):>8} {_number(ours.get('recurrence')):>8} "
            f"{_number(ours.get('predicted')):>10} {_number(peer[0]):>8} "
            f"{_number(row['training']['us_per_step']):>9} {_number(peer[1]):>8}{mark}"
        )
    lines.append("alone: without the input product; *: off by more than a third of the prediction")
    lines.append(f"{'attention, TFLOP/s (forward, backward)':52} {'ours':>14} {'flash':>14} {'cuDNN':>14}")
    for key, row in whole["attention"].items():
        speeds = []
        for name in ("dlkernels", "sdpa_flash", "sdpa_cudnn"):
            one = row.get(name, {})
            both = [_number(one.get(what, {}).get("tflops"), 0) for what in ("forward", "backward")]
            speeds.append(f"{' '.join(both):>14}")
        lines.append(f"{key:52} {' '.join(speeds)} {row.get('failed', '')}")
    for tile in whole["tiles"]:
        best = tile["fastest"][0] if tile["fastest"] else {"tile": [], "tflops": None}
        shipped = (tile["shipped"] or {}).get("tflops")
        name = f"{tile['kernel']} D{tile['D']}{' causal' if tile['causal'] else ''}"
        lines.append(f"{name:52} shipped {_number(shipped, 0)}, best {_number(best['tflops'], 0)} with {best['tile']}")
    missed = [target["what"] for target in whole["targets"] if not target["met"]]
    lines.append(f"targets met: {len(whole['targets']) - len(missed)} of {len(whole['targets'])}")
    return lines
