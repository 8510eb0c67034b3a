"""A small GPT: a decoder-only Transformer that learns to continue a text, and then writes with a cache.

    python examples/gpt.py [--quick] [--out FOLDER]

The model calls torch's `scaled_dot_product_attention`, as most models that people write do. `dlkernels.enable()` serves
these calls, so that the model itself does not know of our kernels. To write a character, the model needs the keys and
values of all characters before it. The program writes the same text twice, once computing them anew for each character
and once keeping them in a cache, and prints what both take.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import dlkernels
from common import Text, compare_steps, one_step, pieces, pyplot, read_arguments, save, train

WIDTH, HEADS, LAYERS, LENGTH, BATCH = 128, 4, 2, 96, 16
Cache = list[tuple[Tensor, Tensor]]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mix = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor, kept: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Returns the output, and the keys and values of all characters so far. `kept` are those of earlier calls."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3 * HEADS, -1)).transpose(1, 2).chunk(3, 1)
        if kept is not None:
            # One new character comes after all others, so it may see each of them.
            k, v = torch.cat([kept[0], k], 2), torch.cat([kept[1], v], 2)
        found = scaled_dot_product_attention(q, k, v, is_causal=kept is None)
        x = x + self.out(found.transpose(1, 2).flatten(2))
        return x + self.mix(self.norm2(x)), (k, v)


class GPT(nn.Module):
    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(characters, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """The logits of the next characters, and the cache for the next call."""
        before = cache[0][0].size(2) if cache else 0
        x = self.embed(tokens) + self.place.weight[before : before + tokens.size(1)]
        kept = []
        for number, block in enumerate(self.blocks):
            x, pair = block(x, cache[number] if cache else None)
            kept.append(pair)
        return self.head(self.norm(x)), kept


def loss_of(model: nn.Module, tokens: Tensor, following: Tensor) -> Tensor:
    return cross_entropy(model(tokens)[0].flatten(0, 1), following.flatten())


@torch.inference_mode()
def write(model: GPT, prompt: Tensor, count: int, use_cache: bool) -> Tensor:
    """The prompt [1, n] and `count` characters after it, each drawn from the model's probabilities."""
    generator = torch.Generator().manual_seed(6)
    tokens, new, cache = prompt, prompt, None
    for _ in range(count):
        logits, cache = model(new, cache) if use_cache else model(tokens)
        probabilities = torch.softmax(logits[:, -1] / 0.5, 1)
        new = torch.multinomial(probabilities, 1, generator=generator)
        tokens = torch.cat([tokens, new], 1)
    return tokens


def main(given: Sequence[str] | None = None) -> dict[str, float]:
    """Returns held-out losses in nats a character, and whether both ways of writing gave the same text."""
    options = read_arguments(__doc__, given)
    text = Text()
    steps, timed = (40, 2) if options.quick else (800, 20)
    batches = pieces(text.training, BATCH, LENGTH, seed=1)
    model = GPT(len(text.alphabet))

    # Here both models are of torch.nn. What differs is whether `enable` is on.
    step = one_step(copy.deepcopy(model), loss_of, next(batches))

    def served() -> None:
        with dlkernels.enable():
            step()

    compare_steps("GPT", step, served, timed)

    with dlkernels.enable() as handle:
        losses = train(model, loss_of, batches, steps, 5e-3, steps // 5)
        with torch.inference_mode():
            held_out = loss_of(model, *next(pieces(text.held_out, 64, LENGTH, seed=2))).item()

        prompt = text.encode("The Python ")[None]
        texts, seconds = [], []
        for use_cache in (False, True):
            begin = time.perf_counter()
            texts.append(write(model, prompt, LENGTH - prompt.size(1), use_cache))
            seconds.append(time.perf_counter() - begin)
    print(handle.report())
    same = torch.equal(*texts)
    print(f"{LENGTH - prompt.size(1)} characters: {seconds[0]:.2f} s without a cache, {seconds[1]:.2f} s with it")
    print(f"the same text: {same}\n{text.decode(texts[1][0])}")

    figure, axes = pyplot.subplots(figsize=(6, 4))
    axes.plot(losses, label="training")
    axes.axhline(text.loss_of_frequencies(), color="grey", linestyle=":", label="frequencies alone")
    axes.axhline(held_out, color="tab:orange", label="held out, at the end")
    axes.set(xlabel="step", ylabel="loss, nats a character")
    axes.legend()
    save(figure, options, "gpt.png")
    print(f"held-out loss {held_out:.3f} nats a character; frequencies alone {text.loss_of_frequencies():.3f}")
    return {"frequencies": text.loss_of_frequencies(), "held out": held_out, "same text": float(same)}


if __name__ == "__main__":
    main()
