"""Tests which kernels a recomputation in the backward calls, inside of a `patch_attention` block and after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import CheckpointError, checkpoint

import dlkernels
from dlkernels.integrations import sdpa_operator
from tests.support.attention_modules import operators
from tests.support.sdpa_calls import OURS, K, Q, V
from tests.support.sdpa_switch import BACKWARD, in_thread, is_registered, is_served, no_other_thread
from tests.support.sdpa_switch import fresh_switch as fresh_switch

pytestmark = [
    pytest.mark.usefixtures("fresh_switch"),
    pytest.mark.usefixtures("native"),
    pytest.mark.o0_skip(reason="Python around calls that attention/test_functional.py makes as well"),
]


def block(x: Tensor, p: float) -> Tensor:
    q = x * 1.5
    return F.scaled_dot_product_attention(q, q.sin(), q.cos(), dropout_p=p).tanh()


def forward(x: Tensor, p: float, how: bool | None) -> Tensor:
    """Runs three blocks. `how` is None for no checkpoints, else it is use_reentrant, and the checkpoint of the first
    block is nested in that of the second."""
    if how is None:
        return block(block(block(x, p), p), p).square().sum()

    def kept(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda y: checkpoint(function, y, use_reentrant=how)

    inner = kept(lambda y: block(y, p))
    return inner(kept(lambda y: block(inner(y), p))(x)).square().sum()


def gradient(p: float, how: bool | None, context: Any = None, backward_context: Any = None) -> Tensor:
    """Returns the gradient with the forward inside of `context` and the backward inside of `backward_context`."""
    x = Q.clone().requires_grad_()
    torch.manual_seed(3)
    if context is None:
        out = forward(x, p, how)
    else:
        with context:
            out = forward(x, p, how)
    if backward_context is None:
        out.backward()
    else:
        with backward_context:
            out.backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant: bool, p: float) -> None:
    with dlkernels.patch_attention():
        expected = gradient(p, None)
        with operators() as seen:
            assert torch.equal(gradient(p, reentrant), expected)
        assert torch.equal(in_thread(lambda: gradient(p, reentrant)), expected)
    assert {OURS, BACKWARD} <= seen.names
    assert not any("scaled_dot_product" in name for name in seen.names)


@no_other_thread
@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_recomputed_after_the_block(reentrant: bool) -> None:
    with dlkernels.patch_attention():
        expected = gradient(0.4, None)
    found = gradient(0.4, reentrant, dlkernels.patch_attention())
    assert torch.equal(found, expected)
    assert not is_served()
    torchs = gradient(0.4, None)
    assert not torch.allclose(torchs, expected)
    assert torch.equal(gradient(0.4, reentrant), torchs)  # torch draws the same mask from the same seed


def test_dropout_that_both_drew_from_one_seed() -> None:
    x = Q.clone().requires_grad_()
    torch.manual_seed(3)
    with dlkernels.patch_attention():
        forward(x, 0.4, True)
    torch.manual_seed(3)
    out = forward(x, 0.4, True)
    with pytest.raises(RuntimeError, match="inside or outside"):
        out.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_of_torch_recomputed_inside_of_the_block(reentrant: bool) -> None:
    expected = gradient(0.4, None)
    assert torch.equal(gradient(0.4, reentrant, None, dlkernels.patch_attention()), expected)


@no_other_thread
def test_without_dropout_after_the_block() -> None:
    """A non-reentrant checkpoint raises, because the recomputation saves other tensors than the forward did. A
    reentrant one needs only the values."""
    for contexts in ((dlkernels.patch_attention(), None), (None, dlkernels.patch_attention())):
        with pytest.raises(CheckpointError):
            gradient(0.0, False, *contexts)
        torch.testing.assert_close(gradient(0.0, True, *contexts), gradient(0.0, None))
    assert not is_registered()


def test_the_memory_of_draws_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa_operator, "_MOST_DRAWS", 3)
    with dlkernels.patch_attention():
        F.scaled_dot_product_attention(Q.clone().requires_grad_(), K, V, dropout_p=0.5)
        assert not sdpa_operator._draws  # no checkpoint recomputes this call
        with torch.no_grad():
            for _ in range(8):
                F.scaled_dot_product_attention(Q, K, V, dropout_p=0.5)
    assert len(sdpa_operator._draws) == 3
