"""Plants the bugs of this folder's lists one at a time in a copy of the tree and reports which of them the tests
notice.

    python tests/mutants/run.py [--only PATTERN ...] [--jobs N] [--list] [--full] [--record]

Each job has its own copy of the tree. Bugs in Python are tested with the compiled module of the working tree, those in
C++ with an unoptimised build up to AVX2, in which only the files that a mutant changes are compiled again.

A mutant's own tests run first, then the rest of the suite: all of it with --full, otherwise as much as --budget seconds
allow. A test that fails or reaches its time limit has noticed the mutant. At the end each of these tests runs once more
without a mutant; if it fails there too, it has noticed nothing. --record adds the verdicts to results.json and writes
RESULTS.md from it.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from lists import GROUPS, MUTANTS
from mutant import ROOT, Mutant

HERE = Path(__file__).resolve().parent
KILLED, TIMED_OUT, SURVIVED, ERROR = "killed", "killed (timeout)", "SURVIVED", "ERROR"
# Files of the suite that are not run for a mutant: they need a network or a compiler, or do not depend on values.
LEFT_OUT = (
    "tests/package/test_packaging.py", "tests/package/test_cuda_build.py", "tests/package/test_mutants.py",
    "tests/package/test_time_limit.py", "tests/rnn/test_memory.py",
)  # fmt: skip
NOTHING_COLLECTED = 5  # a status of pytest
COMMAND_LIMIT = 3600.0  # seconds for a build, or for one entry of a mutant's tests
# What pytest-timeout and faulthandler write when a test reaches its limit.
TIMEOUT = re.compile(r"\+\+\+ Timeout \+\+\+|Timeout \(?>|Timeout \(\d+:\d\d:\d\d")


@dataclass(eq=False)
class Outcome:
    mutant: Mutant
    verdict: str
    by: str = ""
    seconds: float = 0.0

    @property
    def killed(self) -> bool:
        return self.verdict in (KILLED, TIMED_OUT)

    def __str__(self) -> str:
        return f"{self.verdict:16} {self.mutant.name:32} {self.seconds:5.0f} s  {self.by}"


class Scratch:
    """A copy of the working tree with its own build."""

    def __init__(self, folder: Path, timeout: int) -> None:
        self.folder, self.tree, self.timeout = folder, folder / "tree", timeout
        self.tree.mkdir(parents=True, exist_ok=True)
        self.log = folder / "log.txt"
        self.module = ""  # the path of the working tree's compiled module, or empty for that of this copy

    def prepare(self) -> None:
        """Makes the copy equal to the working tree. Only files that differ are written, to compile little again."""
        listed = subprocess.run(
            ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        for name in listed:
            self._put(name, (ROOT / name).read_bytes()) if (ROOT / name).is_file() else None

    def _put(self, name: str, data: bytes) -> None:
        path = self.tree / name
        if path.is_file() and path.read_bytes() == data:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def environment(self) -> dict[str, str]:
        # Kernels above AVX2 would take most of the compile time, and no mutant changes them.
        settings = {
            "PYTHONPATH": str(self.tree), "DLKERNELS_CPU_ISA": "avx2", "OMP_WAIT_POLICY": "passive",
            "CXXFLAGS": "-DDLK_NO_AVX512", "DLKERNELS_CUDA": "0", "MAX_JOBS": os.environ.get("MAX_JOBS", "1"),
            "PYTHONDONTWRITEBYTECODE": "1", "DLKERNELS_TEST_O0_ALL": "1",
        }  # fmt: skip
        if self.module:
            settings["DLKERNELS_NATIVE"] = self.module
        return {**{k: v for k, v in os.environ.items() if k != "DLKERNELS_NATIVE"}, **settings}

    def command(self, command: list[str], limit: float) -> tuple[int, str]:
        """Runs a command and returns its status and output. After `limit` seconds it is killed; the status is 124."""
        with self.log.open("w+", errors="replace") as log:
            process = subprocess.Popen(
                command, cwd=self.tree, env=self.environment(), stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            try:
                status = process.wait(timeout=limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                status = 124
            log.seek(0)
            return status, log.read()

    def build(self) -> str:
        """Builds the copy and returns the end of the compiler's output if that fails."""
        status, output = self.command([sys.executable, "csrc/setup/native.py", "--opt", "0"], COMMAND_LIMIT)
        return "" if status == 0 else output[-1500:]

    def test(self, arguments: str, limit: float) -> tuple[str, str]:
        """Runs one entry of a mutant's tests and returns the verdict and the test that gave it. If the entry reaches a
        `limit` below COMMAND_LIMIT, the budget has ended and no test has failed."""
        kind, _, mode = arguments.partition(" ")
        if kind == "native":
            status, output = self.command(
                ["env", f"BUILD={self.folder / mode}", "sh", "tests/native/run.sh", mode], COMMAND_LIMIT
            )
            if status == 0:
                return SURVIVED, ""
            return TIMED_OUT if status == 124 else KILLED, f"native {mode}: {_first_complaint(output)}"
        if kind == "gpuless":
            file, *rest = shlex.split(mode)
            command = [*gpuless_command(file), "-x", "--tb=line", f"tests/gpuless/{file}", *rest]
        else:
            command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", "-p", "no:cacheprovider"]
            command += [f"--timeout={self.timeout}", *shlex.split(arguments)]
        status, output = self.command(command, limit)
        if kind == "gpuless" and status == NOTHING_COLLECTED:
            return ERROR, f"{arguments}: no test was collected"
        if status in (0, NOTHING_COLLECTED):
            return SURVIVED, ""
        if status == 124 and limit < COMMAND_LIMIT:
            return SURVIVED, "out of time"
        if status == 4:
            return ERROR, output[-500:]
        by = _killing_test(output)
        if status == 124 or TIMEOUT.search(output):
            return TIMED_OUT, by or f"{arguments} (reached the time limit)"
        if not by and status > 0:
            return ERROR, f"pytest ended with status {status} and named no test: {output[-200:]!r}"
        return KILLED, by or f"the process died: status {status}"

    def failing(self, names: list[str]) -> set[str]:
        """Returns those of the tests `names` that fail or reach their time limit in this tree as it is."""
        alone = [name for name in names if name.startswith(("native", "tests/gpuless/"))]
        failing = {
            name for name in alone
            if self.test(name.replace("tests/gpuless/", "gpuless "), COMMAND_LIMIT)[0] != SURVIVED
        }  # fmt: skip
        tests = [name for name in names if name.startswith("tests/") and name not in alone]
        if tests:
            command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "no:cacheprovider"]
            status, output = self.command([*command, f"--timeout={self.timeout}", *tests], COMMAND_LIMIT)
            if status in (0, 1) and not TIMEOUT.search(output):
                failing.update(_runnable(name) for name in re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE))
            elif len(tests) == 1:
                failing.update(tests)
            else:  # a test that reaches its time limit ends the process, and with it the run of the others
                for test in tests:
                    failing |= self.failing([test])
        return failing

    def try_out(self, mutant: Mutant, budget: float, full: bool) -> Outcome:
        begin = time.monotonic()

        def outcome(verdict: str, by: str = "") -> Outcome:
            return Outcome(mutant, verdict, by, time.monotonic() - begin)

        self.prepare()
        if problem := mutant.problem(self.tree):
            return outcome(ERROR, problem)
        mutant.plant(self.tree)
        self.module = "" if mutant.compiled else built_module()
        if mutant.compiled and (words := self.build()):
            return outcome(ERROR, f"it does not compile: {words}")
        rest = _everything_else(mutant) if full or budget > 0 else []
        for number, arguments in enumerate([*mutant.tests, *rest]):
            left = float("inf") if number < len(mutant.tests) or full else begin + budget - time.monotonic()
            if left < 5:
                break
            verdict, by = self.test(arguments, min(left, COMMAND_LIMIT))
            if verdict != SURVIVED:
                return outcome(verdict, by)
        return outcome(SURVIVED)


