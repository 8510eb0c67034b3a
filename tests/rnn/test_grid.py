"""Tests the 64 combinations of bias, direction, batch_first, contiguity, lengths and layers, forward and backward, in
every dtype, mode and ISA, with the tolerance rule."""

from __future__ import annotations

from itertools import product

import pytest
import torch

import dlkernels.nn
from tests.support.layer_cases import DTYPES, MODES, Case, check_case, disagreements, expected, run_layer

T, B = 6, 4
LENGTHS = (3, 6, 1, 5)
COMBINATIONS = list(product((True, False), (False, True), (False, True), (True, False), (None, LENGTHS), (1, 2)))


def combination(mode: str, dtype: torch.dtype, index: int, packed: bool = False) -> Case:
    bias, bidirectional, batch_first, contiguous, lengths, layers = COMBINATIONS[index]
    # The sizes are not multiples of a vector or of each other.
    return Case(
        mode, T=T, B=B, I=5, H=11, P=3 if mode == "lstm_proj" else 0, layers=layers,
        bias=bias, bidirectional=bidirectional, batch_first=batch_first, contiguous=contiguous, lengths=lengths,
        packed=packed, hx=index % 3 != 0, dtype=dtype, seed=index,
    )  # fmt: skip


def test_there_are_64_combinations() -> None:
    assert len(set(COMBINATIONS)) == 64


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("mode", MODES)
def test_grid(mode: str, dtype: torch.dtype, isa: str) -> None:
    failures = []
    for index in range(len(COMBINATIONS)):
        case = combination(mode, dtype, index)
        forms = [case] if case.lengths is None else [case, combination(mode, dtype, index, packed=True)]
        for form in forms:
            data, theirs, ref = expected(case)
            found = disagreements(form, data, run_layer(form, data, dtype, dlkernels.nn), theirs, ref)
            failures += [f"{form}: {line}" for line in found]
    assert not failures, f"{len(failures)} disagreements\n" + "\n".join(failures[:10])


# (T, B, I, H, P). Some sizes fill whole vectors and tiles, some exceed the block sizes, and some leave remainders.
SHAPES = [
    (20, 1, 24, 64, 0),
    (9, 16, 32, 64, 0),
    (12, 7, 33, 97, 0),
    (5, 33, 16, 130, 0),
    (3, 2, 70, 256, 0),
    (40, 5, 1, 1, 0),
    (7, 9, 40, 48, 17),
    (2, 5, 1100, 8, 0),  # I exceeds the depth of one panel (kPanelDepth)
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("mode", MODES)
def test_larger_shapes(mode: str, shape: tuple[int, ...], isa: str) -> None:
    t, b, i, h, p = shape
    if (p > 0) != (mode == "lstm_proj"):
        if p:
            pytest.skip("a projected shape")
        p = max(1, h // 3)
        if p >= h:
            pytest.skip("no projection is smaller than one unit")
    lengths = tuple(1 + (7 * k + t - 1) % t for k in range(b))
    for dtype in (torch.float32, torch.bfloat16):
        for bidirectional, used in ((False, None), (True, lengths)):
            check_case(Case(mode, t, b, i, h, p, bidirectional=bidirectional, lengths=used, dtype=dtype, seed=h))
    check_case(Case(mode, t, b, i, h, p, lengths=lengths, packed=True, hx=False, dtype=torch.float16, seed=h))
    check_case(Case(mode, t, b, i, h, p, bidirectional=True, batch_first=True, dtype=torch.float64, seed=h))
