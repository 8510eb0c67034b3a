"""Builds for the GPU of this machine: build.py module|programs. check.py runs both; a rehearsal builds nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from journal import Result, run_cases
from tools import kernels_program, rehearsal

ROOT = Path(__file__).resolve().parents[2]


def module() -> Result:
    if rehearsal():
        return {"built": "nothing, this is a rehearsal"}
    command = [sys.executable, str(ROOT / "csrc" / "setup" / "native.py")]
    output = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            output += line
    if process.returncode != 0:
        return {"failed": f"status {process.returncode}: {' '.join(output[-300:].split())}"}
    return {"built": next((line for line in output.splitlines() if line.startswith("dlkernels: CPU kernels")), "")}


def programs() -> Result:
    return {"clusters": kernels_program("clusters"), "kernels": kernels_program("kernels")}


if __name__ == "__main__":
    sys.exit(run_cases([(sys.argv[1], {"module": module, "programs": programs}[sys.argv[1]])]))
