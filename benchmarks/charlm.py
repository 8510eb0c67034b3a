"""Trains a character-level language model on Python's own sources, with torch.nn and after `dlkernels.patch`.

The model is char-rnn's default (two layers of 128, 50 sequences of 50 characters, state carried over), trained with
Adam. Both models start from the same weights and see the same batches. Their steps alternate in short blocks, so
that the machine's noise affects both.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dlkernels
from dlkernels.bench.cli import Progress
from dlkernels.bench.machine import headline

# Printable ASCII and newline; all other characters share one more number.
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
VOCABULARY = len(ALPHABET) + 1

# Rounding differences grow with every step of training. So the curves are compared step by step only at the start,
# and by the mean of the last steps at the end.
EARLY_STEPS, EARLY_LIMIT = 20, 1e-3
FINAL_STEPS, FINAL_LIMIT = 20, 0.02


@dataclasses.dataclass(frozen=True)
class Config:
    mode: str = "lstm"
    steps: int = 800
    block: int = 10
    # Training stops early after this time, at the same step for both models.
    seconds: float = 45.0
    batch: int = 50
    length: int = 50
    hidden: int = 128
    layers: int = 2
    learning_rate: float = 3e-3
    seed: int = 0
    corpus_bytes: int = 1_000_000

    @staticmethod
    def quick(mode: str) -> Config:
        return Config(mode, steps=120, block=4, seconds=8.0)


class CharLM(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, config.hidden)
        layer = nn.LSTM if config.mode == "lstm" else nn.GRU
        self.rnn = layer(config.hidden, config.hidden, num_layers=config.layers)
        self.head = nn.Linear(config.hidden, VOCABULARY)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        y, state = self.rnn(self.embed(x), state)
        return self.head(y), state


def corpus(limit: int, folder: Path | None = None) -> Tensor:
    """The interpreter's public top-level modules in alphabetical order, as characters of ALPHABET."""
    folder = folder or Path(sysconfig.get_paths()["stdlib"])
    text = bytearray()
    for path in sorted(folder.glob("[a-z]*.py")):
        text += path.read_bytes()
        if len(text) >= limit:
            break
    if len(text) < min(limit, 100_000):
        raise RuntimeError(f"{folder} holds too little Python source to train on ({len(text)} bytes)")
    index = torch.full((256,), VOCABULARY - 1)
    index[torch.tensor(list(ALPHABET.encode()))] = torch.arange(len(ALPHABET))
    return index[torch.frombuffer(text[:limit], dtype=torch.uint8).long()]


class Trainer:
    def __init__(self, model: nn.Module, config: Config):
        self.model = model
        self.optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
        self.state: Any = None
        self.losses: list[float] = []
        self.blocks: list[float] = []

    def train(self, batches: list[Tensor]) -> None:
        """One block of steps; each batch is [length + 1, batch]."""
        start = time.perf_counter()
        for batch in batches:
            logits, state = self.model(batch[:-1], self.state)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[1:].flatten())
            self.optimizer.zero_grad()
            torch.autograd.backward(loss)
            self.optimizer.step()
            self.state = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
            self.losses.append(loss.item())
        self.blocks.append(time.perf_counter() - start)

    def validate(self, batch: Tensor) -> float:
        """Bits per character."""
        with torch.inference_mode():
            logits, _ = self.model(batch[:-1])
            return nn.functional.cross_entropy(logits.flatten(0, 1), batch[1:].flatten()).item() / math.log(2)


def patched(model: nn.Module) -> nn.Module:
    dlkernels.patch(model)
    if not type(model.rnn).__module__.startswith("dlkernels"):
        raise RuntimeError("dlkernels.patch left the recurrent layer as it was")
    return model


def train_both(config: Config, convert: Callable[[nn.Module], nn.Module] = patched) -> dict[str, Any]:
    """Trains the model twice and returns the entry of the result file."""
    data = corpus(config.corpus_bytes)
    held_out = len(data) // 20
    rows = (len(data) - held_out) // config.batch
    streams = data[: rows * config.batch].view(config.batch, rows).t().contiguous()
    per_epoch = (rows - 1) // config.length

    def batch(step: int) -> Tensor:
        at = step % per_epoch * config.length
        return streams[at : at + config.length + 1]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = CharLM(config)
    twin = convert(copy.deepcopy(model))
    for side in (model, twin):
        Trainer(copy.deepcopy(side), config).train([batch(0)])  # so that the cost of first calls is not measured
    theirs, ours = Trainer(model, config), Trainer(twin, config)
    progress = Progress(config.steps, f"char-LM {config.mode}")
    end = time.monotonic() + config.seconds
    for step in range(0, config.steps, config.block):
        progress.show(f"loss {ours.losses[-1]:.3f}" if ours.losses else "")
        batches = [batch(s) for s in range(step, min(step + config.block, config.steps))]
        theirs.train(batches)
        ours.train(batches)
        progress.advance(len(batches))
        if time.monotonic() > end:
            break
    progress.finish()
    return entry(config, theirs, ours, data[-held_out:][:10_000].view(10, -1).t())


