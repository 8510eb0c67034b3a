"""Runs scripts in a fresh interpreter, with additional environment variables."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environment(**env: str) -> dict[str, str]:
    """Returns this process's environment plus `env`, with this tree on PYTHONPATH for `dlkernels` and `tests`."""
    paths = [str(ROOT), *filter(None, (os.environ.get("PYTHONPATH"),))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **env}


def run_python(source: str, timeout: float = 120, **env: str) -> str:
    """Runs `source` in a fresh interpreter that can import from this tree, and returns what it printed."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", inspect.cleandoc(source)], capture_output=True, text=True, timeout=timeout,
            env=environment(PYTHONFAULTHANDLER="1", **env), cwd=ROOT,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"no end after {timeout} s\n{error.stdout}\n{error.stderr}") from error
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
