"""CUDA kernels in Triton. Importing this package does not import Triton; the first call on a CUDA tensor does.

`register()` makes them the CUDA implementation of the operators; `why_not(x)` says why they would not serve a tensor.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dlkernels._core.private_torch import operator_names

__all__ = ["OPERATORS", "register", "why_not"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_WIDTH = 256
OLDEST = (8, 0)  # older ones lack bfloat16 and asynchronous copies

# operator -> function in dlkernels.attention.triton.host, which takes the arguments in the order of the schema
OPERATORS = {
    "attention": "attention_forward",
    "attention_backward": "attention_backward",
    "attention_map": "attention_map",
}

_libraries: list[torch.library.Library] = []


def _implementation(name: str) -> Callable[..., Any]:
    function: Callable[..., Any] | None = None

    def call(*args: Any) -> Any:
        nonlocal function
        if function is None:
            function = getattr(importlib.import_module("dlkernels.attention.triton.host"), name)
        if not torch.is_grad_enabled():
            return function(*args)
        # Autograd must not record the allocations and sums in here: it has already recorded the call as a whole.
        with torch.no_grad():
            return function(*args)

    call.__name__ = name
    return call


def register(schema: Callable[[str], str]) -> None:
    """Once per process. `schema` makes the schema of an operator, for those that the compiled module did not define."""
    if _libraries:
        return
    library = torch.library.Library("dlkernels", "FRAGMENT")  # type: ignore[no-untyped-call]
    _libraries.append(library)
    known = set(operator_names())
    for operator, function in OPERATORS.items():
        if f"dlkernels::{operator}" not in known:
            library.define(schema(operator))  # type: ignore[no-untyped-call]
        library.impl(operator, _implementation(function), "CUDA")  # type: ignore[no-untyped-call]


@functools.cache
def _device_reason(index: int) -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST:
        return f"compute capability {capability[0]}.{capability[1]}, the Triton kernels need 8.0"
    return ""


def why_not(q: Tensor, v: Tensor | None = None) -> str:
    """Why the Triton kernels do not serve these tensors, or "" if they do."""
    if not q.is_cuda:
        return f"no Triton kernel for {q.device.type} tensors"
    if q.dtype not in DTYPES:
        return f"no CUDA kernel for {q.dtype}"
    width = max(q.size(-1), q.size(-1) if v is None else v.size(-1))
    if width > MAX_WIDTH:
        return f"head size {width}, the CUDA kernels take up to {MAX_WIDTH}"
    return _device_reason(torch.cuda.current_device() if q.device.index is None else q.device.index)
