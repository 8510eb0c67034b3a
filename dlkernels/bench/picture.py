"""What the report's heat map shows: four heads over a long text, each with another feature of `attention`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LENGTH, BINS, WIDTH = 16384, 96, 64


def heads() -> tuple[list[str], list[Tensor]]:
    """Titles, and pictures [BINS, BINS]."""
    from ..functional import attention_map

    q, k = _text()
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


def _text() -> tuple[Tensor, Tensor]:
    """[1, 1, LENGTH, WIDTH]: tokens drift in topic and come back to it, queries look for their own topic."""
    generator = torch.Generator().manual_seed(0)
    place = torch.arange(LENGTH)[:, None] / LENGTH
    turns = torch.randn(1, WIDTH // 2, generator=generator) * 2
    angle = 2 * math.pi * (place * turns + 0.5 * torch.sin(2 * math.pi * 3 * place))
    topic = torch.cat((angle.cos(), angle.sin()), 1)
    noise = [torch.randn(LENGTH, WIDTH, generator=generator) * 0.4 for _ in range(2)]
    q, k = (((topic + n) * 1.3)[None, None] for n in noise)
    return q, k
