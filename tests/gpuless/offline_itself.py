"""Tests that the checks of attention_offline.py can fail."""

from __future__ import annotations

import pytest
import torch
from attention_offline import check, compile_call

from dlkernels.attention.triton import heuristics


def test_shared_memory_limit_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles a tile that is far too large without an error."""
    monkeypatch.setattr(heuristics, "tile", lambda *_: heuristics.Tile(64, 128, 8, 4))
    found = compile_call(monkeypatch, "sm_80", torch.bfloat16, 256, {}, backward=False)
    with pytest.raises(AssertionError, match="shared memory"):
        check(found, "sm_80", True, "plain")


def test_spills_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 x 128 scores and 128 x 64 sums of float32 do not fit the registers of four warps."""
    monkeypatch.setattr(heuristics, "tile", lambda *_: heuristics.Tile(128, 128, 4, 1))
    found = compile_call(monkeypatch, "sm_90", torch.bfloat16, 64, {}, backward=False)
    with pytest.raises(AssertionError, match="spills in a loop"):
        check(found, "sm_90", True, "plain")


def test_serialised_products_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that waits for each of its 16 wgmma before the next one."""
    found = compile_call(monkeypatch, "sm_90", torch.bfloat16, 64, {}, backward=False)
    loops = [loop._replace(waits=16) for loop in found[0].loops]
    assert loops and found[0].name == "forward"
    check(found, "sm_90", True, "plain")
    with pytest.raises(AssertionError, match="serialised"):
        check([found[0]._replace(loops=loops)], "sm_90", True, "plain")
