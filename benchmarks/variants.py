"""Times what the layers do beyond torch.nn:

    python -m benchmarks.variants [--only PART ...] [--threads N] [--seconds S] [--out FILE]

resets: a call with `resets=` beside the same call without it.
cells: an LSTM with `return_cells=True` beside one without.
layer-norm: LayerNormLSTM and LayerNormGRU beside the plain layers.
policy: the update of a recurrent policy by torch.nn.LSTM step by step, with the state multiplied by 0 where an episode
    begins, as libraries for reinforcement learning do it, beside one call of ours with `resets=`. torch.mm with the
    same multiplications is timed too: a layer that did nothing else would reach "most".
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

import dlkernels.nn
from dlkernels.bench.cases import SHORT_DTYPE
from dlkernels.bench.layers import LayerCase
from dlkernels.bench.timing import Budget, alternate

from . import ratios
from .rates import Products

SHAPES = ((128, 128, 64, 256), (16, 50, 128, 128), (1, 50, 64, 256))  # B, T, I, H
SHARE = 0.05  # of the steps that begin an episode


class Side:
    """A function as a side of the timing."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call

    def prepare(self) -> None:
        pass

    def __call__(self) -> None:
        self.call()


class Comparison(NamedTuple):
    name: str
    wanted: float  # the least ratio of the times of `base` and `other`
    base: Callable[[], object]
    other: Callable[[], object]
    products: LayerCase | None = None  # whose multiplications by torch.mm are timed too


def called(layer: Any, x: torch.Tensor, training: bool, **extras: Any) -> Callable[[], object]:
    """A call of the layer, in training with its backward."""
    weights = list(layer.parameters())

    def train() -> None:
        y, _, *cells = layer(x, **extras)
        torch.autograd.grad([y, *cells], weights, [torch.ones_like(each) for each in (y, *cells)])

    def infer() -> None:
        with torch.inference_mode():
            layer(x, **extras)

    return train if training else infer


def beside_plain() -> Iterator[Comparison]:
    for name, (B, T, I, H), training in ((n, s, t) for n in ("LSTM", "GRU") for s in SHAPES for t in (False, True)):
        layer, x = getattr(dlkernels.nn, name)(I, H), torch.randn(T, B, I)
        size = f"{name.lower()}-{'train' if training else 'infer'}-B{B}-T{T}-I{I}-H{H}"
        plain = called(layer, x, training)
        yield Comparison(f"resets-{size}", 1 / 1.1, plain, called(layer, x, training, resets=torch.rand(T, B) < SHARE))
        if name == "LSTM":
            yield Comparison(f"cells-{size}", 1 / 1.3, plain, called(layer, x, training, return_cells=True))


def layer_norm() -> Iterator[Comparison]:
    for name, dtype, H, training in itertools.product(
        ("LSTM", "GRU"), ("float32", "bfloat16"), (256, 512, 1024), (False, True)
    ):
        B, T = 32, 50
        plain = getattr(dlkernels.nn, name)(H, H, dtype=getattr(torch, dtype))
        normalised = getattr(dlkernels.nn, f"LayerNorm{name}")(H, H, dtype=getattr(torch, dtype))
        x = torch.randn(T, B, H).to(getattr(torch, dtype))
        size = f"{name.lower()}-{'train' if training else 'infer'}-{SHORT_DTYPE[dtype]}-B{B}-T{T}-I{H}-H{H}"
        yield Comparison(f"layer-norm-{size}", 1 / 1.3, called(plain, x, training), called(normalised, x, training))


def policy() -> Iterator[Comparison]:
    for B, T, I, H in SHAPES[:2]:
        theirs, ours = torch.nn.LSTM(I, H), dlkernels.nn.LSTM(I, H)
        x, begins = torch.randn(T, B, I), torch.rand(T, B) < SHARE

        def by_steps(theirs: Any = theirs, x: torch.Tensor = x, begins: torch.Tensor = begins) -> None:
            state = (torch.zeros(1, x.shape[1], theirs.hidden_size),) * 2
            outputs = []
            for step, begin in zip(x, begins, strict=True):
                h, c = (part * ~begin[:, None] for part in state)
                y, state = theirs(step[None], (h, c))
                outputs.append(y)
            y = torch.cat(outputs)
            torch.autograd.grad(y, list(theirs.parameters()), torch.ones_like(y))

        case = LayerCase("lstm", B, T, I, H, training=True)
        yield Comparison(f"policy-B{B}-T{T}-I{I}-H{H}", 5.0, by_steps, called(ours, x, True, resets=begins), case)


def main() -> None:
    parser = ratios.parser(__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="measuring time of a case")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: dict[str, dict[str, Any]] = {}
    for case in itertools.chain(beside_plain(), layer_norm(), policy()):
        name = f"{case.name}-{options.threads}t"
        if not ratios.is_chosen(name, options):
            continue
        sample = alternate(Side(case.base), Side(case.other), Budget(options.seconds))
        found[name] = {
            "base_us": sample.theirs * 1e6, "other_us": sample.ours * 1e6, "ratio": sample.ratio,
            "quartiles": sample.quartiles, "wanted": case.wanted,
        }  # fmt: skip
        below = "" if sample.ratio >= case.wanted else f"  below {case.wanted:.2f}"
        if case.products:
            most = alternate(Products(case.products), Side(case.base), Budget(options.seconds)).ratio
            found[name]["most"] = 1 / most
            below += f", most {1 / most:.2f}"
        print(
            f"{name:44} {sample.theirs * 1e6:10.1f} us, {sample.ours * 1e6:10.1f} us: {sample.ratio:.2f}{below}",
            flush=True,
        )
    ratios.finish("cases, time of the first over that of the second", [r["ratio"] for r in found.values()], found,
                  options.out)  # fmt: skip


if __name__ == "__main__":
    main()
