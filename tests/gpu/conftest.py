"""Puts tests/gpuless and the repository's root on the path, and skips the tests that begin after DLKERNELS_DEADLINE."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "gpuless"), str(ROOT)]

from timing import DEADLINE  # noqa: E402


@pytest.fixture(autouse=True)
def _in_time() -> None:
    if time.time() > DEADLINE:
        pytest.skip("NOT RUN: the time of this part was over")
    torch.manual_seed(0)
