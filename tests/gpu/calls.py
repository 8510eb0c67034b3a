"""Calls of the sizes of the benchmarks, to be run once under ncu: calls.py."""

from __future__ import annotations

import torch
from device import best_plan, plan_kind
from timing import DEVICE, REHEARSAL, synchronize
from torch.nn.functional import scaled_dot_product_attention

import dlkernels


def layer(name: str, dtype: torch.dtype, T: int, B: int, H: int) -> None:
    made = getattr(dlkernels.nn, name)(H, H, device=DEVICE, dtype=dtype)
    x = torch.randn(T, B, H, device=DEVICE, dtype=dtype, requires_grad=True)
    made(x)[0].sum().backward()
    synchronize()
    mode = "rnn_tanh" if name == "RNN" else name.lower()
    print(name, dtype, plan_kind(mode, dtype, T, B, H, 1), flush=True)


def attention(dtype: torch.dtype, length: int, width: int) -> float:
    """A forward and a backward; the largest difference of o from torch's in float64."""
    q, k, v = (torch.randn(2, 4, length, width, device=DEVICE, dtype=dtype, requires_grad=True) for _ in range(3))
    o = dlkernels.functional.attention(q, k, v, causal=True)
    torch.autograd.grad(o.float().square().sum(), (q, k, v))
    expected = scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    return float((o - expected).detach().abs().max())


# (kind of plan, layer, dtype, B, H): each kind in the case of many sequences, a float32 layer that multiplies one
# column, and a layer whose slices are wide (48 units).
LAYERS = (
    ("cluster", "LSTM", torch.bfloat16, 64, 512), ("grid", "LSTM", torch.bfloat16, 64, 1024),
    ("steps", "LSTM", torch.bfloat16, 64, 512), ("cluster", "LSTM", torch.float32, 1, 512),
    ("cluster", "GRU", torch.bfloat16, 16, 768),
)  # fmt: skip


def main() -> None:
    for kind, name, dtype, B, H in LAYERS:
        with best_plan(kind):
            layer(name, dtype, *((4, min(B, 2), 16) if REHEARSAL else (64, B, H)))
    attention(torch.bfloat16, 64 if REHEARSAL else 2048, 128)


if __name__ == "__main__":
    main()
