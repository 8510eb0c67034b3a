"""Runs the module that was compiled against this environment's torch under another torch release.

    python tests/abi/check.py torch==2.11.0

It makes a virtual environment in build/ with that torch (gigabytes), loads the same file there and compares its layers
with torch's. The exit status is non-zero unless the results agree under both releases.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SMOKE = Path(__file__).with_name("smoke.py")


def compiled_module() -> Path:
    query = "from dlkernels._core.extension import native; print(native.__file__)"
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", query], env=environment(), check=True, stdout=subprocess.PIPE, text=True
    )
    return Path(found.stdout.strip())


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "DLKERNELS_REQUIRE_NATIVE": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def other_python(spec: str) -> Path:
    folder = ROOT / "build" / f"abi-{re.sub(r'[^0-9A-Za-z.]+', '-', spec)}"
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", spec, "numpy"], check=True)
    return python


def main() -> int:
    spec = sys.argv[1] if len(sys.argv) > 1 else "torch==2.11.0"
    module = compiled_module()
    print(f"{module}\nsha256 {hashlib.sha256(module.read_bytes()).hexdigest()}", flush=True)
    pythons = [Path(sys.executable), other_python(spec)]
    settings = {**environment(), "DLKERNELS_NATIVE": str(module)}
    # They run in another folder than the sources, so that each interpreter imports torch from its own environment.
    codes = [subprocess.run([str(python), str(SMOKE)], env=settings, cwd="/").returncode for python in pythons]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
