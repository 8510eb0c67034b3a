"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import attention, cases, charlm, machine, plots, results, tables
from .progress import Progress
from .runner import Result, Runner
from .timing import Budget

SUITES = ("main", "grid", "attention", "targets", "attention-targets", "charlm", "all")

AnyCase = cases.Case | attention.AttentionCase
# No case is started after this, so that a busy machine makes --quick measure less, not last longer.
QUICK_SECONDS = 45.0
MOST_THREADS = 1024
DTYPES = tuple(cases.SHORT_DTYPE)


def _list_of(convert: Any, allowed: Sequence[str] | None = None) -> Any:
    def parse(text: str) -> list[Any]:
        found = [part.strip() for part in text.split(",") if part.strip()]
        if not found or (allowed and not set(found) <= set(allowed)):
            what = f" of {', '.join(allowed)}" if allowed else ""
            raise argparse.ArgumentTypeError(f"{text!r}: expected a comma-separated list{what}")
        return [convert(part) for part in found]

    return parse


def _thread_count(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
    if not 1 <= value <= MOST_THREADS:
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers of 1 to {MOST_THREADS}")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a finite number of seconds above 0")
    return value


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m dlkernels bench", description="dlkernels against torch on this machine."
    )
    add = p.add_argument
    add("--suite", choices=SUITES, default="main", help="main (the default) is charlm and grid, all adds targets")
    add("--quick", action="store_true", help="a few cases and short training: under a minute")
    add("--only", metavar="PATTERN", action="append", default=[], help="cases whose name contains or matches this")
    add("--threads", metavar="N,...", type=_list_of(_thread_count), help="thread counts (default: 1 and all cores)")
    add("--dtypes", metavar="NAME,...", type=_list_of(str, DTYPES), default=["float32", "bfloat16"])
    add("--seconds", metavar="S", type=_seconds, help="measuring time for each case")
    add("--out", metavar="DIR", type=Path, help="where results go (default: benchmarks/results)")
    add("--no-plot", action="store_true", help="no pictures")
    add("--list", action="store_true", help="print the names of the cases and stop")
    return p


def run(argv: Sequence[str] | None = None, runner: Runner | None = None) -> int:
    args = parser().parse_args(argv)
    chosen = _cases(args)
    if args.list:
        print("\n".join(case.name for case in chosen))
        return 0
    trains = args.suite in ("main", "charlm", "all") and not args.only
    jobs = [_job(args, mode) for mode in ("lstm", "gru")] if trains else []
    if not chosen and not jobs:
        print("no case matches", file=sys.stderr)
        return 2
    runner = runner or Runner(_budget(args))
    host, root = machine.describe(), args.out or results.home()
    try:
        results.folder(root, host)
    except OSError as error:
        print(f"--out: results cannot be written to {root}: {error.strerror}", file=sys.stderr)
        return 2
    print(machine.headline(host, machine.versions()), flush=True)
    deadline = time.monotonic() + QUICK_SECONDS if args.quick else float("inf")
    trained = _train(jobs, args)
    measured = _measure(chosen, runner, deadline)
    doc = results.document(("quick-" if args.quick else "") + args.suite, measured, trained, host)
    if measured:
        print("\n" + tables.results_table(measured) + "\n\n" + tables.summary_text(doc["summary"]))
    path = results.write(doc, root)
    print(f"\nresults: {path}")
    if not args.no_plot:
        _plot(doc, path)
    if any(r.wrong for r in measured) or not all(job["agree"] for job in trained):
        return 1
    if len(measured) < len(chosen) and not args.quick:
        return 130  # the shell's status of a program ended by Ctrl-C
    return 2 if any(r.reached is False for r in measured) else 0


def _cases(args: argparse.Namespace) -> list[AnyCase]:
    found: list[AnyCase] = []
    threads = args.threads or sorted({1, torch.get_num_threads()})
    if args.suite in ("main", "grid", "all"):
        found += cases.grid(threads, args.dtypes, args.quick)
    if args.suite in ("main", "grid", "attention", "all"):
        found += attention.grid(threads, args.dtypes, args.quick)
    if args.suite in ("targets", "all"):
        found += cases.targets(args.threads or (1, 2))
    if args.suite in ("targets", "attention-targets", "all"):
        found += attention.targets(args.threads or (1, 2))
    return cases.select(found, args.only)


def _budget(args: argparse.Namespace) -> Budget:
    if args.quick:
        return Budget(args.seconds or 0.3, block_seconds=0.01, min_pairs=3, max_seconds=3.0)
    return Budget(args.seconds or (2.0 if args.suite.endswith("targets") else 1.0))


def _job(args: argparse.Namespace, mode: str) -> charlm.Config:
    return charlm.Config.quick(mode) if args.quick else charlm.Config(mode)


def _train(jobs: Sequence[charlm.Config], args: argparse.Namespace) -> list[dict[str, Any]]:
    trained = []
    before = torch.get_num_threads()
    torch.set_num_threads(max(args.threads) if args.threads else before)
    for job in jobs:
        trained.append(charlm.train_both(job))
        print("\n" + charlm.text(trained[-1]), flush=True)
    torch.set_num_threads(before)
    return trained


def _measure(chosen: Sequence[AnyCase], runner: Runner, deadline: float) -> list[Result]:
    if not chosen:
        return []
    progress = Progress(len(chosen), "cases")
    found: list[Result] = []
    progress.show(chosen[0].name)
    reason = "this machine is too slow or too busy for --quick"
    try:
        for result in runner.run(chosen):
            found.append(result)
            progress.advance()
            if time.monotonic() > deadline:
                break
            if len(found) < len(chosen):
                progress.show(chosen[len(found)].name)
    except KeyboardInterrupt:  # what was measured until now is reported and written all the same
        reason = "interrupted"
    progress.finish()
    if len(found) < len(chosen):
        print(f"\n{len(chosen) - len(found)} cases left out: {reason}")
    return found


def _plot(doc: dict[str, Any], path: Path) -> None:
    try:
        for picture in plots.draw(doc, path):
            print(f"picture: {picture}")
    except ImportError:
        print("no pictures: matplotlib is not installed")
