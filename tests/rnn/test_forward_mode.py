"""Tests layers and cells in forward mode (jvp, jacfwd, hessian, dual tensors) against reverse mode, which the kernels
compute, and against torch.nn."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp
from torch.nn.utils.rnn import pack_padded_sequence

import dlkernels
from dlkernels._core import extension, tangents
from dlkernels.rnn.routing import route
from tests.support.differentiated_calls import (
    MODES,
    VARIANTS,
    B,
    Case,
    CellCase,
    H,
    I,
    T,
    all_close,
    cases,
    smooth_loss,
)

pytestmark = [
    pytest.mark.usefixtures("native"),
    pytest.mark.o0_skip(reason="forward mode is Python around the reference"),
]


def plain(case: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The tensors of a case without gradients, and tangents for them."""
    tensors = tuple(tensor.detach() for tensor in case.tensors)
    return tensors, tuple(map(torch.randn_like, tensors))


def check_jvp(case: Any) -> None:
    """The product <u, J t> is that of reverse mode, <J' u, t>, for every output."""
    tensors, directions = plain(case)
    outputs, found = jvp(case, tensors, directions)
    expected, pull = vjp(case, *tensors)
    all_close(outputs, expected)
    for at, tangent in enumerate(found):
        u = torch.randn_like(tangent)
        chosen = tuple(u if i == at else torch.zeros_like(out) for i, out in enumerate(expected))
        by_reverse = sum((g * t).sum() for g, t in zip(pull(chosen), directions, strict=True))
        torch.testing.assert_close((u * tangent).sum(), by_reverse)


