"""Tests the drop-in contract in eager mode: edits of results and inputs, and the ways to compute gradients.

Each use is compared with torch's module in float64. Where torch raises, ours may raise the same exception or give the
right result."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dlkernels
from tests.support.contract_entries import (
    BEYOND,
    CELLS,
    ENABLED,
    ENTRIES,
    LAYERS,
    B,
    Entry,
    H,
    I,
    T,
    assert_same,
    compare,
    doubles_its_inputs,
    exactly,
    gradients,
    leaves,
    outcome,
    tensors,
    uses_doubled_inputs,
    weighted,
)

pytestmark = pytest.mark.o0_skip(reason="what autograd and Python do around the kernels is the same")

# (edit of a result in place, the same without editing in place).
EDITS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Tensor], Tensor]]] = {
    "relu_": (lambda y: y.relu_(), torch.relu),
    "mul_": (lambda y: y.mul_(3), lambda y: y * 3),
    "add with +=": (lambda y: y.__iadd__(2), lambda y: y + 2),
    "item assigned": (lambda y: y.__setitem__(0, 0), lambda y: torch.cat((torch.zeros_like(y[:1]), y[1:]))),
    "masked_fill_": (lambda y: y.masked_fill_(y > 0, 0), lambda y: y.masked_fill(y > 0, 0)),
}
entries = pytest.mark.parametrize("entry", [*ENTRIES, *ENABLED], ids=repr)


@entries
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("which", [0, -1], ids=["first", "last"])
def test_result_edited_in_place(entry: Entry, edit: str, which: int) -> None:
    in_place, pure = EDITS[edit]
    theirs, ours = entry.pair(torch.float64)
    inputs = entry.draw(torch.float64)

    def edited(module: nn.Module, *inputs: Tensor) -> Tensor:
        results = tensors(module(*inputs))
        in_place(results[which])
        return weighted(results)

    def not_edited(module: nn.Module, *inputs: Tensor) -> Tensor:
        results = tensors(module(*inputs))
        results[which] = pure(results[which])
        return weighted(results)

    right = gradients(theirs, inputs, not_edited)
    compare(
        lambda: gradients(ours, inputs, edited), lambda: gradients(theirs, inputs, edited), right, entry.keeps_result
    )


@entries
def test_input_edited_after_the_call(entry: Entry) -> None:
    """A program may edit the input after the call, as in `x += attention(x)`."""
    theirs, ours = entry.pair(torch.float64)
    inputs = entry.draw(torch.float64)

    right = gradients(theirs, inputs, uses_doubled_inputs)
    runs = [functools.partial(gradients, module, inputs, doubles_its_inputs) for module in (ours, theirs)]
    compare(*runs, right, entry.keeps_input)


@entries
@pytest.mark.parametrize("how", ["data", "numpy"])
def test_result_overwritten_behind_autograd(entry: Entry, how: str) -> None:
    """Autograd cannot notice such a write. The gradients must be those of the original values unless ours or torch's
    module saves the result."""
    theirs, ours = entry.pair(torch.float64)
    inputs = entry.draw(torch.float64)

    def overwritten(module: nn.Module, *inputs: Tensor) -> Tensor:
        results = tensors(module(*inputs))
        loss = sum(result.sum() for result in results)
        for result in results:
            if how == "data":
                result.data[...] = 7
            else:
                result.detach().numpy()[...] = 7
        return loss  # type: ignore[return-value]

    def untouched(module: nn.Module, *inputs: Tensor) -> Tensor:
        return sum(result.sum() for result in tensors(module(*inputs)))  # type: ignore[return-value]

    right, found = gradients(theirs, inputs, untouched), gradients(theirs, inputs, overwritten)
    if entry.keeps_result:
        pytest.skip("ours keeps the result for its backward, as torch's fused attention does")
    if entry.attends and not all(torch.allclose(a, b) for a, b in zip(right, found, strict=True)):
        pytest.skip("torch's own gradients are wrong after it: its attention keeps the result for its backward")
    assert_same(gradients(ours, inputs, overwritten), right)


@pytest.mark.parametrize("entry", [*LAYERS, *CELLS], ids=repr)
def test_states_of_a_loop_are_reset_in_place(entry: Entry) -> None:
    """A program may set states to zero between calls (`h[done] = 0`), as in reinforcement learning."""
    theirs, ours = entry.pair(torch.float64)
    (x, *_) = entry.draw(torch.float64)

    def loop(module: nn.Module, x: Tensor, reset: Callable[[Tensor], Tensor]) -> Tensor:
        state: Any = None
        total = x.new_zeros(())
        for _ in range(3):
            result = module(x) if state is None else module(x, state)
            state = result if entry in CELLS else result[1]
            total = total + weighted(tensors(result))
            state = tuple(reset(s) for s in state) if isinstance(state, tuple) else reset(state)
        return total

    def in_place(state: Tensor) -> Tensor:
        state[..., 1:, :] = 0
        return state

    def pure(state: Tensor) -> Tensor:
        keep = torch.zeros(state.shape[-2], 1, dtype=state.dtype)
        keep[0] = 1
        return state * keep

    if "packed" in entry.name:  # a Packed module takes no state
        theirs, ours = theirs.layer, ours.layer  # type: ignore[assignment]
        x = x.detach()
    right = gradients(theirs, (x,), lambda module, x: loop(module, x, pure))
    compare(
        lambda: gradients(ours, (x,), lambda module, x: loop(module, x, in_place)),
        lambda: gradients(theirs, (x,), lambda module, x: loop(module, x, in_place)), right,
    )  # fmt: skip


@entries
def test_values_dtypes_and_strides(entry: Entry) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        theirs, ours = entry.pair(dtype)
        inputs = entry.draw(dtype)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                found, expected = tensors(ours(*inputs)), tensors(theirs(*inputs))
            for mine, other in zip(found, expected, strict=True):
                assert (mine.dtype, mine.shape, mine.stride()) == (other.dtype, other.shape, other.stride())
                rough = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}
                torch.testing.assert_close(mine, other, **rough)


# Operations step by step have other dtypes under autocast than torch's layers. rnn/test_resets.py and
# rnn/test_variant_modules.py test the dtypes of what stands for them in the table.
@pytest.mark.parametrize("entry", [entry for entry in (*ENTRIES, *ENABLED) if entry not in BEYOND], ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("of_input", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_under_autocast(entry: Entry, of_input: torch.dtype, dtype: torch.dtype, grad: bool) -> None:
    theirs, ours = entry.pair(torch.float32)
    inputs = tuple(x.to(of_input).requires_grad_() for x in entry.draw(torch.float32))
    with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=dtype):
        expected = outcome(functools.partial(theirs, *inputs))
        found = outcome(functools.partial(ours, *inputs))
    if isinstance(found, Exception):  # packing itself raises for some dtypes
        assert type(found) is type(expected), found
        return
    found = tensors(found)
    if grad:
        sum(result.double().sum() for result in found).backward()
        assert all(x.grad is not None and x.grad.dtype == x.dtype for x in leaves(ours, inputs))
    if isinstance(expected, Exception):
        pytest.skip(f"ours ran; there is nothing to compare it with, as torch raises here: {expected}")
    for mine, other in zip(found, tensors(expected), strict=True):
        assert (mine.dtype, mine.stride()) == (other.dtype, other.stride())
        torch.testing.assert_close(mine, other, rtol=0.05, atol=0.05)


@entries
def test_batched_gradients(entry: Entry) -> None:
    """torch.autograd.grad(is_grads_batched=True), the vmap that preceded torch.func, gives the same gradients."""
    theirs, ours = entry.pair(torch.float64)
    inputs = entry.draw(torch.float64)
    grads = []
    for module in (ours, theirs):
        given = tuple(x.detach().requires_grad_() for x in inputs)
        results = tensors(module(*given))
        torch.manual_seed(3)
        vectors = [torch.randn(4, *r.shape, dtype=r.dtype) for r in results]
        pairs = list(zip(results, vectors, strict=True))
        found = []
        for some in (pairs, *([pair] for pair in pairs)):  # all results, and each alone
            found += torch.autograd.grad(
                [result for result, _ in some], leaves(module, given), [vector for _, vector in some],
                is_grads_batched=True, allow_unused=True, retain_graph=True,
            )  # fmt: skip
        grads.append(found)
    assert_same(*([g for g in found if g is not None] for found in grads))


def test_gradients_batched_twice_are_refused() -> None:
    layer, x = dlkernels.nn.GRU(I, H), torch.randn(T, B, I, requires_grad=True)
    y = layer(x)[0]
    vmap = torch._vmap_internals._vmap
    vectors = torch.randn(2, *y.shape)

    def inner(outer: Tensor) -> Tensor:
        return vmap(lambda v: torch.autograd.grad(y, x, v * outer, retain_graph=True)[0])(vectors)

    with pytest.raises(NotImplementedError, match="batched twice"):
        vmap(inner)(vectors)


def first_columns(results: list[Tensor]) -> Tensor:
    return results[0][..., :2].sum(-1)


def called(module: nn.Module, of: Callable[[list[Tensor]], Tensor]) -> Callable[..., Tensor]:
    return lambda *inputs: of(tensors(module(*inputs)))


@entries
def test_jacobian_and_hessian_vectorized(entry: Entry) -> None:
    theirs, ours = entry.pair(torch.float64)
    inputs = entry.draw(torch.float64)
    functional = torch.autograd.functional
    for function, of in ((functional.jacobian, first_columns), (functional.hessian, weighted)):
        found = function(called(ours, of), inputs, vectorize=True)
        with exactly():
            expected = function(called(theirs, of), inputs, vectorize=True)
        flat = [
            [t for row in result for t in (row if isinstance(row, tuple) else (row,))] for result in (found, expected)
        ]
        assert_same(*flat)


@entries
def test_double_backward(entry: Entry) -> None:
    theirs, ours = entry.pair(torch.float64)
    inputs = entry.draw(torch.float64)

    def penalty(module: nn.Module, *inputs: Tensor) -> Tensor:
        first = torch.autograd.grad(weighted(tensors(module(*inputs))), inputs, create_graph=True)
        return sum((grad**2).sum() for grad in first)  # type: ignore[return-value]

    with exactly():
        right = gradients(theirs, inputs, penalty)
    assert_same(gradients(ours, inputs, penalty), right)


@entries
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed(entry: Entry, use_reentrant: bool) -> None:
    theirs, ours = entry.pair(torch.float64)
    inputs = entry.draw(torch.float64)

    def run(module: nn.Module, *inputs: Tensor) -> Tensor:
        return checkpoint(lambda *x: weighted(tensors(module(*x))), *inputs, use_reentrant=use_reentrant)

    def plain(module: nn.Module, *inputs: Tensor) -> Tensor:
        return weighted(tensors(module(*inputs)))

    given = tuple(x.detach().requires_grad_() for x in inputs)
    run(ours, *given).backward()
    found = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves(ours, given)]
    assert_same(found, gradients(theirs, inputs, plain))


@pytest.mark.parametrize("entry", ENTRIES, ids=repr)  # calls of torch's operators in a transform are torch's to serve
def test_per_sample_gradients(entry: Entry) -> None:
    """vmap(grad) over a batch of inputs gives the gradients of each sample."""
    theirs, ours = entry.pair(torch.float64)
    if "packed" in entry.name:
        pytest.skip("the samples of a PackedSequence share no batch dimension (rnn/test_transforms.py)")
    inputs = tuple(torch.stack((x, x.flip(0))) for x in entry.draw(torch.float64))
    names = [name for name, _ in theirs.named_parameters()]

    def loss(module: nn.Module) -> Callable[..., Tensor]:
        return lambda weights, *x: weighted(
            tensors(torch.func.functional_call(module, dict(zip(names, weights, strict=True)), x))
        )

    which = tuple(range(len(inputs) + 1)) if names else tuple(range(1, len(inputs) + 1))
    found = torch.func.vmap(torch.func.grad(loss(ours), which), (None, *(0,) * len(inputs)))(
        tuple(ours.parameters()), *inputs
    )
    expected = []
    for at in range(2):
        sample = tuple(x[at].detach().requires_grad_() for x in inputs)
        wanted = [*(theirs.parameters() if names else ()), *sample]
        expected.append(torch.autograd.grad(loss(theirs)(tuple(theirs.parameters()), *sample), wanted))
    flat = [t for part in found for t in (part if isinstance(part, tuple) else (part,))]
    assert_same(flat, [torch.stack(pair) for pair in zip(*expected, strict=True)])


@pytest.mark.parametrize("entry", ENTRIES, ids=repr)
def test_forward_mode(entry: Entry) -> None:
    """The tangent of a loss is the product of its gradients, which torch.nn computes, and of the other tangents."""
    if "packed" in entry.name:
        pytest.skip("torch's pack_padded_sequence has no forward mode (rnn/test_forward_mode.py)")
    theirs, ours = entry.pair(torch.float64)
    inputs = entry.draw(torch.float64)
    names = [name for name, _ in ours.named_parameters()]

    def loss(weights: tuple[Tensor, ...], *x: Tensor) -> Tensor:
        return weighted(tensors(torch.func.functional_call(ours, dict(zip(names, weights, strict=True)), x)))

    given = (tuple(weight.detach() for weight in ours.parameters()), *inputs)
    along = (tuple(map(torch.sin, given[0])), *map(torch.cos, inputs))
    with exactly():
        found = torch.func.jvp(loss, given, along)[1]
    expected = gradients(theirs, inputs, lambda module, *x: weighted(tensors(module(*x))))
    flat = (*along[1:], *along[0])
    torch.testing.assert_close(found, sum((g * t).sum() for g, t in zip(expected, flat, strict=True)))


@entries
def test_edited_without_gradients(entry: Entry) -> None:
    theirs, ours = entry.pair(torch.float64)
    inputs = entry.draw(torch.float64)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            found, expected = tensors(ours(*inputs)), tensors(theirs(*inputs))
            for result in (*found, *expected):
                result.relu_()
            assert_same(found, expected)
            assert_same(tensors(ours(*inputs))[:1], tensors(theirs(*inputs))[:1])


@pytest.mark.parametrize("entry", [*LAYERS, *CELLS], ids=repr)
def test_nan_and_infinity_go_where_torchs_go(entry: Entry) -> None:
    theirs, ours = entry.pair(torch.float64)
    for value in (float("nan"), float("inf"), -float("inf")):
        inputs = entry.draw(torch.float64)
        inputs[0][0, 0] = value
        found, expected = (
            gradients(module, inputs, lambda m, *x: sum(r.sum() for r in tensors(m(*x)))) for module in (ours, theirs)
        )
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, other, equal_nan=True, rtol=1e-9, atol=1e-9)


def test_input_edited_with_frozen_weights() -> None:
    """torch's layer saves its input only for the gradients of the weights; ours also saves it for double backward."""
    for module, allowed in ((nn.GRU(I, H), True), (dlkernels.nn.GRU(I, H), False)):
        module.requires_grad_(False)
        x = torch.randn(T, B, I, requires_grad=True)
        copy = x * 1
        loss = module(copy)[0].sum()
        copy.mul_(2)
        if allowed:
            loss.backward()
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
