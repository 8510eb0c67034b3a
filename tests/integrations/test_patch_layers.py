"""Tests `patch` and `unpatch` of recurrent layers and cells: what is swapped, kept and reported."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import dlkernels
from tests.support.hooks_survive import check_hooks_survive

NAMES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class OwnForward(nn.LSTM):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        return super().forward(input * 2, hx)


class Renamed(nn.GRUCell):
    pass


def build(name: str) -> tuple[nn.Module, Tensor]:
    module = getattr(nn, name)(4, 6, dtype=torch.float64)
    shape = (2, 4) if name.endswith("Cell") else (3, 2, 4)
    return module, torch.randn(shape, dtype=torch.float64)


def first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else first(result[0])


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(name: str) -> None:
    module, x = build(name)
    original = vars(module).keys()
    parameters = list(module.parameters())
    expected = first(module(x))
    assert dlkernels.patch(module) is module
    assert type(module) is getattr(dlkernels.nn, name)
    torch.testing.assert_close(first(module(x)), expected)
    assert dlkernels.patch_report(module).patched == [""]
    assert dlkernels.patch(module) is module
    dlkernels.unpatch(module)
    assert type(module) is getattr(nn, name)
    assert vars(module).keys() == original
    assert all(a is b for a, b in zip(parameters, module.parameters(), strict=True))
    assert torch.equal(first(module(x)), expected)
    # After unpatch, torch's own list of weights contains the weight that was assigned while patched.
    with torch.no_grad():
        dlkernels.patch(module)
        setattr(module, "bias_hh" if name.endswith("Cell") else "bias_hh_l0", nn.Parameter(parameters[3] + 1))
        changed = first(module(x))
        torch.testing.assert_close(first(dlkernels.unpatch(module)(x)), changed)
    assert not torch.equal(changed, expected)


def test_whole_model_in_place_or_copied() -> None:
    shared = nn.GRU(4, 4)
    model = nn.ModuleDict({
        "a": nn.Sequential(nn.Linear(4, 4), shared), "b": shared, "cells": nn.ModuleList([nn.LSTMCell(4, 4)]),
    })  # fmt: skip
    model.eval()
    shared.weight_ih_l0.requires_grad_(False)
    outside = [shared]
    duplicate = dlkernels.patch(model, copy=True)
    assert type(shared) is nn.GRU
    assert type(duplicate["b"]) is dlkernels.nn.GRU
    dlkernels.patch(model)
    assert model["a"][1] is model["b"] is outside[0]
    assert type(shared) is dlkernels.nn.GRU
    assert not shared.training
    assert not shared.weight_ih_l0.requires_grad
    report = dlkernels.patch_report(model)
    assert report.patched == ["a.1", "cells.0"]
    assert "a.1: GRU patched" in str(report)
    assert str(dlkernels.patch_report(nn.Linear(2, 2))) == "no layers that dlkernels has"


def test_verbose_prints_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    dlkernels.patch(nn.Sequential(nn.GRU(2, 3)), verbose=True)
    printed = capsys.readouterr().out
    assert printed.startswith("0: GRU patched\nnote: tools that look a layer up by its exact type")
    assert printed == f"{dlkernels.patch_report(dlkernels.patch(nn.Sequential(nn.GRU(2, 3))))}\n"
    assert "note" not in str(dlkernels.patch_report(nn.Sequential(nn.GRU(2, 3))))


@pytest.mark.parametrize("name", NAMES)
def test_hooks_and_their_handles_survive(name: str) -> None:
    module, x = build(name)
    check_hooks_survive(module, module, lambda: first(module(x.requires_grad_())))


@pytest.mark.parametrize("name", NAMES)
def test_parametrizations_survive(name: str) -> None:
    module, x = build(name)
    weight = "weight_hh" if name.endswith("Cell") else "weight_hh_l0"
    parametrize.register_parametrization(module, weight, Doubled())
    nn.utils.parametrizations.weight_norm(module, weight.replace("hh", "ih"))
    module.register_buffer("extra", torch.ones(1))
    keys, expected = list(module.state_dict()), first(module(x))
    dlkernels.patch(module)
    assert isinstance(module, getattr(dlkernels.nn, name))
    assert type(module).__name__ == f"Parametrized{name}"
    assert list(module.state_dict()) == keys
    torch.testing.assert_close(first(module(x)), expected)
    torch.testing.assert_close(first(copy.deepcopy(module)(x)), expected)
    # unpatch keeps an edit that was made while the module was patched.
    parametrize.remove_parametrizations(module, weight)
    dlkernels.unpatch(module)
    assert isinstance(module, getattr(nn, name))
    assert parametrize.is_parametrized(module)
    torch.testing.assert_close(first(module(x)), expected)
    parametrize.remove_parametrizations(module, weight.replace("hh", "ih"))
    assert type(module) is getattr(nn, name)
    torch.testing.assert_close(first(module(x)), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_hook_style_weight_norm_survives(name: str) -> None:
    module, x = build(name)
    weight = "weight_hh" if name.endswith("Cell") else "weight_hh_l0"
    nn.utils.weight_norm(module, weight)
    expected = first(module(x))
    dlkernels.patch(module)
    torch.testing.assert_close(first(module(x)), expected)
    first(module(x)).sum().backward()
    assert getattr(module, f"{weight}_g").grad is not None
    nn.utils.remove_weight_norm(dlkernels.unpatch(module), weight)
    torch.testing.assert_close(first(module(x)), expected)


def test_copies_of_a_patched_model() -> None:
    model = dlkernels.patch(nn.Sequential(nn.LSTM(4, 6)))
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(again[0]) is dlkernels.nn.LSTM
        assert type(dlkernels.unpatch(again)[0]) is nn.LSTM
    native = nn.Sequential(dlkernels.nn.LSTM(4, 6))
    assert type(dlkernels.unpatch(native)[0]) is dlkernels.nn.LSTM
    assert dlkernels.patch_report(native).entries[0].state == "native"


def test_prepacked_weights_go_with_unpatch() -> None:
    layer = dlkernels.patch(nn.GRU(4, 6)).prepack()  # type: ignore[operator]
    dlkernels.unpatch(layer)
    assert "_prepacked" not in vars(layer)
    assert repr(layer) == "GRU(4, 6)"


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_skips_are_named_with_their_reason() -> None:
    replaced = nn.GRU(2, 3)
    replaced.forward = lambda input: input  # type: ignore[method-assign]
    model = nn.ModuleDict({
        "own": OwnForward(2, 3), "renamed": Renamed(2, 3), "replaced": replaced,
        "scripted": torch.jit.script(nn.LSTM(2, 3)), "plain": nn.RNN(2, 3),
    })  # fmt: skip
    assert dlkernels.patch_report(model).names("torch") == ["plain"]
    with pytest.warns(UserWarning, match="left 4 layer") as caught:
        dlkernels.patch(model)
    reasons = {entry.name: entry.reason for entry in dlkernels.patch_report(model).skipped}
    assert reasons.keys() == {"own", "renamed", "replaced", "scripted"}
    assert "own forward" in reasons["own"]
    assert "subclass of torch.nn.GRUCell" in reasons["renamed"]
    assert "replaced on the instance" in reasons["replaced"]
    assert "TorchScript" in reasons["scripted"]
    assert all(name in str(caught[0].message) for name in reasons)
    assert type(model["plain"]) is dlkernels.nn.RNN
    assert type(model["own"]) is OwnForward


def test_a_patched_model_trains_as_before() -> None:
    def losses(patched: bool) -> list[float]:
        torch.manual_seed(0)
        model = nn.ModuleList([nn.LSTM(4, 6, num_layers=2, dropout=0.3), nn.Linear(6, 1)]).double()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        if patched:
            dlkernels.patch(model)
        x, out = torch.randn(5, 3, 4, dtype=torch.float64), []
        for _ in range(4):
            loss = model[1](model[0](x)[0]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            out.append(loss.item())
        return out

    assert losses(True) == pytest.approx(losses(False), rel=1e-9)


def test_nothing_is_warned_without_a_skip() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dlkernels.patch(nn.Sequential(nn.Linear(2, 2), nn.GRU(2, 2)))


def test_pickles_of_earlier_versions_find_the_layers() -> None:
    """Old pickles name the modules in which the classes were then defined; new pickles name the public module."""
    homes = {
        "attention": ("MultiheadAttention",),
        "cells": ("RNNCell", "LSTMCell", "GRUCell"),
        "rnn": ("RNN", "LSTM", "GRU"),
        "transformer": ("TransformerEncoderLayer", "TransformerDecoderLayer"),
    }
    for home, names in homes.items():
        for name in names:
            layer = getattr(dlkernels.nn, name)
            assert pickle.loads(f"cdlkernels.nn.{home}\n{name}\n.".encode()) is layer
            assert layer.__module__ == "dlkernels.nn"
