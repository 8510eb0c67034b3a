"""Tests which arguments the attention operators reject when called directly, without the checks of the Python
layers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.usefixtures("native")


def arguments(**changes: Any) -> dict[str, Any]:
    """Returns the arguments of a valid call with `changes`."""
    base = {
        "q": torch.zeros(2, 4, 5, 8), "k": torch.zeros(2, 2, 6, 8), "v": torch.zeros(2, 2, 6, 3), "mask": None,
        "alibi_slopes": None, "sinks": None, "cu_seqlens_q": None, "cu_seqlens_k": None, "rng": None,
        "max_seqlen_q": 0, "max_seqlen_k": 0, "softmax_scale": 0.5, "causal": 0, "window_left": -1, "window_right": -1,
        "softcap": 0.0, "dropout_p": 0.0,
    }  # fmt: skip
    return {**base, **changes}


PACKED = {"q": torch.zeros(9, 4, 8), "k": torch.zeros(9, 2, 8), "v": torch.zeros(9, 2, 3)}
CU = torch.tensor([0, 4, 9], dtype=torch.int32)
MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "q of three dimensions": ({"q": torch.zeros(4, 5, 8)}, RuntimeError, "q must have shape"),
    "q of integers": ({"q": torch.zeros(2, 4, 5, 8).int()}, RuntimeError, "q must be float32, .*got int32"),
    "k of another width": ({"k": torch.zeros(2, 2, 6, 7)}, RuntimeError, r"k must have shape \[2, 2, 6, 8\]"),
    "k of another batch": ({"k": torch.zeros(1, 2, 6, 8)}, RuntimeError, "k must have shape"),
    "k of another dtype": ({"k": torch.zeros(2, 2, 6, 8).double()}, RuntimeError, "k must be float32, got float64"),
    "k of two dimensions": ({"k": torch.zeros(6, 8)}, RuntimeError, "k must have shape"),
    "v of another length": ({"v": torch.zeros(2, 2, 5, 3)}, RuntimeError, "v must have shape"),
    "v of other heads": ({"v": torch.zeros(2, 4, 6, 3)}, RuntimeError, "v must have shape"),
    "heads that do not divide": (
        {"k": torch.zeros(2, 3, 6, 8), "v": torch.zeros(2, 3, 6, 3)}, RuntimeError, "must be a multiple of the 3",
    ),
    "no heads of k": ({"k": torch.zeros(2, 0, 6, 8), "v": torch.zeros(2, 0, 6, 3)}, RuntimeError, "multiple of the 0"),
    "mask of two dimensions": ({"mask": torch.zeros(5, 6)}, RuntimeError, "mask must have shape"),
    "mask of another size": ({"mask": torch.zeros(1, 1, 5, 7)}, RuntimeError, "mask must have shape"),
    "mask of integers": ({"mask": torch.zeros(1, 1, 5, 6).int()}, RuntimeError, "mask must be bool"),
    "mask of another float": ({"mask": torch.zeros(1, 1, 5, 6).double()}, RuntimeError, "mask must be bool"),
    "slopes of another size": ({"alibi_slopes": torch.zeros(3)}, RuntimeError, "alibi_slopes must have shape"),
    "slopes of another batch": ({"alibi_slopes": torch.zeros(3, 4)}, RuntimeError, "alibi_slopes must have shape"),
    "slopes of three dimensions": ({"alibi_slopes": torch.zeros(1, 2, 4)}, RuntimeError, "alibi_slopes must have"),
    "slopes without dimensions": ({"alibi_slopes": torch.zeros(())}, RuntimeError, "alibi_slopes must have"),
    "slopes of integers": ({"alibi_slopes": torch.zeros(4).int()}, RuntimeError, "alibi_slopes must be float32"),
    "sinks of another size": ({"sinks": torch.zeros(2)}, RuntimeError, "sinks must have shape"),
    "sinks of two dimensions": ({"sinks": torch.zeros(1, 4)}, RuntimeError, "sinks must have shape"),
    "scale not finite": ({"softmax_scale": math.nan}, ValueError, "softmax_scale must be finite"),
    "causal of 3": ({"causal": 3}, ValueError, "causal must be 0"),
    "window of -2": ({"window_left": -2}, ValueError, "window_left and window_right"),
    "softcap negative": ({"softcap": -1.0}, ValueError, "softcap must lie in 0"),
    "softcap beyond float32": ({"softcap": 1e38}, ValueError, "softcap must lie in 0"),
    "dropout above 1": ({"dropout_p": 1.5}, ValueError, "dropout_p must lie in 0..1"),
    "dropout of nan": ({"dropout_p": math.nan}, ValueError, "dropout_p must lie in 0..1"),
    "dropout without rng": ({"dropout_p": 0.5}, RuntimeError, "rng must be given"),
    "rng of three": ({"dropout_p": 0.5, "rng": torch.zeros(3).long()}, RuntimeError, "rng must have shape"),
    "rng of floats": ({"dropout_p": 0.5, "rng": torch.zeros(2)}, RuntimeError, "rng must be int64"),
    "rng without dimensions": ({"dropout_p": 0.5, "rng": torch.zeros(()).long()}, RuntimeError, "rng must have"),
    "cu_seqlens of one side": ({**PACKED, "cu_seqlens_q": CU}, RuntimeError, "must be given together"),
    "cu_seqlens and padded": ({"cu_seqlens_q": CU, "cu_seqlens_k": CU}, RuntimeError, "q must have shape .rows"),
    "cu_seqlens of int64": (
        {**PACKED, "cu_seqlens_q": CU.long(), "cu_seqlens_k": CU}, RuntimeError, "cu_seqlens_q must be int32",
    ),
    "cu_seqlens of other lengths": (
        {**PACKED, "cu_seqlens_q": CU, "cu_seqlens_k": CU[:2]}, RuntimeError, r"cu_seqlens_k must have shape \[3\]",
    ),
    "cu_seqlens without an entry": (
        {**PACKED, "cu_seqlens_q": CU[:0], "cu_seqlens_k": CU[:0]}, RuntimeError, "cu_seqlens_q must have shape",
    ),
    "cu_seqlens from 1": ({**PACKED, "cu_seqlens_q": CU + 1, "cu_seqlens_k": CU}, ValueError, "must begin with 0"),
    "cu_seqlens that fall": (
        {**PACKED, "cu_seqlens_q": torch.tensor([0, 4, 3], dtype=torch.int32), "cu_seqlens_k": CU}, ValueError,
        "must not fall",
    ),
    "cu_seqlens too long": (
        {**PACKED, "cu_seqlens_q": CU, "cu_seqlens_k": torch.tensor([0, 4, 10], dtype=torch.int32)}, ValueError,
        "must not exceed the 9 rows",
    ),
    "a sequence over max_seqlen": (
        {**PACKED, "cu_seqlens_q": CU, "cu_seqlens_k": CU, "max_seqlen_q": 4}, ValueError, "more than max_seqlen 4",
    ),
    "max_seqlen negative": ({"max_seqlen_q": -1}, ValueError, "must not be negative"),
    "mask with cu_seqlens": (
        {**PACKED, "cu_seqlens_q": CU, "cu_seqlens_k": CU, "mask": torch.zeros(1, 1, 1, 1)}, RuntimeError,
        "mask must be None",
    ),
}  # fmt: skip

RESULTS = {
    "do": torch.zeros(2, 4, 5, 3), "dlse": None, "o": torch.zeros(2, 4, 5, 3), "stats": torch.zeros(2, 4, 2, 5),
}  # fmt: skip
NEEDS = {"need_q": True, "need_kv": True, "need_mask": False, "need_slopes": False, "need_sinks": False}


@pytest.mark.parametrize("name", MISTAKES)
def test_refusals(name: str) -> None:
    changes, kind, message = MISTAKES[name]
    call = arguments(**changes)
    with pytest.raises(kind, match=message):
        torch.ops.dlkernels.attention(**call, contiguous=False)
    with pytest.raises(kind, match=message):
        torch.ops.dlkernels.attention_backward(**RESULTS, **call, **NEEDS)
    if call.keys() & {"cu_seqlens_q"} and changes.keys() & {"v", "rng", "dropout_p", "cu_seqlens_q", "max_seqlen_q"}:
        return  # attention_map does not take these arguments
    for absent in ("v", "cu_seqlens_q", "cu_seqlens_k", "rng", "max_seqlen_q", "max_seqlen_k", "dropout_p"):
        del call[absent]
    with pytest.raises(kind, match=message):
        torch.ops.dlkernels.attention_map(**call, rows=2, cols=2)


BACKWARD_MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "do of another shape": ({"do": torch.zeros(2, 4, 5, 8)}, "do must have shape"),
    "do of the packed layout": ({"do": torch.zeros(5, 4, 3)}, "do must have shape"),
    "do of the padded layout": (
        {
            **PACKED,
            "cu_seqlens_q": CU,
            "cu_seqlens_k": CU,
            "do": torch.zeros(2, 4, 9, 3),
            "o": torch.zeros(9, 4, 3),
            "stats": torch.zeros(4, 2, 9),
        },
        "do must have shape",
    ),
    "do of another dtype": ({"do": torch.zeros(2, 4, 5, 3).double()}, "do must be float32"),
    "o of another shape": ({"o": torch.zeros(2, 4, 6, 3)}, "o must have shape"),
    "stats of another shape": ({"stats": torch.zeros(2, 4, 5)}, "stats must have shape"),
    "stats of another dtype": ({"stats": torch.zeros(2, 4, 2, 5).double()}, "stats must be float32"),
    "dlse of another shape": ({"dlse": torch.zeros(2, 4, 5, 1)}, "dlse must have shape"),
    "gradient of no mask": ({"need_mask": True}, "need_mask"),
    "gradient of a bool mask": ({"need_mask": True, "mask": torch.ones(1, 1, 5, 6, dtype=torch.bool)}, "need_mask"),
    "gradient of no slopes": ({"need_slopes": True}, "need_slopes"),
    "gradient of no sinks": ({"need_sinks": True}, "need_sinks"),
}


@pytest.mark.parametrize("name", BACKWARD_MISTAKES)
def test_backward_refusals(name: str) -> None:
    changes, message = BACKWARD_MISTAKES[name]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dlkernels.attention_backward(**{**arguments(), **RESULTS, **NEEDS, **changes})


def test_map_refusals() -> None:
    q = torch.zeros(1, 1, 3, 4)
    for rows, cols in ((0, 1), (1, 0), (-1, 2)):
        with pytest.raises(ValueError, match="rows and cols must be positive"):
            torch.ops.dlkernels.attention_map(q, q, None, None, None, 1.0, 0, -1, -1, 0.0, rows, cols)
