"""Forward and backward TFLOP/s of the CUDA attention kernels beside every SDPA backend: bench_attention.py OUT.json.

The file is written after each case, so that what was measured survives whatever comes next. DLKERNELS_DEADLINE, a
time.time(), ends the run early.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import dlkernels.triton

BACKENDS = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
}
MATH_UP_TO = 2048  # beyond, its M x N tensors are most of the memory and of the time
TOKENS = 16384
HIDDEN = 2048
DTYPE = torch.bfloat16


def milliseconds(call: Callable[[], Any], budget: float = 0.15) -> tuple[float, float]:
    """(median, spread of the middle half) of a call's time on the device, after a warm-up."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    repeats = max(5, min(50, int(budget / max(time.perf_counter() - begin, 1e-5))))
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        times.append((start, stop))
    torch.cuda.synchronize()
    measured = sorted(start.elapsed_time(stop) for start, stop in times)
    quarter = len(measured) // 4
    return statistics.median(measured), measured[-1 - quarter] - measured[quarter]


def ours(q: Any, k: Any, v: Any, do: Any, causal: bool) -> tuple[Callable[[], Any], Callable[[], Any]]:
    rest = (None, None, None, None, None, None, 0, 0, q.size(-1) ** -0.5, int(causal), -1, -1, 0.0, 0.0)
    o, lse = torch.ops.dlkernels.attention(q, k, v, *rest)
    backward = torch.ops.dlkernels.attention_backward
    return (
        lambda: torch.ops.dlkernels.attention(q, k, v, *rest),
        lambda: backward(do, None, q, k, v, o, lse, *rest, True, True, False, False, False),
    )


def theirs(q: Any, k: Any, v: Any, do: Any, causal: bool) -> tuple[Callable[[], Any], Callable[[], Any]]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = scaled_dot_product_attention(*leaves, is_causal=causal)
    return (
        lambda: scaled_dot_product_attention(q, k, v, is_causal=causal),
        lambda: torch.autograd.grad(o, leaves, do, retain_graph=True),
    )


def case(width: int, causal: bool, length: int) -> dict[str, Any]:
    heads, batch = HIDDEN // width, max(1, TOKENS // length)
    q, k, v, do = (torch.randn(batch, heads, length, width, device="cuda", dtype=DTYPE) for _ in range(4))
    flops = 4.0 * batch * heads * length * length * width * (0.5 if causal else 1.0)
    row: dict[str, Any] = {"D": width, "causal": causal, "length": length, "B": batch, "H": heads, "dtype": "bfloat16"}
    expected = None
    for name in ("dlkernels", *BACKENDS):
        if name == "sdpa_math" and length > MATH_UP_TO:
            row[name] = {"not_run": f"longer than {MATH_UP_TO}"}
            continue
        try:
            if name == "dlkernels":
                forward, backward = ours(q, k, v, do, causal)
                expected = forward()[0]
                row[name] = measure(forward, backward, flops)
            else:
                with sdpa_kernel(BACKENDS[name]):
                    forward, backward = theirs(q, k, v, do, causal)
                    result = measure(forward, backward, flops)
                    if expected is not None:
                        result["largest_difference"] = (forward().float() - expected.float()).abs().max().item()
                row[name] = result
        except Exception as error:  # a backend that refuses, or runs out of memory, must not take the others along
            row[name] = {"not_run": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        torch.cuda.empty_cache()
    return row


def measure(forward: Callable[[], Any], backward: Callable[[], Any], flops: float) -> dict[str, float]:
    result = {}
    for name, call, factor in (("forward", forward, 1.0), ("backward", backward, 2.5)):
        median, spread = milliseconds(call)
        result |= {f"{name}_ms": median, f"{name}_spread_ms": spread, f"{name}_tflops": flops * factor / median / 1e9}
    return result


def decode(length: int) -> dict[str, Any]:
    q = torch.randn(1, 32, 1, 128, device="cuda", dtype=DTYPE)
    k, v = (torch.randn(1, 8, length, 128, device="cuda", dtype=DTYPE) for _ in range(2))
    rest = (None, None, None, None, None, None, 0, 0, 128**-0.5, 0, -1, -1, 0.0, 0.0)
    row: dict[str, Any] = {"decode": True, "length": length, "H": 32, "HKV": 8, "D": 128}
    row["dlkernels_ms"] = milliseconds(lambda: torch.ops.dlkernels.attention(q, k, v, *rest))[0]
    row["sdpa_ms"] = milliseconds(lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True))[0]
    return row


def main(path: Path) -> int:
    if not torch.cuda.is_available():
        print("NOT RUN: torch finds no CUDA device")
        return 3
    deadline = float(os.environ.get("DLKERNELS_DEADLINE", "inf"))
    dlkernels.triton.register()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    plan: list[Callable[[], dict[str, Any]]] = [
        lambda width=width, causal=causal, length=length: case(width, causal, length)  # type: ignore[misc]
        for length in (4096, 1024, 16384, 2048, 8192) for width in (64, 128) for causal in (False, True)
    ]  # fmt: skip
    plan[8:8] = [lambda length=length: decode(length) for length in (2048, 32768)]  # type: ignore[misc]
    for index, run in enumerate(plan):
        if time.time() > deadline:
            print(f"NOT RUN: the last {len(plan) - index} of {len(plan)} cases, the time of this part was over")
            rows.append({"not_run": len(plan) - index})
            break
        try:
            rows.append(run())
        except Exception as error:
            rows.append({"failed": f"{type(error).__name__}: {str(error)[:400]}"})
        print(json.dumps(rows[-1]), flush=True)
        path.write_text(json.dumps(rows, indent=1))
    return int(any("failed" in row or "not_run" in row.get("dlkernels", {}) for row in rows))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
