"""Times our recurrent layers and torch.nn's, which use cuDNN on CUDA: bench_recurrent.py OUT.json.

float32 is measured twice, with and without tf32 in cuDNN and in torch's products; our own products never use tf32. Our
layers run on the path that `dlkernels.explain` names. Where that is the reference path, which runs step by step, only
small cases are timed.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import DEVICE, REHEARSAL, milliseconds, run_all, why
from torch.nn.utils.rnn import pack_padded_sequence

import dlkernels

# (B, T, I, H): a batch of one for the latency; sizes whose weights fit a cluster; sizes that fill the GPU; weights that
# are too large to stay in shared memory.
SHAPES = (
    ((2, 8, 16, 16),)
    if REHEARSAL
    else ((1, 128, 256, 256), (64, 128, 512, 512), (64, 128, 1024, 1024), (16, 128, 128, 128), (64, 64, 2048, 2048))
)
PRECISIONS = {
    "bfloat16": (torch.bfloat16, False),
    "float32": (torch.float32, False),
    "float32-tf32": (torch.float32, True),
    "float16": (torch.float16, False),
}
STEPS_OF_REFERENCE = 128 * 16  # B * T up to which the reference path is timed
BUDGET = 0.08  # seconds for each measurement


def _calls(layer: Any, given: Any) -> dict[str, Callable[[], Any]]:
    def forward() -> Any:
        with torch.no_grad():
            return layer(given)

    def training() -> None:
        layer.zero_grad()
        y = layer(given)[0]
        (y if isinstance(y, torch.Tensor) else y.data).sum().backward()

    return {"forward_ms": forward, "training_ms": training}


def case(kind: str, precision: str, shape: tuple[int, int, int, int], packed: bool) -> dict[str, Any]:
    batch, steps, width, hidden = shape
    dtype, tf32 = PRECISIONS[precision]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    x = torch.randn(steps, batch, width, device=DEVICE, dtype=dtype, requires_grad=True)
    # Evenly spaced lengths from T down to T / 4, the longest first, as pack_padded_sequence wants them. A packed case
    # has 0.625 of the tokens of a padded one.
    lengths = torch.linspace(steps, max(1, steps // 4), batch).long()
    given: Any = pack_padded_sequence(x, lengths) if packed else x
    if packed:
        given = given._replace(data=given.data.detach().requires_grad_())
    peer = getattr(torch.nn, kind)(width, hidden).to(DEVICE, dtype)
    mine = getattr(dlkernels.nn, kind)(width, hidden).to(DEVICE, dtype)
    mine.load_state_dict(peer.state_dict())
    explained = dlkernels.explain(mine, given).layers[0]
    row: dict[str, Any] = {
        "what": kind, "dtype": precision, "B": batch, "T": steps, "I": width, "H": hidden,
        "form": "packed" if packed else "padded", "path": explained.path, "reason": explained.reason,
        "forward": explained.forward, "backward": explained.backward,
    }  # fmt: skip
    for name, layer in (("torch.nn", peer), ("dlkernels", mine)):
        if name == "dlkernels" and explained.path == "reference" and batch * steps > STEPS_OF_REFERENCE:
            row[name] = {"left_out": "the reference path, step by step"}
            continue
        row[name] = {}
        try:
            for what, call in _calls(layer, given).items():
                row[name][what], row[name][what.replace("_ms", "_spread_ms")] = milliseconds(call, BUDGET)
        except Exception as error:
            row[name]["not_run"] = why(error)
    for what in ("forward", "training"):
        times = [row[name].get(f"{what}_ms") for name in ("torch.nn", "dlkernels")]
        row[f"{what}_speedup"] = times[0] / times[1] if all(times) else None
    row["largest_difference"] = _difference(peer, mine, given)
    return row


def _difference(peer: Any, mine: Any, given: Any) -> float | str:
    try:
        with torch.no_grad():
            results = [layer(given)[0] for layer in (peer, mine)]
        a, b = (y if isinstance(y, torch.Tensor) else y.data for y in results)
        return float((a.float() - b.float()).abs().max())
    except Exception as error:
        return why(error)


def main(path: Path) -> int:
    plan = [
        functools.partial(case, kind, precision, shape, packed)
        for packed, shapes in ((False, SHAPES[:3]), (True, SHAPES[1:2] or SHAPES), (False, SHAPES[3:]))
        for shape in shapes for kind in ("LSTM", "GRU", "RNN") for precision in PRECISIONS
    ]  # fmt: skip
    return run_all(path, plan)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
