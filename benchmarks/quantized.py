"""Measures layers with weights of fewer bits beside torch's int8 dynamic layers, on the same weights:

    python -m benchmarks.quantized [--threads N] [--seconds S] [--modes lstm gru] [--isa NAME]

Prints for each size the time of torch.ao.quantization.quantize_dynamic, torch's time over ours for int8, bfloat16 and
float32 weights, and the largest error of y against float64.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import dlkernels
from dlkernels._core import extension
from dlkernels.bench.timing import Budget, alternate

BATCHES, SIZES, STEPS = (1, 8, 32), (256, 512, 1024), 20
LAYERS: dict[str, Callable[[int, int], nn.Module]] = {"lstm": nn.LSTM, "gru": nn.GRU}
OURS: dict[str, torch.dtype | None] = {"int8": torch.int8, "bfloat16": torch.bfloat16, "float32": None}


class Call:
    """A side of `alternate`."""

    def __init__(self, layer: nn.Module, x: Tensor) -> None:
        self.layer, self.x = layer, x

    def prepare(self) -> None:
        pass

    def __call__(self) -> Tensor:
        with torch.inference_mode():
            return self.layer(self.x)[0]  # type: ignore[no-any-return]


def torch_int8(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of torch.ao.quantization
        quantize = torch.ao.quantization.quantize_dynamic
        model = quantize(nn.Sequential(layer), {nn.LSTM, nn.GRU}, torch.qint8)  # type: ignore[no-untyped-call]
    return model[0]  # type: ignore[no-any-return]


def ours(layer: nn.Module, weights: torch.dtype | None) -> nn.Module:
    if weights is None:
        return dlkernels.patch(layer, copy=True).prepack()  # type: ignore[operator, no-any-return]
    return dlkernels.quantize(layer, weights)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantized", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="of each comparison")
    parser.add_argument("--modes", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--isa", help="the instruction set of our kernels; the best one if not given")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    if args.isa:
        assert extension.native is not None
        extension.native.set_isa(args.isa)
    torch.manual_seed(0)
    print(f"{'':18} {'torch int8':>13} {'speed-up of ours with':>36}   {'error of torch int8':>20} {'and of ours':>28}")
    print(f"{'':18} {'':>13} " + " ".join(f"{name:>12}" for name in OURS))
    logs: dict[str, list[float]] = {name: [] for name in OURS}
    for mode, size, batch in itertools.product(args.modes, SIZES, BATCHES):
        layer = LAYERS[mode](size, size).eval()
        x = torch.randn(STEPS, batch, size)
        exact = Call(copy.deepcopy(layer).double(), x.double())()
        theirs = Call(torch_int8(layer), x)
        sides = {name: Call(ours(layer, weights), x) for name, weights in OURS.items()}
        samples = {name: alternate(theirs, side, Budget(args.seconds)) for name, side in sides.items()}
        for name, sample in samples.items():
            logs[name].append(math.log(sample.ratio))
        errors = [(call().double() - exact).abs().max().item() for call in (theirs, *sides.values())]
        print(
            f"{mode:4} B {batch:3} H {size:5} {samples['int8'].theirs * 1e6:10.0f} us "
            + " ".join(f"{sample.ratio:11.2f}x" for sample in samples.values())
            + "   "
            + " ".join(f"{error:12.1e}" for error in errors),
            flush=True,
        )
    means = " ".join(f"{math.exp(sum(all_) / len(all_)):11.2f}x" for all_ in logs.values())
    print(f"{'geometric mean':18} {'':>13} {means}")


if __name__ == "__main__":
    main()
