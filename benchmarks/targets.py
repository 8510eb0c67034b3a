"""The speed targets to which we commit, as speed-ups: torch's time over ours."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from dlkernels.bench.attention import DECODE, SQUARE, AttentionCase
from dlkernels.bench.layers import MODES, LayerCase, Shape


def layers(threads: Sequence[int] = (1, 2)) -> list[LayerCase]:
    def both(mode: str, shape: Shape, infer: float | None, train: float | None) -> list[LayerCase]:
        return [LayerCase(mode, *shape, training=t, target=goal) for t, goal in ((False, infer), (True, train))]

    made = [LayerCase(mode, 1, 1, 128, 128, cell=True, target=2.0) for mode in MODES]
    for mode, infer, train in (("lstm", 1.5, 1.5), ("gru", 3.0, 4.0), ("rnn", 3.0, 4.0)):
        made += both(mode, (1, 100, 128, 128), infer, train)
    for mode, goal in (("lstm", 1.0), ("gru", 1.3), ("rnn", None)):
        made += both(mode, (16, 100, 256, 256), goal, goal)
    for shape in ((64, 100, 512, 512), (128, 50, 1024, 1024)):
        for mode in MODES:
            made += both(mode, shape, 0.95, 0.95)
    for mode in MODES:
        packed = LayerCase(mode, 32, 1000, 64, 64, training=True, packed=True, target=15.0)
        # The second target is at most 1.2 times the padded run's time per valid step.
        made += [packed, dataclasses.replace(packed, against="padded", target=1 / 1.2)]
    return [dataclasses.replace(case, threads=count) for case in made for count in threads]


def attention(threads: Sequence[int] = (1, 2)) -> list[AttentionCase]:
    train = functools.partial(AttentionCase, training=True)
    first = SQUARE[0]
    made = [AttentionCase(*shape, target=1.0) for shape in SQUARE]
    made.append(AttentionCase(*first, causal=True, target=1.3))
    made += [AttentionCase(*shape, dtype="bfloat16", target=1.3) for shape in SQUARE]
    made.append(AttentionCase(1, 8, 1024, 128, dtype="bfloat16", target=1.1))
    for dtype, goal in (("bfloat16", 2.0), ("float32", 1.1)):
        made += [train(*shape, dtype=dtype, target=goal) for shape in (*SQUARE, (8, 12, 197, 64))]
    # torch runs these by its general path only, without a fused kernel.
    made += [train(*first, dropout=0.1, target=2.0), train(*first, mask="grad", target=2.0)]
    made += [AttentionCase(*first, Dv=32, training=training, target=2.0) for training in (False, True)]
    made += [dataclasses.replace(DECODE, dtype=dtype, target=2.0) for dtype in ("float32", "bfloat16")]
    return [dataclasses.replace(case, threads=count) for case in made for count in threads]
