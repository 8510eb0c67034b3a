"""Selects the tests that this process runs.

DLKERNELS_SHARD=0/2 takes every second test. DLKERNELS_ARCH=sm_90 takes the tests of this architecture and of those with
the same first digit (8.6 runs with 8.0). DLKERNELS_RELEASE=0/2 is the first of two Triton releases: the releases take
turns, so that each runs every width, every kind and every architecture. Of the tests marked `any_architecture` each
width is then left to one architecture, and those marked `everything` are left out.
"""

from __future__ import annotations

import os

import pytest


def _share(name: str, items: list[pytest.Item]) -> list[pytest.Item]:
    index, _, count = os.environ.get(name, "0/1").partition("/")
    return items[int(index) :: int(count)]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "any_architecture: what is compiled is the same for each architecture")
    config.addinivalue_line("markers", "everything: left out if the tests are dealt to several releases")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    index, releases = map(int, os.environ.get("DLKERNELS_RELEASE", "0/1").split("/"))
    dealt = items
    if releases > 1:
        # Their outer parameter is the architecture and the inner one the width, three of each.
        alike = [item for item in items if item.get_closest_marker("any_architecture")]
        one_of_each_width = alike[::4]
        dealt = [
            item for item in items
            if not item.get_closest_marker("everything") and (item not in alike or item in one_of_each_width)
        ]  # fmt: skip
    # The innermost parameter may have as many values as there are releases. So the release that gets the first test
    # changes with every round.
    mine = {item for at, item in enumerate(dealt) if (at + at // releases) % releases == index}
    arch = os.environ.get("DLKERNELS_ARCH")
    items[:] = [
        item for item in _share("DLKERNELS_SHARD", items)
        if item in mine and (arch is None or f"[{arch[:4]}" in item.name)
    ]  # fmt: skip
