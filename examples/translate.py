"""Sequence to sequence with attention: dates as people write them, translated into the form 1987-03-04.

    python examples/translate.py [--quick] [--out FOLDER]

A bidirectional GRU reads the date, character by character. A second GRU writes the translation, and before each
character it looks at what the first one has read, by attention. The dates of the test are on days that the training has
not seen. The picture shows where the model looks while it writes.
"""

from __future__ import annotations

import copy
import datetime
import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

import dlkernels
from common import Batch, compare_steps, one_step, pyplot, read_arguments, save, train
from dlkernels.functional import attention, attention_map

WIDTH, BATCH = 128, 64
FORMS = ("%A, {0.day} %B %Y", "%B {0.day}, %Y", "{0.day} %b %y", "{0.day}.{0.month}.%Y", "%a %d %b %Y", "%m/%d/%y")
END, ALPHABET = 0, " ,-./0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
NUMBER = {character: number for number, character in enumerate(ALPHABET, 1)}
FIRST, LAST = datetime.date(1970, 1, 1).toordinal(), datetime.date(2069, 1, 1).toordinal() - 1


def encode(texts: Sequence[str]) -> Tensor:
    """Numbers [rows, longest + 1]. END follows each text and fills its row up to the end."""
    longest = max(map(len, texts)) + 1
    return torch.tensor([[NUMBER[character] for character in text] + [END] * (longest - len(text)) for text in texts])


def decode(row: Tensor) -> str:
    return "".join(ALPHABET[number - 1] for number in row.tolist() if number != END)


def pairs(seed: int, rows: int, held_out: bool) -> Iterator[Batch]:
    """Yields dates and their translations for ever. Every tenth day is held out."""
    generator = random.Random(seed)
    while True:
        days = [generator.randrange(FIRST, LAST) // 10 * 10 for _ in range(rows)]
        dates = [datetime.date.fromordinal(day if held_out else day + generator.randrange(1, 10)) for day in days]
        yield (
            encode([date.strftime(generator.choice(FORMS).format(date)) for date in dates]),
            encode([date.isoformat() for date in dates]),
        )


class Translator(nn.Module):
    """The encoder and the decoder are recurrent; between them is attention with one head."""

    def __init__(self) -> None:
        super().__init__()
        self.attend: Callable[..., Tensor] = attention
        self.embed = nn.Embedding(len(ALPHABET) + 1, WIDTH)
        self.encoder = nn.GRU(WIDTH, WIDTH // 2, bidirectional=True, batch_first=True)
        self.decoder = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.query = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, len(ALPHABET) + 1))

    def read(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """What the encoder has read at each place [rows, places, WIDTH], and the state in which the decoder begins."""
        memory, last = self.encoder(self.embed(source))
        return memory, torch.cat([last[0], last[1]], 1)[None]

    def write(
        self, written: Tensor, state: Tensor, memory: Tensor, seen: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Logits of the characters after those that are written, the decoder's state, and what attention compared."""
        y, state = self.decoder(self.embed(written), state)
        # Attention wants a dimension of heads, which is 1 here.
        q, k = self.query(y)[:, None], memory[:, None]
        found = self.attend(q, k, k, attn_mask=seen)[:, 0]
        return self.head(torch.cat([y, found], 2)), state, (q, k)

    def forward(self, source: Tensor, written: Tensor) -> Tensor:
        memory, state = self.read(source)
        return self.write(written, state, memory, visible(source))[0]


def visible(source: Tensor) -> Tensor:
    """The mask [rows, 1, 1, places] of what attention may see: the characters, and not what fills the row."""
    return (source != END)[:, None, None]


def shifted(target: Tensor) -> Tensor:
    """What is written before each character of the target; END stands before the first."""
    return nn.functional.pad(target[:, :-1], (1, 0), value=END)


def loss_of(model: nn.Module, source: Tensor, target: Tensor) -> Tensor:
    """In training the decoder is given the right characters before each place, so all places are computed at once."""
    return nn.functional.cross_entropy(model(source, shifted(target)).flatten(0, 1), target.flatten())


@torch.inference_mode()
def translate(model: Translator, source: Tensor, length: int) -> Tensor:
    """Here the decoder is given what it has written itself, one character at a time."""
    memory, state = model.read(source)
    written = torch.full((len(source), 1), END)
    for _ in range(length):
        logits, state, _ = model.write(written[:, -1:], state, memory, visible(source))
        written = torch.cat([written, logits.argmax(2)], 1)
    return written[:, 1:]


@torch.inference_mode()
def looked_at(model: Translator, source: Tensor, target: Tensor) -> Tensor:
    """The attention [places of the target, places of the source] of one pair."""
    memory, state = model.read(source)
    _, _, (q, k) = model.write(shifted(target), state, memory, visible(source))
    return attention_map(q, k, attn_mask=visible(source), rows=q.size(2), cols=k.size(2))[0, 0]


def main(given: Sequence[str] | None = None) -> dict[str, float]:
    """Returns which part of held-out dates and of their characters is right, and of characters that are guessed."""
    options = read_arguments(__doc__, given)
    steps, timed = (90, 2) if options.quick else (500, 20)
    batches = pairs(1, BATCH, held_out=False)
    model = Translator()
    theirs = copy.deepcopy(model)
    theirs.attend = nn.functional.scaled_dot_product_attention
    dlkernels.patch(model)
    batch = next(batches)
    both = [one_step(timed_model, loss_of, batch) for timed_model in (theirs, copy.deepcopy(model))]
    compare_steps("two GRUs and attention", *both, timed)
    train(model, loss_of, batches, steps, 5e-3, steps // 5)

    source, target = next(pairs(2, 500, held_out=True))
    right = translate(model, source, target.size(1)) == target
    guess = next(batches)[1].mode(0).values  # the most frequent character of each place
    guessed = (guess == target).float().mean().item()
    results = {
        "guessed characters": guessed,
        "characters": right.float().mean().item(),
        "dates": right.all(1).float().mean().item(),
    }
    for row in range(5):
        found = decode(translate(model, source[row : row + 1], target.size(1))[0])
        print(f"  {decode(source[row]):28} -> {found}   right: {decode(target[row])}")

    row = int((source != END).sum(1).argmax())  # the longest
    source, target = source[row : row + 1], target[row : row + 1]
    length = int((source != END).sum())
    figure, axes = pyplot.subplots(figsize=(9, 4))
    axes.imshow(looked_at(model, source, target)[:, :length].numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(length), decode(source[0]))
    axes.set_yticks(range(target.size(1)), [*decode(target[0]), "end"])
    axes.set(xlabel="read", ylabel="written")
    save(figure, options, "translate.png")
    print(f"held out: {100 * results['dates']:.1f} % of dates right, {100 * results['characters']:.1f} % of characters")
    print(f"the most frequent character of each place: {100 * guessed:.1f} % of characters right")
    return results


if __name__ == "__main__":
    main()
