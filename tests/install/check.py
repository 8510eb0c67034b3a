"""Tests that pip installs dlkernels with its usual build isolation without downloading a second torch.

    python -m tests.install.check torch==2.13.0

Three installations are timed and each is followed by the smoke test with the compiled module: into a virtual
environment that has torch, the same as an editable installation, and into a virtual environment on top of a Python that
has torch. This takes minutes and 3 GB under /tmp.
"""

from __future__ import annotations

import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.install.environments import (
    LEAVE_OUT,
    ROOT,
    SMOKE,
    check_that_no_torch_was_fetched,
    new_environment,
    run,
)


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def install(name: str, python: Path, *what: str) -> None:
    begin, processor = time.monotonic(), processor_seconds()
    log = run(python, "-m", "pip", "install", "-v", *what)
    seconds, processor = time.monotonic() - begin, processor_seconds() - processor
    check_that_no_torch_was_fetched(name, log)
    print(
        f"{name}: pip install took {seconds:.0f} s ({processor:.0f} s of processor time), no torch fetched", flush=True
    )
    print(run(python, "-W", "ignore", SMOKE, DLKERNELS_REQUIRE_NATIVE="1"), flush=True)


def source(folder: Path, name: str) -> str:
    """Copies the tree, so that each installation compiles everything."""
    return str(shutil.copytree(ROOT, folder / name, ignore=LEAVE_OUT))


def python_with_torch(folder: Path, spec: str) -> Path | None:
    """A copy of this interpreter with torch installed, as in a container, or None if it cannot be copied."""
    if sys.base_prefix in ("/usr", "/usr/local"):
        return None
    shutil.copytree(sys.base_prefix, folder, symlinks=True)
    python = folder / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    run(python, "-m", "pip", "install", spec, "numpy")
    return python


def main() -> int:
    spec = sys.argv[1] if len(sys.argv) > 1 else "torch==2.13.0"
    with tempfile.TemporaryDirectory(prefix="dlkernels-install-") as name:
        folder = Path(name)
        python = new_environment(folder / "env", spec, "numpy")
        install("plain", python, source(folder, "plain"))
        run(python, "-m", "pip", "uninstall", "-y", "dlkernels")
        install("editable", python, "-e", source(folder, "editable"))
        shutil.rmtree(folder / "env")
        below = python_with_torch(folder / "python", spec)
        if below is None:
            print(f"on top of another environment: not shown, {sys.base_prefix} is the system's Python")
            return 0
        run(below, "-m", "venv", "--system-site-packages", folder / "top")
        install("on top of an environment with torch", folder / "top" / "bin" / "python", source(folder, "top-source"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
