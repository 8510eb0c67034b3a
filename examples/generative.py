"""A variational and an adversarial autoencoder, which write digits row by row.

    python examples/generative.py [--quick] [--out FOLDER]

Both have the same encoder and decoder. A bidirectional GRU reads the 8 rows of an image and gives a code of a few
numbers; a second GRU writes the rows from the code. To make new digits, one draws a code at random, and for that the
codes of real digits have to be distributed in a known way. The variational autoencoder adds a term to its loss that
pulls them towards a normal distribution. The adversarial one has a critic, which learns to tell the codes from numbers
of that distribution, while the encoder learns to deceive it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

import dlkernels
from common import Batch, compare_speed, pyplot, read_arguments, read_digits, save, train

WIDTH, CODE, BATCH = 96, 6, 64


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.reader = nn.GRU(8, WIDTH, bidirectional=True, batch_first=True)
        self.code = nn.Linear(2 * WIDTH, 2 * CODE)
        self.begin = nn.Linear(CODE, WIDTH)
        self.writer = nn.GRU(CODE, WIDTH, batch_first=True)
        self.row = nn.Linear(WIDTH, 8)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of an image's code and the logarithm of its deviation, [rows, CODE] each."""
        _, last = self.reader(images)
        mean, logarithm = self.code(torch.cat([last[0], last[1]], 1)).chunk(2, 1)
        return mean, logarithm

    def decode(self, codes: Tensor) -> Tensor:
        """The logits of the pixels, [rows, 8, 8]. The GRU is given the code before each row of the image."""
        y, _ = self.writer(codes[:, None].expand(-1, 8, -1), torch.tanh(self.begin(codes))[None])
        return self.row(y)


def wrong_pixels(logits: Tensor, images: Tensor) -> Tensor:
    """The cross-entropy of an image, in nats: the sum over its pixels, whose grey is taken for a probability."""
    return binary_cross_entropy_with_logits(logits, images, reduction="none").sum((1, 2)).mean()


def loss_of_variational(model: Autoencoder, images: Tensor) -> Tensor:
    """A bound for -log p(image): the error of a code that is drawn, and its distance from the normal distribution."""
    mean, logarithm = model.encode(images)
    codes = mean + logarithm.exp() * torch.randn_like(mean)
    distance = 0.5 * (mean.square() + (2 * logarithm).exp() - 1) - logarithm
    return wrong_pixels(model.decode(codes), images) + distance.sum(1).mean()


def critic() -> nn.Module:
    return nn.Sequential(nn.Linear(CODE, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))


class Adversarial:
    """The loss of the adversarial autoencoder. Each call first lets the critic take a step of its own."""

    def __init__(self, weight: float = 2.0) -> None:
        self.weight, self.critic = weight, critic()
        self.optimizer = torch.optim.Adam(self.critic.parameters(), 2e-3, betas=(0.5, 0.99))

    def __call__(self, model: Autoencoder, images: Tensor) -> Tensor:
        codes, _ = model.encode(images)
        judged = self.critic(torch.cat([torch.randn_like(codes), codes.detach()]))
        genuine = torch.cat([torch.ones(len(codes), 1), torch.zeros(len(codes), 1)])
        self.optimizer.zero_grad()
        binary_cross_entropy_with_logits(judged, genuine).backward()
        self.optimizer.step()
        # The encoder is rewarded where the critic takes a code for one of the normal distribution.
        deceived = binary_cross_entropy_with_logits(self.critic(codes), torch.ones(len(codes), 1))
        return wrong_pixels(model.decode(codes), images) + self.weight * deceived


def batches(images: Tensor, seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    for _ in itertools.count():
        for rows in torch.randperm(len(images), generator=generator).split(BATCH):
            yield (images[rows],)


def main(given: Sequence[str] | None = None) -> dict[str, float]:
    """Returns the held-out error of the decoded images, and that of the mean image, in nats an image."""
    options = read_arguments(__doc__, given)
    (training, _), (held_out, _) = read_digits()
    training, held_out = training[:, 0], held_out[:, 0]
    steps, timed = (250, 2) if options.quick else (2500, 20)
    mean_image = training.mean(0).clamp(1e-3, 1 - 1e-3)
    results = {"mean image": wrong_pixels(mean_image.logit().expand(len(held_out), -1, -1), held_out).item()}
    # A grey pixel costs something even if its grey is known exactly.
    results["no error"] = wrong_pixels(held_out.clamp(1e-6, 1 - 1e-6).logit(), held_out).item()

    models = {"variational": Autoencoder(), "adversarial": Autoencoder()}
    losses = {"variational": loss_of_variational, "adversarial": Adversarial()}
    compare_speed(
        "variational autoencoder", models["variational"], loss_of_variational, next(batches(training, 1)), timed
    )
    codes = torch.randn(12, CODE)
    figure, axes = pyplot.subplots(5, 12, figsize=(12, 5.2))
    lines = [("held out", held_out[:12])]
    for name, model in models.items():
        dlkernels.patch(model)
        train(model, losses[name], batches(training, 2), steps, 1e-2)
        with torch.no_grad():
            found, _ = model.encode(held_out)
            decoded = model.decode(found)
            results[name] = wrong_pixels(decoded, held_out).item()
            lines += [(f"{name},\ndecoded", decoded[:12].sigmoid()), ("new", model.decode(codes).sigmoid())]
        print(f"{name}: held-out codes have mean {found.mean():.2f} and deviation {found.std():.2f}")
    for (name, images), line in zip(lines, axes, strict=True):
        for image, place in zip(images, line, strict=True):
            place.imshow(image.numpy(), cmap="gray_r", vmin=0, vmax=1)
            place.set(xticks=[], yticks=[])
        line[0].set_ylabel(name)
    save(figure, options, "generative.png")
    print("held-out error, nats an image:")
    for name, error in results.items():
        print(f"  {name:12} {error:.2f}")
    return results


if __name__ == "__main__":
    main()
