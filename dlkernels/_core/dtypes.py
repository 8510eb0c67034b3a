"""The dtypes that kernels have, and the ones that they compute in."""

from __future__ import annotations

import torch

__all__ = ["CUDA_KERNEL_DTYPES", "DTYPES", "KERNEL_DTYPES", "compute_dtype"]

# The operators take a dtype as its place in this list, and -1 for that of x.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
KERNEL_DTYPES = frozenset(DTYPES)
CUDA_KERNEL_DTYPES = KERNEL_DTYPES - {torch.float64}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays; everything shorter is computed in float32."""
    return torch.promote_types(dtype, torch.float32)
