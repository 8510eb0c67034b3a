"""`explain` of attention reports the kernels and plans that really run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import dlkernels
from dlkernels._core import extension
from dlkernels.functional import attention, scaled_dot_product_attention
from tests.support.instruction_sets import kernels_of

pytestmark = pytest.mark.usefixtures("native")

SHAPES = {
    "dot": (torch.randn(1, 8, 1, 64), torch.randn(1, 2, 2048, 64)),
    "tiles": (torch.randn(2, 4, 200, 32), torch.randn(2, 4, 300, 32)),
    "few keys": (torch.randn(1, 1, 40, 8), torch.randn(1, 1, 3, 8)),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("count", [1, 2])
def test_the_plan_is_what_ran(name: str, count: int, isa: str, threads: Callable[[int], None]) -> None:
    threads(count)
    q, k = SHAPES[name]
    plan = dlkernels.explain(attention, q, k, k).layers[0]
    assert plan.path == "native" and not plan.grad and not plan.backward
    attention(q, k, k)
    ran = extension.native.attention_last_run()
    assert {key: ran[key] for key in plan.forward} == plan.forward and not ran["backward"]
    assert plan.kernel == f"cpu/{kernels_of(isa)}/attention/{'dot' if name == 'dot' else 'tiles'}"
    q = q.clone().requires_grad_()
    plan = dlkernels.explain(attention, q, k, k).layers[0]
    assert plan.grad and "gradient" in plan.reason
    attention(q, k, k).sum().backward()
    ran = extension.native.attention_last_run()
    assert {key: ran[key] for key in plan.backward} == plan.backward and ran["backward"]


@pytest.mark.parametrize("rows", [1, 40])
def test_the_matrix_unit_is_named(rows: int, isa: str) -> None:
    """The matrix unit serves only bfloat16 in tiles; for all other calls explain names the instruction set that
    runs."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        q, k = torch.randn(1, 1, rows, 16, dtype=dtype), torch.randn(1, 1, 30, 16, dtype=dtype)
        plan = dlkernels.explain(attention, q.requires_grad_(), k, k).layers[0]
        for half in (plan.forward, plan.backward):
            assert half["isa"] == kernels_of(isa, attention=dtype, dot=rows == 1)
            assert ("matrix unit" in half["reason"]) == (half["isa"] == "amx")


def test_nothing_is_run() -> None:
    q, k = SHAPES["tiles"]
    attention(q[:, :, :9], k, k)
    before, state = extension.native.attention_last_run(), torch.get_rng_state()
    dlkernels.explain(attention, q, k, k, dropout_p=0.5)
    assert extension.native.attention_last_run() == before and torch.equal(state, torch.get_rng_state())


def test_text() -> None:
    q, k = SHAPES["dot"]
    text = str(dlkernels.explain(attention, q, k, k, causal="bottom_right", sinks=torch.zeros(8)))
    for part in ("q [1, 8, 1, 64] float32 cpu", "k [1, 2, 2048, 64]", "forward: threads", "split", "block_m", "few"):
        assert part in text, (part, text)


@pytest.mark.parametrize("function", [scaled_dot_product_attention, torch.nn.functional.scaled_dot_product_attention])
def test_sdpa(function: Any) -> None:
    q, k = SHAPES["tiles"]
    found = dlkernels.explain(function, q[0], k[0], k[0], is_causal=True)
    assert found.kernel.endswith("attention/tiles") and found.native
    for call, options, reason in (
        ((q, k.double(), k), {}, "dtype"),
        ((q, k, k), {"scale": float("nan")}, "scale"),
        ((q, k, k), {"attn_mask": torch.zeros(3, 3)}, "attn_mask"),
        ((q.to("meta"), k.to("meta"), k.to("meta")), {}, "meta"),
    ):
        found = dlkernels.explain(function, *call, **options)
        assert found.kernel == "torch" and reason in found.layers[0].reason


def test_other_paths() -> None:
    q, k = SHAPES["tiles"]
    meta = dlkernels.explain(attention, q.to("meta"), k.to("meta"), k.to("meta"))
    assert meta.kernel == "reference" and "meta" in meta.layers[0].reason and not meta.native
    assert dlkernels.explain(attention, q[:0], k[:0], k[:0]).layers[0].path == "nothing"
    rows = torch.randn(30, 4, 8)
    cu = torch.tensor([0, 10, 30])
    packed = dlkernels.explain(attention, rows, rows, rows, cu_seqlens_q=cu, cu_seqlens_k=cu, return_lse=True)
    assert packed.native
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast bfloat16" in str(dlkernels.explain(attention, q, k, k))


def test_mistakes_raise_what_the_call_raises() -> None:
    q, k = SHAPES["tiles"]
    with pytest.raises(RuntimeError, match="k: expected width"):
        dlkernels.explain(attention, q, k[..., :5], k)
    with pytest.raises(TypeError, match="explain"):
        dlkernels.explain(torch.nn.Linear(8, 16), q)
    with pytest.raises(TypeError, match="explain"):
        dlkernels.explain(torch.softmax, q)
    with pytest.raises(TypeError, match="missing a required argument: 'k'"):
        dlkernels.explain(attention, q)
    with pytest.raises(TypeError, match="missing a required argument: 'key'"):
        dlkernels.explain(torch.nn.functional.scaled_dot_product_attention, q)


def test_a_layer_of_torch() -> None:
    found = dlkernels.explain(torch.nn.MultiheadAttention(8, 2), torch.randn(3, 1, 8))
    assert found.kernel == "torch" and "not patched" in found.layers[0].reason
    x = torch.randn(3, 1, 8)
    assert dlkernels.explain(torch.nn.MultiheadAttention(8, 2), query=x, key=x, value=x).kernel == "torch"
