"""A vision Transformer and a small convolutional network, which read handwritten digits.

    python examples/vision_transformer.py [--quick] [--out FOLDER]

The images are scikit-learn's: 1797 digits of 8 x 8 pixels, a quarter of them held out. The Transformer cuts each
into 16 patches of 2 x 2 pixels and takes them for a sequence. One more vector, which belongs to no patch, collects what
the answer needs. The picture shows which patches this vector looks at in the last layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

import dlkernels
from common import Batch, compare_speed, pyplot, read_arguments, read_digits, save, train
from dlkernels.functional import attention_map

WIDTH, HEADS, LAYERS, BATCH = 64, 4, 3, 64
PATCH, PATCHES = 2, 16


class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        # A convolution whose step is as long as its window is wide sees each patch once.
        self.patches = nn.Conv2d(1, WIDTH, PATCH, stride=PATCH)
        self.answer = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.place = nn.Parameter(torch.randn(PATCHES, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 10)

    def sequence(self, images: Tensor) -> Tensor:
        """The vector for the answer and those of the patches, [rows, 1 + PATCHES, WIDTH]."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.place
        return torch.cat([self.answer.expand(len(x), -1, -1), x], 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(self.sequence(images))[:, 0])

    @torch.no_grad()
    def looked_at(self, images: Tensor) -> Tensor:
        """How much of the last layer's attention the answer gives to each patch, [rows, 4, 4], over all heads."""
        x = self.sequence(images)
        for layer in self.encoder.layers[:-1]:
            x = layer(x)
        last = self.encoder.layers[-1]
        weights = last.self_attn
        projected = nn.functional.linear(last.norm1(x), weights.in_proj_weight, weights.in_proj_bias)
        q, k, _ = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in projected.chunk(3, 2))
        found = attention_map(q[:, :, :1], k, rows=1, cols=1 + PATCHES)
        return found[:, :, 0, 1:].mean(1).unflatten(1, (4, 4))


def convolutional() -> nn.Module:
    """Two convolutions. No layer of ours serves them; the network is here as a measure for the Transformer."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(256, 10),
    )


def batches(images: Tensor, labels: Tensor, seed: int) -> Iterator[Batch]:
    """Yields images in random order for ever, each shifted by at most one pixel, so that there are more of them."""
    generator = torch.Generator().manual_seed(seed)
    for _ in itertools.count():
        for rows in torch.randperm(len(images), generator=generator).split(BATCH):
            shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
            yield images[rows].roll(shift, (2, 3)), labels[rows]


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(images), labels)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model(images).argmax(1) == labels).float().mean().item()


def main(given: Sequence[str] | None = None) -> dict[str, float]:
    """Returns which part of the held-out digits each network reads right."""
    options = read_arguments(__doc__, given)
    (images, labels), held_out = read_digits()
    mean, deviation = images.mean(), images.std()
    images, held_out = (images - mean) / deviation, ((held_out[0] - mean) / deviation, held_out[1])
    steps, timed = (150, 2) if options.quick else (1000, 20)
    transformer, convolutions = VisionTransformer(), convolutional()
    compare_speed("vision Transformer", transformer, loss_of, next(batches(images, labels, 1)), timed)
    dlkernels.patch(transformer)
    results = {}
    for name, model in (("vision Transformer", transformer), ("convolutions", convolutions)):
        print(f"{name}: {sum(parameter.numel() for parameter in model.parameters())} parameters")
        train(model, loss_of, batches(images, labels, 2), steps, 3e-3, steps // 4)
        results[name] = accuracy(model, *held_out)

    shown = [int((held_out[1] == digit).nonzero()[0]) for digit in range(10)]
    figure, axes = pyplot.subplots(2, 10, figsize=(12, 2.8))
    for column, (image, looked) in enumerate(
        zip(held_out[0][shown, 0], transformer.looked_at(held_out[0][shown]), strict=True)
    ):
        axes[0, column].imshow(image.numpy(), cmap="gray_r")
        axes[1, column].imshow(looked.numpy(), cmap="Blues", vmin=0)
        axes[0, column].set_axis_off()
        axes[1, column].set_axis_off()
    save(figure, options, "vision_transformer.png")
    for name, part in results.items():
        print(f"{name}: {100 * part:.1f} % of {len(held_out[1])} held-out digits right (10 % by chance)")
    return results


if __name__ == "__main__":
    main()
