"""The gradients that layers with layer normalisation and zoneout compute from records with slots of 16 bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.support.variant_cases import Case, check, variants

VARIANTS = variants()
SIZES = ({"H": 2, "I": 16, "T": 9}, {"H": 33, "I": 1, "T": 9}, {"H": 96, "I": 40, "T": 20})


@pytest.mark.parametrize("variant", ("LayerNormLSTM", "LayerNormGRU", "LayerNormLSTM-all", "LSTM-zoneout-c"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gradients(variant: str, dtype: torch.dtype, size: dict[str, int], isa: str) -> None:
    """With two units or one input feature, the gradients of normalised products are what is left of a difference of
    values that have been rounded to 16 bits."""
    check(replace(VARIANTS[variant], dtype=dtype, B=7, **size))


@pytest.mark.parametrize("name", ("LayerNormLSTM", "LayerNormGRU", "LSTM", "GRU"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_gates_near_one(name: str, dtype: torch.dtype, isa: str) -> None:
    """A forget or update gate of 0.999 for 200 steps, which would be 1 in bfloat16."""
    case = Case(name, T=200, H=16, zoneout=0.0 if name.startswith("LayerNorm") else 1e-3, training=False, dtype=dtype)

    def gradients(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        module = case.module(dtype)
        x, states, _ = case.arguments(dtype)
        assert states is not None
        first = states[-1].requires_grad_()
        bias = module.bias_ih_l0
        with torch.no_grad():
            bias[case.H : 2 * case.H] = 7
        y, _ = module(x, (states[0], first) if case.lstm else first)
        of_first, of_bias = torch.autograd.grad(y[-1].sum(), (first, bias))
        return of_first.double(), of_bias[case.H : 2 * case.H].double()

    for got, want in zip(gradients(dtype), gradients(torch.float64), strict=True):
        assert (got - want).norm() < 0.03 * want.norm()
