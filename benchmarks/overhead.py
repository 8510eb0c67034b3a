"""Measures what `dlkernels.enable()` costs models none of whose operators are ours:

    python -m benchmarks.overhead [--only PART ...] [--rounds 20] [--seconds 0.5] [--out FILE]

A round starts three processes: two with the switch off, one with it on from the start, in another order each time. For
each model they take turns, in short blocks of one thread. Neighbouring blocks give a ratio, on over the mean of the two
that are off, the round the median of its ratios, and a model the median of its rounds, printed with its 95 % confidence
interval. Beside it stands one process that is off over the other: its distance from 1 is the noise. The limit is 1 %,
and the exit status is 2 where the whole interval of a model is above it.

Processes differ by some per cent as long as they live, because their memory lies elsewhere. A process that turned the
switch on and off would measure that as well, since it allocates memory at each turn. Hence the rounds. The time is that
of the processor, so that other programs matter less. The case "left" calls an operator of ours with arguments that are
left to torch. It has no limit.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import dlkernels
from dlkernels.bench.timing import calls_per_block, run_block

from . import ratios

ROOT = Path(__file__).resolve().parents[1]
BLOCK = 0.01  # seconds
LEFT = "left-forward-mode"
LIMIT = 1.01
Step = Callable[[], Any]


def conv() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    return model, torch.randn(4, 3, 16, 16)


def mlp() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Dropout(0.1), nn.Linear(64, 10))
    return model, torch.randn(8, 32)


class Elementwise(nn.Module):
    """Small operators, so that a cost of each call shows most."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for _ in range(4):
            x = torch.tanh(x * self.scale + 0.5).exp().clamp(max=2.0) - x.sigmoid()
        return torch.softmax(x, -1)


def elementwise() -> tuple[nn.Module, Tensor]:
    return Elementwise(), torch.randint(0, 50, (4, 8))


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {"conv": conv, "mlp": mlp, "elementwise": elementwise}


def forward(model: nn.Module, x: Tensor) -> Step:
    model.eval()

    def step() -> None:
        with torch.inference_mode():
            model(x)

    return step


def training(model: nn.Module, x: Tensor) -> Step:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(model(x).square().sum())
        optimizer.step()

    return step


def left_gru() -> Step:
    """Forward-mode differentiation of a GRU, which is left to torch."""
    layer, x, tangent = nn.GRU(16, 16), torch.randn(5, 4, 16), torch.randn(5, 4, 16)

    def step() -> None:
        with torch.no_grad(), forward_ad.dual_level():
            layer(forward_ad.make_dual(x, tangent))  # type: ignore[no-untyped-call]

    return step


def cases() -> dict[str, Callable[[], Step]]:
    made: dict[str, Callable[[], Step]] = {}
    for name, make in MODELS.items():
        for kind, run in (("forward", forward), ("training", training)):
            made[f"{name}-{kind}"] = functools.partial(_case, make, run)
    return made | {LEFT: left_gru}


def _case(make: Callable[[], tuple[nn.Module, Tensor]], run: Callable[[nn.Module, Tensor], Step]) -> Step:
    return run(*make())


