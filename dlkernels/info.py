"""Reports what this machine has, what was built, and which kernel serves which operator."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from dlkernels._core import extension
from dlkernels._core.dtypes import CUDA_KERNEL_DTYPES
from dlkernels._core.processor import cpu_model, usable_cpus
from dlkernels._core.routing import ONLY_SCALAR
from dlkernels._version import __version__
from dlkernels.attention import triton
from dlkernels.rnn.kinds import MODES

__all__ = ["cuda_mismatch", "format_info", "info"]

_DTYPES = ("float32", "float64", "bfloat16", "float16")
_CUDA_DTYPES = ", ".join(name for name in _DTYPES if getattr(torch, name) in CUDA_KERNEL_DTYPES)
# The operators of a recurrent cell are its mode with one of these suffixes.
_SUFFIXES = ("", "_backward", "_cell", "_cell_backward")
_ENVIRONMENT = (
    "DLKERNELS_CPU_ISA", "DLKERNELS_NATIVE", "DLKERNELS_NO_NATIVE", "DLKERNELS_REQUIRE_NATIVE", "OMP_NUM_THREADS",
    "OMP_THREAD_LIMIT", "OMP_DYNAMIC", "MKL_NUM_THREADS",
)  # fmt: skip


def info() -> dict[str, Any]:
    """Everything `python -m dlkernels info` prints, as plain data that json can write."""
    native = extension.native
    build: dict[str, Any] = dict(native.build_info()) if native is not None else {}
    return {
        "versions": {
            "dlkernels": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "native": {
            "loaded": native is not None,
            "file": getattr(native, "__file__", None),
            "why_not": extension.why_not,
            "build": build,
        },
        "cpu": {
            "model": cpu_model(),
            "features": dict(native.cpu_features()) if native is not None else {},
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
        },
        "isa": _isa(),
        "threads": {
            "torch": torch.get_num_threads(), "interop": torch.get_num_interop_threads(), "cpus": usable_cpus(),
        },
        "environment": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        "cuda": {
            "torch_build": torch.version.cuda, "available": torch.cuda.is_available(),
            "mismatch": cuda_mismatch(str(build.get("cuda_release", ""))),
        },
        "kernels": _kernels(bool(build.get("with_cuda", False))),
    }  # fmt: skip


def cuda_mismatch(release: str) -> str:
    """What to know if the CUDA kernels were compiled by an nvcc of another major release than the CUDA of torch: the
    module is independent of the version of torch, so torch may have been exchanged since."""
    if not release or not torch.version.cuda or release.split(".")[0] == torch.version.cuda.split(".")[0]:
        return ""
    return (
        f"the CUDA kernels were compiled by nvcc {release} and may need a newer GPU driver than this torch "
        f"(CUDA 13: 580 or later)"
    )


def _isa() -> dict[str, Any]:
    native = extension.native
    if native is None:
        return {"in_force": None, "available": [], "reason": extension.why_not}
    in_force, available = native.isa(), list(native.available_isas())
    cap = os.environ.get("DLKERNELS_CPU_ISA")
    compiled = list(native.build_info().get("isas", []))
    if extension.prefers_torch:
        reason = f"{ONLY_SCALAR}: torch's operators run what they can serve"
    elif cap:
        reason = f"DLKERNELS_CPU_ISA={cap} caps the choice"
    elif compiled and in_force == compiled[-1]:
        reason = "the best that was compiled"
    else:
        reason = "the best that this machine and the build have in common"
    return {"in_force": in_force, "available": available, "compiled": compiled, "reason": reason}


def _kernels(with_cuda: bool) -> list[dict[str, str]]:
    """One row for each operator, device and kernel. A row without a kernel says what serves the operator instead, and
    why."""
    native = extension.native
    if with_cuda:
        no_cuda = "" if torch.cuda.is_available() else "torch finds no CUDA device"
    else:
        no_cuda = f"no CUDA kernels: {extension.why_no_cuda}" if native is not None else extension.why_not
    rows = []
    for mode in MODES:
        for op in (mode + suffix for suffix in _SUFFIXES):
            rows += _on_cpu("recurrent", op, partial(_layer_plan, mode))
            rows.append({
                "family": "recurrent", "op": op, "device": "cuda", "dtypes": _CUDA_DTYPES, "reason": no_cuda,
                "kernel": f"cuda/{mode}" if not no_cuda else "reference",
            })  # fmt: skip
    return rows + _attention_kernels()


def _layer_plan(mode: str, native: Any, dtype: str) -> dict[str, Any]:
    return dict(native.plan(mode, dtype, 50, 64, 64, 64))


def _attention_plan(native: Any, dtype: str) -> dict[str, Any]:
    return dict(native.attention_plan(dtype, 1, 1, 1, 64, 64, 64, 64))


def _on_cpu(family: str, op: str, plan: Callable[[Any, str], dict[str, Any]]) -> list[dict[str, str]]:
    """The kernels that serve `op` on the CPU for a large batch and sizes that are multiples of a vector. There is a row
    for each kernel, because bfloat16 may use an instruction set that no other dtype uses."""
    dtypes: dict[str, list[str]] = {}
    for dtype in _DTYPES:
        kernel = str(plan(extension.native, dtype)["kernel"]) if extension.native is not None else "reference"
        dtypes.setdefault(kernel.removesuffix("/tiles"), []).append(dtype)
    return [
        {
            "family": family, "op": op, "device": "cpu", "kernel": kernel, "dtypes": ", ".join(served),
            "reason": "for what torch's operators lack" if extension.prefers_torch else extension.why_not,
        }
        for kernel, served in dtypes.items()
    ]  # fmt: skip


def _attention_kernels() -> list[dict[str, str]]:
    if torch.cuda.is_available():
        no_cuda = triton.why_not(torch.empty(0, device="cuda"))
    else:
        no_cuda = "torch finds no CUDA device"
    rows = []
    for op in triton.OPERATORS:
        rows += _on_cpu("attention", op, _attention_plan)
        rows.append({
            "family": "attention", "op": op, "device": "cuda", "dtypes": _CUDA_DTYPES, "reason": no_cuda,
            "kernel": "reference" if no_cuda else "cuda/triton/attention",
        })  # fmt: skip
    return rows


def format_info(data: dict[str, Any]) -> str:
    """`info()` as text."""
    versions, native, cpu, isa, threads = (data[key] for key in ("versions", "native", "cpu", "isa", "threads"))
    lines = [
        ", ".join([*(f"{name} {versions[name]}" for name in ("dlkernels", "torch", "python")), versions["platform"]]),
        f"native module: {native['file']}" if native["loaded"] else f"native module: none ({native['why_not']})",
    ]
    for key, value in ((key, value) for key, value in native["build"].items() if value != ""):
        lines.append(f"  {key}: {', '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}")
    lines.append(f"CPU: {cpu['model']}, {threads['cpus']} usable CPUs, torch capability {cpu['torch_capability']}")
    if cpu["features"]:
        present = [name for name, there in cpu["features"].items() if there]
        lines.append(f"  features: {', '.join(present) or 'none that matter here'}")
    lines.append(f"ISA: {isa['in_force'] or 'none'} ({isa['reason']})")
    if isa["available"]:
        lines.append(f"  available here: {', '.join(isa['available'])}")
    lines.append(f"threads: {threads['torch']} (torch.get_num_threads), {threads['interop']} interop")
    lines += [f"  {name}={value}" for name, value in data["environment"].items()]
    cuda = data["cuda"]
    built = f"with {cuda['torch_build']}" if cuda["torch_build"] else "without it"
    lines.append(f"CUDA: torch built {built}, {'a device' if cuda['available'] else 'no device'} found")
    if cuda["mismatch"]:
        lines.append(f"  {cuda['mismatch']}")
    return "\n".join([*lines, "", *_kernel_table(data["kernels"])])


def _kernel_table(rows: list[dict[str, str]]) -> list[str]:
    """The rows of `_kernels` with those merged that differ only in their operator. A merged row that holds for every
    operator of a family names the family, and the lines below the table list the operators of each family."""
    families: dict[str, list[str]] = {}
    merged: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        family, op, kernel = row["family"], row["op"], row["kernel"]
        mode = next((mode for mode in MODES if op.removeprefix(mode) in _SUFFIXES), None)
        if mode is not None and kernel.endswith(f"/{mode}"):
            kernel = kernel.removesuffix(mode) + "MODE"
        if row["reason"]:
            kernel += f" ({row['reason']})"
        dtypes = "all" if row["kernel"] == "reference" else row["dtypes"]
        merged.setdefault((family, row["device"], dtypes, kernel), []).append(op)
        families.setdefault(family, []).append(op)
    operators = {family: list(dict.fromkeys(ops)) for family, ops in families.items()}

    table = [("operators", "device", "dtypes", "kernel")]
    for (family, device, dtypes, kernel), ops in merged.items():
        named = f"all {family}" if ops == operators[family] else ", ".join(ops)
        table.append((named, device, dtypes, kernel))
    widths = [max(len(cells[column]) for cells in table) for column in range(3)]
    lines = [
        f"{op:{widths[0]}}  {device:{widths[1]}}  {dtypes:{widths[2]}}  {kernel}"
        for op, device, dtypes, kernel in table
    ]
    members = {family: ", ".join(ops) for family, ops in operators.items()}
    of_mode = ", ".join(f"MODE{suffix}" for suffix in _SUFFIXES)
    members["recurrent"] = f"{of_mode}; MODE is one of {', '.join(MODES)}"
    return [*lines, "", *(f"{family}: {text}" for family, text in members.items())]


def main(argv: list[str]) -> int:
    """`python -m dlkernels info [--json]`."""
    if any(argument != "--json" for argument in argv):
        print("usage: python -m dlkernels info [--json]", file=sys.stderr)
        return 2
    data = info()
    print(json.dumps(data, indent=2, default=str) if argv else format_info(data))
    return 0
