"""torch.nn's recurrent layers, which are cuDNN's on CUDA, and ours beside them: bench_recurrent.py OUT.json.

Ours run on whatever path `dlkernels.explain` names; where that is the reference, step by step, only small cases are
timed. cuDNN's times are the bar for kernels to come.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import DEVICE, REHEARSAL, milliseconds, run_all, why

import dlkernels

# (B, T, I, H): latency, a middle one, two that fill the machine
SHAPES = ((2, 8, 16, 16),) if REHEARSAL else ((1, 128, 256, 256), (16, 128, 512, 512), (64, 256, 1024, 1024))
DTYPES = (torch.float32,) if REHEARSAL else (torch.bfloat16, torch.float16, torch.float32)
STEPS_OF_REFERENCE = 128 * 16  # B * T up to which the reference path is timed


def _calls(layer: Any, x: torch.Tensor) -> tuple[Callable[[], Any], Callable[[], Any]]:
    def forward() -> Any:
        with torch.no_grad():
            return layer(x)

    def training() -> None:
        layer.zero_grad()
        layer(x)[0].sum().backward()

    return forward, training


def case(kind: str, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> dict[str, Any]:
    batch, steps, width, hidden = shape
    x = torch.randn(steps, batch, width, device=DEVICE, dtype=dtype, requires_grad=True)
    peer = getattr(torch.nn, kind)(width, hidden).to(DEVICE, dtype)
    mine = getattr(dlkernels.nn, kind)(width, hidden).to(DEVICE, dtype)
    mine.load_state_dict(peer.state_dict())
    row: dict[str, Any] = {"what": kind, "dtype": str(dtype)[6:], "B": batch, "T": steps, "I": width, "H": hidden}
    route = dlkernels.explain(mine, x)
    row["path"] = str(route)
    for name, layer in (("torch.nn", peer), ("dlkernels", mine)):
        if name == "dlkernels" and "reference" in row["path"] and batch * steps > STEPS_OF_REFERENCE:
            row[name] = {"left_out": "the reference path, step by step"}
            continue
        try:
            forward, training = _calls(layer, x)
            row[name] = {"forward_ms": milliseconds(forward)[0], "training_ms": milliseconds(training)[0]}
        except Exception as error:
            row[name] = {"not_run": why(error)}
    return row


def main(path: Path) -> int:
    plan = [
        functools.partial(case, kind, dtype, shape)
        for shape in SHAPES for dtype in DTYPES for kind in ("LSTM", "GRU", "RNN")
    ]  # fmt: skip
    return run_all(path, plan)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
