"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from .._core.private_torch import onednn_takes_bf16
from . import attention, calibrate, cases, layers, machine, peers, peers_report, plots, report
from .runner import AnyCase, Result, Runner
from .timing import Budget

# --quick starts no case after this time. On a busy machine it then measures less instead of taking longer.
QUICK_SECONDS = 45.0
MOST_THREADS = 1024
DTYPES = tuple(cases.SHORT_DTYPE)

# A suite consists of parts, functions that make a list of cases from the options.
Part = Callable[[argparse.Namespace], Sequence[AnyCase]]
# A job trains a model with both sides, prints the outcome and returns an entry of the result file's "charlm".
Job = Callable[[], dict[str, Any]]


def layer_grid(args: argparse.Namespace) -> Sequence[AnyCase]:
    return layers.grid(_threads(args), _dtypes(args), args.quick)


def attention_grid(args: argparse.Namespace) -> Sequence[AnyCase]:
    return attention.grid(_threads(args), _dtypes(args), args.quick)


def peer_grid(args: argparse.Namespace) -> Sequence[AnyCase]:
    return peers.grid(args.threads or (1, 2), fast_dtypes(args), args.quick)


def _dtypes(args: argparse.Namespace) -> list[str]:
    return args.dtypes or ["float32", "bfloat16"]


def fast_dtypes(args: argparse.Namespace) -> list[str]:
    """The dtypes to measure in suites of large cases. Says so if bfloat16 is left out."""
    if args.dtypes or onednn_takes_bf16():
        return _dtypes(args)
    print(
        "bfloat16 is left out: torch multiplies it in scalar code on this processor, and a training step can take "
        "minutes; --dtypes float32,bfloat16 measures it all the same",
        file=sys.stderr,
    )
    return ["float32"]


