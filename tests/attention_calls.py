"""Cases of attention_oracle.py run by `dlkernels.functional.attention`, and held against float64."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attention_oracle as oracle
import torch
from attention_oracle import Case, Data, Results, result_dtype
from torch import Tensor

import dlkernels.attention
from dlkernels import functional
from dlkernels.testing import FACTOR_FORWARD, FACTOR_GRAD, error, floor

CAUSAL: dict[int, Any] = {0: False, 1: True, 2: "bottom_right"}


@contextmanager
def seed_drawn(rng: Tensor | None) -> Iterator[None]:
    """The dropout mask that the next calls draw."""
    drawn = dlkernels.attention.draw_seed
    if rng is not None:
        dlkernels.attention.draw_seed = lambda: rng
    try:
        yield
    finally:
        dlkernels.attention.draw_seed = drawn


def arguments(case: Case, data: Data) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(the floating-point tensors by name, the other arguments), in the dtypes and memory layout of the case."""
    (q, k, v), (mask, slopes, sinks, cu_q, cu_k, *_) = oracle.op_arguments(case, data)
    tensors = {"q": q, "k": k, "v": v, "attn_mask": mask, "alibi_slopes": slopes, "sinks": sinks}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    options = {
        "causal": CAUSAL[case.causal], "dropout_p": case.dropout, "softmax_scale": case.scale, "window": case.window,
        "softcap": case.softcap, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k,
    }  # fmt: skip
    return tensors, options


NAMES = {"q": "dq", "k": "dk", "v": "dv", "attn_mask": "dmask", "alibi_slopes": "dslopes", "sinks": "dsinks"}


def run(case: Case, data: Data, grads: bool = True) -> Results:
    """o, lse and every gradient, by `functional.attention`."""
    tensors, options = arguments(case, data)
    leaves = {
        name: tensor.detach().requires_grad_() if grads and tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    with seed_drawn(data.rng):
        o, lse = functional.attention(**leaves, **options, return_lse=True)
    results = {"o": o.detach(), "lse": lse.detach()}
    if not grads:
        return results
    variables = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    cotangents = [(o, data.do.to(case.dtype))]
    if data.dlse is not None:
        cotangents.append((lse, data.dlse.to(lse.dtype)))
    found = torch.autograd.grad([out for out, _ in cotangents], list(variables.values()), [d for _, d in cotangents])
    return {**results, **{NAMES[name]: grad for name, grad in zip(variables, found, strict=True)}}


# See helpers.py: the error of a few values is one throw of the dice. A verdict against us is looked at again, with
# inputs close by, where our median error has to be within the rule; the one throw may be off by no more than RETRY_CAP.
NEIGHBOURS = 15
RETRY_CAP = 4.0
second_looks: list[str] = []


def _limit(name: str, measure: float, reference: Tensor, dtype: torch.dtype) -> float:
    return (FACTOR_GRAD if name[0] == "d" else FACTOR_FORWARD) * measure + floor(reference, dtype)


def _errors(case: Case, data: Data, ours: Results) -> dict[str, tuple[float, float, Tensor]]:
    """Of each result: our error, the largest of plain PyTorch's in the case's dtype, and the float64 value."""
    reference = oracle.run_oracle(case, data, torch.float64)
    theirs = oracle.measures(case, data)
    assert ours.keys() == reference.keys(), (ours.keys(), reference.keys())
    found = {}
    for name, value in ours.items():
        assert value.dtype == result_dtype(case, name) and value.shape == reference[name].shape, (name, case)
        measures = [error(results[name], reference[name]) for results in theirs]
        measure = max((e for e in measures if math.isfinite(e)), default=0.0)
        found[name] = error(value, reference[name]), measure, reference[name]
    return found


def _neighbours(case: Case, data: Data) -> Iterator[Data]:
    generator = torch.Generator().manual_seed(case.seed)
    for _ in range(NEIGHBOURS):
        moved = {}
        for name in ("q", "k", "v", "do"):
            values = getattr(data, name)
            factors = 1 + (torch.rand(values.shape, generator=generator, dtype=torch.float64) - 0.5) / 50
            moved[name] = (values * factors).to(case.dtype).double()
        yield dataclasses.replace(data, **moved)


def check(case: Case, data: Data | None = None) -> Results:
    """Every result under the tolerance rule; returns ours."""
    data = oracle.make_data(case) if data is None else data
    ours = run(case, data)
    nearby: dict[str, tuple[list[float], list[float]]] = {}
    for name, (found, measure, reference) in _errors(case, data, ours).items():
        dtype = result_dtype(case, name)
        limit = _limit(name, measure, reference, dtype)
        if found <= limit:
            continue
        second_looks.append(f"{case}: {name}")
        if not nearby:
            for moved in _neighbours(case, data):
                for key, (mine, theirs, _) in _errors(case, moved, run(case, moved)).items():
                    lists = nearby.setdefault(key, ([], []))
                    lists[0].append(mine)
                    lists[1].append(theirs)
        mine, theirs = map(statistics.median, nearby[name])
        usual = _limit(name, theirs, reference, dtype)
        assert mine <= usual and found <= RETRY_CAP * max(limit, usual), (
            f"{name} {case}: error {found:.3e}, limit {limit:.3e}, plain PyTorch {measure:.3e}; "
            f"nearby ours {mine:.3e}, PyTorch {theirs:.3e}"
        )
    return ours
