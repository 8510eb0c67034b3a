"""Describes the machine and the software for a result file, without host or user names."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from .._core.extension import native
from .._core.processor import cpu_model, usable_cpus
from .._version import __version__

_ENVIRONMENT = re.compile(r"^(OMP|KMP|GOMP|MKL|DNNL|ONEDNN|ATEN|TORCH|DLKERNELS|LD_PRELOAD|MALLOC)(_|$)")


def isa() -> str:
    """The instruction set our kernels use, or torch's capability where none are compiled."""
    return str(native.isa()) if native else torch.backends.cpu.get_cpu_capability().lower()


def last_kernel() -> dict[str, Any]:
    """The plan of the last operator call of this thread, as it ran."""
    return _plan(native.last_run() if native else None)


def last_attention_kernel() -> dict[str, Any]:
    return _plan(native.attention_last_run() if native else None)


def _plan(run: dict[str, Any] | None) -> dict[str, Any]:
    return {k: v for k, v in run.items() if isinstance(v, (str, int, float, bool))} if run else {"kernel": "reference"}


def _caches() -> dict[str, str]:
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            found[f"L{level}"] = size
    return found


def describe() -> dict[str, Any]:
    return {
        "cpu": cpu_model(),
        "arch": platform.machine(),
        "system": platform.system(),
        "cores": usable_cpus(),
        "caches": _caches(),
        "isa": isa(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_threads": torch.get_num_threads(),
        # How the OpenMP threads wait between calls changes small-shape times; libgomp's default is to spin.
        "environment": {k: v for k, v in sorted(os.environ.items()) if _ENVIRONMENT.match(k)},
        "load_average": [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else [],
    }


def versions() -> dict[str, Any]:
    found: dict[str, Any] = {
        "dlkernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "mkl": torch._C.has_mkl,
        "onednn": torch._C._has_mkldnn,
    }
    found["build"] = {k: v for k, v in native.build_info().items() if k != "path"} if native else "none: reference path"
    return found


def slug(cpu: str, isa_name: str) -> str:
    """Folder name of a machine: CPU model and instruction set."""
    text = re.sub(r"\((r|tm|c)\)", "", f"{cpu} {isa_name}".lower()).replace("@", " ")
    return re.sub(r"[^a-z0-9.]+", "-", text).strip("-")


def headline(machine: dict[str, Any], found: dict[str, Any]) -> str:
    cores_text = f"{machine['cores']} core" + ("s" if machine["cores"] != 1 else "")
    return (
        f"{machine['cpu']}, {cores_text}, {machine['isa']}; "
        f"dlkernels {found['dlkernels']}, torch {found['torch']}, Python {found['python']}"
    )
