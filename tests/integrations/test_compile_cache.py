"""Inductor's caches on disk outlive this package: an upgraded package must not get a program of the old one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import dlkernels
from dlkernels._core import compile_cache
from tests.support.sdpa_switch import in_thread

Q = torch.randn(1, 2, 8, 8)
X = torch.randn(3, 4)


def attention(q: Tensor) -> Tensor:
    return dlkernels.functional.attention(q, q, q)


def cell() -> Callable[[Tensor], Tensor]:
    layer = dlkernels.nn.GRUCell(4, 6)
    return lambda x: layer(x)


@pytest.mark.parametrize("what", ["attention", "cell"])
def test_another_build_compiles_again(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, given = (attention, Q) if what == "attention" else (cell(), X)

    def compile_as(build: str) -> tuple[int, int]:
        """How many of the two graphs, forward and backward, the cache had, and how many it had not."""
        monkeypatch.setattr(compile_cache, "_digest", lambda: build)
        compile_cache._tag.cache_clear()

        def compiled() -> None:
            torch._dynamo.reset()
            counters.clear()
            torch.compile(function, fullgraph=True)(given.clone().requires_grad_()).sum().backward()

        in_thread(compiled)  # a thread has a tag of its own
        found = counters["inductor"]
        return found["fxgraph_cache_hit"], found["fxgraph_cache_miss"]

    with fresh_cache():
        assert compile_as("one") == (0, 2)
        assert compile_as("one") == (2, 0)
        assert compile_as("another") == (0, 2)
    compile_cache._tag.cache_clear()
