"""Reads result files and checks their structure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dlkernels.bench.report import SCHEMA

_Schema = dict[str, type]
_TOP: _Schema = {"schema": int, "suite": str, "date": str}
_TOP |= dict.fromkeys(("machine", "versions", "summary"), dict) | dict.fromkeys(("results", "charlm"), list)
_ENTRY: _Schema = {"name": str, "case": dict, "regime": str, "status": str, "message": str, "kernel": dict}
_TIMED: _Schema = dict.fromkeys(("theirs_ms", "ours_ms", "speedup", "ratio_of_all"), float)
_TIMED |= dict.fromkeys(("spread", "quartiles", "calls"), list) | {"pairs": int}
# A side of a cell of the suite `peers`.
_SIDE: _Schema = {"status": str, "reason": str}
_SIDE_CLAIM: _Schema = {"error": float, "limit": float}
_CHARLM: _Schema = {"mode": str, "config": dict, "threads": int, "steps": int}
_CHARLM |= {"seconds": dict, "losses": dict, "validation": dict, "agree": bool, "message": str}
# Fields that only a case whose results agree may have.
_CLAIMS = {"speedup": "a speed-up", "spread": "a spread", "ours_ms": "a time of ours", "ratio_of_all": "a ratio"}
_CLAIMS |= {"ms": "a time", "ratio": "a ratio", "speedup_plain": "a speed-up", "best": "a best peer"}
_CHARLM_CLAIM: _Schema = {"speedup": float, "spread": list}


def problems(doc: dict[str, Any]) -> list[str]:
    """The errors of a result file; an empty list if it has none."""
    found = _mismatches(doc, _TOP, "file")
    if found:
        return found
    if doc["schema"] != SCHEMA:
        return [f"schema {doc['schema']}, expected {SCHEMA}"]
    for entry in doc["results"]:
        found += _judge(entry, entry.get("name", "?"), _ENTRY, _TIMED, entry.get("status") == "ok")
        for side, outcome in entry.get("sides", {}).items():
            name = f"{entry.get('name', '?')}, {side}"
            found += _judge(outcome, name, _SIDE, _SIDE_CLAIM, outcome.get("status") == "ok")
    for entry in doc["charlm"]:
        found += _judge(entry, f"charlm {entry.get('mode', '?')}", _CHARLM, _CHARLM_CLAIM, entry.get("agree") is True)
    return found


def _judge(entry: dict[str, Any], name: str, always: _Schema, claim: _Schema, agrees: bool) -> list[str]:
    found = _mismatches(entry, always | (claim if agrees else {}), name)
    if not agrees:
        found += [f"{name}: {_CLAIMS[key]} without agreement" for key in sorted(_CLAIMS.keys() & entry.keys())]
    return found


def _mismatches(mapping: dict[str, Any], schema: _Schema, where: str) -> list[str]:
    return [
        f"{where}: {key} should be {kind.__name__}"
        for key, kind in schema.items()
        if not isinstance(mapping.get(key), (float, int) if kind is float else kind)
    ]


def load(path: Path) -> dict[str, Any]:
    doc: dict[str, Any] = json.loads(path.read_text())
    found = problems(doc)
    if found:
        raise ValueError(f"{path}: " + "; ".join(found[:5]))
    return doc
