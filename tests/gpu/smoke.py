"""The first thing that runs on a GPU: every size of cluster, a tiny layer by every plan, one attention call. check.py
runs this file; a case that hangs or crashes costs only itself."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable

import torch
from calls import attention
from device import KINDS, best_plan, plan_of
from journal import Result, run_cases
from timing import DEVICE, REHEARSAL, context_broken
from tools import kernels_program
from turns import ON_GPU

import dlkernels
from tests.support.layer_cases import Case, check_case

UNITS = 32  # of a block of a cluster of the LSTM (slice_shape in csrc/rnn/cuda/sequence.h)


def clusters() -> Result:
    """tests/cuda/clusters_test.cu: the sizes from 1 to 16 by occupancy and by a launch."""
    done = subprocess.run([kernels_program("clusters")], capture_output=True, text=True, timeout=60)
    sizes = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode != 0 or not sizes:
        return {"failed": f"status {done.returncode}: {done.stdout[-300:]}{done.stderr[-300:]}", "sizes": sizes}
    return {"sizes": sizes}


def layer(mode: str, dtype: torch.dtype, hidden: int, best: str, must: bool = True) -> Result:
    """A layer whose results and gradients are compared with float64. With `must` its plan has to be of this kind."""
    case = Case(mode, T=4, B=9, I=6, H=hidden, dtype=dtype)
    with best_plan(best):
        plan = plan_of(mode, dtype, case.T, case.B, case.H, case.D)
        if must and ON_GPU and torch.cuda.get_device_capability() >= (9, 0):
            assert plan["kind"] == best, f"{plan['kind']} instead of {best}: {plan['reason']}"
        check_case(case, DEVICE)
    return {"plan": plan["kind"], "blocks": plan["blocks"], "reason": plan["reason"]}


def one_attention() -> Result:
    largest = attention(torch.bfloat16, 256, 64)
    assert largest <= 0.02, f"o is off by {largest}"
    return {"largest_difference": largest}


def this_build() -> Result:
    """Whether the compiled module has kernels for this GPU, and the layers and attention use them."""
    if not ON_GPU:
        return {}
    x = torch.zeros(4, 3, 8, device=DEVICE, dtype=torch.bfloat16)
    explained = dlkernels.explain(dlkernels.nn.LSTM(8, 8, device=DEVICE, dtype=torch.bfloat16), x)
    assert explained.kernel.startswith("cuda/"), str(explained)
    q = torch.zeros(1, 1, 64, 64, device=DEVICE, dtype=torch.bfloat16)
    served = dlkernels.explain(dlkernels.functional.attention, q, q, q)
    assert "triton" in str(served), str(served)
    return {"layer": explained.kernel, "attention": served.kernel}


def cases() -> list[tuple[str, Callable[[], Result]]]:
    found: list[tuple[str, Callable[[], Result]]] = [("build", this_build), ("clusters", clusters)]
    for best in KINDS[:1] if REHEARSAL else KINDS:
        for mode in ("lstm", "gru", "rnn_tanh"):
            for dtype in (torch.bfloat16, torch.float32):
                name = f"{mode} {str(dtype)[6:]} {best}"
                found.append((name, functools.partial(layer, mode, dtype, 40, best)))
    found.append(("attention", one_attention))
    for blocks in (1, 2) if REHEARSAL else range(1, 17):
        # The plan takes no clusters of a size that the driver does not run.
        one = functools.partial(layer, "lstm", torch.bfloat16, UNITS * blocks, "cluster", must=False)
        found.append((f"lstm in clusters of {blocks}", one))
    return found


if __name__ == "__main__":
    sys.exit(run_cases(cases(), context_broken))