def _everything_else(mutant: Mutant) -> list[str]:
    own = {word for arguments in mutant.tests if "-k" not in arguments for word in shlex.split(arguments)}
    files = sorted((ROOT / "tests").rglob("test_*.py"), key=lambda path: ("fuzz" in path.name, path.name))
    names = [str(path.relative_to(ROOT)) for path in files]
    return [name for name in names if name not in own and name not in LEFT_OUT]


def _killing_test(output: str) -> str:
    found = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    if found:
        return str(found[0])
    ended = re.findall(r'File ".*/(tests/(?:\w+/)*test_\w+\.py)", line \d+,? in (test_\w+)', output)
    if ended:
        how = "reached its time limit" if TIMEOUT.search(output) else "the process ended"
        return f"{ended[-1][0]}::{ended[-1][1]} ({how})"
    return ""


def _first_complaint(output: str) -> str:
    lines = [line for line in output.splitlines() if re.search("ERROR|WARNING|runtime error|FAILED|want|alone", line)]
    return lines[0][:160] if lines else output[-160:]


def gpuless_command(file: str) -> list[str]:
    """pytest in the environment of the oldest Triton, with the settings that `make gpuless` gives to the file."""
    python = ROOT / "build" / "gpuless-triton-3.6.0" / "bin" / "python"
    if not python.is_file():
        raise SystemExit(f"{python} is missing: make gpuless")
    settings = {"DLKERNELS_TEST_ALLOW_REFERENCE": "1", "OMP_NUM_THREADS": "1"}
    if "offline" in file:
        settings |= {"DLKERNELS_ARCH": "sm_90", "DLKERNELS_RELEASE": "0/1", "TRITON_DISABLE_LINE_INFO": "1"}
    elif "interpreted" in file:
        settings |= {"DLKERNELS_SHARD": "0/1", "TRITON_INTERPRET": "1"}
    options = ["-q", "-p", "no:cacheprovider", "--confcutdir=tests/gpuless", "-W", "ignore::DeprecationWarning"]
    return ["env", *(f"{name}={value}" for name, value in settings.items()), str(python), "-m", "pytest", *options]


