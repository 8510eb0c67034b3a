"""All mutants by group, in the order in which they are tried: those that need no compiler first."""

from __future__ import annotations

from attention import ATTENTION
from distributed import DISTRIBUTED
from mutant import Mutant
from python import PYTHON
from recurrent import RECURRENT
from triton_kernels import TRITON

GROUPS: dict[str, tuple[Mutant, ...]] = {
    "Python": PYTHON,
    "distributed": DISTRIBUTED,
    "recurrent, C++": RECURRENT,
    "attention, C++": ATTENTION,
    "attention, Triton": TRITON,
}
MUTANTS: tuple[Mutant, ...] = (*PYTHON, *DISTRIBUTED, *RECURRENT, *ATTENTION, *TRITON)
