"""Runs everything that needs an NVIDIA GPU: `make gpu-check`.

    python tests/gpu/check.py --out DIR [--part NAME]... [--resume] [--within SECONDS] [--limit NAME=SECONDS]...
                              [--rehearse]

The parts run in the order of parts.py, each with its own time limit, by default all of them; --part names some
(`sanitizers` stands for memcheck, racecheck and synccheck). The build is made in any case, since a machine may be bare;
it takes no time where nothing changed. Within a part a case that hangs or crashes costs only itself.

DIR receives a JSON file for each part, summary.json, which may be committed as benchmarks/results/GPU/NAME.json, and in
logs/ the output and the journal of every process. --resume continues behind what DIR already has: parts that passed,
and cases that ended in any way, are not run again. --within ends the whole call after so many seconds. --limit changes
the limit of a part.

The exit status is 0 only if all these parts ran in full and passed. --rehearse runs all parts without a GPU, small and
with stubs of the tools (tests/gpu/stubs), which tests this check, but no GPU code.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import parts
import summary
import supervise
from machine import environment, missing
from parts import GROUPS, Part, Run

ROOT = Path(__file__).resolve().parents[2]
LEAST = 15.0  # seconds that a part needs to be worth beginning
SAME = ("sources", "device", "torch", "triton", "rehearsal")  # of the results in one folder


def arguments(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in parts.PARTS]
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check")
    parser.add_argument("--part", action="append", choices=[*names, *GROUPS], default=[])
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--within", type=float, default=float("inf"))
    parser.add_argument("--limit", action="append", default=[], metavar="NAME=SECONDS")
    parser.add_argument("--rehearse", action="store_true")
    found = parser.parse_args(given)
    found.limits = {}
    for text in found.limit:
        name, _, seconds = text.partition("=")
        if name not in names or not seconds.replace(".", "", 1).isdigit():
            parser.error(f"--limit {text}: NAME=SECONDS, where NAME is one of {', '.join(names)}")
        found.limits[name] = float(seconds)
    wanted = {name for one in found.part for name in GROUPS.get(one, (one,))} or set(names)
    found.parts = [part for part in parts.PARTS if part.name in wanted or part.name == names[0]]
    return found


def result_of(part: Part, outcomes: list[supervise.Outcome], seconds: float, limit: float) -> dict[str, Any]:
    cases = {key: result for outcome in outcomes for key, result in outcome.cases.items()}
    not_run = [key for outcome in outcomes for key in outcome.not_run]
    not_run += [key for key, result in cases.items() if "not_run" in result]
    failed = [key for key, result in cases.items() if "failed" in result]
    problems = [f"{outcome.name}: {outcome.problem}" for outcome in outcomes if outcome.problem]
    # A part that its time limit ended has shown no fault, but it has not passed either.
    late = [problem for problem in problems if supervise.OVER in problem]
    faults = failed or len(late) < len(problems) or not (cases or late)
    status = "failed" if faults else "incomplete" if not_run or problems else "passed"
    return {
        "part": part.name, "status": status, "seconds": round(seconds, 1), "limit": limit, "problems": problems,
        "failed": failed, "not_run": not_run, "cases": cases,
    }  # fmt: skip


def not_run(part: Part, reason: str) -> dict[str, Any]:
    return {
        "part": part.name, "status": "not run", "seconds": 0.0, "limit": part.limit, "problems": [reason],
        "failed": [], "not_run": [], "cases": {},
    }  # fmt: skip


def same_folder(out: Path, found: dict[str, Any]) -> str:
    """Why this folder must not be used: it has results of other sources or of another machine."""
    file = out / "environment.json"
    if not file.is_file():
        return ""
    before = json.loads(file.read_text())
    other = [f"{name}: {before.get(name)} before, {found.get(name)} now" for name in SAME
             if before.get(name) != found.get(name)]  # fmt: skip
    return f"{out} has results of something else ({'; '.join(other)}): choose another --out" if other else ""


def main(given: Sequence[str]) -> int:
    options = arguments(given)
    begin = time.time()
    end = begin + options.within
    if options.rehearse:
        os.environ["DLKERNELS_DEVICE"] = "cpu"
    # The processes of the parts have process groups of their own, which nobody else would end.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(124))
    out: Path = options.out
    found = environment(options.rehearse)
    print(json.dumps(found, indent=1), flush=True)
    refusal = same_folder(out, found)
    if refusal:
        print(refusal)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    (out / "environment.json").write_text(json.dumps(found, indent=1))
    reason = missing(found, options.rehearse)
    run = Run(options.rehearse, bool(found.get("available")) and not options.rehearse, os.cpu_count() or 1)
    ran: dict[str, str] = {}
    for index, part in enumerate(options.parts):
        file = out / f"{part.name}.json"
        logs = out / "logs" / part.name
        if index > 0 and options.resume and file.is_file() and json.loads(file.read_text())["status"] == "passed":
            ran[part.name] = "passed"
            print(f"{time.time() - begin:6.0f} s  {part.name}: passed before", flush=True)
            continue
        file.unlink(missing_ok=True)
        if not options.resume:
            shutil.rmtree(logs, ignore_errors=True)
        # In a rehearsal the machine may be slow or busy.
        limit = options.limits.get(part.name, part.limit * (5 if options.rehearse else 1))
        why_not = reason or parts.why_not(part)
        if not why_not and end - time.time() < LEAST:
            why_not = f"the {options.within:.0f} seconds of this call were over"
        if why_not:
            result = not_run(part, why_not)
        else:
            started = time.time()
            until = min(started + limit, end - 3)
            try:
                outcomes = supervise.run(part.stages(run), logs, until)
            except BaseException:
                supervise.stop()
                raise
            result = result_of(part, outcomes, time.time() - started, limit)
        if index == 0 and not reason and ("module" in result["failed"] or "module" not in result["cases"]):
            reason = "the module was not built"
        file.write_text(json.dumps(result, indent=1))
        summary.write(out)
        ran[part.name] = result["status"]
        counts = f"{len(result['cases'])} cases, {len(result['failed'])} failed, {len(result['not_run'])} not run"
        print(f"{time.time() - begin:6.0f} s  {part.name}: {result['status']}, {counts}", flush=True)
        for line in result["problems"]:
            print(f"          {line}", flush=True)
    whole = json.loads((out / "summary.json").read_text())
    print("\n".join(summary.tables(whole)))
    wrong = summary.problems(whole, [part.name for part in options.parts])
    for line in wrong:
        print(f"summary.json: {line}")
    if reason or options.rehearse:
        print(f"NOTHING RAN ON A GPU: {reason or 'this was a rehearsal'}")
    print(f"{out / 'summary.json'}: {time.time() - begin:.0f} s")
    return int(bool(wrong) or any(status != "passed" for status in ran.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
