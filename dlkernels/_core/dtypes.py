"""The dtypes that the kernels take, and the dtypes in which they compute."""

from __future__ import annotations

import torch

__all__ = ["CUDA_KERNEL_DTYPES", "DTYPES", "KERNEL_DTYPES", "compute_dtype"]

# The operators take a dtype as its index in this tuple; -1 stands for the dtype of x.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
KERNEL_DTYPES = frozenset(DTYPES)
CUDA_KERNEL_DTYPES = KERNEL_DTYPES - {torch.float64}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, and float32 for everything shorter."""
    return torch.promote_types(dtype, torch.float32)
