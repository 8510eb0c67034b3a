"""What PyTorch's own tests try with nn.RNN, LSTM and GRU, with `dlkernels.enable` off and on."""

from __future__ import annotations

import copy
import io
import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from tests.support.enabled_calls import flat
from tests.support.enabled_calls import off_again as off_again
from tests.support.torch_cases import (
    LAYERS,
    MARKS_OF_CASES,
    B,
    Case,
    H,
    I,
    T,
    compare,
    error,
    gradients,
    into,
    state,
)
from tests.support.torch_cases import in_double as in_double

pytestmark = MARKS_OF_CASES

OF_LAYERS: dict[str, Case] = {}


@into(OF_LAYERS)
def no_state_is_a_state_of_zeros(mode: str) -> Any:
    found = []
    for layers, both in itertools.product((1, 2), (False, True)):
        layer, x = LAYERS[mode](I, H, layers, bidirectional=both), torch.randn(T, B, I)
        zeros = torch.zeros(layers * (1 + both), B, H)
        outputs = layer(x)
        torch.testing.assert_close(flat(outputs), flat(layer(x, (zeros, zeros) if mode == "lstm" else zeros)))
        found.append(outputs)
    return found


@into(OF_LAYERS)
def a_state_that_is_given(mode: str) -> Any:
    layer, x, hx = LAYERS[mode](I, H, 2, bidirectional=True), torch.randn(T, B, I), state(mode, 4, B, H)
    leaves = [t.requires_grad_() for t in (x, *flat(hx))]
    results = layer(x, hx)
    return results, gradients(results, *leaves, *layer.parameters())


@into(OF_LAYERS)
def a_batch_of_no_sequences(mode: str) -> Any:
    layer, x = LAYERS[mode](I, H), torch.randn(T, 0, I, requires_grad=True)
    results = layer(x)
    assert results[0].shape == (T, 0, H)
    return results, gradients(results, x, *layer.parameters())


@into(OF_LAYERS)
def dropout_between_the_layers(mode: str) -> Any:
    """Evaluation has no dropout, the same seed gives the same mask, and with probability 1 nothing passes."""
    found = []
    for p in (0.0, 0.276, 0.731, 1.0):
        layer, x = LAYERS[mode](I, 50, 2, dropout=p), torch.randn(T, B, I)
        plain, first, second = layer.eval()(x)[0], layer.train()(x)[0], layer(x)[0]
        torch.manual_seed(7)
        seeded = layer(x)[0]
        torch.manual_seed(7)
        assert torch.equal(layer(x)[0], seeded)
        assert torch.equal(first, second) == (p in (0.0, 1.0))
        assert torch.equal(first, plain) == (p == 0.0)
        if p == 1.0:
            assert torch.equal(layer(x * 2)[0], first)
        found.append((plain, first, second, seeded))
    return found


@into(OF_LAYERS)
def dropout_that_changes_between_calls(mode: str) -> Any:
    layer, x = LAYERS[mode](I, 50, 3, dropout=0.0), torch.randn(T, B, I)
    found = []
    for p in (0.0, 0.5, 0.0, 0.9):
        layer.dropout = p
        found.append(layer(x)[0])
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
    return found


@into(OF_LAYERS)
def one_sequence_without_a_batch(mode: str) -> Any:
    found = []
    for both, first in itertools.product((False, True), repeat=2):
        layer = LAYERS[mode](I, H, 2, bidirectional=both, batch_first=first)
        x, hx = torch.randn(T, I), state(mode, 2 * (1 + both), H)
        batched = (hx[0][:, None], hx[1][:, None]) if mode == "lstm" else hx[:, None]
        results, batch = layer(x, hx), layer(x[None] if first else x[:, None], batched)
        torch.testing.assert_close(results[0], batch[0].squeeze(0 if first else 1))
        found.append((results, layer(x)))
    return found


@into(OF_LAYERS)
def batch_first(mode: str) -> Any:
    layer, x = LAYERS[mode](I, H, bidirectional=True), torch.randn(T, B, I)
    other = copy.deepcopy(layer)
    other.batch_first = True
    results, turned = layer(x), other(x.transpose(0, 1))
    torch.testing.assert_close(turned[0].transpose(0, 1), results[0])
    return results, turned


@into(OF_LAYERS)
def two_directions_are_two_layers(mode: str) -> Any:
    layer, x = LAYERS[mode](I, H, bidirectional=True), torch.randn(T, B, I)
    ahead, back = LAYERS[mode](I, H), LAYERS[mode](I, H)
    ahead.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.endswith("_reverse")})
    back.load_state_dict(
        {k.removesuffix("_reverse"): v for k, v in layer.state_dict().items() if k.endswith("_reverse")}
    )
    results = layer(x)[0]
    torch.testing.assert_close(results, torch.cat([ahead(x)[0], back(x.flip(0))[0].flip(0)], -1))
    return results


@into(OF_LAYERS)
def backward_twice(mode: str) -> Any:
    layer, x = LAYERS[mode](I, H, 2), torch.randn(T, B, I)
    loss = layer(x)[0].square().sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in layer.parameters()]
    loss.backward()
    torch.testing.assert_close([p.grad for p in layer.parameters()], [2 * g for g in once])
    return once, error(loss.backward).partition(":")[0]


@into(OF_LAYERS)
def second_derivatives(mode: str) -> Any:
    layer, x = LAYERS[mode](2, 3, bidirectional=True), torch.randn(3, 2, 2, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x)[0], (x,))
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], (x,))
    return layer(x)


