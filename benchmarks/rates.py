"""Sets small layers beside torch.mm with the same multiplications:

    python -m benchmarks.rates [--only PART ...] [--threads N] [--seconds S] [--out FILE]

The other side of an inference call is [T * B, I + H] times [I + H, gates * H]; that of a training step has this product
and the two of its backward. The ratio is torch.mm's time over the layer's: the part of torch.mm's rate that the whole
call reaches, with its cells, its records and its autograd.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from dlkernels.bench.engines import GATES
from dlkernels.bench.layers import Inputs, LayerCase, Workload, ours
from dlkernels.bench.timing import Budget, alternate

from . import ratios

BATCHES, HIDDEN, STEPS = (16, 64, 200), (64, 96, 128), 60
# The parts of torch.mm's rate that are wanted.
WANTED = {"float32": 0.9, "bfloat16": 0.7}


class Products:
    """The products of a call as a side of the timing."""

    def __init__(self, case: LayerCase) -> None:
        dtype, gates = getattr(torch, case.dtype), len(GATES[case.mode]) * case.H
        self.training = case.training
        self.x = torch.randn(case.T * case.B, case.I + case.H).to(dtype)
        self.weight = torch.randn(gates, case.I + case.H).to(dtype)
        self.dgates = torch.randn(case.T * case.B, gates).to(dtype)

    def prepare(self) -> None:
        pass

    def __call__(self) -> tuple[Tensor, ...]:
        with torch.inference_mode():
            out = torch.mm(self.x, self.weight.t())
            if not self.training:
                return (out,)
            return out, torch.mm(self.dgates, self.weight), torch.mm(self.dgates.t(), self.x)


def cases(threads: int) -> list[LayerCase]:
    return [
        LayerCase(mode, B, STEPS, H, H, training=training, dtype=dtype, threads=threads)
        for dtype, training, mode, B, H in itertools.product(WANTED, (False, True), GATES, BATCHES, HIDDEN)
    ]


def main() -> None:
    parser = ratios.parser(__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="measuring time of a case")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: dict[str, dict[str, Any]] = {}
    for case in cases(options.threads):
        if not ratios.is_chosen(case.name, options):
            continue
        layer = Workload(case, Inputs.make(case), ours)
        if not case.training:
            layer.module.prepack()  # type: ignore[operator]
        sample = alternate(Products(case), layer, Budget(options.seconds))
        found[case.name] = {
            "mm_us": sample.theirs * 1e6, "ours_us": sample.ours * 1e6, "rate": sample.ratio,
            "quartiles": sample.quartiles, "wanted": WANTED[case.dtype],
        }  # fmt: skip
        below = "" if sample.ratio >= WANTED[case.dtype] else "  below"
        print(
            f"{case.name:38} torch.mm {sample.theirs * 1e6:9.1f} us  ours {sample.ours * 1e6:9.1f} us  "
            f"{sample.ratio:.2f}{below}",
            flush=True,
        )
    ratios.finish("cases, part of torch.mm's rate", [row["rate"] for row in found.values()], found, options.out)


if __name__ == "__main__":
    main()
