"""DLKERNELS_SHARD=0/2 takes every second test, DLKERNELS_ARCH=sm_90 those for this architecture and its kin: 8.6 goes
with 8.0. DLKERNELS_RELEASE=0/2, of the first of two Triton releases: tests marked `one_release` are dealt out;
with DLKERNELS_DEAL_ALL=1 all are, in turns, so that each release still gets each width, kind and architecture."""

from __future__ import annotations

import os

import pytest


def _share(name: str, items: list[pytest.Item]) -> list[pytest.Item]:
    index, _, count = os.environ.get(name, "0/1").partition("/")
    return items[int(index) :: int(count)]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "one_release: compiled with one of the Triton releases, not with each")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    everything = os.environ.get("DLKERNELS_DEAL_ALL") == "1"
    dealt = [item for item in items if everything or item.get_closest_marker("one_release")]
    index, _, count = os.environ.get("DLKERNELS_RELEASE", "0/1").partition("/")
    turns = int(count) if everything else len(dealt) + 1
    # The innermost parameter has as many values as there are releases: each turn begins with another release.
    left_out = {item for at, item in enumerate(dealt) if (at + at // turns) % int(count) != int(index)}
    arch = os.environ.get("DLKERNELS_ARCH")
    items[:] = [
        item for item in _share("DLKERNELS_SHARD", items)
        if item not in left_out and (arch is None or f"[{arch[:4]}" in item.name)
    ]  # fmt: skip
