"""Commands in virtual environments of their own, and copies of the source tree to install from."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SMOKE = ROOT / "tests" / "abi" / "smoke.py"
LEAVE_OUT = shutil.ignore_patterns(
    ".*_cache", ".git", ".venv*", "__pycache__", "*.egg-info", "*.so", "build", "dist", "results"
)


def run(*command: str | Path, unset: Collection[str] = (), **environment: str) -> str:
    """Returns what the command printed; a failure ends the process. The command sees no Python path and no settings of
    dlkernels but those in `environment`, and none of the variables in `unset`."""
    words = [str(word) for word in command]
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "DLKERNELS_")) and name not in unset
    }
    done = subprocess.run(
        words, env={**inherited, **environment}, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stdout}\nfailed with {done.returncode}")
    return done.stdout


def new_environment(folder: Path, *packages: str) -> Path:
    """Makes a virtual environment with these packages and returns its Python."""
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", *packages)
    return python


def check_that_no_torch_was_fetched(name: str, log: str) -> None:
    """`log` is what `pip install -v` printed in an environment that has torch."""
    if "Requirement already satisfied: torch" not in log:
        raise SystemExit(f"{name}: pip did not settle for the torch that is there:\n{log}")
    fetched = [line for line in log.splitlines() if line.strip().startswith(("Collecting torch", "Downloading torch"))]
    if fetched:
        raise SystemExit(f"{name}: torch was fetched again: {fetched}")
