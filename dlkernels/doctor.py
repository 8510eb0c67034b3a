"""`python -m dlkernels doctor`: finds what commonly goes wrong in an installation, and says what to do about it."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from dlkernels._core import extension
from dlkernels._core.processor import usable_cpus
from dlkernels._core.routing import ONLY_SCALAR
from dlkernels.attention import triton
from dlkernels.info import cuda_mismatch

__all__ = ["Finding", "examine"]

_PACKAGE = Path(__file__).resolve().parent
_SOURCES = (".cpp", ".cu", ".def", ".h")


class Finding(NamedTuple):
    what: str
    remedy: str


def examine() -> list[Finding]:
    """All findings, the most serious first; none if all is well."""
    return [*_module(), *_processor(), *_threads(), *_copies(), *_cuda(), *_results()]


def _module() -> Iterator[Finding]:
    native = extension.native
    if native is None:
        yield Finding(f"no compiled module, so all calls run on plain PyTorch: {extension.why_not}", extension.remedy)
        return
    if os.environ.get("DLKERNELS_NATIVE"):
        yield Finding(f"DLKERNELS_NATIVE loads another module: {native.__file__}", "unset DLKERNELS_NATIVE")
        return
    sources = _PACKAGE.parent / "csrc"
    if sources.is_dir():
        built = Path(str(native.__file__)).stat().st_mtime
        newer = [
            path for path in sources.rglob("*")
            if path.suffix in _SOURCES and path.stat().st_mtime > built
            and (extension.HAVE_CUDA_KERNELS or "cuda" not in path.parts)
        ]  # fmt: skip
        if newer:
            yield Finding(f"the sources are newer than the compiled module: {newer[0]}", "make build")


def _processor() -> Iterator[Finding]:
    native = extension.native
    if native is None:
        return
    cap = os.environ.get("DLKERNELS_CPU_ISA")
    if cap:
        yield Finding(f"DLKERNELS_CPU_ISA={cap} caps the kernels' instruction set", "unset DLKERNELS_CPU_ISA")
        return
    if extension.prefers_torch:
        yield Finding(
            f"{ONLY_SCALAR}, so calls run on torch's operators wherever these have what a call asks for",
            "none is needed: a patched model is as fast as torch's; DLKERNELS_CPU_ISA=scalar runs the kernels",
        )
    features = native.cpu_features()
    if features.get("amx_tile") and not features.get("amx_granted"):
        yield Finding(
            "the processor has AMX, but the kernel does not let this process use it", "use Linux 5.16 or later"
        )


def _threads() -> Iterator[Finding]:
    threads, cpus = torch.get_num_threads(), usable_cpus()
    if threads > cpus:
        yield Finding(
            f"torch uses {threads} threads on {cpus} usable CPUs, which makes short calls several times slower",
            f"OMP_NUM_THREADS={cpus}, or torch.set_num_threads({cpus})",
        )
    limit = os.environ.get("OMP_THREAD_LIMIT")
    if limit and limit.isdigit() and int(limit) < threads:
        yield Finding(f"OMP_THREAD_LIMIT={limit} is below torch's {threads} threads", "unset OMP_THREAD_LIMIT")


def _copies() -> Iterator[Finding]:
    places = {str(_PACKAGE.parent)}
    for entry in sys.path:
        package = Path(entry or ".") / "dlkernels"
        if (package / "_version.py").is_file():
            places.add(str(package.resolve().parent))
    if len(places) > 1:
        yield Finding(
            f"several copies of the package are on sys.path: {', '.join(sorted(places))}; {_PACKAGE.parent} is used",
            "uninstall the others, or start Python in another directory",
        )


def _cuda() -> Iterator[Finding]:
    native = extension.native
    if native is None or not torch.cuda.is_available():
        return
    if not extension.HAVE_CUDA_KERNELS:
        yield Finding(
            f"there is a GPU, but recurrent layers on it run on plain PyTorch: {extension.why_no_cuda}",
            "reinstall with nvcc on PATH and DLKERNELS_CUDA=1",
        )
    mismatch = cuda_mismatch(str(native.build_info().get("cuda_release", "")))
    if mismatch:
        yield Finding(mismatch, "reinstall with the nvcc of torch's CUDA")
    reason = triton.why_not(torch.empty(0, device="cuda"))
    if reason:
        yield Finding(f"attention on the GPU runs on plain PyTorch: {reason}", "pip install 'triton>=3.6'")


def _results() -> Iterator[Finding]:
    """Runs a layer and attention, and compares them with torch's."""
    from dlkernels import functional, nn

    torch.manual_seed(0)
    theirs, x = torch.nn.LSTM(8, 8), torch.randn(5, 3, 8)
    ours = nn.LSTM(8, 8)
    ours.load_state_dict(theirs.state_dict())
    q = torch.randn(1, 2, 9, 16)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a missing module is a finding of its own
        pairs = {
            "LSTM": (ours(x)[0], theirs(x)[0]),
            "attention": (functional.attention(q, q, q), torch.nn.functional.scaled_dot_product_attention(q, q, q)),
        }
    for name, (mine, other) in pairs.items():
        worst = float((mine - other).abs().max())
        if not worst < 1e-5:
            yield Finding(
                f"{name} differs from torch's by {worst:g}", "report it with the output of `python -m dlkernels info`"
            )


def main(argv: list[str]) -> int:
    """`python -m dlkernels doctor`. Returns 0 if nothing is wrong, else 1."""
    if argv:
        print("usage: python -m dlkernels doctor", file=sys.stderr)
        return 2
    findings = examine()
    for number, (what, remedy) in enumerate(findings, 1):
        print(f"{number}. {what}\n   -> {remedy}")
    if not findings:
        print("nothing found: the compiled kernels are loaded and agree with torch's results")
    return int(bool(findings))
