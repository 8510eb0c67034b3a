"""Tests combinations that are common in models: few or many rows, long keys that are split, windows, slopes per batch,
masks, 16-bit types and several threads. The rows cover all pairs of these. Each is compared with float64 and must be
bit-equal to the result on one thread."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support.attention_calls import check, run
from tests.support.attention_oracle import Case, Results, make_data, run_op
from tests.support.covering_arrays import Row, pairwise, row_id

pytestmark = pytest.mark.usefixtures("native")

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# (H, Hkv, M). Up to 8 rows that share their keys are computed by dot products, more rows by tiles.
ROWS = {
    "one": (2, 2, 1), "gqa4": (8, 2, 1), "gqa16": (16, 1, 1), "few": (4, 4, 7), "block": (2, 1, 50),
    "blocks": (2, 2, 200),
}  # fmt: skip
# The forward splits keys from 1024 on, the backward from 512 on.
KEYS = (40, 530, 1100)
MASKS: dict[str, dict[str, Any]] = {
    "none": {}, "padding": {"mask": "bn"}, "bias": {"mask": "hmn", "mask_kind": "own"},
    "batch_bias": {"mask": "bhmn", "mask_kind": "float32"}, "one_row": {"mask": "n", "mask_kind": "own"},
    "varlen": {},
}  # fmt: skip
RULES: dict[str, dict[str, Any]] = {
    "none": {}, "window": {"causal": 2, "window": (50, 0)}, "both_sides": {"window": (20, 30)}, "causal": {"causal": 1},
    "bottom_right": {"causal": 2},
}  # fmt: skip
EXTRAS: dict[str, dict[str, Any]] = {
    "none": {}, "sinks": {"sinks": True}, "softcap": {"softcap": 2.0}, "dropout": {"dropout": 0.2},
    "no_dlse": {"dlse": False},
}  # fmt: skip


def case_of(row: Row) -> Case:
    H, Hkv, M = ROWS[row["rows"]]
    N, B = row["N"], row["B"]
    options: dict[str, Any] = {**MASKS[row["mask"]], **RULES[row["rule"]], **EXTRAS[row["extra"]]}
    if row["mask"] == "varlen":
        lengths = (M, max(1, M // 3)) if B == 2 else (M,)
        options |= {"lengths_q": lengths, "lengths_k": (N, N - 7)[:B]}
    return Case(
        B=B, H=H, Hkv=Hkv, M=M, N=N, D=row["D"], Dv=24, dtype=row["dtype"], slopes=row["slopes"], layout=row["layout"],
        **options,
    )  # fmt: skip


COVER = pairwise(
    {
        "rows": tuple(ROWS), "N": KEYS, "dtype": (F32, F64, BF16, F16), "mask": tuple(MASKS), "rule": tuple(RULES),
        "slopes": (None, "h", "bh"), "extra": tuple(EXTRAS), "B": (1, 2), "D": (16, 40), "threads": (2, 3),
        "layout": ("bhmd", "bmhd"),
    }
)  # fmt: skip


@pytest.mark.parametrize("row", COVER, ids=row_id)
def test_long_keys_windows_slopes_masks(row: Row, isa: str, threads: Callable[[int], None]) -> None:
    case = case_of(row)
    threads(1)
    alone = check(case)
    threads(row["threads"])
    together = run(case, make_data(case))
    for name, value in together.items():
        assert torch.equal(value, alone[name]), name


def test_the_rows_cover_what_they_say() -> None:
    assert len(COVER) < 60
    for a, b in (("rows", "rule"), ("N", "slopes"), ("slopes", "B"), ("mask", "N"), ("dtype", "threads")):
        assert len({(row[a], row[b]) for row in COVER}) == len({r[a] for r in COVER}) * len({r[b] for r in COVER})


# These combinations of three factors are tested in full, because the pairs need not contain them.
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("rows", ["one", "gqa4", "gqa16"])
@pytest.mark.parametrize("rule", [r for r in RULES if r != "none"])
def test_one_query_with_a_window(rule: str, rows: str, dtype: torch.dtype, isa: str) -> None:
    H, Hkv, M = ROWS[rows]
    for N in (70, 600):
        check(Case(B=2, H=H, Hkv=Hkv, M=M, N=N, D=24, Dv=24, dtype=dtype, **RULES[rule]))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("M", [1, 70])
@pytest.mark.parametrize("N", [513, 1100])
@pytest.mark.parametrize("B", [2, 3])
def test_slopes_of_each_sequence_with_split_keys(
    B: int, N: int, M: int, count: int, isa: str, threads: Callable[[int], None]
) -> None:
    threads(count)
    case = Case(B=B, H=2, Hkv=1, M=M, N=N, D=16, Dv=16, slopes="bh", causal=2)
    data = make_data(case)
    assert data.slopes is not None and data.slopes.unique().numel() == 2 * B
    # The slopes are small enough that distant keys still have weight.
    data.slopes = (data.slopes * 30 / N).float().double()
    check(case, data)


def hidden_but_nan(case: Case, at: tuple[int, int], value: float = math.nan) -> Results:
    """Runs the operators with a mask that hides every key, except that it is `value` for row at[0] and key at[1]."""
    data = make_data(case)
    assert data.mask is not None
    data.mask.fill_(-math.inf)
    data.mask[..., min(at[0], data.mask.shape[-2] - 1), at[1]] = value
    return run_op(case, data)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("mask", ["n", "mn", "bhmn"])
@pytest.mark.parametrize(("M", "at"), [(1, (0, 0)), (3, (2, 19)), (60, (59, 299)), (200, (130, 128))])
def test_nan_in_a_mask_that_hides_the_rest(
    M: int, at: tuple[int, int], mask: str, dtype: torch.dtype, isa: str
) -> None:
    """As in torch, a NaN in the mask reaches the results of its row, also if all other elements of its tile are
    -inf."""
    case = Case(B=2, H=2, Hkv=2, M=M, N=20 if M == 3 else 300, mask=mask, mask_kind="own", dtype=dtype, dlse=False)
    found = hidden_but_nan(case, at)
    rows = torch.zeros(M, dtype=torch.bool)
    rows[slice(None) if mask == "n" else at[0]] = True
    for name in ("o", "lse", "dq"):
        assert found[name][:, :, rows].isnan().all(), name
    assert (found["o"][:, :, ~rows] == 0).all() and (found["lse"][:, :, ~rows] == -math.inf).all()
    assert (found["dq"][:, :, ~rows] == 0).all()
    assert found["dv"][:, :, at[1]].isnan().all()


@pytest.mark.parametrize("M", [1, 60])
def test_nan_in_a_mask_as_torch_has_it(M: int, isa: str) -> None:
    import dlkernels

    q, k, v = torch.randn(1, 2, M, 16), torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 16)
    mask = torch.full((M, 40), -math.inf)
    mask[:, 0] = 0.0
    mask[M // 2] = -math.inf
    mask[M // 2, 30] = math.nan
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
    ours = dlkernels.functional.scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(ours, theirs, equal_nan=True)
