"""Profiles calls.py with ncu, which check.py runs last: counters.py."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

from journal import Result, run_cases
from tools import tool

METRICS = (
    "gpu__time_duration.sum", "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed", "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "launch__registers_per_thread", "launch__shared_mem_per_block_dynamic",
)  # fmt: skip
KERNELS = "regex:sequence_|cell_|^forward|^backward"
# The clocks are left as they are: other programs may use the GPU, and the benchmarks ran with these.
OPTIONS = ("--clock-control", "none", "--csv", "--kernel-name", KERNELS, "--launch-count", "12")


def profiled() -> Result:
    ncu = tool("ncu")
    if ncu is None:
        raise SystemExit("there is no ncu")
    calls = [sys.executable, str(Path(__file__).with_name("calls.py"))]
    command = [ncu, *OPTIONS, "--metrics", ",".join(METRICS), *calls]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, flush=True)
    if "ERR_NVGPUCTRPERM" in done.stdout:
        return {"not_run": "this machine does not let users read the GPU's counters"}
    lines = [line for line in done.stdout.splitlines() if line.startswith('"')]
    kernels: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(lines):
        kernels.setdefault(f"{row['ID']} {row['Kernel Name'][:80]}", {})[row["Metric Name"]] = row["Metric Value"]
    if done.returncode != 0 or not kernels:
        return {"failed": f"status {done.returncode}, {len(kernels)} kernels: {' '.join(done.stdout[-300:].split())}"}
    return {"kernels": kernels}


if __name__ == "__main__":
    sys.exit(run_cases([("ncu", profiled)]))
