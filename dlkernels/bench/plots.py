"""Pictures beside a result file; matplotlib is optional."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import picture
from .cases import MODES, REGIMES
from .machine import headline

# Okabe-Ito colours, told apart by colour-blind readers too.
_COLOURS = dict(zip((*MODES, "attention"), ("#0072B2", "#D55E00", "#009E73", "#CC79A7"), strict=True))
_MARKERS = "osD^v"


def draw(doc: dict[str, Any], path: Path) -> list[Path]:
    """PNGs of the ratios and of the loss curves, named after the result file. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    made = []
    entries = [e for e in doc["results"] if e["status"] == "ok" and e["case"]["against"] == "torch"]
    if entries:
        made.append(_ratios(doc, entries, path.with_suffix(".png")))
    if any(e["case"]["mode"] == "attention" for e in doc["results"]):
        made.append(_heat_map(path.with_name(path.stem + "-attention.png")))
    if doc["charlm"]:
        made.append(_curves(doc, path.with_name(path.stem + "-charlm.png")))
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
    """`attention_map` of made-up heads over 16,384 tokens, none of which ever has its M x N probabilities in memory."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    titles, maps = picture.heads()
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
    figure.suptitle(f"attention_map of {picture.LENGTH:,} tokens in {picture.BINS} x {picture.BINS} bins", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _rows(entries: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Entries that differ in their thread count only share a row."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        rows.setdefault(entry["name"].rsplit("-", 1)[0], []).append(entry)
    return rows


def _curves(doc: dict[str, Any], path: Path) -> Path:
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