class Command:
    """`python -m dlkernels bench`. benchmarks/ derives a class from it that adds suites, jobs and their pictures."""

    prog = "python -m dlkernels bench"
    suites: Mapping[str, Sequence[Part]] = {  # the first is the default
        "grid": (layer_grid, attention_grid),
        "attention": (attention_grid,),
        "peers": (peer_grid,),
    }
    suite_help = "grid (the default) is layers and attention; peers needs dlkernels[peers]"

    def jobs(self, args: argparse.Namespace) -> list[Job]:
        return []

    def seconds(self, args: argparse.Namespace) -> float:
        """The measuring time for each case if neither --seconds nor --quick is given."""
        return peers.SECONDS if args.suite == "peers" else 1.0

    def runner(self, budget: Budget) -> Runner:
        return peers.PeerRunner(budget)

    def draw(self, doc: dict[str, Any], path: Path) -> list[Path]:
        return plots.draw(doc, path)

    def parser(self) -> argparse.ArgumentParser:
        p = argparse.ArgumentParser(prog=self.prog, description="dlkernels against torch on this machine.")
        add = p.add_argument
        add("--suite", choices=tuple(self.suites), default=next(iter(self.suites)), help=self.suite_help)
        add("--quick", action="store_true", help="less of everything: under a minute")
        add("--only", metavar="PATTERN", action="append", default=[], help="cases whose name contains or matches this")
        add("--threads", metavar="N,...", type=_list_of(_thread_count), help="thread counts (default: 1 and all cores)")
        add("--dtypes", metavar="NAME,...", type=_list_of(str, DTYPES), help="default: float32,bfloat16")
        add("--seconds", metavar="S", type=_seconds, help="measuring time for each case")
        add("--out", metavar="DIR", type=Path, help="where results go (default: benchmarks/results)")
        add("--no-plot", action="store_true", help="no pictures")
        add("--list", action="store_true", help="print the names of the cases and stop")
        add("--calibrate", action="store_true", help="print the constants that this machine would want, and stop")
        return p

    def run(self, argv: Sequence[str] | None = None, runner: Runner | None = None) -> int:
        """Returns 0 (done), 1 (some result is wrong), 2 (a speed target is missed, or bad arguments) or 130
        (interrupted)."""
        args = self.parser().parse_args(argv)
        if args.calibrate:
            return calibrate.main()
        chosen = cases.select([case for part in self.suites[args.suite] for case in part(args)], args.only)
        if args.list:
            print("\n".join(case.name for case in chosen))
            return 0
        jobs = self.jobs(args)
        if not chosen and not jobs:
            print("no case matches", file=sys.stderr)
            return 2
        runner = runner or self.runner(self._budget(args))
        host, root = machine.describe(), args.out or report.home()
        try:
            report.folder(root, host)
        except OSError as error:
            print(f"--out: results cannot be written to {root}: {error.strerror}", file=sys.stderr)
            return 2
        print(machine.headline(host, machine.versions()), flush=True)
        deadline = time.monotonic() + QUICK_SECONDS if args.quick else float("inf")
        trained = [job() for job in jobs]
        measured = _measure(chosen, runner, deadline)
        doc = report.document(("quick-" if args.quick else "") + args.suite, measured, trained, host)
        beside_peers = peers_report.summary(measured)
        doc["summary"] |= beside_peers
        parts = [report.results_table(measured), peers_report.table(measured)]
        parts += [report.summary_text(doc["summary"]), peers_report.summary_text(beside_peers)]
        if measured:
            print("\n" + "\n\n".join(part for part in parts if part))
        path = report.write(doc, root)
        print(f"\nresults: {path}")
        if not args.no_plot:
            self._plot(doc, path)
        if any(r.wrong for r in measured) or not all(job["agree"] for job in trained):
            return 1
        if len(measured) < len(chosen) and not args.quick:
            return 130  # the shell's status of a program ended by Ctrl-C
        return 2 if any(r.reached is False for r in measured) or peers_report.missed(beside_peers) else 0

    def _budget(self, args: argparse.Namespace) -> Budget:
        if args.quick:
            return Budget(args.seconds or 0.3, block_seconds=0.01, min_pairs=3, max_seconds=3.0)
        return Budget(args.seconds or self.seconds(args))

    def _plot(self, doc: dict[str, Any], path: Path) -> None:
        try:
            for picture in self.draw(doc, path):
                print(f"picture: {picture}")
        except ImportError:
            print("no pictures: matplotlib is not installed")


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
    except KeyboardInterrupt:  # the results up to now are still reported and written
        reason = "interrupted"
    progress.finish()
    if len(found) < len(chosen):
        print(f"\n{len(chosen) - len(found)} cases left out: {reason}")
    return found


def _threads(args: argparse.Namespace) -> list[int]:
    return args.threads or sorted({1, torch.get_num_threads()})


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


class Progress:
    """A progress bar on stderr: one line that moves on a terminal, one line per tenth elsewhere."""

    def __init__(self, total: int, what: str, stream: TextIO | None = None):
        self.total, self.what = max(1, total), what
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.done = 0
        self.tenth = -1
        self.start = time.monotonic()

    def show(self, label: str) -> None:
        """Shows the name of the case that runs now."""
        if self.live:
            bar = "#" * (20 * self.done // self.total)
            line = f"{self.what} [{bar:<20}] {self.done}/{self.total} {self._left()} {label}"
            width = shutil.get_terminal_size().columns - 1
            self.stream.write("\r" + line[:width].ljust(width))
        elif 10 * self.done // self.total > self.tenth:
            self.tenth = 10 * self.done // self.total
            self.stream.write(f"{self.what} {self.done}/{self.total} {self._left()} {label}\n")
        self.stream.flush()

    def advance(self, count: int = 1) -> None:
        self.done += count

    def finish(self) -> None:
        if self.live:
            self.stream.write("\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r")
        self.stream.write(f"{self.what}: {self.done} of {self.total} in {_clock(time.monotonic() - self.start)}\n")
        self.stream.flush()

    def _left(self) -> str:
        if not self.done:
            return ""
        return _clock((time.monotonic() - self.start) / self.done * (self.total - self.done)) + " left"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
