"""Programs that write to `_flat_weights` or replace weights by name affect our layers as they affect torch.nn's. Each
use is a function that is applied to torch's layer and to ours."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import dlkernels
from tests.support.module_pairs import LAYERS, B, F, T, assert_same, flat

pytestmark = pytest.mark.o0_skip(reason="what is done to weights is Python alone")


def _scaled(layer: Any, factor: float) -> list[Tensor]:
    return [weight.detach() * factor for weight in layer.parameters()]


def _assign(layer: Any) -> None:
    layer._flat_weights = _scaled(layer, 0.5)


def _assign_item(layer: Any) -> None:
    layer._flat_weights[1] = _scaled(layer, 2.0)[1]


def _assign_after_a_call(layer: Any) -> None:
    layer(torch.randn(T, B, F))
    weights = layer._flat_weights
    layer(torch.randn(T, B, F))
    weights[0] = _scaled(layer, 3.0)[0]


def _assign_then_the_same_by_name(layer: Any) -> None:
    _assign(layer)
    layer.weight_hh_l0 = layer.weight_hh_l0


def _assign_then_another_by_name(layer: Any) -> None:
    _assign(layer)
    layer.weight_hh_l0 = nn.Parameter(_scaled(layer, 0.1)[1])


def _assign_then_to(layer: Any) -> None:
    _assign(layer)
    layer.to(torch.float32).float()


def _assign_then_functional_call(layer: Any) -> None:
    _assign(layer)
    torch.func.functional_call(layer, {"bias_ih_l0": _scaled(layer, 7.0)[2]}, (torch.randn(T, B, F),))


def _assign_without_the_parameters(layer: Any) -> None:
    weights = _scaled(layer, 0.5)
    for name in layer._flat_weights_names:
        del layer._parameters[name]
    layer._flat_weights = weights


def _weight_drop(layer: Any) -> None:
    raw = layer.weight_hh_l0
    del layer._parameters["weight_hh_l0"]
    layer.register_parameter("weight_hh_l0_raw", nn.Parameter(raw.data))
    layer.weight_hh_l0 = layer.weight_hh_l0_raw * 0.5
    layer.flatten_parameters = lambda: None


def _weight_drop_twice(layer: Any) -> None:
    _weight_drop(layer)
    layer(torch.randn(T, B, F))
    layer.weight_hh_l0 = layer.weight_hh_l0_raw * 0.25


def _pruned(layer: Any) -> None:
    prune.l1_unstructured(layer, "weight_hh_l0", amount=0.5)


def _assign_then_parametrize(layer: Any) -> None:
    _assign(layer)
    nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")


def _spectral_norm(layer: Any) -> None:
    torch.manual_seed(1)
    nn.utils.spectral_norm(layer, "weight_hh_l0")


USES = [
    _assign, _assign_item, _assign_after_a_call, _assign_then_the_same_by_name, _assign_then_another_by_name,
    _assign_then_to, _assign_then_functional_call, _assign_without_the_parameters, _weight_drop, _weight_drop_twice,
    _pruned, _assign_then_parametrize, _spectral_norm,
]  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_copies_forget_an_assigned_list(name: str) -> None:
    x, same = torch.randn(T, B, F), []
    for lib in (nn, dlkernels.nn):
        layer = getattr(lib, name)(F, 6)
        _assign(layer)
        copies = (copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer)))
        same.append([torch.equal(other(x)[0], layer(x)[0]) for other in copies])
    assert same[0] == same[1] == [False] * 3


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__.strip("_"))
@pytest.mark.parametrize("name", LAYERS)
def test_flat_weights_are_those_of_torch(name: str, use: Callable[[Any], None]) -> None:
    theirs = getattr(nn, name)(F, 6)
    ours = getattr(dlkernels.nn, name)(F, 6)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(T, B, F)
    torch.manual_seed(2)
    use(theirs)
    torch.manual_seed(2)
    use(ours)
    for _ in range(2):
        with torch.no_grad():
            assert_same(theirs(x), ours(x))
        assert_same(theirs(x), ours(x))
    assert_same(theirs._flat_weights, ours._flat_weights)
    expected, result = flat(theirs(x))[0], flat(ours(x))[0]
    assert expected.requires_grad == result.requires_grad
    if expected.requires_grad:
        expected.sum().backward(retain_graph=True)  # weight drop computed the weight once for several calls
        result.sum().backward(retain_graph=True)
    for want, got in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert (want.grad is None) == (got.grad is None)
        if want.grad is not None:
            torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_assigned_weights_survive_patch_and_unpatch_and_serve_prepack(name: str) -> None:
    layer = getattr(nn, name)(F, 6)
    x = torch.randn(T, B, F)
    plain = layer(x)
    layer._flat_weights = _scaled(layer, 0.5)
    expected = layer(x)
    dlkernels.patch(layer)
    assert_same(expected, layer(x))
    with torch.no_grad():
        assert_same(expected, layer.prepack()(x))
    compiled = torch.compile(lambda x: layer(x)[0], backend="eager", fullgraph=True)
    assert_same(expected[0], compiled(x))
    dlkernels.unpatch(layer)
    assert_same(expected, layer(x))
    layer._init_flat_weights()
    assert_same(plain, dlkernels.patch(layer)(x))


@pytest.mark.parametrize("name", LAYERS)
def test_prepack_after_another_layers_weight_was_assigned(name: str) -> None:
    layer, other = getattr(dlkernels.nn, name)(F, 6).prepack(), getattr(dlkernels.nn, name)(F, 6)
    x = torch.randn(T, B, F)
    peer = getattr(nn, name)(F, 6)
    peer.load_state_dict(layer.state_dict())
    layer.weight_hh_l0 = other.weight_hh_l0
    with torch.no_grad():
        peer.weight_hh_l0.copy_(other.weight_hh_l0)
        assert_same(peer(x), layer(x))
        layer.prepack()
        assert_same(peer(x), layer(x))
        other.weight_hh_l0.mul_(0.5)
        peer.weight_hh_l0.mul_(0.5)
        assert_same(peer(x), layer(x))
