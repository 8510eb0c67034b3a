"""The usual run of `make gpuless` deals the compilations to the Triton releases (tests/gpuless/conftest.py). Together
they leave out nothing that is shipped, and each meets every width, every kind of call and every architecture."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.o0_skip(reason="it is about pytest alone")

CONFTEST = Path(__file__).parents[1] / "gpuless" / "conftest.py"
ARCHITECTURES, WIDTHS, KINDS = ("sm_80", "sm_90", "sm_100"), ("64", "128", "256"), ("plain", "dropout")


class Item:
    def __init__(self, name: str, marker: str = "") -> None:
        self.name, self.marker = name, marker

    def get_closest_marker(self, name: str) -> Any:
        return name if name == self.marker else None


def dealt(monkeypatch: pytest.MonkeyPatch, release: str, arch: str) -> list[str]:
    spec = importlib.util.spec_from_file_location("conftest_of_gpuless", CONFTEST)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("DLKERNELS_RELEASE", release)
    monkeypatch.setenv("DLKERNELS_ARCH", arch)
    half = (Item(f"half[{'-'.join(row)}]") for row in itertools.product(ARCHITECTURES, WIDTHS, KINDS))
    single = (Item(f"single[{'-'.join(row)}]", "any_architecture") for row in itertools.product(ARCHITECTURES, WIDTHS))
    items = [*half, *single, *(Item(f"odd[{arch}]") for arch in ARCHITECTURES)]
    module.pytest_collection_modifyitems(items)
    return [item.name for item in items]


def test_nothing_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = [name for arch in ARCHITECTURES for name in dealt(monkeypatch, "0/1", arch)]
    assert len(everything) == len(set(everything)) == 18 + 9 + 3
    by_release = [
        [name for arch in ARCHITECTURES for name in dealt(monkeypatch, f"{release}/2", arch)] for release in range(2)
    ]
    usual = by_release[0] + by_release[1]
    assert len(usual) == len(set(usual)) and set(usual) <= set(everything)
    left_out = set(everything) - set(usual)
    assert len(left_out) == 6 and all(name.startswith("single") for name in left_out)
    for width in WIDTHS:
        assert sum(name.startswith("single") and f"-{width}]" in name for name in usual) == 1
    for names in by_release:
        for value in (*ARCHITECTURES, *WIDTHS, *KINDS):
            assert any(name.startswith("half") and value in name for name in names), value
