"""Every kind of wrong value of every argument of `attention` and `attention_map` raises an error that names it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dlkernels._core import extension
from dlkernels.functional import attention, attention_map

B, H, HKV, M, N, D, DV = 2, 4, 2, 5, 7, 8, 6
Q, K, V = torch.zeros(B, H, M, D), torch.zeros(B, HKV, N, D), torch.zeros(B, HKV, N, DV)
PACKED = {"q": torch.zeros(9, H, D), "k": torch.zeros(12, HKV, D), "v": torch.zeros(12, HKV, DV)}
CU_Q, CU_K = torch.tensor([0, 4, 9]), torch.tensor([0, 5, 12])

Call = tuple[str, str, Callable[..., Any], dict[str, Any]]

pytestmark = [
    pytest.mark.o0_skip(reason="checks are Python; those of the operators are in attention/test_operator_refusals.py"),
]


def bad_tensors(good: Tensor, optional: bool = False) -> dict[str, Any]:
    """Returns other objects and tensors of a wrong rank, dtype, layout or device."""
    values: dict[str, Any] = {
        "list": [[1.0]], "int": 3, "str": "x", "dict": {}, "bool": True, "array": good.numpy(),
        "scalar": torch.tensor(1.0), "empty": torch.empty(0), "rank + 1": good[None], "meta": good.to("meta"),
        "sparse": good.to_sparse(), "int64": good.long(), "complex": good.to(torch.complex64),
        "nested": torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(4, 3)]),
    }  # fmt: skip
    if not optional:
        values["None"] = None
    return values


def wrong_sizes(good: Tensor, dims: tuple[int, ...]) -> dict[str, Tensor]:
    values = {}
    for dim in dims:
        for size in (good.shape[dim] + 1, 0):
            shape = [size if d == dim else s for d, s in enumerate(good.shape)]
            values[f"size {size} of dim {dim}"] = torch.zeros(shape)
    return values


def tensor_mistakes() -> Iterator[Call]:
    padded = {"q": Q, "k": K, "v": V}
    dims = {"q": (1, 3), "k": (0, 1, 3), "v": (0, 1, 2)}
    of_packed = {"q": (1, 2), "k": (1, 2), "v": (0, 1)}
    for name, good in padded.items():
        # A wrong size or device of one tensor may be reported for another one that is compared with it.
        for what, bad in {**bad_tensors(good), **wrong_sizes(good, dims[name])}.items():
            yield name if what[:4] not in ("size", "meta") else "", what, attention, {**padded, name: bad}
            if name != "v":
                without = {**padded, name: bad}
                del without["v"]
                yield name if what[:4] not in ("size", "meta") else "", what, attention_map, without
        others = {"float64": good.double(), "bfloat16": good.bfloat16(), "rank - 1": good[0]}
        for what, bad in others.items():
            yield "k" if name == "q" and what[0] in "fb" else name, what, attention, {**padded, name: bad}
    cu = {"cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K}
    for name, good in PACKED.items():
        for what, bad in {**bad_tensors(good), **wrong_sizes(good, of_packed[name])}.items():
            yield name if what[:4] not in ("size", "meta") else "", f"packed {what}", attention, {
                **PACKED, name: bad, **cu,
            }  # fmt: skip


def option_mistakes() -> Iterator[Call]:
    numbers = {"str": "a", "list": [1.0], "tensor": torch.tensor(0.1), "bool": True, "nan": math.nan, "inf": math.inf,
               "complex": 1j}  # fmt: skip
    flags = {"None": None, "int": 1, "str": "yes", "tensor": torch.tensor(True)}
    options: dict[str, dict[str, Any]] = {
        "attn_mask": {
            **bad_tensors(torch.zeros(M, N), optional=True), **wrong_sizes(torch.zeros(B, H, M, N), (0, 1, 2, 3)),
            "float64": torch.zeros(M, N, dtype=torch.float64), "bfloat16": torch.zeros(M, N).bfloat16(),
            "1-D": torch.zeros(N), "5-D": torch.zeros(1, 1, 1, M, N), "transposed": torch.zeros(N, M),
        },
        "causal": {**flags, "upper": "TOP_LEFT", "list": [1]},
        "dropout_p": {**numbers, "None": None, "negative": -0.1, "above": 1.01},
        "softmax_scale": numbers,
        "softcap": {**numbers, "None": None, "negative": -1.0},
        "window": {"None": None, "int": 3, "str": "ab", "one": (1,), "three": (1, 2, 3), "float": (1.5, 0),
                   "-2": (0, -2), "bool": (True, 1), "tensor": torch.tensor([1, 2]), "huge": (2**64, 0),
                   "nested": ((1,), 2)},
        "alibi_slopes": {**bad_tensors(torch.zeros(H), optional=True), **wrong_sizes(torch.zeros(H), (0,)),
                         "batch": torch.zeros(B + 1, H), "3-D": torch.zeros(1, B, H), "per key head": torch.zeros(HKV)},
        "sinks": {**bad_tensors(torch.zeros(H), optional=True), **wrong_sizes(torch.zeros(H), (0,)),
                  "2-D": torch.zeros(B, H), "per key head": torch.zeros(HKV)},
        "enable_gqa": flags,
    }  # fmt: skip
    for name, values in options.items():
        for what, bad in values.items():
            if (name, what) == ("attn_mask", "rank + 1"):
                continue  # [1, M, N] is a mask
            yield name, what, attention, {"q": Q, "k": K, "v": V, name: bad}
            if name != "dropout_p":
                yield name, what, attention_map, {"q": Q, "k": K, name: bad}
    for name in ("return_lse", "deterministic"):
        for what, bad in flags.items():
            yield name, what, attention, {"q": Q, "k": K, "v": V, name: bad}
    sizes = {"None": None, "zero": 0, "negative": -1, "float": 2.0, "str": "2", "bool": True, "huge": 2**63}
    for name in ("rows", "cols"):
        for what, bad in sizes.items():
            yield name, what, attention_map, {"q": Q, "k": K, name: bad}
    yield "k", "heads without grouping", attention, {"q": Q, "k": K, "v": V, "enable_gqa": False}


def packed_mistakes() -> Iterator[Call]:
    good = {**PACKED, "cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K}
    for name, cu, rows in (("cu_seqlens_q", CU_Q, 9), ("cu_seqlens_k", CU_K, 12)):
        values: dict[str, Any] = {
            "None": None, "list": cu.tolist(), "int": 3, "str": "x", "float": cu.float(), "bool": cu.bool(),
            "int16": cu.short(), "scalar": torch.tensor(0), "2-D": cu[None], "empty": cu[:0], "too few": cu[:2],
            "too many": torch.cat([cu, cu[-1:]]), "begins with 1": torch.tensor([1, 4, rows]),
            "falls": torch.tensor([0, 5, 4]), "negative": torch.tensor([0, -3, rows]),
            "beyond": torch.tensor([0, 4, rows + 1]), "far beyond": torch.tensor([0, 4, 2**62]),
            "wraps in 32 bits": torch.tensor([0, 4, 2**32 + 5]), "most negative": torch.tensor([0, -(2**63), rows]),
        }  # fmt: skip
        for what, bad in values.items():
            yield "cu_seqlens", what, attention, {**good, name: bad}
    for name in ("max_seqlen_q", "max_seqlen_k"):
        for what, bad in {"float": 2.0, "str": "a", "bool": True, "negative": -1, "huge": 2**63, "list": [3]}.items():
            yield name, what, attention, {**good, name: bad}
        yield "max_seqlen", "too short", attention, {**good, name: 3}
        yield name, "without cu_seqlens", attention, {"q": Q, "k": K, "v": V, name: 5}
    yield "attn_mask", "of another size with cu_seqlens", attention, {**good, "attn_mask": torch.zeros(M + 40, N)}
    yield "q", "padded with cu_seqlens", attention, {**good, "q": Q}
    yield "q", "packed without cu_seqlens", attention, dict(PACKED)
    yield "alibi_slopes", "batch", attention, {**good, "alibi_slopes": torch.zeros(3, H)}


def is_mistake(call: Call) -> bool:
    """Returns False for a call with 0 heads of queries, which is valid: 0 is a multiple of any number of key heads."""
    q = call[3].get("q")
    return not (isinstance(q, Tensor) and q.dim() > 2 and not q.is_nested and q.shape[1] == 0)


MISTAKES = [call for call in (*tensor_mistakes(), *option_mistakes(), *packed_mistakes()) if is_mistake(call)]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "number", range(len(MISTAKES)), ids=lambda i: f"{MISTAKES[i][2].__name__}-{MISTAKES[i][0]}-{MISTAKES[i][1]}"
)
def test_mistake(number: int, grad: bool) -> None:
    argument, _, function, kwargs = MISTAKES[number]
    if grad:
        kwargs = {
            name: value.detach().clone().requires_grad_()
            if name in "qkv" and isinstance(value, Tensor) and value.is_floating_point() and not value.is_nested
            else value
            for name, value in kwargs.items()
        }
    with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
        function(**kwargs)
    assert argument in str(caught.value) and str(caught.value).strip(), caught.value


@pytest.mark.parametrize("function", [attention, attention_map])
def test_arguments_that_are_missing_or_unknown(function: Callable[..., Any]) -> None:
    for args, kwargs in (((), {}), ((Q,), {}), ((Q, K, V, None), {}), ((Q, K), {"mask": None, "v": V})):
        with pytest.raises(TypeError):
            function(*args, **kwargs)


def test_values_of_cu_seqlens_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "HAVE_NATIVE", False)
    monkeypatch.setattr(extension, "_announced", True)
    calls = [kwargs for name, what, _, kwargs in MISTAKES if name in ("cu_seqlens", "max_seqlen")]
    assert len(calls) > 20
    for kwargs in calls:
        with pytest.raises((TypeError, ValueError, RuntimeError), match="seqlen"):
            attention(**kwargs)
    attention(**PACKED, cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K)


def test_good_calls_pass() -> None:
    assert attention(Q, K, V).shape == (B, H, M, DV)
    assert attention(**PACKED, cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K.int()).shape == (9, H, DV)
    assert attention_map(Q, K).shape == (B, H, 64, 64)