def entry(config: Config, theirs: Trainer, ours: Trainer, tail: Tensor) -> dict[str, Any]:
    agree, message = compare(theirs.losses, ours.losses)
    ratios = [a / b for a, b in zip(theirs.blocks, ours.blocks, strict=True)]
    job = {
        "mode": config.mode,
        "config": dataclasses.asdict(config),
        "threads": torch.get_num_threads(),
        "steps": len(ours.losses),
        "seconds": {"torch": round(sum(theirs.blocks), 3), "dlkernels": round(sum(ours.blocks), 3)},
        "agree": agree,
        "message": message,
        "validation": {"torch": round(theirs.validate(tail), 4), "dlkernels": round(ours.validate(tail), 4)},
        "losses": {"torch": [round(x, 5) for x in theirs.losses], "dlkernels": [round(x, 5) for x in ours.losses]},
    }
    if agree:
        job["speedup"] = round(statistics.median(ratios), 4)
        job["spread"] = [round(min(ratios), 4), round(max(ratios), 4)]
    return job


def compare(theirs: list[float], ours: list[float]) -> tuple[bool, str]:
    """Whether two loss curves agree, and a text with the figures."""
    early = max(abs(a - b) for a, b in zip(theirs[:EARLY_STEPS], ours[:EARLY_STEPS], strict=True))
    final = [statistics.fmean(curve[-FINAL_STEPS:]) for curve in (theirs, ours)]
    drift = abs(final[0] - final[1]) / final[0]
    # A comparison with NaN is False, so NaN does not agree.
    agree = early <= EARLY_LIMIT and drift <= FINAL_LIMIT
    count = min(EARLY_STEPS, len(ours))
    return agree, (
        f"largest difference over the first {count} steps {early:.1e} (limit {EARLY_LIMIT:.0e}); "
        f"final loss {final[0]:.4f} and {final[1]:.4f}, {100 * drift:.2f}% apart (limit {100 * FINAL_LIMIT:.0f}%)"
    )


def text(job: dict[str, Any]) -> str:
    lines = [f"char-LM, {job['mode'].upper()}, {job['steps']} steps, threads: {job['threads']}"]
    if job["agree"]:
        low, high = job["spread"]
        lines.append(f"  loss curves agree: {job['message']}")
        lines.append(
            f"  wall time: torch.nn {job['seconds']['torch']:.1f} s, patched {job['seconds']['dlkernels']:.1f} s; "
            f"{job['speedup']:.2f}x ({low:.2f}..{high:.2f} over blocks of steps)"
        )
        lines.append(
            f"  held-out bits per character: {job['validation']['torch']:.3f} and {job['validation']['dlkernels']:.3f}"
        )
    else:
        lines.append(f"  LOSS CURVES DISAGREE, no speed-up claimed: {job['message']}")
    return "\n".join(lines)


def curves(doc: dict[str, Any], path: Path) -> Path:
    """A picture of the jobs of a result file: loss by step and by wall time."""
    import matplotlib.pyplot as plt

    jobs = doc["charlm"]
    figure, panels = plt.subplots(2, len(jobs), figsize=(5 * len(jobs), 6), squeeze=False, layout="constrained")
    for column, job in enumerate(jobs):
        steps = range(1, job["steps"] + 1)
        for row, panel in enumerate(panels[:, column]):
            for side, style in (("torch", {"color": "#999999", "linewidth": 3}), ("dlkernels", {"color": "#D55E00"})):
                seconds = job["seconds"][side]
                x = steps if row == 0 else [s * seconds / job["steps"] for s in steps]
                panel.plot(x, job["losses"][side], label=f"{side}, {seconds:.1f} s", **{"linewidth": 1, **style})
            panel.set_xlabel("step" if row == 0 else "wall time, s")
            panel.set_ylabel("training loss, nats per character")
            panel.legend(fontsize=8)
            panel.grid(alpha=0.25)
        panels[0, column].set_title(f"char-LM, {job['mode'].upper()}", fontsize=9)
    figure.suptitle(headline(doc["machine"], doc["versions"]), fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
