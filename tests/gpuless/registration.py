"""Tests that the CUDA functions take the arguments of the operators, and that Triton is not imported before it is
needed."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch

import dlkernels.attention.triton
from dlkernels.attention.triton import host


@pytest.mark.parametrize("operator", dlkernels.attention.triton.OPERATORS)
def test_arguments(operator: str) -> None:
    schema = getattr(torch.ops.dlkernels, operator).default._schema
    parameters = inspect.signature(getattr(host, dlkernels.attention.triton.OPERATORS[operator])).parameters
    assert list(parameters) == [argument.name for argument in schema.arguments]


def test_operators_have_a_cuda_implementation() -> None:
    for operator in dlkernels.attention.triton.OPERATORS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dlkernels::{operator}", "CUDA"), operator


def test_import_is_lazy() -> None:
    script = "import dlkernels, sys; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


@pytest.mark.parametrize("setting, precision", [("ieee", "ieee"), ("tf32", "tf32")])
def test_tf32_only_where_torch_allows_it(setting: str, precision: str) -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = setting
        assert host._precision(torch.float32) == precision
        assert host._precision(torch.bfloat16) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
