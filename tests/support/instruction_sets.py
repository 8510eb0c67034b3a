"""Lists the instruction sets of this machine and those with kernels of each family, and selects one for a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dlkernels._core import extension

BEST_ISA_LAST = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")


def available_isas() -> list[str]:
    """Returns the names that set_isa accepts here, weakest first; DLKERNELS_CPU_ISA caps the list."""
    if not extension.HAVE_NATIVE:
        return ["reference"]
    available = extension.native.available_isas()
    assert set(available) <= set(BEST_ISA_LAST), f"BEST_ISA_LAST lacks {set(available) - set(BEST_ISA_LAST)}"
    return sorted(available, key=BEST_ISA_LAST.index)


def optimised() -> bool:
    """Returns False for the -O0 build, which `make test-O0` tests."""
    flags = str(extension.native.build_info().get("flags", "")) if extension.HAVE_NATIVE else ""
    return "-O0" not in flags


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    if not extension.HAVE_NATIVE:
        yield
        return
    extension.choose_isa(name)
    try:
        yield
    finally:
        extension.choose_isa(None)


def kernels_of(
    isa: str, *, attention: torch.dtype | None = None, layer: torch.dtype | None = None, dot: bool = False
) -> str:
    """Returns the instruction set whose kernels serve `isa` for attention, or for a layer, in that dtype. The sets
    that multiply bfloat16 have kernels for no other dtype."""
    if isa not in ("avx512_bf16", "amx"):
        return isa
    return isa if torch.bfloat16 in (attention, layer) and not dot else "avx512"
