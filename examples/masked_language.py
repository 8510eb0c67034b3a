"""Pre-training in the manner of BERT, and fine-tuning to classify.

    python examples/masked_language.py [--quick] [--out FOLDER]

A Transformer first learns to guess words that are hidden from it, in Python's own source files. For that nobody has to
label anything. Then it learns to tell from which package a piece of source comes, and is given only some labelled
pieces for this. A Transformer that was not pre-trained learns the same from the same pieces. Both are tested on files
that neither step has seen.
"""

from __future__ import annotations

import collections
import copy
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dlkernels
from common import Batch, compare_speed, pieces, pyplot, read_arguments, save, train

WIDTH, HEADS, LAYERS, LENGTH, BATCH = 64, 4, 2, 32, 32
PACKAGES = ("asyncio", "email", "multiprocessing", "unittest")
WORDS, UNKNOWN, MASK = 1000, 1000, 1001  # 0 .. 999 are the most frequent words
LABELLED = 25  # pieces of each package


def read_packages() -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The words of each package as numbers: of the files for training, of held-out files, and how frequent each is."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    split: list[list[list[str]]] = [[], []]
    for package in PACKAGES:
        for part in split:
            part.append([])
        for number, path in enumerate(sorted((folder / package).glob("*.py"))):
            words = re.findall(r"[A-Za-z]+|\d+|[^\sA-Za-z\d]", path.read_text("utf-8", "replace"))
            split[number % 4 == 3][-1] += words  # every fourth file is held out
    counts = collections.Counter(word for words in split[0] for word in words).most_common(WORDS)
    index = {word: number for number, (word, _) in enumerate(counts)}
    training, held_out = (
        [torch.tensor([index.get(word, UNKNOWN) for word in words]) for words in part] for part in split
    )
    return training, held_out, torch.bincount(torch.cat(training), minlength=WORDS + 1) + 1


class Encoder(nn.Module):
    """Reads words in both directions: no mask hides from a word those that follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(MASK + 1, WIDTH), nn.Embedding(LENGTH, WIDTH)
        nn.init.normal_(self.place.weight, std=0.3)  # less than the words, which say more than their places
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.1, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.word = nn.Linear(WIDTH, WORDS + 1)
        self.package = nn.Linear(WIDTH, len(PACKAGES))

    def forward(self, words: Tensor) -> Tensor:
        return self.layers(self.embed(words) + self.place.weight)


def masked(batches: Iterator[Batch], seed: int) -> Iterator[Batch]:
    """Yields words of which some are hidden, which those are, and the words themselves.

    Of each 100 words 15 are to be guessed: 12 of these are replaced by MASK, 1 or 2 by any word, and the rest stay. The
    model cannot know which words were exchanged, so it has to check all of them.
    """
    generator = torch.Generator().manual_seed(seed)
    for words, _ in batches:
        wanted = torch.rand(words.shape, generator=generator) < 0.15
        how = torch.rand(words.shape, generator=generator)
        given = torch.where(wanted & (how < 0.8), MASK, words)
        any_word = torch.randint(WORDS, words.shape, generator=generator)
        yield torch.where(wanted & (how > 0.9), any_word, given), wanted, words


def loss_of_words(model: Encoder, given: Tensor, wanted: Tensor, words: Tensor) -> Tensor:
    return cross_entropy(model.word(model(given)[wanted]), words[wanted])


def labelled(packages: list[Tensor], rows: int, seed: int) -> Batch:
    """`rows` pieces of each package, with the number of the package."""
    found = [next(pieces(words, rows, LENGTH, seed))[0] for words in packages]
    return torch.cat(found), torch.arange(len(packages)).repeat_interleave(rows)


def loss_of_packages(model: Encoder, words: Tensor, package: Tensor) -> Tensor:
    return cross_entropy(model.package(model(words).mean(1)), package)


def always(batch: Batch) -> Iterator[Batch]:
    while True:
        yield batch


@torch.no_grad()
def accuracy(model: Encoder, words: Tensor, package: Tensor) -> float:
    return (model.package(model(words).mean(1)).argmax(1) == package).float().mean().item()


def main(given: Sequence[str] | None = None) -> dict[str, float]:
    """Returns held-out losses of hidden words, in nats, and which part of held-out pieces is classified right."""
    options = read_arguments(__doc__, given)
    training, held_out, counts = read_packages()
    steps, tuning, timed = (160, 30, 2) if options.quick else (2500, 60, 20)
    batches = masked(pieces(torch.cat(training), BATCH, LENGTH, seed=1), seed=2)
    plain = Encoder()
    compare_speed("masked words", plain, loss_of_words, next(batches), timed)
    dlkernels.patch(plain)
    pretrained = copy.deepcopy(plain)
    losses = train(pretrained, loss_of_words, batches, steps, 5e-3, steps // 5)

    hidden = next(masked(pieces(torch.cat(held_out), 256, LENGTH, seed=3), seed=4))
    with torch.no_grad():
        results = {"hidden words": loss_of_words(pretrained, *hidden).item()}
    guessed = hidden[2][hidden[1]]
    results["frequencies"] = cross_entropy(counts.log().expand(len(guessed), -1), guessed).item()

    examples, test = labelled(training, LABELLED, seed=5), labelled(held_out, 250, seed=6)
    for name, model in (("pre-trained", pretrained), ("from nothing", plain)):
        train(model, loss_of_packages, always(examples), tuning, 3e-3)
        results[name] = accuracy(model, *test)

    figure, axes = pyplot.subplots(figsize=(6, 4))
    axes.plot(losses, label="training")
    axes.axhline(results["frequencies"], color="grey", linestyle=":", label="frequencies alone")
    axes.axhline(results["hidden words"], color="tab:orange", label="held out, at the end")
    axes.set(xlabel="step of the pre-training", ylabel="loss of a hidden word, nats")
    axes.legend()
    save(figure, options, "masked_language.png")
    print(f"hidden words: held-out loss {results['hidden words']:.3f}; frequencies alone {results['frequencies']:.3f}")
    for name in ("pre-trained", "from nothing"):
        print(f"{name}: {100 * results[name]:.1f} % of held-out pieces to the right package (25 % by chance)")
    return results


if __name__ == "__main__":
    main()
