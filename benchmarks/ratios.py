"""The options and the summary of all ratios that compare_trees and peak_memory share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dlkernels.bench.machine import describe
from dlkernels.bench.report import geometric_mean


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", nargs="+", default=[""], help="cases whose name has one of these in it")
    made.add_argument("--out", type=Path, help="a JSON file")
    return made


def is_chosen(name: str, options: argparse.Namespace) -> bool:
    return any(part in name for part in options.only)


def finish(what: str, ratios: Sequence[float], cases: Mapping[str, Any], out: Path | None) -> None:
    """Prints the mean and the largest of `ratios`. Writes the mean, the machine and all measurements to `out`."""
    mean = geometric_mean(ratios)
    if mean is not None:
        print(f"{len(ratios)} {what}: geometric mean {mean:.3f}, largest {max(ratios):.3f}")
    if out:
        out.write_text(json.dumps({"machine": describe(), "mean": mean, "cases": cases}, indent=1) + "\n")
