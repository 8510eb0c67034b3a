"""Compares the attention operators on a CUDA device with float64 on the CPU over the cases of tests/gpuless, and tests
what only a GPU can show. check.py runs this file; turns.py explains DLKERNELS_SHARD."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import FACTORS, GRADIENTS, Inputs, Judge, build, label, pairwise
from timing import DEVICE, REHEARSAL
from torch import Tensor
from turns import first_shard, mine, on_a_gpu

import dlkernels
from dlkernels.testing import Verdict

# Longer sequences than under the interpreter, which have several of the shipped tiles, whole tiles and partial ones.
LENGTHS = ((1, 1), (1, 513), (7, 97), (97, 7), (300, 300), (257, 1030), (1025, 130))
CASES = pairwise(FACTORS | {"lengths": LENGTHS[:4] if REHEARSAL else LENGTHS})


def on_device(inputs: Inputs) -> tuple[Tensor, Tensor, list[Tensor]]:
    def move(x: Any) -> Any:
        return x.to(DEVICE) if isinstance(x, Tensor) else x

    q, k, v = move(inputs.q), move(inputs.k), move(inputs.v)
    features = {name: x if name == "rng" else move(x) for name, x in inputs.features.items()}
    rest = list(features.values())
    o, lse, stats = torch.ops.dlkernels.attention(q, k, v, *rest, False)
    mask = features["mask"]
    needs = (True, True, mask is not None and mask.is_floating_point(), features["alibi_slopes"] is not None)
    gradients = torch.ops.dlkernels.attention_backward(
        move(inputs.do), move(inputs.dlse), q, k, v, o, stats, *rest, *needs, features["sinks"] is not None
    )
    return o, lse, gradients


@pytest.mark.parametrize(
    "index", [i for i in range(len(CASES)) if mine(i)], ids=[label(c) for i, c in enumerate(CASES) if mine(i)]
)
def test_pairs_of_features(index: int) -> None:
    judged(build(CASES[index], index), CASES[index]["dtype"])


def judged(inputs: Inputs, dtype: torch.dtype) -> None:
    """Checks that the results are right and that a second run gives the same bits."""
    o, lse, gradients = on_device(inputs)
    judge = Judge(inputs, dtype)
    wrong = []

    def note(name: str, verdict: Verdict, factor: float) -> None:
        # exp2, log2 and division have errors of up to 2 ulp on the GPU and 1 ulp on the CPU.
        if not verdict.ours <= verdict.limit * factor + 1e-6 * float(dtype == torch.float32):
            wrong.append(f"{name}: {verdict}")

    note("o", judge.output(o, dtype), 2)
    note("lse", judge.logarithm(lse), 4)
    for name, actual in zip(GRADIENTS, gradients, strict=True):
        if name in judge.gradients:
            note(name, judge.gradient(name, actual), 2)
    again = on_device(inputs)
    for name, first, second in zip(
        ("o", "lse", *GRADIENTS), (o, lse, *gradients), (*again[:2], *again[2]), strict=True
    ):
        if not torch.equal(first, second):
            wrong.append(f"{name} differs from run to run")
    assert not wrong, "\n".join(wrong)


PLAIN: dict[str, Any] = {name: values[0] for name, values in FACTORS.items()} | {"lengths": (300, 300)}
NO_FEATURES = (None, None, None, None, None, None, 0, 0)


@first_shard
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saturated_rows(dtype: torch.dtype) -> None:
    """Logits of about 1e4. If the scaling of a score were fused with the subtraction of the maximum, p at the maximum
    would differ from 1 by the rounding error of the maximum."""
    inputs = build(PLAIN | {"causal": 1, "dtype": dtype, "widths": (64, 64)}, 13)
    judged(inputs._replace(q=inputs.q * 64, k=inputs.k * 64), dtype)


@first_shard
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_nan_does_not_leak(dtype: torch.dtype) -> None:
    case = PLAIN | {"causal": 1, "dtype": dtype, "widths": (64, 64)}
    inputs = build(case, 1)
    clean_o, _, clean = on_device(inputs)
    k, v = inputs.k.clone(), inputs.v.clone()
    k[:, :, 200], v[:, :, 200] = float("nan"), float("inf")
    o, _, gradients = on_device(inputs._replace(k=k, v=v))
    torch.testing.assert_close(o[:, :, :200], clean_o[:, :, :200])
    torch.testing.assert_close(gradients[0][:, :, :200], clean[0][:, :, :200])
    assert not o[:, :, 200:].isfinite().any()


@first_shard
def test_200_repeats_are_bit_equal() -> None:
    inputs = build(PLAIN | {"causal": 1, "dtype": torch.bfloat16, "widths": (64, 64), "alibi": "H", "group": 2}, 2)
    first = on_device(inputs)
    for _ in range(200):
        o, lse, gradients = on_device(inputs)
        assert torch.equal(o, first[0]) and torch.equal(lse, first[1])
        assert all(map(torch.equal, gradients, first[2]))


@on_a_gpu
@first_shard
def test_memory_is_linear() -> None:
    """A forward and a backward of 16k x 16k allocate no tensor of M x N elements."""
    length, heads, width = 16384, 2, 64
    q, k, v, do = (torch.randn(1, heads, length, width, device=DEVICE, dtype=torch.bfloat16) for _ in range(4))
    rest = (*NO_FEATURES, width**-0.5, 0, -1, -1, 0.0, 0.0)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    o, _, stats = torch.ops.dlkernels.attention(q, k, v, *rest, False)
    torch.ops.dlkernels.attention_backward(do, None, q, k, v, o, stats, *rest, True, True, False, False, False)
    assert torch.cuda.max_memory_allocated() - before < length * length // 2


@first_shard
def test_decode_splits_the_keys() -> None:
    """Decoding of (B, H, M, N, D) = (1, 32, 1, 2048, 128) with four query heads per key head, compared with SDPA."""
    q = torch.randn(1, 32, 1, 128, device=DEVICE, dtype=torch.bfloat16)
    k, v = (torch.randn(1, 8, 2048, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    rest = (*NO_FEATURES, 128**-0.5, 0, -1, -1, 0.0, 0.0)
    o, _, _ = torch.ops.dlkernels.attention(q, k, v, *rest, False)
    expected = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)
    torch.testing.assert_close(o.double(), expected, rtol=2e-2, atol=2e-3)


@first_shard
def test_the_function_runs_these_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """`dlkernels.functional.attention` with gradients, eager and compiled. On a GPU the Triton code must have run."""
    ran: list[str] = []
    if not REHEARSAL:
        from dlkernels.attention.triton import host

        for name in ("attention_forward", "attention_backward"):
            original = getattr(host, name)
            monkeypatch.setattr(host, name, lambda *x, name=name, run=original: ran.append(name) or run(*x))
    q, k, v = (torch.randn(2, 4, 130, 64, device=DEVICE, requires_grad=True) for _ in range(3))

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dlkernels.functional.attention(q, k, v, causal=True).square().sum()

    plain = torch.autograd.grad(loss(q, k, v), (q, k, v))
    assert REHEARSAL or ran == ["attention_forward", "attention_backward"]
    expected = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    right = torch.autograd.grad(expected.square().sum(), (q, k, v))
    for found, wanted in zip(plain, right, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(q, k, v), (q, k, v))
    for found, wanted in zip(compiled, plain, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@on_a_gpu
@first_shard
def test_cuda_graph() -> None:
    """A captured call replays with other inputs, so it neither synchronises nor allocates memory outside of torch."""
    rest = (*NO_FEATURES, 64**-0.5, 1, -1, -1, 0.0, 0.0)
    q, k, v, do = (torch.randn(2, 4, 256, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(4))

    def call() -> list[Tensor]:
        o, lse, stats = torch.ops.dlkernels.attention(q, k, v, *rest, False)
        more = torch.ops.dlkernels.attention_backward(
            do, None, q, k, v, o, stats, *rest, True, True, False, False, False
        )
        return [o, lse, *more[:3]]

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    q.copy_(torch.randn_like(q))
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, captured, call()))
