"""Runs the kernels' test, a program without torch, under compute-sanitizer: sanitize.py memcheck|racecheck|synccheck.

check.py runs this file. A case is a few shapes, since each start of the tool takes seconds.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

from journal import Result, run_cases
from tools import kernels_program, rehearsal, tool

sys.path.append(str(Path(__file__).resolve().parents[1] / "cuda"))
from shapes import small_shapes

TOGETHER = 6
ERRORS = 9  # exit status


def case(program: str, sanitizer: str, name: str, shapes: list[str]) -> Result:
    options = ["--tool", name, "--error-exitcode", str(ERRORS), "--print-limit", "20"]
    done = subprocess.run(
        [sanitizer, *options, program, *shapes], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(done.stdout, flush=True)
    # The tool's own line shows that it watched; without it a status of 0 means nothing.
    watched = "ERROR SUMMARY" in done.stdout or "RACECHECK SUMMARY" in done.stdout
    if done.returncode == 0 and watched and f"{len(shapes)} shapes, 0 failures" in done.stdout:
        return {"shapes": shapes}
    reason = f"{name} found errors" if done.returncode == ERRORS else f"status {done.returncode}"
    return {"failed": f"{reason}: {' '.join(done.stdout[-300:].split())}", "shapes": shapes}


def main(name: str) -> int:
    sanitizer = tool("compute-sanitizer")
    if sanitizer is None:
        raise SystemExit("there is no compute-sanitizer")
    program = kernels_program("kernels")
    shapes = small_shapes()[: 2 * TOGETHER if rehearsal() else None]
    groups = [shapes[at : at + TOGETHER] for at in range(0, len(shapes), TOGETHER)]
    return run_cases([
        (f"{name} {group[0]} and {len(group) - 1} more", functools.partial(case, program, sanitizer, name, group))
        for group in groups
    ])  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
