"""Measures the TFLOP/s of the attention kernels and of every SDPA backend, both passes: bench_attention.py OUT.json."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import DEVICE, REHEARSAL, milliseconds, run_all, why
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import dlkernels.attention.triton

BACKENDS = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
}
MATH_UP_TO = 2048  # for longer sequences its M x N tensors take most of the memory and of the time
TOKENS = 128 if REHEARSAL else 16384
HIDDEN = 128 if REHEARSAL else 2048
LENGTHS = (64, 128) if REHEARSAL else (4096, 1024, 16384, 2048, 8192)
DECODE_LENGTHS = (256,) if REHEARSAL else (2048, 32768)
Calls = tuple[Callable[[], Any], Callable[[], Any]]


def ours(q: Any, k: Any, v: Any, do: Any, causal: bool) -> Calls:
    rest = (None, None, None, None, None, None, 0, 0, q.size(-1) ** -0.5, int(causal), -1, -1, 0.0, 0.0)
    o, _, stats = torch.ops.dlkernels.attention(q, k, v, *rest, False)
    backward = torch.ops.dlkernels.attention_backward
    return (
        lambda: torch.ops.dlkernels.attention(q, k, v, *rest, False),
        lambda: backward(do, None, q, k, v, o, stats, *rest, True, True, False, False, False),
    )


def theirs(q: Any, k: Any, v: Any, do: Any, causal: bool) -> Calls:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = scaled_dot_product_attention(*leaves, is_causal=causal)
    return (
        lambda: scaled_dot_product_attention(q, k, v, is_causal=causal),
        lambda: torch.autograd.grad(o, leaves, do, retain_graph=True),
    )


def measure(calls: Calls, flops: float) -> dict[str, float]:
    result = {}
    for name, call, factor in (("forward", calls[0], 1.0), ("backward", calls[1], 2.5)):
        median, spread = milliseconds(call)
        result |= {f"{name}_ms": median, f"{name}_spread_ms": spread, f"{name}_tflops": flops * factor / median / 1e9}
    return result


def case(dtype: torch.dtype, width: int, causal: bool, length: int) -> dict[str, Any]:
    heads, batch = HIDDEN // width, max(1, TOKENS // length)
    q, k, v, do = (torch.randn(batch, heads, length, width, device=DEVICE, dtype=dtype) for _ in range(4))
    flops = 4.0 * batch * heads * length * length * width * (0.5 if causal else 1.0)
    row: dict[str, Any] = {
        "what": "attention", "dtype": str(dtype)[6:], "B": batch, "H": heads, "M": length, "N": length, "D": width,
        "causal": causal,
    }  # fmt: skip
    expected = None
    for name in ("dlkernels", *BACKENDS):
        if name == "sdpa_math" and length > MATH_UP_TO:
            row[name] = {"not_run": f"longer than {MATH_UP_TO}"}
            continue
        try:
            if name == "dlkernels":
                calls = ours(q, k, v, do, causal)
                expected = calls[0]()[0]
                row[name] = measure(calls, flops)
            else:
                with sdpa_kernel(BACKENDS[name]):
                    calls = theirs(q, k, v, do, causal)
                    row[name] = measure(calls, flops)
                    if expected is not None:
                        difference = calls[0]().float() - expected.float()
                        row[name]["largest_difference"] = difference.abs().max().item()
        except Exception as error:  # a backend may refuse the call or run out of memory; the others are still measured
            row[name] = {"not_run": why(error)}
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    return row | {"best_peer": _ratios(row)}


def _ratios(row: dict[str, Any]) -> dict[str, Any]:
    """Our speed divided by that of the faster of SDPA's flash and cuDNN backends."""
    found = {}
    for name in ("forward", "backward"):
        peers = [row[peer].get(f"{name}_ms") for peer in ("sdpa_flash", "sdpa_cudnn")]
        times = [x for x in peers if x]
        mine = row["dlkernels"].get(f"{name}_ms")
        found[f"{name}_ratio"] = min(times) / mine if times and mine else None
    return found


def decode(length: int) -> dict[str, Any]:
    q = torch.randn(1, 32, 1, 128, device=DEVICE, dtype=torch.bfloat16)
    k, v = (torch.randn(1, 8, length, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    rest = (None, None, None, None, None, None, 0, 0, 128**-0.5, 0, -1, -1, 0.0, 0.0)
    row: dict[str, Any] = {"what": "decode", "dtype": "bfloat16", "H": 32, "HKV": 8, "M": 1, "N": length, "D": 128}
    row["dlkernels"] = {"forward_ms": milliseconds(lambda: torch.ops.dlkernels.attention(q, k, v, *rest, False))[0]}
    # SDPA chooses its backend.
    row["sdpa"] = {"forward_ms": milliseconds(lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True))[0]}
    return row


def main(path: Path) -> int:
    dlkernels.attention.triton.register()
    grid = [
        functools.partial(case, torch.bfloat16, width, causal, length)
        for length in LENGTHS for width in (64, 128) for causal in (False, True)
    ]  # fmt: skip
    more = [functools.partial(decode, length) for length in DECODE_LENGTHS]
    more.append(functools.partial(case, torch.float32, 64, True, min(1024, LENGTHS[0])))
    return run_all(path, grid[:8] + more + grid[8:])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