def built_module() -> str:
    """The compiled module of the working tree. It is optimised, so that no test is skipped."""
    name = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not (ROOT / "dlkernels" / name).is_file():
        raise SystemExit(f"dlkernels/{name} is missing: make build")
    return str(ROOT / "dlkernels" / name)


def confirm(scratch: Scratch, outcomes: list[Outcome]) -> None:
    """Runs the tests that killed mutants once more without a mutant. Where a test fails there too, the verdict becomes
    an error."""
    scratch.prepare()
    for compiled in (False, True):
        killed = {o: _runnable(o.by) for o in outcomes if o.killed and o.mutant.compiled == compiled}
        if killed and compiled and (words := scratch.build()):
            raise SystemExit(f"without any mutant the tree does not compile: {words}")
        scratch.module = "" if compiled else built_module()
        failing = scratch.failing(sorted(set(killed.values())))
        for outcome, name in killed.items():
            if name in failing:
                outcome.verdict, outcome.by = ERROR, f"{outcome.by} fails without it too"


def _runnable(by: str) -> str:
    """The name under which pytest runs a test again. The id of a test may be cut off at a space; then the name is that
    of the test with all its parameters."""
    name = by.partition(":")[0] if by.startswith("native") else by.split(" ")[0]
    return name if name.endswith("]") else name.partition("[")[0]


def record(outcomes: list[Outcome]) -> None:
    """Adds verdicts to results.json, which has for each mutant its last verdict, the test that gave it and the commit,
    and writes RESULTS.md."""
    path = HERE / "results.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    for outcome in outcomes:
        known[outcome.mutant.name] = {"verdict": outcome.verdict.lower(), "by": outcome.by, "commit": commit}
    listed = {mutant.name for mutant in MUTANTS}
    kept = {name: known[name] for name in sorted(known) if name in listed}
    path.write_text(json.dumps(kept, indent=1) + "\n")
    (HERE / "RESULTS.md").write_text(results_page(kept))


