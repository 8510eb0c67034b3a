"""What `make gpu-check` ran with: versions, the device, and a sum of the sources."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("csrc", "dlkernels", "tests/cuda", "tests/gpu", "tests/gpuless", "tests/support")
# Found by a separate process, so that a torch that cannot be imported is reported too.
SCRIPT = """
import json, platform, sys
found = {"python": sys.version.split()[0], "platform": platform.platform()}
try:
    import torch
    found |= {"torch": torch.__version__, "cuda": torch.version.cuda, "available": torch.cuda.is_available()}
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        found |= {"device": p.name, "capability": [p.major, p.minor], "multiprocessors": p.multi_processor_count,
                  "memory": p.total_memory, "cudnn": torch.backends.cudnn.version()}
except Exception as error:
    found["torch_error"] = repr(error)
try:
    import triton
    found["triton"] = triton.__version__
except Exception as error:
    found["triton_error"] = repr(error)
print(json.dumps(found))
"""
NVIDIA_SMI = "--query-gpu=name,driver_version,clocks.max.sm,clocks.sm,power.limit,temperature.gpu"


def sum_of_sources() -> str:
    total = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix in (".py", ".h", ".cpp", ".cu", ".def"):
                total.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return total.hexdigest()[:16]


def said(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not run: {error}"


def environment(rehearse: bool) -> dict[str, Any]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    try:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120,
            env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        found: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {"error": done.stderr[-2000:]}
    except subprocess.TimeoutExpired as error:
        found = {"error": str(error)}
    return {
        **found, "rehearsal": rehearse, "sources": sum_of_sources(),
        "commit": said(["git", "-C", str(ROOT), "rev-parse", "HEAD"]),
        "nvidia_smi": said(["nvidia-smi", NVIDIA_SMI, "--format=csv"]),
        "nvcc": said([os.environ.get("NVCC") or "nvcc", "--version"])[-60:],
    }  # fmt: skip


def missing(found: dict[str, Any], rehearse: bool) -> str:
    """Why nothing can run on a GPU here, or ""."""
    if "error" in found or "torch_error" in found:
        return f"torch: {found.get('torch_error') or found['error']}"
    if rehearse:
        return ""
    if not found.get("available"):
        return "torch finds no CUDA device"
    return f"Triton: {found['triton_error']}" if "triton_error" in found else ""
