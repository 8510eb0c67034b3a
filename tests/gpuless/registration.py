"""Tests that the CUDA functions take the arguments of the operators, and that Triton is not imported before it is
needed."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dlkernels.attention.triton
from dlkernels.attention.triton import host

SCHEMAS = Path(__file__).resolve().parents[2] / "csrc" / "attention" / "torch" / "registration.cpp"


def schema_in_cpp(operator: str) -> torch._C.FunctionSchema:
    """The schema with which the compiled module registers an operator."""
    text = SCHEMAS.read_text()
    for definition in re.findall(r"library\.def\(\s*((?:\"[^\"]*\"\s*)+)\)", text):
        schema = "".join(re.findall(r"\"([^\"]*)\"", definition))
        if schema.startswith(operator + "("):
            return torch._C.parse_schema(schema)
    raise AssertionError(f"{SCHEMAS} defines no {operator}")


@pytest.mark.parametrize("operator", dlkernels.attention.triton.OPERATORS)
def test_arguments(operator: str) -> None:
    function, schema = dlkernels.attention.triton.OPERATORS[operator]
    ours, theirs = torch._C.parse_schema(operator + schema), schema_in_cpp(operator)
    assert str(ours) == str(theirs)
    parameters = inspect.signature(getattr(host, function)).parameters
    assert list(parameters) == [argument.name for argument in theirs.arguments]


def test_operators_have_a_cuda_implementation() -> None:
    dlkernels.attention.triton.register()
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