def results_page(known: dict[str, dict[str, str]]) -> str:
    """RESULTS.md: the numbers of verdicts per group, and the mutants that survived or could not be judged."""
    verdicts = (KILLED, TIMED_OUT, SURVIVED.lower(), ERROR.lower(), "not tried")
    found = {mutant: known.get(mutant.name, {}).get("verdict", "not tried") for mutant in MUTANTS}
    lines = [
        "# Results of `make mutants`", "",
        "Written by `tests/mutants/run.py --record` from results.json, which has for each mutant the test that noticed",
        "it and the commit on which it was tried last.", "",
        f"| group | mutants | {' | '.join(verdicts)} |", f"| --- |{' ---: |' * (1 + len(verdicts))}",
    ]  # fmt: skip
    for group, mutants in {**GROUPS, "all": MUTANTS}.items():
        counts = [sum(found[mutant] == verdict for mutant in mutants) for verdict in verdicts]
        lines.append(f"| {group} | {len(mutants)} | {' | '.join(map(str, counts))} |")
    for verdict, title in ((SURVIVED.lower(), "Survivors"), (ERROR.lower(), "Not judged")):
        left = [mutant for mutant in MUTANTS if found[mutant] == verdict]
        if left:
            lines += ["", f"## {title}", "", *(f"- `{mutant.name}` ({mutant.file}): {mutant.why}" for mutant in left)]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="names or files, with * and ?")
    parser.add_argument("--jobs", type=int, default=1, help="copies of the tree that work side by side")
    parser.add_argument("--list", action="store_true", help="print the mutants and whether each can be planted")
    parser.add_argument("--full", action="store_true", help="the whole suite for each mutant that its own tests miss")
    parser.add_argument("--budget", type=float, default=0, help="seconds of other tests for such a mutant (0)")
    parser.add_argument("--timeout", type=int, default=120, help="seconds for one test (120)")
    parser.add_argument("--unconfirmed", action="store_true", help="do not run what failed without a mutant too")
    parser.add_argument("--record", action="store_true", help="add the verdicts to results.json and write RESULTS.md")
    parser.add_argument("--scratch", type=Path, default=ROOT / "build" / "mutants", help="where the copies lie")
    options = parser.parse_args()
    chosen = [
        m for m in MUTANTS
        if not options.only or any(fnmatch(m.name, p) or p in m.name or p in m.file for p in options.only)
    ]  # fmt: skip
    if not chosen:
        raise SystemExit("no mutant has such a name")
    if options.list:
        for mutant in chosen:
            print(f"{mutant.name:32} {mutant.file:44} {mutant.why}")
            if problem := mutant.problem():
                print(f"    ERROR: {problem}")
        return int(any(mutant.problem() for mutant in chosen))
    copies: queue.Queue[Scratch] = queue.Queue()
    for number in range(options.jobs):
        copies.put(Scratch(options.scratch / str(number), options.timeout))
    for scratch in list(copies.queue):
        scratch.prepare()
        if any(mutant.compiled for mutant in chosen) and (words := scratch.build()):
            raise SystemExit(f"without any mutant the tree does not compile: {words}")
    outcomes: list[Outcome] = []
    printing = threading.Lock()

    def one(mutant: Mutant) -> None:
        scratch = copies.get()
        try:
            outcome = scratch.try_out(mutant, options.budget, options.full)
        finally:
            copies.put(scratch)
        with printing:
            outcomes.append(outcome)
            print(outcome, flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(one, chosen))
    if not options.unconfirmed:
        confirm(copies.queue[0], outcomes)
    if options.record:
        record(outcomes)
    return summarize(outcomes)


def summarize(outcomes: list[Outcome]) -> int:
    killed, errors = sum(o.killed for o in outcomes), sum(o.verdict == ERROR for o in outcomes)
    judged = len(outcomes) - errors
    share = 100 * killed / judged if judged else 0
    print(f"{killed} of {judged} killed ({share:.0f}%), {errors} could not be planted or judged")
    for outcome in outcomes:
        if not outcome.killed:
            print(f"  {outcome.verdict} {outcome.mutant.name}: {outcome.mutant.why}. {outcome.by}")
    return int(killed < len(outcomes))


if __name__ == "__main__":
    sys.exit(main())
