"""DLKERNELS_SHARD=0/2 takes every second test, DLKERNELS_ARCH=sm_90 those for this architecture and its kin: 8.6 goes
with 8.0."""

from __future__ import annotations

import os

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    shard, _, shards = os.environ.get("DLKERNELS_SHARD", "0/1").partition("/")
    arch = os.environ.get("DLKERNELS_ARCH")
    mine = [item for index, item in enumerate(items) if index % int(shards) == int(shard)]
    items[:] = [item for item in mine if arch is None or f"[{arch[:4]}" in item.name]
