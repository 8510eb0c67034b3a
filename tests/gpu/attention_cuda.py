"""The attention operators on a CUDA device against float64 on the CPU: the cases of tests/gpuless, and what only a GPU
can show. Run by check.py; DLKERNELS_SHARD=2/8 takes each eighth case, DLKERNELS_DEADLINE ends a run in time."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gpuless"))

from cases import FACTORS, GRADIENTS, Inputs, build, exact, label, pairwise, peer

import dlkernels.triton
from dlkernels.testing import within_rule

dlkernels.triton.register()
SHARD, _, SHARDS = os.environ.get("DLKERNELS_SHARD", "0/1").partition("/")
DEADLINE = float(os.environ.get("DLKERNELS_DEADLINE", "inf"))
# Longer than under the interpreter: several of the shipped tiles, whole and cut.
CASES = pairwise(FACTORS | {"lengths": ((1, 1), (1, 513), (7, 97), (97, 7), (300, 300), (257, 1030), (1025, 130))})


@pytest.fixture(autouse=True)
def _in_time() -> None:
    if time.time() > DEADLINE:
        pytest.skip("NOT RUN: the time of this part was over")


def mine(index: int) -> bool:
    return index % int(SHARDS) == int(SHARD)


def on_gpu(inputs: Inputs) -> tuple[Tensor, Tensor, list[Tensor]]:
    def move(x: Any) -> Any:
        return x.cuda() if isinstance(x, Tensor) else x

    q, k, v = move(inputs.q), move(inputs.k), move(inputs.v)
    features = {name: x if name == "rng" else move(x) for name, x in inputs.features.items()}
    rest = list(features.values())
    o, lse = torch.ops.dlkernels.attention(q, k, v, *rest)
    mask = features["mask"]
    needs = (True, True, mask is not None and mask.is_floating_point(), features["alibi_slopes"] is not None)
    gradients = torch.ops.dlkernels.attention_backward(
        move(inputs.do), move(inputs.dlse), q, k, v, o, lse, *rest, *needs, features["sinks"] is not None
    )
    return o, lse, gradients


@pytest.mark.parametrize(
    "index", [i for i in range(len(CASES)) if mine(i)], ids=[label(c) for i, c in enumerate(CASES) if mine(i)]
)
def test_pairs_of_features(index: int) -> None:
    case = CASES[index]
    inputs = build(case, index)
    dtype = case["dtype"]
    o, lse, gradients = on_gpu(inputs)
    ref_o, ref_lse, ref = exact(inputs)
    peer_o, peer_lse, base = peer(inputs, dtype)
    wrong = []

    def judge(name: str, actual: Tensor, other: Tensor, right: Tensor, kind: torch.dtype, factor: float) -> None:
        verdict = within_rule(actual.cpu(), other.to(kind), right, kind, grad=name.startswith("d"))
        # exp2, log2 and division of the GPU are good to 2 ulp, those of the CPU to 1.
        if not verdict.ours <= verdict.limit * factor + 1e-6 * float(kind == torch.float32):
            wrong.append(f"{name}: {verdict}")

    judge("o", o, peer_o, ref_o, dtype, 2)
    judge("lse", lse, peer_lse, ref_lse, torch.float32, 4)
    for name, actual in zip(GRADIENTS, gradients, strict=True):
        if name in ref:
            judge(name, actual, base[name], ref[name], actual.dtype, 2)
    again = on_gpu(inputs)
    for name, first, second in zip(
        ("o", "lse", *GRADIENTS), (o, lse, *gradients), (*again[:2], *again[2]), strict=True
    ):
        if not torch.equal(first, second):
            wrong.append(f"{name} differs from run to run")
    assert not wrong, "\n".join(wrong)


PLAIN: dict[str, Any] = {name: values[0] for name, values in FACTORS.items()} | {"lengths": (300, 300)}


@pytest.mark.skipif(not mine(0), reason="in the first shard")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_nan_does_not_leak(dtype: torch.dtype) -> None:
    case = PLAIN | {"causal": 1, "dtype": dtype, "widths": (64, 64)}
    inputs = build(case, 1)
    clean_o, _, clean = on_gpu(inputs)
    k, v = inputs.k.clone(), inputs.v.clone()
    k[:, :, 200], v[:, :, 200] = float("nan"), float("inf")
    o, _, gradients = on_gpu(inputs._replace(k=k, v=v))
    torch.testing.assert_close(o[:, :, :200], clean_o[:, :, :200])
    torch.testing.assert_close(gradients[0][:, :, :200], clean[0][:, :, :200])
    assert not o[:, :, 200:].isfinite().any()


@pytest.mark.skipif(not mine(0), reason="in the first shard")
def test_200_repeats_are_bit_equal() -> None:
    inputs = build(PLAIN | {"causal": 1, "dtype": torch.bfloat16, "widths": (64, 64), "alibi": "H", "group": 2}, 2)
    first = on_gpu(inputs)
    for _ in range(200):
        o, lse, gradients = on_gpu(inputs)
        assert torch.equal(o, first[0]) and torch.equal(lse, first[1])
        assert all(map(torch.equal, gradients, first[2]))


@pytest.mark.skipif(not mine(0), reason="in the first shard")
def test_memory_is_linear() -> None:
    """16k x 16k, forward and backward: nothing of M x N elements."""
    length, heads, width = 16384, 2, 64
    q, k, v, do = (torch.randn(1, heads, length, width, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    rest = (None, None, None, None, None, None, 0, 0, width**-0.5, 0, -1, -1, 0.0, 0.0)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    o, lse = torch.ops.dlkernels.attention(q, k, v, *rest)
    torch.ops.dlkernels.attention_backward(do, None, q, k, v, o, lse, *rest, True, True, False, False, False)
    assert torch.cuda.max_memory_allocated() - before < length * length // 2


@pytest.mark.skipif(not mine(0), reason="in the first shard")
def test_decode_splits_the_keys() -> None:
    """(1, 32, 1, 2048, 128) with four query heads to a key head, against the same without splitting and SDPA."""
    q = torch.randn(1, 32, 1, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, 8, 2048, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rest = (None, None, None, None, None, None, 0, 0, 128**-0.5, 0, -1, -1, 0.0, 0.0)
    o, _ = torch.ops.dlkernels.attention(q, k, v, *rest)
    expected = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)
    torch.testing.assert_close(o.double(), expected, rtol=2e-2, atol=2e-3)
