"""Attention needs memory linear in M + N, except for the gradient of a full mask, and calls leave no memory behind.
Also tests that importing dlkernels does not load Triton and that attention works without the compiled module."""

from __future__ import annotations

import json

import pytest

from tests.support.fresh_python import run_python
from tests.support.memory_probes import ALLOCATOR

pytestmark = [pytest.mark.o0_skip(reason="memory is the same at -O0, only slower")]

PEAKS = """
import ctypes, gc, json
import torch
from dlkernels.functional import attention, attention_map
torch.set_num_threads(1)

def peak_of(run):
    '''MiB that the call needed on top of what was there, from the kernel's own high-water mark.'''
    def field(name):
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith(name))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = field("VmRSS")
    run()
    return (field("VmHWM") - before) / 1024

n = 16384
q, k, v = (torch.randn(1, 1, n, 8, requires_grad=True) for _ in range(3))
slopes, sinks = torch.full((1,), 0.01, requires_grad=True), torch.zeros(1, requires_grad=True)
bias = torch.zeros(1, n, requires_grad=True)
column = torch.zeros(n, 1, requires_grad=True)
cu = torch.tensor([0, n // 4, n], dtype=torch.int32)
packed = [t.detach()[0].transpose(0, 1).requires_grad_() for t in (q, k, v)]

def train(q, k, v, **options):
    attention(q, k, v, **options).sum().backward()

calls = {
    "plain": lambda: train(q, k, v, window=(900, 0)),
    "features": lambda: train(
        q, k, v, causal=True, alibi_slopes=slopes, sinks=sinks, dropout_p=0.1, window=(900, None)
    ),
    "bias of keys": lambda: train(q, k, v, attn_mask=bias, window=(500, 500)),
    "bias of queries": lambda: train(q, k, v, attn_mask=column, window=(500, 500)),
    "expanded mask": lambda: train(q, k, v, attn_mask=torch.zeros(1, n).expand(n, n), window=(500, 500)),
    "packed": lambda: train(*packed, cu_seqlens_q=cu, cu_seqlens_k=cu, window=(900, 0)),
    "map": lambda: attention_map(q, k, causal=True, window=(900, None)),
}
attention(q[:, :, :64], k[:, :, :64], v[:, :, :64], dropout_p=0.1).sum().backward()
print("RESULT", json.dumps({name: peak_of(call) for name, call in calls.items()}))
"""


@pytest.mark.heavy
def test_no_matrix_is_made() -> None:
    output = run_python(PEAKS, timeout=300, **ALLOCATOR)
    peaks: dict[str, float] = json.loads(output.split("RESULT", 1)[1])
    print({name: f"{mib:.1f} MiB" for name, mib in peaks.items()})
    matrix = 16384 * 16384 / 2**20  # of one byte for each query and key: 256 MiB
    assert len(peaks) == 7
    for name, mib in peaks.items():
        assert mib < matrix / 8, f"{name}: {mib:.1f} MiB"


FULL = (
    PEAKS.split("calls = {")[0].replace("n = 16384", "n = 4096")
    + """
mask = torch.zeros(n, n, requires_grad=True)
attention(q, k, v, attn_mask=mask).sum().backward()
mask.grad = None
print("RESULT", peak_of(lambda: attention(q, k, v, attn_mask=mask).sum().backward()))
"""
)


def test_the_gradient_of_a_full_mask_is_all_there_is() -> None:
    peak = float(run_python(FULL, timeout=120, **ALLOCATOR).split("RESULT", 1)[1])
    assert 60 < peak < 64 + 24, f"{peak:.1f} MiB, the gradient has 64"


LEAKS = """
import torch
import dlkernels
from dlkernels.functional import attention, attention_map, scaled_dot_product_attention
from tests.support.memory_probes import leaves_nothing

q, k = torch.randn(2, 4, 20, 16, requires_grad=True), torch.randn(2, 2, 30, 16, requires_grad=True)
mask = torch.randn(20, 30, requires_grad=True)
cu = torch.tensor([0, 5, 20])
rows = torch.randn(20, 4, 16, requires_grad=True)

def once():
    attention(q, k, k, attn_mask=mask, dropout_p=0.1, return_lse=True)[0].sum().backward()
    attention(rows, rows, rows, cu_seqlens_q=cu, cu_seqlens_k=cu, causal=True).sum().backward()
    with torch.no_grad():
        scaled_dot_product_attention(q[0], k[0, :1], k[0, :1])
        attention_map(q, k, rows=4, cols=4)
    with dlkernels.patch_attention():
        torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
    for wrong in ({"attn_mask": mask.T}, {"cu_seqlens_q": cu, "cu_seqlens_k": cu}):
        try:
            attention(q, k, k, **wrong)
        except (RuntimeError, ValueError):
            pass
    try:
        attention(rows, rows, rows, cu_seqlens_q=cu + 7, cu_seqlens_k=cu)
    except (RuntimeError, ValueError):
        pass

leaves_nothing(once, 100, 150)
"""


@pytest.mark.heavy
def test_no_leak() -> None:
    run_python(LEAKS, timeout=240, OMP_NUM_THREADS="1", **ALLOCATOR)


IMPORT = """
import sys
import torch
before = "triton" in sys.modules
import dlkernels
q = torch.randn(1, 1, 3, 4)
dlkernels.functional.attention(q, q, q)
dlkernels.explain(dlkernels.functional.attention, q, q, q)
assert before or "triton" not in sys.modules
# The operators have a CUDA implementation, even if this torch has no CUDA.
for name in ("attention", "attention_backward", "attention_map"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dlkernels::{name}", "CUDA")
"""


def test_importing_and_calling_on_the_cpu_loads_no_triton() -> None:
    run_python(IMPORT)


WITHOUT = """
import warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import dlkernels
    from dlkernels.functional import attention, attention_map, scaled_dot_product_attention
    q = torch.randn(2, 4, 3, 8, requires_grad=True)
    o = attention(q, q, q, causal=True, dropout_p=0.0)
torch.testing.assert_close(o, torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True))
torch.testing.assert_close(scaled_dot_product_attention(q, q, q), attention(q, q, q))
assert o.requires_grad and attention_map(q, q).shape == (2, 4, 64, 64)
assert any("reference path" in str(w.message) for w in caught), [str(w.message) for w in caught]
assert dlkernels.explain(attention, q, q, q).kernel == "reference"
assert dlkernels.explain(scaled_dot_product_attention, q, q, q).kernel == "torch"
"""


def test_without_the_compiled_module() -> None:
    run_python(WITHOUT, DLKERNELS_NO_NATIVE="1", DLKERNELS_REQUIRE_NATIVE="0")
