"""DLKERNELS_SHARD=0/2 takes every second test, DLKERNELS_ARCH=sm_90 those for this architecture and its kin: 8.6 goes
with 8.0. DLKERNELS_RELEASE=0/2, of the first of two Triton releases: tests marked `one_release` are dealt out."""

from __future__ import annotations

import os

import pytest


def _share(name: str, items: list[pytest.Item]) -> list[pytest.Item]:
    index, _, count = os.environ.get(name, "0/1").partition("/")
    return items[int(index) :: int(count)]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "one_release: compiled with one of the Triton releases, not with each")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    dealt = [item for item in items if item.get_closest_marker("one_release")]
    left_out = set(dealt) - set(_share("DLKERNELS_RELEASE", dealt))
    arch = os.environ.get("DLKERNELS_ARCH")
    items[:] = [
        item for item in _share("DLKERNELS_SHARD", items)
        if item not in left_out and (arch is None or f"[{arch[:4]}" in item.name)
    ]  # fmt: skip