@into(OF_LAYERS)
def weights_in_another_order_in_memory(mode: str) -> Any:
    """Weights, input and state are not contiguous."""
    layer = LAYERS[mode](I, H, 2)
    for parameter in layer.parameters():
        parameter.data = torch.stack([parameter.data] * 2, -1)[..., 0] if parameter.dim() == 1 else (
            parameter.data.t().contiguous().t()
        )  # fmt: skip
    x = torch.randn(B, I, T).permute(2, 0, 1)
    one = torch.randn(2, 1, H).expand(2, B, H)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = layer(x, (one, one) if mode == "lstm" else one)
    return results, gradients(results, *layer.parameters())


@into(OF_LAYERS)
def layers_that_share_weights(mode: str) -> Any:
    layer, x = LAYERS[mode](H, H, 2), torch.randn(T, B, H)
    layer.weight_hh_l1 = layer.weight_hh_l0
    layer.weight_ih_l1 = layer.weight_ih_l0
    results = layer(x)
    return results, gradients(results, *layer.parameters())


@into(OF_LAYERS)
def frozen_weights(mode: str) -> Any:
    """Some weights, or all but the input, need no gradient."""
    layer, x = LAYERS[mode](I, H, 2), torch.randn(T, B, I)
    layer.weight_hh_l0.requires_grad_(False)
    some = gradients(layer(x), *(p for p in layer.parameters() if p.requires_grad))
    layer.requires_grad_(False)
    assert not layer(x)[0].requires_grad
    return some, gradients(layer(x.requires_grad_()), x)


@into(OF_LAYERS)
def normalised_weights(mode: str) -> Any:
    layer, x = LAYERS[mode](I, H, 2), torch.randn(T, B, I)
    plain = layer(x)
    parametrizations.weight_norm(layer, "weight_hh_l0")
    parametrizations.weight_norm(layer, "weight_ih_l1")
    normed = layer(x)
    torch.testing.assert_close(flat(normed), flat(plain))
    found = gradients(normed, *layer.parameters())
    nn.utils.parametrize.remove_parametrizations(layer, "weight_hh_l0")
    return normed, found, layer(x)


@into(OF_LAYERS)
def weights_normalised_by_hooks(mode: str) -> Any:
    layer, x = LAYERS[mode](I, H), torch.randn(T, B, I)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = nn.utils.weight_norm(layer, "weight_hh_l0")
        normed = layer(x)
        layer.weight_hh_l0_g.data *= 2
        changed = layer(x)
        assert not torch.equal(changed[0], normed[0])
        return normed, changed, gradients(changed, *layer.parameters())


@into(OF_LAYERS)
def pruned_weights(mode: str) -> Any:
    layer, x = LAYERS[mode](I, H, 2), torch.randn(T, B, I)
    prune.l1_unstructured(layer, "weight_hh_l0", 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = layer(x)
    found = gradients(results, *layer.parameters())
    prune.remove(layer, "weight_hh_l0")
    return results, found, layer(x)


@into(OF_LAYERS)
def copies_and_checkpoints(mode: str) -> Any:
    layer, x = LAYERS[mode](I, H, 2, bias=False), torch.randn(T, B, I)
    expected = layer(x)
    buffer, other = io.BytesIO(), LAYERS[mode](I, H, 2, bias=False)
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer))
    vector = nn.utils.parameters_to_vector(layer.parameters()).detach()
    third = LAYERS[mode](I, H, 2, bias=False)
    nn.utils.vector_to_parameters(vector, third.parameters())
    for one in (copy.deepcopy(layer), other, third, layer.float().double()):
        one.flatten_parameters()
        torch.testing.assert_close(flat(one(x)), flat(expected), rtol=1e-5, atol=1e-5)
    return expected


@into(OF_LAYERS)
def hooks(mode: str) -> Any:
    layer, x = LAYERS[mode](I, H), torch.randn(T, B, I, requires_grad=True)
    seen: list[Tensor] = []
    layer.weight_hh_l0.register_hook(lambda g: g * 3)
    layer.register_full_backward_hook(lambda _, given, of_results: seen.extend(flat(given)))
    layer.register_forward_hook(lambda _, given, results: (results[0] * 2, results[1]))
    results = layer(x)
    found = gradients(results, x, *layer.parameters())
    assert seen
    return results, found, seen


@into(OF_LAYERS)
def results_edited_in_place(mode: str) -> Any:
    layer, x = LAYERS[mode](I, H), torch.randn(T, B, I)
    y, hx = layer(x)
    y[1] = 0
    y.mul_(2)
    return y, gradients((y, hx), *layer.parameters())


@into(OF_LAYERS)
def truncated_back_propagation(mode: str) -> Any:
    layer, x = LAYERS[mode](I, H, 2), torch.randn(4 * T, B, I)
    hx, losses = None, []
    for part in x.split(T):
        y, hx = layer(part, hx)
        hx = tuple(t.detach() for t in hx) if mode == "lstm" else hx.detach()
        losses.append(y.square().sum())
    return hx, torch.autograd.grad(sum(losses), list(layer.parameters()))


@pytest.mark.parametrize("mode", LAYERS)
@pytest.mark.parametrize("name", OF_LAYERS)
def test_layers(name: str, mode: str) -> None:
    compare(OF_LAYERS[name], mode, f"{mode}.input")


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_projections(layers: int, both: bool) -> None:
    def case(_: str) -> Any:
        layer, x = nn.LSTM(I, H, layers, bidirectional=both, proj_size=2), torch.randn(T, B, I, requires_grad=True)
        assert layer.weight_hr_l0.shape == (2, H)
        hx = torch.randn(layers * (1 + both), B, 2), torch.randn(layers * (1 + both), B, H)
        results = layer(x, hx)
        assert results[0].shape == (T, B, 2 * (1 + both))
        return results, layer(x), gradients(results, x, *layer.parameters())

    compare(case, "lstm", "lstm.input")
