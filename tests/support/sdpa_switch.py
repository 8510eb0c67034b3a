"""Tells whether our kernels serve torch's scaled_dot_product_attention, and clears the switch's state for a test."""

from __future__ import annotations

import _thread
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dlkernels.integrations import sdpa_operator, switch
from tests.support.attention_modules import operators
from tests.support.sdpa_calls import OURS, K, Q, draw

E, H = 8, 2
X = draw(2, 5, E)
BACKWARD = f"{OURS}_backward"


# The kernels are unregistered only when no other thread exists that may be calling them. pytest-timeout's thread would
# count as one, so these tests use its signal.
no_other_thread = pytest.mark.timeout(300, method="signal")


def is_registered() -> bool:
    name = "aten::scaled_dot_product_attention"
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "AutogradCPU")


@pytest.fixture
def fresh_switch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Clears the state of earlier tests, so that leaving the last block unregisters the kernels. Threads that other
    tests left behind, such as Inductor's, do not call the kernels and are not counted."""
    before = _thread._count()
    counted = types.SimpleNamespace(_count=lambda: max(0, _thread._count() - before))
    monkeypatch.setattr(switch, "_thread", counted)
    sdpa_operator._draws.clear()
    yield
    assert not sdpa_operator.SWITCH.is_on
    sdpa_operator._draws.clear()


def is_served(function: Callable[[], Any] = lambda: F.scaled_dot_product_attention(Q, K, K)) -> bool:
    with operators() as seen:
        function()
    theirs = [name for name in seen.names if "scaled_dot_product" in name]
    assert (OURS in seen.names) == (not theirs), seen.names
    return OURS in seen.names


def is_served_compiled(function: Callable[[], Any]) -> bool:
    """Does the same as `is_served` with the profiler, because Dynamo does not support dispatch modes."""
    function()
    with torch.profiler.profile() as profile:
        function()
    return OURS in {event.key for event in profile.key_averages()}


def in_thread(function: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def split(x: Tensor) -> Tensor:
    x = x.unflatten(-1, (2, 4)).transpose(1, 2)
    return F.scaled_dot_product_attention(x, x, x, is_causal=True).transpose(1, 2).flatten(-2)
