"""Tests that the checks of attention_offline.py can fail."""

from __future__ import annotations

import offline
import pytest
import torch
from attention_offline import check, compile_call

from dlkernels.attention.triton import addresses, heuristics


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
    """With 128 x 128 scores in the registers of four warps each wgmma waits for the one before it."""
    monkeypatch.setattr(heuristics, "tile", lambda *_: heuristics.Tile(128, 128, 4, 2))
    found = compile_call(monkeypatch, "sm_90", torch.bfloat16, 64, {"causal": 1}, backward=False)
    assert found[0].name == "forward" and "wgmma" in found[0].binary.advisories[0]
    with pytest.raises(AssertionError, match=r"C75.*serialized"):
        check(found, "sm_90", True, "causal")
    silent = found[0]._replace(binary=found[0].binary._replace(advisories=()))
    with pytest.raises(AssertionError, match="wgmma are serialised"):
        check([silent], "sm_90", True, "causal")


def test_the_words_of_ptxas() -> None:
    said = "ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to\n"
    assert offline.advisories(said + "ptxas-blackwell info : (C7508) x\nptxas info : Used 168 registers\n") == [
        said[said.index("(") :].rstrip(), "(C7508) x",
    ]  # fmt: skip


def test_narrow_loads_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "align", lambda *_: 1)
    found = compile_call(monkeypatch, "sm_90", torch.bfloat16, 72, {}, backward=False)
    assert found[0].name == "forward" and found[0].binary.narrow_loads > 100
