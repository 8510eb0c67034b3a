"""The processor that this process runs on."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

__all__ = ["cpu_model", "usable_cpus"]


def cpu_model() -> str:
    """The model name that the operating system reports, or the name of the architecture if it reports none."""
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            # x86 has "model name"; some Arm kernels have only "Model" or "Hardware".
            if line.startswith(("model name", "Model", "Hardware")):
                return " ".join(line.partition(":")[2].split())
    except OSError:
        pass
    if sys.platform == "darwin":
        query = ["sysctl", "-n", "machdep.cpu.brand_string"]
        name = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
        if name:
            return name
    return platform.processor() or platform.machine()


def usable_cpus() -> int:
    """The number of CPUs that this process may be scheduled on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
