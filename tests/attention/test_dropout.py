"""Tests dropout of `functional.attention`: its statistics, its seed, and that every plan draws the same mask."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dlkernels._core import extension
from dlkernels.functional import attention
from tests.support import attention_oracle as oracle
from tests.support.attention_calls import seed_drawn
from tests.support.attention_oracle import Case

pytestmark = pytest.mark.usefixtures("native")


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout_by_statistics(p: float) -> None:
    N = 400
    q, v = torch.zeros(1, 2, 50, 8), torch.eye(N).expand(1, 2, N, N)
    kept = attention(q, torch.zeros(1, 2, N, 8), v, dropout_p=p) * N
    share = (kept != 0).double().mean().item()
    assert abs(share - (1 - p)) < 5 * math.sqrt(p * (1 - p) / kept.numel()) + 1e-12
    if p < 1:
        torch.testing.assert_close(kept[kept != 0], torch.full_like(kept[kept != 0], 1 / (1 - p)))


def test_dropout_comes_from_the_seed() -> None:
    q = torch.randn(1, 2, 40, 8)

    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return attention(q, q, q, dropout_p=0.3)  # type: ignore[no-any-return]

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))
    torch.manual_seed(1)
    assert not torch.equal(attention(q, q, q, dropout_p=0.3), attention(q, q, q, dropout_p=0.3))
    before = torch.get_rng_state()
    attention(q, q, q)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("device", ["meta"])
def test_a_default_device_does_not_move_the_seed(device: str) -> None:
    q = torch.randn(1, 2, 4, 8)
    with torch.device(device):
        assert attention(q, q, q, dropout_p=0.3).device.type == "cpu"


def test_same_dropout_mask_for_any_tile_and_split(threads: Any) -> None:
    """The random word of (b, h, i, j) is the same for any number of queries, keys and threads."""
    case = Case(B=2, H=3, Hkv=3, M=210, N=1100, D=8, Dv=8, dropout=0.4, seed=3)
    rng = oracle.make_data(case).rng
    expected = torch.stack([oracle.keep_mask(case, rng, b, 3, case.M, case.N) for b in range(2)])
    seen_plans = set()
    for M, N, count in (
        (1, 1100, 1),
        (2, 1100, 2),
        (5, 7, 1),
        (17, 150, 2),
        (64, 64, 1),
        (210, 150, 2),
        (210, 1100, 2),
    ):
        threads(count)
        q, k, v = torch.zeros(2, 3, M, 8), torch.zeros(2, 3, N, 8), torch.eye(N).expand(2, 3, N, N)
        # v shows 150 columns of the mask at a time, a width that the kernels accept.
        for start in range(0, N, 150):
            part = v[..., start : start + 150].contiguous().requires_grad_()
            with seed_drawn(rng):
                o = attention(q, k, part, dropout_p=case.dropout)
            assert torch.equal(o != 0, expected[:, :, :M, start : min(start + 150, N)] if N == 1100 else
                               expected[:, :, :M, :N][..., start : start + 150]), (M, N, count)  # fmt: skip
            ran = extension.native.attention_last_run()
            seen_plans.add((ran["kernel"].rsplit("/", 1)[1], ran["block_m"], ran["split"]))
    assert {plan[0] for plan in seen_plans} == {"dot", "tiles"} and len({plan[1] for plan in seen_plans}) > 2
    assert max(plan[2] for plan in seen_plans) > 1
