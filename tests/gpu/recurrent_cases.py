"""Small layers and their lengths, which all tests of the recurrent layers on a CUDA device use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device import CUDA_KERNELS
from turns import ON_GPU

from tests.support.layer_cases import Case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


with_cuda_kernels = pytest.mark.skipif(not CUDA_KERNELS, reason="a rehearsal: the CPU's kernels do not do this")


def a_case(mode: str = "lstm", dtype: torch.dtype = torch.bfloat16, **more: Any) -> Case:
    T, B, I, H = (40, 33, 48, 200) if ON_GPU else (4, 9, 6, 40)
    return Case(mode, **{"T": T, "B": B, "I": I, "H": H, "dtype": dtype, "bidirectional": True, **more})


def uneven(case: Case) -> tuple[int, ...]:
    return tuple(1 + (3 * b + case.T - 1) % case.T for b in range(case.B))
