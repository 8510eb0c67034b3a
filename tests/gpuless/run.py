"""GPU code proven without a GPU: python tests/gpuless/run.py triton==3.6.0 triton==3.9.0

The Triton kernels run under Triton's interpreter with the first of the given releases, and are compiled for each
architecture with all of them. Each rung has a process of its own; one that cannot run fails. The environments, in
build/, lie on top of the one that runs this: they hold Triton and the numpy that its interpreter can work with.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
# Triton 3.6's interpreter converts arrays of one element to scalars, which numpy 2.4 refuses.
NUMPY = "numpy<2.4"


def environment(spec: str) -> Path:
    """The Python of an environment with this Triton."""
    folder = ROOT / "build" / f"gpuless-{re.sub(r'[^0-9A-Za-z.]+', '-', spec)}"
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        below = sysconfig.get_path("purelib")
        own = next(folder.glob("lib/python*/site-packages"))
        (own / "below.pth").write_text(below + "\n")
        subprocess.run([str(python), "-m", "pip", "install", "-q", "--no-deps", spec, NUMPY], check=True)
        ready.touch()
    return python


def rung(name: str, python: Path, file: str, arguments: list[str], **more: str) -> bool:
    begin = time.monotonic()
    settings = {
        **os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "DLKERNELS_TEST_ALLOW_REFERENCE": "1",
        **more,
    }  # fmt: skip
    command = [str(python), "-m", "pytest", str(HERE / file), "-q", "-p", "no:cacheprovider", *arguments]
    status = subprocess.run(command, cwd=ROOT, env=settings).returncode
    verdict = "passed" if status == 0 else f"FAILED ({status})"
    print(f"== {name}: {verdict}, {time.monotonic() - begin:.0f} s", flush=True)
    return status == 0


def main(arguments: list[str]) -> int:
    specs = [x for x in arguments if x.startswith("triton")]
    rest = [x for x in arguments if not x.startswith("triton")]
    if not specs:
        print(__doc__)
        return 2
    pythons = {spec: environment(spec) for spec in specs}
    # Triton 3.6 reads scalars from arrays of one element in every operation; numpy warns each time.
    quiet = ["-W", "ignore::DeprecationWarning"]
    results = [
        rung(
            f"interpreter, {specs[0]}", pythons[specs[0]], "attention_interpreted.py", [*quiet, *rest],
            TRITON_INTERPRET="1", OMP_NUM_THREADS="1",
        ),
        *(rung(f"offline compilation, {spec}", pythons[spec], "attention_offline.py", rest) for spec in specs),
    ]  # fmt: skip
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
