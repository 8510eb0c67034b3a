"""How layers would run on CUDA: decided by plain C++, so it can be asked for without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from dlkernels import _native
from dlkernels.autograd import route

SHARED_BYTES = 232448  # of a block on an H200
MULTIPROCESSORS = 132


def plan(mode: str, dtype: str, B: int, H: int, D: int = 1, backward: bool = False) -> dict[str, Any]:
    assert _native.native is not None
    return dict(_native.native.cuda_plan(mode, dtype, 10, B, H, D, backward))


@pytest.mark.parametrize(
    ("mode", "dtype", "B", "H", "D", "kind", "slices"),
    [
        ("lstm", "bfloat16", 1, 1, 1, "cluster", 1),
        ("lstm", "bfloat16", 64, 256, 2, "cluster", 8),
        ("gru", "float16", 64, 512, 1, "cluster", 16),
        ("rnn_tanh", "bfloat16", 8, 1024, 1, "cluster", 16),
        ("lstm", "float32", 16, 256, 1, "cluster", 8),
        ("lstm", "float32", 16, 512, 1, "grid", 32),
        ("lstm", "bfloat16", 16, 1024, 2, "grid", 64),
        ("lstm", "float32", 16, 1024, 1, "steps", 0),
        ("lstm", "bfloat16", 16, 4096, 1, "steps", 0),
        ("lstm", "bfloat16", 100000, 128, 1, "steps", 0),
    ],
)
def test_where_the_weights_stay(mode: str, dtype: str, B: int, H: int, D: int, kind: str, slices: int) -> None:
    chosen = plan(mode, dtype, B, H, D)
    assert (chosen["kind"], chosen["slices"]) == (kind, slices), chosen["reason"]
    assert chosen["kernel"] == f"cuda/{kind}/{mode}"


@pytest.mark.parametrize("mode", ["lstm", "gru", "rnn_relu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backward", [False, True])
def test_plans_fit_the_gpu_and_cover_the_call(mode: str, dtype: str, backward: bool) -> None:
    for D in (1, 2):
        for B in (1, 7, 8, 9, 64, 200):
            for H in (1, 33, 100, 300, 700, 1500):
                chosen = plan(mode, dtype, B, H, D, backward)
                if chosen["kind"] == "steps":
                    continue
                assert chosen["shared_bytes"] <= SHARED_BYTES
                assert chosen["groups"] == D * -(-B // chosen["tile"])
                assert chosen["tile"] % (8 * chosen["column_tiles"]) == 0
                if chosen["kind"] == "grid":  # all at once, or the barrier would never be reached
                    assert chosen["blocks"] <= MULTIPROCESSORS
                else:
                    assert chosen["slices"] <= 16


def test_a_module_without_cuda_kernels_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        x = torch.empty(2, 3, device="cuda")
        doubles = x.double()
    monkeypatch.setattr(_native, "HAVE_CUDA_KERNELS", False)
    assert route(x) == ("reference", "the compiled module has no CUDA kernels: it was built without nvcc")
    monkeypatch.setattr(_native, "HAVE_CUDA_KERNELS", True)
    assert route(x).path == "op"
    assert route(doubles) == ("reference", "no kernel for torch.float64 on cuda")
    assert route(x, projected=True) == ("reference", "no CUDA kernel for projections")
