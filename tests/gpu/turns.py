"""Selects the tests on a CUDA device that this process runs: DLKERNELS_SHARD=2/8 takes every eighth case."""

from __future__ import annotations

import os

import pytest
from timing import REHEARSAL

_INDEX, _, _COUNT = os.environ.get("DLKERNELS_SHARD", "0/1").partition("/")
ON_GPU = not REHEARSAL


def mine(index: int) -> bool:
    return index % int(_COUNT) == int(_INDEX)


first_shard = pytest.mark.skipif(not mine(0), reason="in the first shard")
on_a_gpu = pytest.mark.skipif(not ON_GPU, reason="a rehearsal: only a GPU shows this")
