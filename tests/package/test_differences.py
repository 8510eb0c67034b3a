"""Each line of the tables in docs/differences.md names a test that exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import dlkernels

TESTS = Path(__file__).parents[1]
TABLE = TESTS.parent / "docs" / "differences.md"


def _rows() -> list[str]:
    """Returns the lines of every table whose last column is headed "test"."""
    found, inside = [], False
    for line in TABLE.read_text().splitlines():
        last = line.strip("|").split("|")[-1].strip()
        if not line.startswith("|"):
            inside = False
        elif last == "test":
            inside = True
        elif inside and set(last) != {"-"}:
            found.append(line)
    return found


ROWS = _rows()


def named_tests(line: str) -> list[tuple[str, str]]:
    """Returns (file, function) pairs; `::function` alone belongs to the file named before it."""
    found, file = [], ""
    for text in re.findall(r"`((?:[\w/]+\.py)?(?:::\w+)?)`", line):
        name, _, function = text.partition("::")
        file = name or file
        if file:
            found.append((file, function))
    return found


@pytest.mark.parametrize("line", ROWS, ids=lambda line: line.split("|")[1].strip()[:40])
def test_every_line_names_a_test_that_exists(line: str) -> None:
    named = [(file, function) for file, function in named_tests(line.rsplit("|", 2)[1])]
    assert named, "no test is named"
    for file, function in named:
        path = TESTS / file
        assert path.is_file(), f"{file} is not there"
        assert re.search(rf"^def {function}\(", path.read_text(), re.M) or not function, f"{file} has no {function}"


def test_there_are_lines() -> None:
    assert len(ROWS) >= 20


def test_layers_derive_from_rnnbase() -> None:
    for name in ("LSTM", "GRU", "RNN"):
        layer = getattr(dlkernels.nn, name)(4, 6)
        assert isinstance(layer, torch.nn.RNNBase) and not isinstance(layer, getattr(torch.nn, name))
