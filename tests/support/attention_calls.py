"""Runs cases of attention_oracle.py with `dlkernels.functional.attention` and compares the results with float64."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import dlkernels.attention.functional
from dlkernels import functional
from dlkernels.testing import FACTOR_FORWARD, FACTOR_GRAD, error, floor
from tests.support import attention_oracle as oracle
from tests.support.attention_oracle import Case, Data, Results, result_dtype

CAUSAL: dict[int, Any] = {0: False, 1: True, 2: "bottom_right"}


@contextmanager
def seed_drawn(rng: Tensor | None) -> Iterator[None]:
    """Within the block, `functional.attention` uses `rng` as its dropout seed; None leaves it to draw one."""
    drawn = dlkernels.attention.functional.draw_seed
    if rng is not None:
        dlkernels.attention.functional.draw_seed = lambda: rng
    try:
        yield
    finally:
        dlkernels.attention.functional.draw_seed = drawn


def arguments(case: Case, data: Data) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors by name and the other arguments, in the dtypes and the memory layout of the case."""
    (q, k, v), (mask, slopes, sinks, cu_q, cu_k, *_) = oracle.op_arguments(case, data)
    tensors = {"q": q, "k": k, "v": v, "attn_mask": mask, "alibi_slopes": slopes, "sinks": sinks}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    options = {
        "causal": CAUSAL[case.causal], "dropout_p": case.dropout, "softmax_scale": case.scale, "window": case.window,
        "softcap": case.softcap, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k,
    }  # fmt: skip
    return tensors, options


NAMES = {"q": "dq", "k": "dk", "v": "dv", "attn_mask": "dmask", "alibi_slopes": "dslopes", "sinks": "dsinks"}


def prepare(case: Case, data: Data, grads: bool = True) -> Callable[[], Results]:
    """Returns the call that `run` makes; all its tensors are made beforehand."""
    tensors, options = arguments(case, data)
    leaves = {
        name: tensor.detach().requires_grad_() if grads and tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    variables = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    cotangents = [data.do.to(case.dtype)] + ([] if data.dlse is None else [data.dlse.to(case.small)])

    def call() -> Results:
        with seed_drawn(data.rng):
            outputs = functional.attention(**leaves, **options, return_lse=True)
        results = {name: output.detach() for name, output in zip(("o", "lse"), outputs, strict=True)}
        if not grads:
            return results
        found = torch.autograd.grad(outputs[: len(cotangents)], list(variables.values()), cotangents)
        return {**results, **{NAMES[name]: grad for name, grad in zip(variables, found, strict=True)}}

    return call


def run(case: Case, data: Data, grads: bool = True) -> Results:
    """Computes o, lse and, with `grads`, every gradient with `functional.attention`."""
    return prepare(case, data, grads)()


# The largest error of a few values is mostly chance, as layer_cases.py explains. If a result breaks the rule, the case
# is repeated with NEIGHBOURS slightly changed inputs. It passes if our median error is within the rule there and the
# error of the original inputs is at most RETRY_CAP times the limit.
NEIGHBOURS = 15
RETRY_CAP = 4.0
second_looks: list[str] = []


def _limit(name: str, measure: float, reference: Tensor, dtype: torch.dtype) -> float:
    return (FACTOR_GRAD if name[0] == "d" else FACTOR_FORWARD) * measure + floor(reference, dtype)


def _compared(case: Case, data: Data, ours: Results) -> dict[str, tuple[float, Tensor]]:
    """Returns our error and the float64 value of each result."""
    reference = oracle.run_oracle(case, data, torch.float64)
    assert ours.keys() == reference.keys(), (ours.keys(), reference.keys())
    for name, value in ours.items():
        assert value.dtype == result_dtype(case, name) and value.shape == reference[name].shape, (name, case)
    return {name: (error(value, reference[name]), reference[name]) for name, value in ours.items()}


def _measured(case: Case, data: Data, compared: dict[str, tuple[float, Tensor]]) -> dict[str, tuple[float, float]]:
    """Returns, for each result, our error and the largest finite error of plain PyTorch in the case's dtype."""
    theirs = oracle.measures(case, data)
    found = {}
    for name, (mine, reference) in compared.items():
        measures = [error(results[name], reference) for results in theirs]
        found[name] = mine, max((e for e in measures if math.isfinite(e)), default=0.0)
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


def check(case: Case, data: Data | None = None, other: Callable[[Case, Data], Results] | None = None) -> Results:
    """Asserts that every result of `run`, or of `other` in its place, keeps the tolerance rule. Returns the results."""
    data = oracle.make_data(case) if data is None else data
    ours = (other or run)(case, data)
    compared = _compared(case, data, ours)
    # The rule takes a tensor's largest error, so one lse of 1e30 would excuse all the others. Those below 1e4 are
    # therefore also compared on their own.
    reference = compared["lse"][1]
    near, bound = reference.abs() < 1e4, 1e-9 if case.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(ours["lse"].double()[near], reference[near], rtol=bound, atol=bound)
    if all(mine <= floor(reference, result_dtype(case, name)) for name, (mine, reference) in compared.items()):
        return ours  # every error is below the floor, so PyTorch's own error does not matter
    nearby: dict[str, tuple[list[float], list[float]]] = {}
    for name, (found, measure) in _measured(case, data, compared).items():
        reference, dtype = compared[name][1], result_dtype(case, name)
        limit = _limit(name, measure, reference, dtype)
        if found <= limit:
            continue
        second_looks.append(f"{case}: {name}")
        if not nearby:
            for moved in _neighbours(case, data):
                for key, errors in _measured(case, moved, _compared(case, moved, run(case, moved))).items():
                    for each, value in zip(nearby.setdefault(key, ([], [])), errors, strict=True):
                        each.append(value)
        mine, theirs = map(statistics.median, nearby[name])
        usual = _limit(name, theirs, reference, dtype)
        assert mine <= usual and found <= RETRY_CAP * max(limit, usual), (
            f"{name} {case}: error {found:.3e}, limit {limit:.3e}, plain PyTorch {measure:.3e}; "
            f"nearby ours {mine:.3e}, PyTorch {theirs:.3e}"
        )
    return ours
