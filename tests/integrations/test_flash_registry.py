"""Tests our attention as an implementation of torch.nn.attention's registry of flash attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dlkernels.testing import error

registry = pytest.importorskip("torch.nn.attention", reason="this torch has no registry of flash attention")
if not hasattr(registry, "register_flash_attention_impl"):
    pytest.skip("this torch has no registry of flash attention", allow_module_level=True)

pytestmark = [
    pytest.mark.usefixtures("native"),
    pytest.mark.o0_skip(reason="Python around kernels that other tests call as well"),
]

OURS = {"dlkernels::attention", "dlkernels::attention_backward"}


@pytest.fixture
def active() -> Iterator[None]:
    registry.activate_flash_attention_impl("dlkernels")
    yield
    registry.restore_flash_attention_impl()


def draw(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def attend(dtype: torch.dtype, **options: Any) -> list[Tensor]:
    q, k, v = (draw(dtype, 2, 3, rows, 16).requires_grad_() for rows in (9, 7, 7))
    if isinstance(options.get("attn_mask"), Tensor) and options["attn_mask"].is_floating_point():
        options["attn_mask"] = options["attn_mask"].to(dtype)
    o = scaled_dot_product_attention(q, k, v, **options)
    return [o, *torch.autograd.grad((o * draw(dtype, *o.shape)).sum(), (q, k, v))]


def profiled(function: Callable[[], list[Tensor]]) -> tuple[list[Tensor], set[str]]:
    """The result, and the names of the operators that ran. A dispatch mode does not see those in a backend's kernel."""
    with torch.profiler.profile() as profile:
        result = function()
    return result, {event.key for event in profile.key_averages()}


MASK = draw(torch.float32, 9, 7)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scale": 0.3},
    "tiny scale": {"scale": 1e-21},
    "negative scale": {"scale": -0.5},
    "causal": {"is_causal": True},
    "mask added": {"attn_mask": MASK},
    "boolean mask, a row hidden": {
        "attn_mask": (MASK > 0).logical_and(torch.arange(9)[:, None] != 4).expand(2, 3, 9, 7)
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_as_accurate_as_torchs(name: str, dtype: torch.dtype, active: None) -> None:
    ours, seen = profiled(lambda: attend(dtype, **OPTIONS[name]))
    assert seen >= OURS
    registry.restore_flash_attention_impl()
    theirs, seen = profiled(lambda: attend(dtype, **OPTIONS[name]))
    assert not OURS & seen
    right = attend(torch.float64, **OPTIONS[name])
    registry.activate_flash_attention_impl("dlkernels")
    for mine, other, exact in zip(ours, theirs, right, strict=True):
        assert mine.dtype == other.dtype and mine.stride() == other.stride()
        assert error(mine, exact) <= 3 * error(other, exact) + 1e-7


def test_compiled(active: None) -> None:
    """The kernels have the strides that torch's own fakes of these operators promise."""
    given = [draw(torch.float32, 2, 3, 7, 16).transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()] * 3
    compiled = torch.compile(scaled_dot_product_attention, backend="aot_eager", fullgraph=True)
    o, right = compiled(*given), scaled_dot_product_attention(*given)
    torch.testing.assert_close(o, right)
    for found, expected in zip(
        torch.autograd.grad(o.sum(), given), torch.autograd.grad(right.sum(), given), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_dropout_is_torchs(active: None) -> None:
    torch.manual_seed(0)
    ours = attend(torch.float32, dropout_p=0.5)
    registry.restore_flash_attention_impl()
    torch.manual_seed(0)
    theirs = attend(torch.float32, dropout_p=0.5)
    registry.activate_flash_attention_impl("dlkernels")
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected)
    with pytest.raises(RuntimeError, match="dropout_p must be 0"):
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*[torch.ones(1, 1, 2, 8)] * 3, 0.5)


def test_the_registry_knows_the_name() -> None:
    assert "dlkernels" in registry.list_flash_attention_impls()
    assert registry.current_flash_attention_impl() is None
    assert not OURS & profiled(lambda: attend(torch.float32))[1]
