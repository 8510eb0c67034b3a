"""An LSTM whose output is a mixture of normal distributions, on the voltage of a nerve cell.

    python examples/mixture_density.py [--quick] [--out FOLDER]

The series is a recording that matplotlib ships: 12000 values of the voltage across the membrane of a cell, which rises
slowly and then fires. The LSTM reads it and says how it goes on some steps later. Shortly before the cell fires there
are two answers: it has fired by then, or it has not. A single normal distribution has to cover both and all between
them. A mixture can name both, each with its probability.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy
import torch
from matplotlib.cbook import get_sample_data
from torch import Tensor, nn

import dlkernels
from common import Batch, compare_speed, pyplot, read_arguments, save, train

WIDTH, LENGTH, BATCH = 64, 150, 16
AHEAD = 10  # steps between what the model has read and what it predicts; a spike is about 15 steps wide
HELD_OUT = slice(9000, 11000)  # The current that makes the cell fire is off after these steps.
NARROWEST = 0.03  # Values are rounded, and without this limit a distribution could shrink around a single one.


def read_voltage() -> Tensor:
    """The recording, scaled to mean 0 and deviation 1."""
    with get_sample_data("membrane.dat") as file:
        found = torch.tensor(numpy.frombuffer(file.read(), numpy.float32))
    return (found - found.mean()) / found.std()


class MixtureDensity(nn.Module):
    def __init__(self, components: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, 3 * components)
        # Different means at the start, so that the components become different.
        self.register_buffer("spread", torch.linspace(-1, 1, components) if components > 1 else torch.zeros(1))

    def forward(self, x: Tensor) -> torch.distributions.Distribution:
        """The distribution of the value AHEAD steps after each value of x [rows, steps]."""
        change = nn.functional.pad(x.diff(dim=1), (1, 0))
        y, _ = self.lstm(torch.stack([x, 10 * change], 2))
        weight, mean, deviation = self.head(y).chunk(3, 2)
        mean = x[:, :, None] + self.spread + mean
        deviation = NARROWEST + nn.functional.softplus(deviation)
        return torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(logits=weight), torch.distributions.Normal(mean, deviation)
        )


def stretches(series: Tensor, seed: int) -> Iterator[Batch]:
    """Yields stretches from random places, and the values that are to be predicted, for ever."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(series) - LENGTH - AHEAD, (BATCH, 1), generator=generator)
        places = starts + torch.arange(LENGTH)
        yield series[places], series[places + AHEAD]


def loss_of(model: nn.Module, x: Tensor, later: Tensor) -> Tensor:
    """The mean of -log p of what came. A density may be above 1, so this may be below 0."""
    return -model(x).log_prob(later).mean()


def loss_without_reading(series: Tensor, held_out: Tensor) -> float:
    """The same loss of a normal distribution around the present value, with the deviation of all changes."""
    deviation = (series[AHEAD:] - series[:-AHEAD]).std().item()
    squares = (held_out[AHEAD:] - held_out[:-AHEAD]).square().mean().item()
    return squares / (2 * deviation**2) + math.log(deviation * math.sqrt(2 * math.pi))


def main(given: Sequence[str] | None = None) -> dict[str, float]:
    """Returns held-out losses: of one normal distribution, of a mixture of five, and of one that reads nothing."""
    options = read_arguments(__doc__, given)
    voltage = read_voltage()
    training, held_out = voltage[: HELD_OUT.start], voltage[HELD_OUT]
    steps, timed = (60, 2) if options.quick else (800, 20)
    results = {"without reading": loss_without_reading(training, held_out)}
    models = {"one normal distribution": MixtureDensity(1), "mixture of five": MixtureDensity(5)}
    compare_speed("LSTM and mixture", models["mixture of five"], loss_of, next(stretches(training, 1)), timed)
    figure, axes = pyplot.subplots(2, 1, figsize=(11, 6), sharex=True)
    for (name, model), below in zip(models.items(), axes, strict=True):
        dlkernels.patch(model)
        train(model, loss_of, stretches(training, 2), steps, 1e-2)
        x, later = held_out[None, :-AHEAD], held_out[None, AHEAD:]
        with torch.no_grad():
            results[name] = loss_of(model, x, later).item()
            grid = torch.linspace(-1.5, 3.5, 120)[:, None, None]
            density = model(x).log_prob(grid)[:, 0]
        shown = slice(1000, 1500)
        below.imshow(
            density[:, shown].exp().numpy(),
            origin="lower",
            aspect="auto",
            cmap="Blues",
            vmax=2,
            extent=(0, 500, -1.5, 3.5),
        )
        below.plot(later[0, shown].numpy(), color="tab:orange", linewidth=0.8)
        below.set(title=f"{name}, {AHEAD} steps before", ylabel="voltage, scaled")
    axes[1].set_xlabel("step")
    save(figure, options, "mixture_density.png")
    for name, loss in results.items():
        print(f"held-out loss, {name:24} {loss:7.3f} nats")
    return results


if __name__ == "__main__":
    main()
