"""The journal of a worker of `make gpu-check`: a file with a JSON object a line for the list of its cases, for each
case that begins and for each that ends. check.py reads it while the worker runs. So what was found survives the worker,
the case that hangs or crashes is known, and a worker that is started again continues behind it."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# The exit status of a worker that has to be started again, since an error has made its CUDA context unusable.
RESTART = 75
Result = dict[str, Any]


class Journal:
    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, **entry: Any) -> None:
        # The line before may be an unfinished one of a process that was killed.
        with self.path.open("a") as file:
            file.write(f"\n{json.dumps(entry)}\n")

    def plan(self, keys: Sequence[str]) -> None:
        self.write(plan=list(keys))

    def begin(self, key: str) -> None:
        self.write(begin=key)

    def end(self, key: str, result: Result) -> None:
        self.write(end=key, result=result)


class Story:
    """What a journal says: the planned cases, the results of those that ended, and the case that is running, if any."""

    def __init__(self, path: Path) -> None:
        self.planned: list[str] = []
        self.ended: dict[str, Result] = {}
        self.running: str | None = None
        for line in path.read_text().splitlines() if path.is_file() else ():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # an empty or an unfinished line
                continue
            if "plan" in entry:
                self.planned = entry["plan"]
            elif "begin" in entry:
                self.running = entry["begin"]
            else:
                self.ended[entry["end"]] = entry["result"]
                self.running = None

    @property
    def not_run(self) -> list[str]:
        return [key for key in self.planned if key not in self.ended]


def of_this_process() -> Journal | None:
    path = os.environ.get("DLKERNELS_JOURNAL")
    return Journal(Path(path)) if path else None


def why(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


def run_cases(cases: Sequence[tuple[str, Callable[[], Result]]], broken: Callable[[], bool] = lambda: False) -> int:
    """Runs the cases that have not ended yet and returns the exit status of the worker. A case that raises has failed.
    If `broken` then says that this process can run no more cases, the worker has to be started again."""
    journal = of_this_process()
    assert journal is not None, "check.py sets DLKERNELS_JOURNAL"
    ended = Story(journal.path).ended
    journal.plan([key for key, _ in cases])
    for key, case in cases:
        if key in ended:
            continue
        journal.begin(key)
        try:
            result = case()
        except Exception as error:
            traceback.print_exc()
            result = {"failed": why(error)}
        journal.end(key, result)
        print(f"{key}: {json.dumps(result)[:300]}", flush=True)
        if "failed" in result and broken():
            return RESTART
    return 0