class Plain:
    """A step as a side of the timing."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def prepare(self) -> None:
        pass

    def __call__(self) -> None:
        self.step()


def work(on: bool) -> None:
    """The process of a round: reads the name of a case and how many calls a block has, measures, and answers with the
    median of their times. At the end it writes whether calls were served and left."""
    handle = dlkernels.enable() if on else None
    torch.set_num_threads(1)
    torch.manual_seed(0)
    steps = {name: Plain(make()) for name, make in cases().items()}
    for line in sys.stdin:
        name, _, calls = line.strip().partition(" ")
        if name == "end":
            break
        times = run_block(steps[name], int(calls), 0.001, time.thread_time)
        print(statistics.median(times), flush=True)
    print(int(handle is not None and bool(handle.served)), int(handle is not None and bool(handle.left)), flush=True)


class Worker:
    def __init__(self, on: bool) -> None:
        self.on = on
        command = [sys.executable, "-m", "benchmarks.overhead", "--worker", "on" if on else "off"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def ask(self, text: str) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()

    def block(self, name: str, calls: int) -> float:
        return float(self.ask(f"{name} {calls}"))

    def finish(self, chosen: Sequence[str]) -> None:
        """Raises unless the calls of our operators are what the cases say."""
        answer = self.ask("end").split()
        self.process.wait()
        expected = ["0", str(int(self.on and LEFT in chosen))]
        if answer != expected:
            raise RuntimeError(f"served and left {answer}, expected {expected}")


def measure(workers: Sequence[Worker], name: str, seconds: float) -> list[list[float]]:
    """The medians of the blocks of each worker."""
    for worker in workers:
        worker.block(name, 20)
    calls = calls_per_block(workers[0].block(name, 20), BLOCK)
    blocks: list[list[float]] = [[] for _ in workers]
    end = time.monotonic() + seconds
    while len(blocks[0]) < 5 or time.monotonic() < end:
        for worker, kept in zip(workers, blocks, strict=True):
            kept.append(worker.block(name, calls))
    return blocks


def one_round(number: int, chosen: Sequence[str], seconds: float) -> dict[str, dict[str, float]]:
    """For each case the ratios on over off and off over off, and the times in microseconds."""
    sides = {"off": Worker(on=False), "again": Worker(on=False), "on": Worker(on=True)}
    order = list(itertools.permutations(sides))[number % 6]
    found = {}
    try:
        for name in chosen:
            blocks = dict(zip(order, measure([sides[side] for side in order], name, seconds), strict=True))
            turns = list(zip(blocks["off"], blocks["again"], blocks["on"], strict=True))
            found[name] = {
                "on/off": statistics.median(2 * on / (off + again) for off, again, on in turns),
                "off/off": statistics.median(again / off for off, again, _ in turns),
                **{f"{side}_us": statistics.median(blocks[side]) * 1e6 for side in ("off", "on")},
            }
        for worker in sides.values():
            worker.finish(chosen)
    finally:
        for worker in sides.values():
            worker.process.kill()
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Of the median, with a confidence of at least 95 %; of fewer than six values the smallest and the largest. As many
    values lie below the median as heads fall in as many throws of a coin, whatever their distribution."""
    count, rank, tail = len(values), 0, 1 / 2 ** len(values)
    while 2 * tail <= 0.05:
        rank += 1
        tail += math.comb(count, rank) / 2**count
    ordered, rank = sorted(values), max(rank, 1)
    return ordered[rank - 1], ordered[-rank]


def summary(rounds: Sequence[dict[str, float]]) -> dict[str, Any]:
    """The medians over the rounds, the interval, and the ratios of all rounds."""
    row: dict[str, Any] = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
    row["interval"] = interval([one["on/off"] for one in rounds])
    return row | {"rounds": {key: [round(one[key], 4) for one in rounds] for key in ("on/off", "off/off")}}


def main() -> None:
    parser = ratios.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="each with new processes")
    parser.add_argument("--seconds", type=float, default=0.5, help="measuring time of a case in a round")
    parser.add_argument("--worker", choices=("on", "off"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker == "on")
        return
    chosen = [name for name in cases() if ratios.is_chosen(name, options)]
    rounds = [one_round(number, chosen, options.seconds) for number in range(options.rounds)]
    found = {name: summary([one[name] for one in rounds]) for name in chosen}
    for name, row in found.items():
        low, high = row["interval"]
        print(
            f"{name:20} off {row['off_us']:8.1f} us  on {row['on_us']:8.1f} us  on/off {row['on/off']:.4f} "
            f"({low:.3f}..{high:.3f})  off/off {row['off/off']:.4f}"
        )
    limited = {name: row["on/off"] for name, row in found.items() if name != LEFT}
    ratios.finish("models without our operators, on over off", list(limited.values()), found, options.out)
    above = [name for name in limited if found[name]["interval"][0] > LIMIT]
    if above:
        print(f"more than 1 % slower: {', '.join(above)}")
        sys.exit(2)


if __name__ == "__main__":
    main()
