"""Layers with layer normalisation, zoneout and recurrent dropout, what they are called with, and what the oracle of
tests/support/variant_oracle.py makes of that."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import dlkernels.nn
from dlkernels.testing import Verdict, within_rule
from tests.support import variant_oracle

Results = dict[str, Tensor]
SEED = 7


@dataclass(frozen=True)
class Case:
    """A call of a layer, in training if `training`. With `packed` the lengths are those of a PackedSequence. The oracle
    runs on the CPU with the masks of the device."""

    name: str = "LayerNormLSTM"  # a class of dlkernels.nn
    T: int = 5
    B: int = 3
    I: int = 4
    H: int = 6
    layers: int = 1
    bias: bool = True
    bidirectional: bool = False
    batch_first: bool = False
    lengths: tuple[int, ...] | None = None
    packed: bool = False
    hx: bool = True
    training: bool = True
    zoneout: Any = 0.0
    recurrent_dropout: float = 0.0
    eps: float = 1e-5
    dtype: torch.dtype = torch.float64
    seed: int = 0  # of the numbers
    device: str = "cpu"

    @property
    def lstm(self) -> bool:
        return self.name.endswith("LSTM")

    @property
    def normalised(self) -> bool:
        return self.name.startswith("LayerNorm")

    def module(self, dtype: torch.dtype) -> Any:
        """The layer, with random parameters that are the same numbers in every dtype and exact in the case's."""
        kwargs: dict[str, Any] = {"eps": self.eps} if self.normalised else {}
        module = getattr(dlkernels.nn, self.name)(
            self.I, self.H, num_layers=self.layers, bias=self.bias, batch_first=self.batch_first,
            bidirectional=self.bidirectional, zoneout=self.zoneout, recurrent_dropout=self.recurrent_dropout, **kwargs,
        ).double().train(self.training)  # fmt: skip
        generator = torch.Generator().manual_seed(3 * self.seed + 1)
        with torch.no_grad():
            for name, p in module.named_parameters():
                noise = torch.rand(p.shape, generator=generator, dtype=torch.float64) - 0.5
                value = 1 + noise if name.startswith("norm") else noise * (2 if name.startswith("bias") else 1.2)
                p.copy_(value.to(self.dtype))
        return module.to(dtype)

    def arguments(self, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...] | None, Tensor | None]:
        """input, hx (as a tuple, also for the GRU) and lengths."""
        generator = torch.Generator().manual_seed(3 * self.seed + 2)
        shape = (self.B, self.T, self.I) if self.batch_first else (self.T, self.B, self.I)
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype).to(dtype)
        states = None
        if self.hx:
            entries = self.layers * (1 + self.bidirectional)
            states = tuple(
                torch.randn(entries, self.B, self.H, generator=generator, dtype=torch.float64).to(self.dtype).to(dtype)
                for _ in range(1 + self.lstm)
            )
        return x, states, None if self.lengths is None else torch.tensor(self.lengths)

    def masks(self) -> list[variant_oracle.Masks]:
        """Those that the layer draws after `torch.manual_seed(SEED)`; none in evaluation."""
        if not self.training:
            return []
        rows = (sum(self.lengths or ()),) if self.packed else (self.T, self.B)
        sizes = (1 + self.bidirectional, rows, self.B, self.H)
        torch.manual_seed(SEED)
        return [
            variant_oracle.draw(*sizes, self.zoneout, self.recurrent_dropout, self.lstm, self.device)
            for _ in range(self.layers)
        ]


def call(case: Case, module: Any, x: Tensor, states: Any, lengths: Tensor | None, oracle: bool) -> Results:
    """The results of the layer, or of the oracle with the layer's parameters."""
    given: Any = x
    if case.packed:
        given = pack_padded_sequence(x, lengths, case.batch_first, enforce_sorted=False)
        lengths = None
    elif lengths is not None:
        lengths = lengths.to(x.device)
    if oracle:
        return variant_oracle.layers(module, given, states, lengths, dict(module.named_parameters()), case.masks())
    torch.manual_seed(SEED)
    hx = states if states is None or case.lstm else states[0]
    options = {} if lengths is None else {"lengths": lengths}
    y, last = module(given, hx, **options)
    y = y.data if isinstance(y, PackedSequence) else y
    return {"y": y, "h": last[0], "c": last[1]} if case.lstm else {"y": y, "h": last}


