"""Tests attention and its layers in forward mode (jvp, jacfwd, hessian, dual tensors) against reverse mode, which the
kernels compute, and against torch's operators."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

import dlkernels
from dlkernels._core import extension
from dlkernels.functional import attention, attention_map

pytestmark = [
    pytest.mark.usefixtures("native"),
    pytest.mark.o0_skip(reason="forward mode is Python around the reference"),
]

B, HEADS, M, N, D = 2, 4, 3, 5, 2


def new(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def padded() -> tuple[Tensor, Tensor, Tensor]:
    return new(B, HEADS, M, D), new(B, HEADS, N, D), new(B, HEADS, N, D)


CU_Q, CU_K = torch.tensor([0, 2, 3]), torch.tensor([0, 1, 5])
MASK = torch.rand(B, 1, M, N) > 0.3
MASK[0, 0, 1] = False  # a query that sees nothing


def with_seed(**options: Any) -> Any:
    torch.manual_seed(3)
    return attention(**options)


# Functions of tensors that have tangents, and the shapes of these.
CALLS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "everything": (
        lambda q, k, v, mask, slopes, sinks: attention(
            q, k, v, attn_mask=mask, alibi_slopes=slopes, sinks=sinks, softcap=3.0, window=(2, 1), softmax_scale=0.3,
            return_lse=True,
        ),
        ((B, HEADS, M, D), (B, 2, N, D), (B, 2, N, 3), (M, N), (HEADS,), (HEADS,)),
    ),
    "causal": (
        lambda q, k, v: attention(q, k, v, causal="bottom_right"), ((B, 2, M, D), (B, 2, N, D), (B, 2, N, D)),
    ),
    "hidden": (lambda q, k, v: attention(q, k, v, attn_mask=MASK), ((B, 2, M, D), (B, 2, N, D), (B, 2, N, D))),
    "dropout": (
        lambda q, k, v: with_seed(q=q, k=k, v=v, dropout_p=0.4), ((B, 2, M, D), (B, 2, N, D), (B, 2, N, D)),
    ),
    "packed": (
        lambda q, k, v: attention(q, k, v, cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K, causal=True, return_lse=True),
        ((3, 2, D), (5, 2, D), (5, 2, D)),
    ),
    "packed mask": (
        lambda q, k, v, mask: attention(q, k, v, attn_mask=mask, cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K),
        ((3, 2, D), (5, 2, D), (5, 2, D), (2, 4)),
    ),
}  # fmt: skip


def finite(results: Any) -> tuple[Tensor, ...]:
    """The results as a tuple, with 0 where an lse is -inf."""
    found = results if isinstance(results, tuple) else (results,)
    return tuple(tensor.masked_fill(tensor == -math.inf, 0.0) for tensor in found)


def loss(results: Any) -> Tensor:
    return torch.stack([(tensor.square() + tensor.sin()).sum() for tensor in finite(results)]).sum()


@pytest.mark.parametrize("name", CALLS)
def test_jvp_is_the_transpose_of_vjp(name: str) -> None:
    function, shapes = CALLS[name]
    tensors, directions = [new(*shape) for shape in shapes], [new(*shape) for shape in shapes]
    outputs, found = jvp(lambda *given: finite(function(*given)), tuple(tensors), tuple(directions))
    expected, pull = vjp(lambda *given: finite(function(*given)), *tensors)
    torch.testing.assert_close(outputs, expected)
    for at, tangent in enumerate(found):
        u = torch.randn_like(tangent)
        gradients = pull(tuple(u if i == at else torch.zeros_like(out) for i, out in enumerate(expected)))
        by_reverse = sum((g * t).sum() for g, t in zip(gradients, directions, strict=True))
        torch.testing.assert_close((u * tangent).sum(), by_reverse)


@pytest.mark.parametrize("name", ["everything", "causal", "hidden", "packed"])
def test_second_derivatives_in_every_order(name: str) -> None:
    function, shapes = CALLS[name]
    q, *rest = (new(*shape) for shape in shapes)

    def of(q: Tensor) -> Tensor:
        return loss(function(q, *rest))

    expected = jacrev(jacrev(of))(q)
    for outer, inner in ((jacfwd, jacrev), (jacrev, jacfwd), (jacfwd, jacfwd)):
        torch.testing.assert_close(outer(inner(of))(q), expected)


@pytest.mark.parametrize("name", CALLS)
def test_gradcheck(name: str) -> None:
    function, shapes = CALLS[name]
    tensors = [new(*shape).requires_grad_() for shape in shapes]
    assert gradcheck(
        lambda *given: finite(function(*given)), tensors, fast_mode=True, check_forward_ad=True,
        check_backward_ad=False, check_undefined_grad=False, check_batched_forward_grad=name != "dropout",
    )  # fmt: skip


def test_same_as_torch() -> None:
    tensors = padded()
    for ours, theirs in (
        ({}, {}),
        ({"causal": True}, {"is_causal": True}),
        ({"attn_mask": MASK[1:]}, {"attn_mask": MASK[1:]}),
    ):

        def of_torch(*given: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):
                return nn.functional.scaled_dot_product_attention(*given, **theirs)  # noqa: B023

        def of_ours(*given: Tensor) -> Any:
            return attention(*given, **ours)  # noqa: B023

        directions = tuple(tensor.cos() for tensor in tensors)
        torch.testing.assert_close(jvp(of_ours, tensors, directions), jvp(of_torch, tensors, directions))
        torch.testing.assert_close(jacfwd(of_ours)(*tensors), jacrev(of_torch)(*tensors))


def test_vmap_around_and_within_jvp() -> None:
    q, k, v = padded()
    qs, along = torch.stack([q, 2 * q, -q]), torch.stack([q.cos(), q.sin(), q])

    def one(q: Tensor, direction: Tensor) -> Tensor:
        return jvp(lambda q: attention(q, k, v, causal=True), (q,), (direction,))[1]  # type: ignore[no-any-return]

    expected = torch.stack(list(map(one, qs, along)))
    torch.testing.assert_close(torch.vmap(one)(qs, along), expected)
    mapped = torch.vmap(lambda q: attention(q, k, v, causal=True))
    torch.testing.assert_close(jvp(mapped, (qs,), (along,))[1], expected)


@pytest.mark.parametrize("name", ["everything", "packed", "dropout"])
def test_tangents_that_reach_the_backward_alone(name: str) -> None:
    """The forward has run on the kernel, because no tensor had a tangent yet. The gradients are linear in the
    cotangents, so their tangents are the gradients for the tangents of these."""
    function, shapes = CALLS[name]
    tensors = [new(*shape) for shape in shapes]
    outputs, pull = vjp(lambda *given: finite(function(*given)), *tensors)
    along = tuple(map(torch.randn_like, outputs))
    torch.testing.assert_close(jvp(pull, (outputs,), (along,)), (pull(outputs), pull(along)))
    leaves = [tensor.requires_grad_() for tensor in tensors]
    outputs = finite(function(*leaves))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(out.detach(), u) for out, u in zip(outputs, along, strict=True)]
        gradients = torch.autograd.grad(outputs, leaves, duals)
        found = tuple(forward_ad.unpack_dual(gradient).tangent for gradient in gradients)
    torch.testing.assert_close(found, pull(along))


def test_attention_map() -> None:
    q, k, _ = padded()
    found = jvp(lambda q: attention_map(q, k, rows=M, cols=N), (q,), (q,))[1]
    expected = jvp(lambda q: torch.softmax(q @ k.mT / math.sqrt(D), -1), (q,), (q,))[1]
    torch.testing.assert_close(found, expected)


MODULES: dict[str, tuple[str, dict[str, Any], Callable[..., Any]]] = {
    "attention": ("MultiheadAttention", {}, lambda m, x: m(x, x, x, need_weights=False)[0]),
    "weights": ("MultiheadAttention", {}, lambda m, x: m(x, x, x)),
    "mask": ("MultiheadAttention", {"add_bias_kv": True}, lambda m, x: m(
        x, x, x, need_weights=False, key_padding_mask=torch.tensor([[False, False, True], [False, True, False]])
    )[0]),
    "encoder": ("TransformerEncoderLayer", {"dim_feedforward": 5, "dropout": 0.0}, lambda m, x: m(x)),
    "decoder": ("TransformerDecoderLayer", {"dim_feedforward": 5, "dropout": 0.0}, lambda m, x: m(x, x)),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("training", [True, False])
def test_layers_as_torch(name: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, options, call = MODULES[name]
    theirs = getattr(nn, kind)(4, 2, batch_first=True, dtype=torch.float64, **options).train(training)
    ours, x = dlkernels.patch(deepcopy(theirs)), new(B, M, 4)
    weights = {key: weight.detach() for key, weight in theirs.named_parameters()}

    class Called(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Any:
            return call(self.module, x)

    def run(module: nn.Module) -> Callable[..., Any]:
        named = Called(module)
        return lambda x, weights: functional_call(named, {f"module.{key}": w for key, w in weights.items()}, (x,))

    with sdpa_kernel(SDPBackend.MATH):
        monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)  # torch's has no forward mode
        both = [jvp(run(module), (x, weights), (x.cos(), weights)) for module in (ours, theirs)]
        torch.testing.assert_close(*both)
        second = [hessian(lambda x: loss(run(ours)(x, weights)))(x)]
        second.append(jacrev(jacrev(lambda x: loss(run(theirs)(x, weights))))(x))
        torch.testing.assert_close(*second)


def test_explain_and_the_warning_announce_it(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = padded()
    monkeypatch.setattr(extension, "_forward_mode_announced", False)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(v, v)
        text = str(dlkernels.explain(attention, q, k, dual))
        assert "call: reference (a tensor carries a forward-mode tangent (jvp, jacfwd)" in text
        assert dlkernels.explain(attention, q, k, v).native
        with pytest.warns(RuntimeWarning, match="forward-mode derivatives"):
            attention(q, k, dual)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attention(q, k, dual)  # once per process


@pytest.mark.parametrize("name", ["attention", "encoder", "decoder"])
def test_explain_of_layers(name: str) -> None:
    kind, options, _ = MODULES[name]
    module, x = getattr(dlkernels.nn, kind)(4, 2, batch_first=True, dtype=torch.float64, **options), new(B, M, 4)
    inputs = {"attention": 3, "encoder": 1, "decoder": 2}[name]
    given = {"need_weights": False} if name == "attention" else {}
    assert dlkernels.explain(module, *(x,) * inputs, **given).native
    found = []
    with forward_ad.dual_level():
        found.append(dlkernels.explain(module, *(forward_ad.make_dual(x, x),) * inputs, **given))
    jvp(lambda x: (found.append(dlkernels.explain(module, *(x,) * inputs, **given)), x)[1], (x,), (x,))
    jvp(grad(lambda x: (found.append(dlkernels.explain(module, *(x,) * inputs, **given)), x.sum())[1]), (x,), (x,))
    assert len(found) == 3
    for explanation in found:
        assert {layer.path for layer in explanation.layers} == {"reference"}
        assert "forward-mode tangent" in explanation.layers[0].reason


def test_values_are_checked() -> None:
    q, k, v = new(3, 2, D), new(5, 2, D), new(5, 2, D)
    with pytest.raises(ValueError, match="cu_seqlens_q: expected values"):
        jvp(lambda v: attention(q, k, v, cu_seqlens_q=CU_Q + 1, cu_seqlens_k=CU_K), (v,), (v,))
