"""What the files of tests on a CUDA device share: whose turn it is, what only a GPU shows, small layers."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from device import CUDA_KERNELS, ON_GPU
from helpers import Case

SHARD, _, SHARDS = os.environ.get("DLKERNELS_SHARD", "0/1").partition("/")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def mine(index: int) -> bool:
    return index % int(SHARDS) == int(SHARD)


first_shard = pytest.mark.skipif(not mine(0), reason="in the first shard")
on_a_gpu = pytest.mark.skipif(not ON_GPU, reason="a rehearsal: only a GPU shows this")
with_cuda_kernels = pytest.mark.skipif(not CUDA_KERNELS, reason="a rehearsal: the CPU's kernels do not do this")


def a_case(mode: str = "lstm", dtype: torch.dtype = torch.bfloat16, **more: Any) -> Case:
    T, B, I, H = (40, 33, 48, 200) if ON_GPU else (4, 9, 6, 40)
    return Case(mode, **{"T": T, "B": B, "I": I, "H": H, "dtype": dtype, "bidirectional": True, **more})


def uneven(case: Case) -> tuple[int, ...]:
    return tuple(1 + (3 * b + case.T - 1) % case.T for b in range(case.B))