def results(case: Case, dtype: torch.dtype, oracle: bool = False, gradients: bool = True) -> Results:
    """What the layer, or the oracle in this dtype, returns, and the gradients of all arguments and parameters."""
    device = "cpu" if oracle else case.device
    module = case.module(dtype).to(device)
    x, states, lengths = case.arguments(dtype)
    x, states = x.to(device), None if states is None else tuple(state.to(device) for state in states)
    inputs = {"x": x, **{f"state{k}": state for k, state in enumerate(states or ())}}
    for tensor in inputs.values():
        tensor.requires_grad_(gradients)
    module.requires_grad_(gradients)
    found = call(case, module, x, states, lengths, oracle)
    if gradients:
        generator = torch.Generator().manual_seed(3 * case.seed + 3)
        loss = sum(
            (value * torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)).sum()
            for value in found.values()
        )
        sources = {**inputs, **dict(module.named_parameters())}
        grads = torch.autograd.grad(loss, list(sources.values()))  # type: ignore[arg-type]
        found |= {f"d{name}": grad for name, grad in zip(sources, grads, strict=True)}
    return {name: value.detach().cpu() for name, value in found.items()}


def verdicts(case: Case, gradients: bool) -> dict[str, Verdict]:
    """The tolerance rule for each result. What it measures by is the oracle in the dtype of the case: the same
    computation in plain operations of torch."""
    ours = results(case, case.dtype, gradients=gradients)
    ref = results(case, torch.float64, oracle=True, gradients=gradients)
    theirs = ref if case.dtype == torch.float64 else results(case, case.dtype, oracle=True, gradients=gradients)
    assert ours.keys() == ref.keys()
    assert {value.dtype for value in ours.values()} == {case.dtype}
    return {
        name: within_rule(value, theirs[name], ref[name], case.dtype, grad=name.startswith("d"))
        for name, value in ours.items()
    }


def check(case: Case, gradients: bool = True) -> None:
    """Asserts that the layer keeps the tolerance rule. The largest error of a few values is mostly chance, so a result
    that breaks the rule is looked at again: our median error for other numbers must be within the median limit."""
    found = verdicts(case, gradients)
    broken = [name for name, verdict in found.items() if not verdict.ok]
    if broken and case.dtype != torch.float64:
        others = [verdicts(replace(case, seed=case.seed + k), gradients) for k in range(1, 10)]
        for name in broken:
            ours, limit = (
                statistics.median(getattr(other[name], field) for other in others) for field in ("ours", "limit")
            )
            if ours <= limit and found[name].ours <= 4 * max(limit, found[name].limit):
                found[name] = found[name]._replace(ok=True)
    for name, verdict in found.items():
        assert verdict.ok, f"{case}\n{name}: {verdict}"


def of_both(**options: Any) -> list[Case]:
    return [Case(name, **options) for name in ("LayerNormLSTM", "LayerNormGRU")]


def variants() -> dict[str, Case]:
    """One case for each feature, by a name for the test."""
    found = {}
    for name, other in (("LSTM", "LayerNormLSTM"), ("GRU", "LayerNormGRU")):
        pair = (0.3, 0.2) if name == "LSTM" else 0.2
        found[other] = Case(other)
        found[f"{other}-no-bias"] = Case(other, bias=False, eps=0.1)
        found[f"{name}-zoneout"] = Case(name, zoneout=0.4)
        found[f"{name}-zoneout-rates"] = Case(name, zoneout=pair, training=False)
        found[f"{name}-dropout"] = Case(name, recurrent_dropout=0.4)
        found[f"{other}-all"] = Case(other, zoneout=pair, recurrent_dropout=0.3)
        found[f"{other}-all-evaluated"] = Case(other, zoneout=pair, recurrent_dropout=0.3, training=False)
    found["LSTM-zoneout-c"] = Case("LSTM", zoneout=(0.5, 0.0))
    found["LSTM-zoneout-h"] = Case("LSTM", zoneout=(0.0, 0.5))
    return found


FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-hx": {"hx": False},
    "bidirectional": {"bidirectional": True},
    "two-layers": {"layers": 2, "batch_first": True},
    "lengths": {"lengths": (3, 0, 5, 2), "B": 4, "bidirectional": True},
    "packed": {"lengths": (3, 1, 5, 5), "B": 4, "packed": True, "bidirectional": True, "layers": 2},
}


def in_form(case: Case, form: str) -> Case:
    return replace(case, **FORMS[form])
