"""Trains a small Transformer language model of torch.nn's layers, with and without `dlkernels.patch`.

    python examples/text_transformer.py [--steps 40] [--threads 2]

The model learns to continue pieces of Python's own sources, which have different lengths and are therefore padded. Both
models start from the same weights and see the same batches. Their steps alternate, so that other load on the machine
affects both. Their losses are close but not equal, because each draws its own dropout. This takes under a minute on two
cores.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sysconfig
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import dlkernels

# Printable ASCII and newline; all other characters share one more number.
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
VOCABULARY = len(ALPHABET) + 1
PAD = VOCABULARY  # the number after those of the characters
LONGEST, SHORTEST, BATCH = 256, 64, 16


class TextModel(nn.Module):
    def __init__(self, width: int = 128, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY + 1, width, padding_idx=PAD)
        self.place = nn.Embedding(LONGEST, width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.size(1)
        x = self.embed(tokens) + self.place.weight[:length]
        causal = torch.ones(length, length, dtype=torch.bool).triu(1)
        return self.head(self.encoder(x, mask=causal, src_key_padding_mask=tokens == PAD, is_causal=True))


def read_sources(length: int) -> Tensor:
    """The first characters of Python's own modules, in alphabetical order."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = ""
    for path in sorted(folder.glob("[a-z]*.py")):
        text += path.read_text("utf-8", "replace")
        if len(text) >= length:
            break
    index = {character: number for number, character in enumerate(ALPHABET)}
    return torch.tensor([index.get(character, len(ALPHABET)) for character in text[:length]])


def batch(text: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens [BATCH, length] and the token that follows each of them, padded at the end with PAD."""
    lengths = torch.randint(SHORTEST, LONGEST + 1, (BATCH,), generator=generator)
    starts = torch.randint(len(text) - LONGEST - 1, (BATCH,), generator=generator)
    places = torch.arange(int(lengths.max()) + 1)
    rows = text[starts[:, None] + places]
    rows[places > lengths[:, None]] = PAD
    return rows[:, :-1], rows[:, 1:]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor, following: Tensor) -> tuple[float, float]:
    """Runs one training step and returns its loss and its seconds."""
    begin = time.perf_counter()
    logits = model(tokens)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten(), ignore_index=PAD)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item(), time.perf_counter() - begin


@torch.no_grad()
def write(model: nn.Module, prompt: str, count: int) -> str:
    """`prompt`, continued by `count` characters that are sampled from the model at a low temperature."""
    model.eval()
    tokens = torch.tensor([[ALPHABET.index(character) for character in prompt]])
    for _ in range(count):
        probabilities = torch.softmax(model(tokens[:, -LONGEST:])[0, -1] / 0.6, -1)
        probabilities[len(ALPHABET) :] = 0
        tokens = torch.cat([tokens, torch.multinomial(probabilities, 1)[None]], 1)
    return "".join(ALPHABET[token] for token in tokens[0].tolist())


@torch.no_grad()
def picture(model: TextModel, tokens: Tensor, rows: int = 16, cols: int = 32) -> str:
    """The attention map of the first layer, averaged over the heads: rows are queries, columns are keys."""
    layer = model.encoder.layers[0]
    x = layer.norm1(model.embed(tokens[None]) + model.place.weight[: len(tokens)])
    attention = layer.self_attn
    projected = nn.functional.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    q, k, _ = (part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in projected.chunk(3, -1))
    found = dlkernels.functional.attention_map(q, k, causal=True, rows=rows, cols=cols)[0].mean(0)
    shades = " .:-=+*#%@"
    levels = (found / found.max() * (len(shades) - 1)).round().long().tolist()
    return "\n".join("".join(shades[level] for level in row) for row in levels)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    text = read_sources(300_000)

    theirs = TextModel()
    ours = dlkernels.patch(copy.deepcopy(theirs))
    print(dlkernels.patch_report(ours))

    models = {"torch.nn": theirs, "dlkernels": ours}
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=2e-3) for name, model in models.items()}
    losses: dict[str, list[float]] = {name: [] for name in models}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    generator = torch.Generator().manual_seed(1)
    for number in range(1, options.steps + 1):
        tokens, following = batch(text, generator)
        for name, model in models.items():
            loss, duration = step(model, optimizers[name], tokens, following)
            losses[name].append(loss)
            seconds[name].append(duration)
        if number % 10 == 0 or number == options.steps:
            recent = "  ".join(f"{name} {statistics.mean(losses[name][-10:]):.3f}" for name in models)
            print(f"step {number:3}: loss {recent}")
    medians = {name: statistics.median(seconds[name]) for name in models}
    print(", ".join(f"{name} {1000 * median:.0f} ms a step" for name, median in medians.items()), end="")
    print(f": {medians['torch.nn'] / medians['dlkernels']:.2f} times as fast")

    print("\nThe patched model goes on with 'def ':\n" + write(ours, "def ", 100))
    print("\nand looks, in its first layer, like this:\n" + picture(ours, text[:LONGEST]))


if __name__ == "__main__":
    main()
