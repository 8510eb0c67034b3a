"""Tests the bounds beside which `bench --suite peers` sets our times."""

from __future__ import annotations

import pytest
import torch

from dlkernels.bench import bounds

pytestmark = pytest.mark.o0_skip(reason="no kernel of ours runs")


def test_counts() -> None:
    operations, read, again = bounds.counted("lstm", 3, 5, 7, 11, False, 4)
    assert operations == 5 * 2 * 3 * 4 * 11 * (7 + 11)
    assert read == 4 * (4 * 11 * 7 + 5 * 4 * 11 * 11)
    assert again == 4 * 4 * 11 * 11
    assert bounds.counted("gru", 3, 5, 7, 11, True, 4)[0] == 3 * 5 * 2 * 3 * 3 * 11 * (7 + 11)
    assert bounds.counted("rnn", 1, 1, 7, 11, False, 1)[1:] == (11 * (7 + 11),) * 2


@pytest.mark.parametrize("threads", [1, 2])
def test_rates(threads: int) -> None:
    """No processor on which this runs takes a nanosecond for ten bytes, or multiplies less than 100 million times a
    second."""
    assert 1e8 < bounds.read_rate(1 << 20, threads) < 1e13
    present = torch.get_num_threads()
    assert 1e8 < bounds.product_rate(torch.float32, threads) < 1e15
    assert torch.get_num_threads() == present


@pytest.mark.parametrize(("B", "expected"), [(1, 4 * (16 + 9 * 64) / 10.0), (100, 2 * 100 * 9 * (16 + 64) / 100.0)])
def test_the_longer_time_counts(B: int, expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "read_rate", lambda size, threads: 10.0)
    monkeypatch.setattr(bounds, "product_rate", lambda dtype, threads: 100.0)
    assert bounds.seconds("rnn", B, 9, 2, 8, False, torch.float32, 4, 1) == expected
    assert bounds.seconds("rnn", B, 9, 2, 8, False, torch.float32, 1, 1) == (16 + 9 * 64) / 10.0
