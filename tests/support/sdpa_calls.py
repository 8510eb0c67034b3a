"""Small inputs for scaled_dot_product_attention, and calls of it with every kind of wrong argument."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

OURS = "dlkernels::attention"


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


Q, K, V, MASK = draw(2, 3, 4, 8), draw(2, 3, 5, 8), draw(2, 3, 5, 6), draw(4, 5)


def bad_tensors(good: Tensor) -> dict[str, Any]:
    values: dict[str, Any] = {
        "None": None, "list": [[1.0]], "int": 3, "str": "x", "meta": good.to("meta"), "sparse": good.to_sparse(),
        "scalar": torch.tensor(1.0), "vector": good.flatten(), "6-D": good.expand(7, 5, *good.shape),
    }  # fmt: skip
    for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64):
        values[str(dtype)] = torch.ones(good.shape).to(dtype)
    for dim in range(good.dim()):
        for size in (0, 1, good.shape[dim] + 1):
            values[f"size {size} of dim {dim}"] = torch.ones(
                [size if d == dim else s for d, s in enumerate(good.shape)]
            )
    return values


def mistakes() -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    made: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    for at, name in enumerate(("query", "key", "value")):
        for what, bad in bad_tensors((Q, K, V)[at]).items():
            args = tuple(bad if i == at else t for i, t in enumerate((Q, K, V)))
            made[f"{name} {what}"] = args, {}
            if at == 0 or what != "size 0 of dim 1":  # torch crashes, see test_no_heads_to_group
                made[f"{name} {what}, grouped"] = args, {"enable_gqa": True}
    for what, bad in bad_tensors(MASK).items():
        made[f"attn_mask {what}"] = (Q, K, V), {"attn_mask": bad}
    options: dict[str, list[Any]] = {
        "dropout_p": [None, "a", [0.1], 1.5, 2, math.inf, 1j], "is_causal": [None, 1, 0, "a", torch.tensor(True)],
        "scale": ["a", [1.0], 1j], "enable_gqa": [None, 1, "a"],
    }  # fmt: skip
    for name, values in options.items():
        for bad in values:
            made[f"{name} {bad!r}"] = (Q, K, V), {name: bad}
    made["mask and causal"] = (Q, K, V), {"attn_mask": MASK, "is_causal": True}
    made["nothing"] = (), {}
    made["two tensors"] = (Q, K), {}
    made["too many"] = (Q, K, V, MASK, 0.0, False, 1.0), {}
    made["unknown"] = (Q, K, V), {"foo": 1}
    made["heads that do not divide"] = (Q, K[:, :2], V[:, :2]), {"enable_gqa": True}
    return made


MISTAKES = mistakes()


def attempt(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return error