@pytest.mark.parametrize("mode, variant", cases())
def test_jvp_of_layers(mode: str, variant: str) -> None:
    check_jvp(Case(mode, **VARIANTS[variant]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bias, state", ((True, True), (False, False)))
def test_jvp_of_cells(mode: str, bias: bool, state: bool) -> None:
    check_jvp(CellCase(mode, bias, state))


LAYERS: dict[str, dict[str, Any]] = {
    "plain": {}, "stack": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "relu": {"nonlinearity": "relu"},
    "dropout": {"num_layers": 3, "dropout": 0.5, "batch_first": True}, "projection": {"proj_size": 2, "num_layers": 2},
}  # fmt: skip
OF_LAYERS = [
    pytest.param(name, options, id=f"{name}-{which}")
    for name in ("LSTM", "GRU", "RNN")
    for which, options in LAYERS.items()
    if not ("nonlinearity" in options and name != "RNN") and not ("proj_size" in options and name != "LSTM")
]


def pair(name: str, **options: Any) -> tuple[Any, Any]:
    """torch.nn's module and ours, with the same weights."""
    theirs = getattr(nn, name)(I, H, dtype=torch.float64, **options)
    return theirs, dlkernels.patch(deepcopy(theirs))


def flat(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else [tensor for part in results for tensor in flat(part)]


@pytest.mark.parametrize("name, options", OF_LAYERS)
def test_layers_as_torch(name: str, options: dict[str, Any]) -> None:
    theirs, ours = pair(name, **options)
    x = torch.randn((B, T, I) if options.get("batch_first") else (T, B, I), dtype=torch.float64)
    weights = {key: weight.detach() for key, weight in theirs.named_parameters()}
    states = [torch.randn_like(state) for state in flat(theirs(x)[1])]

    def call(layer: nn.Module) -> Any:
        def run(x: Tensor, states: list[Tensor], weights: dict[str, Tensor]) -> list[Tensor]:
            torch.manual_seed(1)  # of dropout
            hx = tuple(states) if len(states) == 2 else states[0]
            return flat(functional_call(layer, weights, (x, hx)))

        directions = (torch.ones_like(x), list(map(torch.sin, states)), {key: w.cos() for key, w in weights.items()})
        return jvp(run, (x, states, weights), directions)

    for found, expected in zip(call(ours), call(theirs), strict=True):
        all_close(found, expected)


@pytest.mark.parametrize("name", ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"))
def test_jacobians_and_hessians_as_torch(name: str) -> None:
    theirs, ours = pair(name)
    x = torch.randn((B, I) if "Cell" in name else (T, B, I), dtype=torch.float64)
    torch.testing.assert_close(jacfwd(lambda x: flat(ours(x))[0])(x), jacrev(lambda x: flat(theirs(x))[0])(x))
    expected = jacrev(jacrev(lambda x: smooth_loss(tuple(flat(theirs(x))))))(x)
    torch.testing.assert_close(hessian(lambda x: smooth_loss(tuple(flat(ours(x)))))(x), expected)


@pytest.mark.parametrize("name", ("LSTMCell", "GRUCell", "RNNCell"))
@pytest.mark.parametrize("shape", ((B, I), (I,)))
def test_cells_as_torch(name: str, shape: tuple[int, ...]) -> None:
    theirs, ours = pair(name)
    x = torch.randn(shape, dtype=torch.float64)
    weights = {key: weight.detach() for key, weight in theirs.named_parameters()}

    def call(cell: nn.Module) -> Any:
        return jvp(lambda x, w: flat(functional_call(cell, w, (x,))), (x, weights), (x, weights))

    for found, expected in zip(call(ours), call(theirs), strict=True):
        all_close(found, expected)


def test_packed_input_is_that_of_lengths() -> None:
    layer = dlkernels.nn.LSTM(I, H, bidirectional=True, dtype=torch.float64)
    x, lengths = torch.randn(T, B, I, dtype=torch.float64), torch.tensor([3, 1])
    packed = pack_padded_sequence(x, lengths)

    def of_packed(data: Tensor) -> list[Tensor]:
        return flat(layer(packed._replace(data=data))[1])

    def of_padded(x: Tensor) -> list[Tensor]:
        return flat(layer(x, lengths=lengths)[1])

    all_close(jvp(of_packed, (packed.data,), (packed.data,))[1], jvp(of_padded, (x,), (x,))[1])


@pytest.mark.parametrize("mode", ("lstm", "gru"))
@pytest.mark.parametrize(
    "variant", ("plain", "batch-first", "lengths", "packed", "truncated", "truncated-every-step", "truncated-packed")
)
def test_second_derivatives_in_every_order(mode: str, variant: str) -> None:
    """They agree with reverse over reverse, also where the cuts of `bptt_steps` make a gradient that is no derivative
    of the outputs."""
    case = Case(mode, **VARIANTS[variant])
    (x, *rest), (direction, *_) = plain(case)

    def of(x: Tensor) -> Tensor:
        return smooth_loss(case(x, *rest))

    expected = jacrev(jacrev(of))(x)
    for outer, inner in ((jacfwd, jacrev), (jacrev, jacfwd), (jacfwd, jacfwd)):
        torch.testing.assert_close(outer(inner(of))(x), expected)
    along = (expected * direction).sum(dim=(-3, -2, -1) if x.dim() == 3 else (-2, -1))
    torch.testing.assert_close(jvp(grad(of), (x,), (direction,))[1], along)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone().requires_grad_(), direction)
        y = of(dual)
        (gradient,) = torch.autograd.grad(y, dual, retain_graph=True)
        torch.testing.assert_close(forward_ad.unpack_dual(gradient).tangent, along)
        (of_tangent,) = torch.autograd.grad(forward_ad.unpack_dual(y).tangent, dual)
        transposed = (expected * direction[(..., *[None] * x.dim())]).sum(dim=tuple(range(x.dim())))
        torch.testing.assert_close(of_tangent, transposed)


@pytest.mark.parametrize("make", (Case, CellCase))
@pytest.mark.parametrize("mode", ("lstm", "rnn_relu"))
def test_vmap_around_and_within_jvp(make: Any, mode: str) -> None:
    case = make(mode)
    (x, *rest), (direction, *others) = plain(case)
    xs, along = torch.stack([x, 2 * x, -x]), torch.stack([direction, x, direction])

    def one(x: Tensor, direction: Tensor) -> tuple[Tensor, ...]:
        return jvp(case, (x, *rest), (direction, *others))[1]  # type: ignore[no-any-return]

    expected = [torch.stack(parts) for parts in zip(*map(one, xs, along), strict=True)]
    all_close(torch.vmap(one)(xs, along), expected)
    dims = (0, *(None for _ in rest))
    all_close(jvp(torch.vmap(case, dims), (xs, *rest), (along, *others))[1], expected)


def test_tangents_that_reach_the_backward_alone() -> None:
    """The forward has run on the kernel, because no tensor had a tangent yet."""
    for case in (Case("lstm"), Case("gru", bidirectional=True), CellCase("lstm"), CellCase("rnn_tanh")):
        tensors, _ = plain(case)
        outputs, pull = vjp(case, *tensors)
        _, expected_pull = vjp(case.expected, *tensors)
        along = tuple(map(torch.randn_like, outputs))
        _, found = jvp(pull, (outputs,), (along,))
        all_close(found, expected_pull(along))
        leaves = [tensor.requires_grad_() for tensor in tensors]
        outputs = case(*leaves)
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(out.detach(), u) for out, u in zip(outputs, along, strict=True)]
            gradients = torch.autograd.grad(outputs, leaves, duals)
            all_close([forward_ad.unpack_dual(gradient).tangent for gradient in gradients], found)


def test_hessian_vector_product_of_a_few_weights() -> None:
    """Only the last layer has a tangent, which reaches the gradients of the layer below through the backward."""
    models = []
    for layers in zip(*(pair(name) for name in ("GRU", "RNN")), strict=True):
        models.append([*layers, nn.Linear(H, I, dtype=torch.float64)])
    x = torch.randn(T, B, I, dtype=torch.float64)

    def product(layers: list[Any]) -> Any:
        below, above, _ = layers
        fixed = {key: weight.detach() for key, weight in below.named_parameters()}
        weights = {key: weight.detach() for key, weight in above.named_parameters()}
        middle = torch.eye(H, I, dtype=torch.float64)

        def gradients(weights: dict[str, Tensor]) -> Any:
            def of(fixed: dict[str, Tensor]) -> Tensor:
                y = functional_call(below, fixed, (x,))[0] @ middle
                return smooth_loss((functional_call(above, weights, (y,))[0],))

            return grad(of)(fixed)

        return jvp(gradients, (weights,), (weights,))[1]

    found, expected = product(models[1]), product(models[0])
    all_close(list(found.values()), list(expected.values()))


def test_gradcheck() -> None:
    checks = {"check_forward_ad": True, "check_backward_ad": False, "check_batched_forward_grad": True}
    for case in (Case("lstm", projected=True, lengths=True), Case("gru", packed=True), CellCase("lstm")):
        assert gradcheck(case, case.tensors, fast_mode=True, check_undefined_grad=False, **checks)
    layer = dlkernels.nn.GRU(I, H, dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64)
    found = torch.autograd.functional.jacobian(
        lambda x: layer(x)[0], x, vectorize=True, strategy="forward-mode"
    )  # fmt: skip
    torch.testing.assert_close(found, jacrev(lambda x: layer(x)[0])(x))


def test_a_tensor_without_a_tangent_runs_on_the_kernel() -> None:
    x, w = torch.randn(2, 3, 4).unbind()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(w, w)
        assert route(x).native and not route(x, dual).native
    assert route(w).native
    decided: list[bool] = []
    jvp(lambda w: (decided.extend(route(*given).native for given in ((x,), (w,), (x, w))), w)[1], (w,), (w,))
    assert decided == [True, False, False]


def test_tangents_are_found_below_every_wrapper() -> None:
    x, seen = torch.randn(2, 3), []

    def look(x: Tensor) -> Tensor:
        seen.append(tangents.are_carried([None, torch.ones(2), x]))
        return x.square().sum()

    for transformed in (look, grad(look), torch.vmap(look), jacrev(jacrev(look)), torch.vmap(grad(look))):
        jvp(transformed, (x,), (x,))
        with forward_ad.dual_level():
            transformed(forward_ad.make_dual(x, x))
    jacfwd(jacrev(look))(x)
    jacrev(jacfwd(look))(x)
    assert len(seen) == 12 and all(seen)
    seen.clear()
    jvp(lambda y: (grad(look)(x), torch.vmap(look)(x), y)[2], (x,), (x,))
    assert len(seen) == 2 and not any(seen)


@pytest.mark.parametrize("name", ("LSTM", "GRUCell"))
def test_explain_and_the_warning_announce_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = getattr(dlkernels.nn, name)(I, H)
    x = torch.randn(T, I)
    monkeypatch.setattr(extension, "_forward_mode_announced", False)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        explanation = dlkernels.explain(module, dual)
        assert explanation.kernel == "reference" and not explanation.native
        assert "reference (a tensor carries a forward-mode tangent (jvp, jacfwd)" in str(explanation)
        with pytest.warns(RuntimeWarning, match="forward-mode derivatives"):
            module(dual)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            module(dual)  # once per process
        assert "reference" not in str(dlkernels.explain(module, x))


def test_values_are_checked() -> None:
    layer, x = dlkernels.nn.GRU(I, H), torch.randn(T, B, I)

    def of(lengths: list[int]) -> Callable[[Tensor], Tensor]:
        return lambda x: layer(x, lengths=torch.tensor(lengths))[0]

    with pytest.raises(ValueError, match=r"lengths must lie in 0\.\.T"):
        jvp(of([T + 1, 1]), (x,), (x,))
    assert jvp(of([T, 1]), (x,), (x,))[1].isfinite().all()
    weights = {key: weight.detach() for key, weight in layer.named_parameters()}
    with pytest.raises(ValueError, match=r"lengths must lie in 0\.\.T"):
        jvp(lambda w: flat(functional_call(layer, w, (x,), {"lengths": torch.tensor([9, 1])})), (weights,), (weights,))
    packed = pack_padded_sequence(x, torch.tensor([T, 1]))
    wrong = packed._replace(batch_sizes=torch.tensor([2, 2, 1]))
    with pytest.raises(RuntimeError, match="batch_sizes must be positive"):
        jvp(lambda data: layer(wrong._replace(data=data))[0].data, (x[:2, 0],), (x[:2, 0],))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_dtypes_and_autocast(dtype: torch.dtype) -> None:
    layer, x = dlkernels.nn.LSTM(I, H).to(dtype), torch.randn(T, B, I, dtype=dtype)
    for result in jvp(lambda x: layer(x)[0], (x,), (x,)):
        assert result.dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = layer(x)[0].dtype
        for result in jvp(lambda x: layer(x)[0], (x,), (x,)):
            assert result.dtype == expected


def test_prepacked_weights_are_not_used() -> None:
    layer, x = dlkernels.nn.GRU(I, H, dtype=torch.float64), torch.randn(T, B, I, dtype=torch.float64)
    expected = jvp(lambda x: layer(x)[0], (x,), (x,))
    layer.prepack()
    with torch.no_grad():
        all_close(jvp(lambda x: layer(x)[0], (x,), (x,)), [tensor.detach() for tensor in expected])
        with forward_ad.dual_level():
            assert "ignored" in dlkernels.explain(layer, forward_ad.make_dual(x, x)).layers[0].packed_weights
