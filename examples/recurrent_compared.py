"""RNN, LSTM, GRU and Transformer side by side, as models of the next character.

    python examples/recurrent_compared.py [--quick] [--out FOLDER]

The four models read the same pieces of Python's manual and have layers of the same width. For each the program prints
the loss on a part of the manual that it has not seen, and draws how strongly the loss at the last character depends on
the characters before it. An LSTM is trained once more with truncated back-propagation, whose gradient ends after some
steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import dlkernels
from common import Text, compare_speed, pieces, pyplot, read_arguments, save, train

WIDTH, LENGTH, BATCH, CUT = 128, 64, 16, 16
KINDS = ("RNN", "LSTM", "GRU", "Transformer")


class CharacterModel(nn.Module):
    """Predicts each character from those before it. `bptt_steps` is an argument of our recurrent layers only."""

    def __init__(self, kind: str, characters: int, bptt_steps: int = 0) -> None:
        super().__init__()
        self.bptt_steps = bptt_steps
        self.embed = nn.Embedding(characters, WIDTH)
        if kind == "Transformer":
            # A recurrent layer knows the order of its input. Attention does not, so each place has a vector of its own.
            self.place = nn.Parameter(torch.randn(LENGTH, WIDTH))
            layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, batch_first=True, norm_first=True)
            self.body: nn.Module = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        else:
            self.body = getattr(nn, kind)(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, characters)

    def read(self, x: Tensor) -> Tensor:
        """The logits of the next character, from embedded characters."""
        if isinstance(self.body, nn.TransformerEncoder):
            causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)  # True hides the characters that come later
            return self.head(self.body(x + self.place, mask=causal, is_causal=True))
        more = {"bptt_steps": self.bptt_steps} if self.bptt_steps else {}
        return self.head(self.body(x, **more)[0])

    def forward(self, tokens: Tensor) -> Tensor:
        return self.read(self.embed(tokens))


def loss_of(model: nn.Module, tokens: Tensor, following: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), following.flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, text: Text) -> float:
    return loss_of(model, *next(pieces(text.held_out, 128, LENGTH, seed=2))).item()


def influence(model: CharacterModel, text: Text) -> Tensor:
    """The norm of the gradient of the last character's loss, for each distance from it in time."""
    tokens, following = next(pieces(text.held_out, 32, LENGTH, seed=3))
    x = model.embed(tokens).detach().requires_grad_()
    loss = nn.functional.cross_entropy(model.read(x)[:, -1], following[:, -1], reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x)
    return gradient.double().norm(dim=2).mean(0).flip(0)  # float32 cannot hold the squares of the smallest


def main(given: Sequence[str] | None = None) -> dict[str, float]:
    """Returns the held-out loss of each model and of the frequencies alone, in nats a character."""
    options = read_arguments(__doc__, given)
    text = Text()
    steps, timed = (30, 2) if options.quick else (600, 20)
    results = {"frequencies": text.loss_of_frequencies()}
    figure, (before, after) = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
    for kind in (*KINDS, f"LSTM, bptt_steps={CUT}"):
        torch.manual_seed(1)
        model = CharacterModel(kind.partition(",")[0], len(text.alphabet), CUT if "," in kind else 0)
        batches = pieces(text.training, BATCH, LENGTH, seed=4)
        if kind in KINDS:
            compare_speed(kind, model, loss_of, next(batches), timed)
        dlkernels.patch(model)
        style = "--" if "," in kind else "-"
        before.semilogy(influence(model, text).numpy(), style, label=kind)
        train(model, loss_of, batches, steps, 5e-3 if kind == "Transformer" else 1e-2)
        gradient = influence(model, text)
        after.semilogy(gradient.numpy(), style, label=kind)
        results[kind] = held_out_loss(model, text)
        far = gradient[[1, CUT + 4, 50]].tolist()
        print(f"{kind}: gradient 1, {CUT + 4} and 50 characters back " + ", ".join(f"{norm:.1e}" for norm in far))
    for axes, title in ((before, "before training"), (after, "after training")):
        axes.set(title=title, xlabel="characters back in time", ylim=(1e-12, 10))
    before.set_ylabel("norm of the gradient")
    after.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, options, "recurrent_compared.png")
    print("held-out loss, nats a character:")
    for kind, loss in results.items():
        print(f"  {kind:20} {loss:.3f}")
    return results


if __name__ == "__main__":
    main()
