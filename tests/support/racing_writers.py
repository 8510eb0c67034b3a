"""Makes calls while another thread writes to their index tensors. The program is started with
`python -m tests.support.racing_writers NAME SECONDS`. Every call must end with a result or an exception, and the last
line printed counts both."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

from dlkernels import functional

# The call, the tensor that changes, and what it is changed to.
Race = tuple[Callable[[], Tensor], Tensor, list[Tensor]]
# MANY is large enough that the other thread can write between a check and a use of the tensor.
MANY, STEPS, I, H = 4096, 8, 4, 8


def weights(gates: int, directions: int) -> list[Tensor]:
    shapes = ((gates * H, I), (gates * H, H), (gates * H,), (gates * H,)) * directions
    return [torch.randn(shape) for shape in shapes]


def batch_sizes() -> Race:
    x, w = torch.randn(64 + STEPS, I, requires_grad=True), weights(3, 2)
    sizes = torch.ones(STEPS, dtype=torch.int64)
    sizes[0] = 65
    step = sizes[1:2]  # only one element changes, so that half of the calls find valid values
    absurd = [torch.full_like(step, value) for value in (2**40, -1)]
    return lambda: functional.gru(x, None, w, bidirectional=True, batch_sizes=sizes)[0], step, absurd


def lengths() -> Race:
    x, w = torch.randn(STEPS, MANY, I, requires_grad=True), weights(4, 1)
    ends = torch.full((MANY,), 3, dtype=torch.int64)
    absurd = [torch.full_like(ends, value) for value in (2**40, -(2**40), STEPS + 1)]
    return lambda: functional.lstm(x, None, w, lengths=ends)[0], ends, absurd


def cu_seqlens() -> Race:
    rows = torch.randn(MANY, 1, 8, requires_grad=True)
    cu = torch.arange(MANY // 4 + 1, dtype=torch.int32) * 4
    absurd = [cu * 2**15, -cu, cu.flip(0), torch.full_like(cu, 2**31 - 1)]
    return lambda: functional.attention(rows, rows, rows, cu_seqlens_q=cu, cu_seqlens_k=cu), cu, absurd


RACES = {"batch_sizes": batch_sizes, "lengths": lengths, "cu_seqlens": cu_seqlens}


def main(name: str, seconds: float) -> None:
    call, tensor, absurd = RACES[name]()
    good, over = tensor.clone(), False
    behind = tensor.data  # autograd does not see what is written here

    def write() -> None:
        while not over:
            for values in absurd:
                behind.copy_(values)
                behind.copy_(good)

    sys.setswitchinterval(1e-6)
    writer = threading.Thread(target=write)
    writer.start()
    results = refusals = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for training in (*[False] * 20, True):
            try:
                with torch.set_grad_enabled(training):
                    y = call()
                if training:
                    y.sum().backward()
                results += 1
            except (RuntimeError, ValueError):
                refusals += 1
    over = True
    writer.join()
    print(results, refusals)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
