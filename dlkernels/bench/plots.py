"""Draws the pictures that are stored beside a result file; matplotlib is optional."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..functional import attention_map
from .cases import REGIMES
from .layers import MODES
from .machine import headline

# Okabe-Ito colours, which colour-blind readers can tell apart.
_COLOURS = dict(zip((*MODES, "attention"), ("#0072B2", "#D55E00", "#009E73", "#CC79A7"), strict=True))
_MARKERS = "osD^v"
# Sizes of the attention maps: tokens, bins of an axis, width of a head.
LENGTH, BINS, WIDTH = 16384, 96, 64


def draw(doc: dict[str, Any], path: Path) -> list[Path]:
    """PNGs of the ratios and of attention maps, named after the result file. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    made = []
    entries = [e for e in doc["results"] if e["status"] == "ok" and e["case"]["against"] == "torch"]
    if entries:
        made.append(_ratios(doc, entries, path.with_suffix(".png")))
    if any(e["case"]["mode"] == "attention" for e in doc["results"]):
        made.append(_heat_map(path.with_name(path.stem + "-attention.png")))
    return made


def _ratios(doc: dict[str, Any], entries: list[dict[str, Any]], path: Path) -> Path:
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    by_regime = [(regime, _rows([e for e in entries if e["regime"] == regime])) for regime in REGIMES]
    groups = [(regime, rows) for regime, rows in by_regime if rows]
    counts = [len(rows) for _, rows in groups]
    figure, panels = plt.subplots(
        len(groups), 1, figsize=(9, 1.4 + 0.19 * sum(counts) + 0.5 * len(groups)), sharex=True, squeeze=False,
        height_ratios=[n + 1 for n in counts], layout="constrained",
    )  # fmt: skip
    threads = sorted({e["case"]["threads"] for e in entries})
    markers = {t: _MARKERS[i % len(_MARKERS)] for i, t in enumerate(threads)}
    for panel, (regime, rows) in zip(panels[:, 0], groups, strict=True):
        for y, (_, found) in enumerate(rows.items()):
            for e in found:
                colour = _COLOURS[e["case"]["mode"]]
                panel.plot(e["quartiles"], (y, y), color=colour, alpha=0.35, linewidth=3, solid_capstyle="round")
                panel.plot(e["speedup"], y, markers[e["case"]["threads"]], color=colour, markersize=5)
        panel.set_yticks(range(len(rows)), list(rows), fontsize=7)
        panel.set_ylim(len(rows) - 0.4, -0.6)
        panel.axvline(1, color="black", linewidth=0.8)
        panel.grid(axis="x", which="both", alpha=0.25)
        panel.set_title(regime, fontsize=9, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    last = panels[-1, 0]
    last.set_xscale("log", base=2)
    last.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    last.xaxis.set_minor_formatter(NullFormatter())
    last.set_xlabel("torch time / dlkernels time (log scale); bar: middle half of the block pairs", fontsize=8)
    handles = [Line2D([], [], color=c, linewidth=3, label=m.upper()) for m, c in _COLOURS.items()]
    handles += [
        Line2D([], [], color="grey", marker=markers[t], linestyle="", label=f"{t} thread" + "s" * (t > 1))
        for t in threads
    ]
    figure.legend(handles=handles, fontsize=7, loc="outside lower center", ncols=len(handles))
    figure.suptitle(headline(doc["machine"], doc["versions"]), fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _heat_map(path: Path) -> Path:
    """Draws `attention_map` of synthetic heads over 16,384 tokens, whose M x N probabilities are never in memory."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    titles, maps = attention_maps()
    figure, panels = plt.subplots(1, len(titles), figsize=(3.2 * len(titles), 3.6), layout="constrained")
    for panel, title, values in zip(panels, titles, maps, strict=True):
        image = panel.imshow(
            values.clamp(min=1e-5).numpy(), norm=LogNorm(1e-5, 1), cmap="magma", interpolation="nearest"
        )
        panel.set_title(title, fontsize=9)
        panel.set_xticks([])
        panel.set_yticks([])
        panel.set_xlabel("keys", fontsize=8)
    panels[0].set_ylabel("queries", fontsize=8)
    figure.colorbar(image, ax=panels, shrink=0.8, label="share of a bin's attention")
    figure.suptitle(f"attention_map of {LENGTH:,} tokens in {BINS} x {BINS} bins", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _rows(entries: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Groups the entries into rows; entries that differ only in their thread count share a row."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        rows.setdefault(entry["name"].rsplit("-", 1)[0], []).append(entry)
    return rows


def attention_maps() -> tuple[list[str], list[Tensor]]:
    """Titles, and maps [BINS, BINS] of four heads over a long sequence, each with another feature of `attention`."""
    q, k = _queries_and_keys()
    kinds = {
        "full": attention_map(q, k, rows=BINS, cols=BINS),
        "causal": attention_map(q, k, causal=True, rows=BINS, cols=BINS),
        "causal, ALiBi": attention_map(
            q, k, causal=True, alibi_slopes=torch.tensor([2**-9]), softcap=20.0, rows=BINS, cols=BINS
        ),
        "window, sink": attention_map(
            q, k, window=(LENGTH // 8, LENGTH // 32), sinks=torch.tensor([9.0]), rows=BINS, cols=BINS
        ),
    }
    return list(kinds), [values[0, 0] for values in kinds.values()]


def _queries_and_keys() -> tuple[Tensor, Tensor]:
    """Synthetic q and k [1, 1, LENGTH, WIDTH]: the topic of the tokens drifts and returns, and a query matches the keys
    of its own topic."""
    generator = torch.Generator().manual_seed(0)
    place = torch.arange(LENGTH)[:, None] / LENGTH
    turns = torch.randn(1, WIDTH // 2, generator=generator) * 2
    angle = 2 * math.pi * (place * turns + 0.5 * torch.sin(2 * math.pi * 3 * place))
    topic = torch.cat((angle.cos(), angle.sin()), 1)
    noise = [torch.randn(LENGTH, WIDTH, generator=generator) * 0.4 for _ in range(2)]
    q, k = (((topic + n) * 1.3)[None, None] for n in noise)
    return q, k
