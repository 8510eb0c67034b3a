"""What the examples share: arguments, a text to learn from, training, pictures and the comparison of speed."""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics

import matplotlib
import torch
from torch import Tensor, nn

import dlkernels

matplotlib.use("Agg")  # Pictures go into files, so no screen is needed.
from matplotlib import pyplot
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
Batch = tuple[Tensor, ...]
Loss = Callable[..., Tensor]  # of a model and the parts of a batch


def read_arguments(description: str, given: Sequence[str] | None) -> argparse.Namespace:
    """Reads the arguments that every example has, and fixes the seed."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="train for some seconds only, as the tests do")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "examples", help="the folder for the pictures")
    options = parser.parse_args(given)
    torch.manual_seed(0)
    return options


class Text:
    """The chapters of Python's manual that `help()` shows, as numbers; the last tenth is held out."""

    def __init__(self) -> None:
        text = "\n".join(topics[name] for name in sorted(topics))
        self.alphabet = [character for character in sorted(set(text)) if character.isascii()]
        self.number = {character: number for number, character in enumerate(self.alphabet)}
        tokens = self.encode(text)
        self.training, self.held_out = tokens[: len(tokens) * 9 // 10], tokens[len(tokens) * 9 // 10 :]

    def encode(self, text: str) -> Tensor:
        """The numbers of the characters; those outside of the alphabet are left out."""
        return torch.tensor([self.number[character] for character in text if character in self.number])

    def decode(self, tokens: Tensor) -> str:
        return "".join(self.alphabet[token] for token in tokens.tolist())

    def loss_of_frequencies(self) -> float:
        """The held-out loss of a model that knows how frequent each character is, and nothing else."""
        counts = torch.bincount(self.training, minlength=len(self.alphabet)) + 1
        return nn.functional.cross_entropy(counts.log().expand(len(self.held_out), -1), self.held_out).item()


def read_digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """scikit-learn's images of digits [rows, 1, 8, 8] with their labels: for training, and held out."""
    from sklearn.datasets import load_digits  # imported here, because the other examples do without it

    found = load_digits()
    images, labels = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16, torch.tensor(found.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held_out, training = order[: len(order) // 4], order[len(order) // 4 :]
    return (images[training], labels[training]), (images[held_out], labels[held_out])


def pieces(tokens: Tensor, rows: int, length: int, seed: int) -> Iterator[Batch]:
    """Yields pieces [rows, length] from random places of a text, and the token that follows each token, for ever."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(tokens) - length, (rows, 1), generator=generator)
        found = tokens[starts + torch.arange(length + 1)]
        yield found[:, :-1], found[:, 1:]


def train(
    model: nn.Module, loss_of: Loss, batches: Iterator[Batch], steps: int, rate: float, report: int = 0
) -> list[float]:
    """Trains by AdamW and returns the losses. The rate rises at first and then falls to zero along a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    model.train()
    losses = []
    for number in range(1, steps + 1):
        loss = loss_of(model, *next(batches))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if report and (number % report == 0 or number == steps):
            print(f"step {number:4}: loss {statistics.mean(losses[-report:]):.3f}", flush=True)
    model.eval()
    return losses


def compare_speed(name: str, model: nn.Module, loss_of: Loss, batch: Batch, steps: int) -> None:
    """Compares a training step of a model of torch.nn with that of a copy which `dlkernels.patch` has changed."""
    theirs, ours = copy.deepcopy(model), dlkernels.patch(copy.deepcopy(model))
    compare_steps(name, one_step(theirs, loss_of, batch), one_step(ours, loss_of, batch), steps)


def one_step(model: nn.Module, loss_of: Loss, batch: Batch) -> Callable[[], None]:
    """A function that runs one training step of this model."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model, *batch).backward()
        optimizer.step()

    return step


def compare_steps(name: str, theirs: Callable[[], None], ours: Callable[[], None], steps: int) -> None:
    """Prints the medians of both. The steps alternate, so that other load on the machine affects both alike."""
    seconds: list[list[float]] = [[], []]
    for number in range(steps + 2):
        for times, step in zip(seconds, (theirs, ours), strict=True):
            begin = time.perf_counter()
            step()
            if number >= 2:  # the first steps allocate memory
                times.append(time.perf_counter() - begin)
    before, after = map(statistics.median, seconds)
    print(
        f"{name}: torch.nn {before:.4f} s, dlkernels {after:.4f} s a training step: {before / after:.2f} times as fast"
    )


def save(figure: Figure, options: argparse.Namespace, name: str) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / name, dpi=100, bbox_inches="tight")
    pyplot.close(figure)
    print(f"picture: {os.path.relpath(options.out / name)}")
