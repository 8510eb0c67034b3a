"""Calls of the recurrent layers to be run under a tool: calls.py small | main.

small calls every kind of kernel once, at sizes that are fast enough under compute-sanitizer. main calls layers of the
sizes of the benchmarks once, for ncu.
"""

from __future__ import annotations

import sys
import time

import torch
from device import KINDS, best_plan, plan_kind
from timing import DEADLINE, DEVICE, REHEARSAL, synchronize

import dlkernels


def call(name: str, dtype: torch.dtype, T: int, B: int, H: int, directions: int, lengths: bool) -> None:
    layer = getattr(dlkernels.nn, name)(H, H, bidirectional=directions == 2, device=DEVICE, dtype=dtype)
    x = torch.randn(T, B, H, device=DEVICE, dtype=dtype, requires_grad=True)
    given = torch.arange(B, device=DEVICE) % (T + 1) if lengths else None
    layer(x, lengths=given)[0].sum().backward()
    synchronize()
    mode = "rnn_tanh" if name == "RNN" else name.lower()
    print(name, dtype, plan_kind(mode, dtype, T, B, H, directions), flush=True)


def small() -> None:
    for kind in KINDS:
        for dtype in (torch.bfloat16, torch.float32):
            for name in ("LSTM", "GRU", "RNN"):
                if time.time() > DEADLINE:
                    raise SystemExit(f"NOT RUN from {kind} {dtype} {name} on: the time of this part was over")
                with best_plan(kind):
                    call(name, dtype, 3, 18, 70, 2, True)
    for cell in (dlkernels.nn.LSTMCell, dlkernels.nn.GRUCell, dlkernels.nn.RNNCell):
        step = cell(9, 35, device=DEVICE)
        h = step(torch.randn(70, 9, device=DEVICE))
        (h[0] if isinstance(h, tuple) else h).sum().backward()
    synchronize()


def main() -> None:
    T, H = (4, 16) if REHEARSAL else (64, 512)
    for kind, width in (("cluster", H), ("grid", 2 * H), ("steps", H)):
        with best_plan(kind):
            call("LSTM", torch.bfloat16, T, 2 if REHEARSAL else 64, width, 1, False)


if __name__ == "__main__":
    {"small": small, "main": main}[sys.argv[1]]()
