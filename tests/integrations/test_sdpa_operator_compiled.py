"""Tests `patch_attention` under torch.compile and torch.export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dlkernels
from tests.support.fresh_python import run_python
from tests.support.sdpa_calls import Q
from tests.support.sdpa_switch import X, in_thread, is_served, is_served_compiled, split
from tests.support.sdpa_switch import fresh_switch as fresh_switch

pytestmark = [
    pytest.mark.usefixtures("fresh_switch"),
    pytest.mark.usefixtures("native"),
    pytest.mark.o0_skip(reason="Python around calls that attention/test_functional.py makes as well"),
]


def loss_and_gradient(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    x = X.clone().requires_grad_()
    out = function(x)
    return out.detach(), torch.autograd.grad(out.square().sum(), x)[0]


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.heavy)])
def test_compile(backend: str) -> None:
    torch._dynamo.reset()
    expected = loss_and_gradient(split)
    compiled = torch.compile(split, backend=backend, fullgraph=True)

    def once() -> list[bool]:
        found = [is_served_compiled(lambda: loss_and_gradient(compiled))]
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                found.append(is_served_compiled(lambda: compiled(X)))
        return found

    with dlkernels.patch_attention():
        torch.testing.assert_close(loss_and_gradient(compiled), expected)
        assert all(once())
    # A graph keeps the kernels that it was compiled with.
    assert once() == 3 * [backend != "eager"]
    torch._dynamo.reset()


def test_compile_in_another_thread_is_torchs() -> None:
    """A compilation in a thread that did not enter the block must not use our kernels, because only the thread that
    entered has the tag in Inductor's cache key."""
    torch._dynamo.reset()
    compiled = torch.compile(split, backend="aot_eager", fullgraph=True)
    with dlkernels.patch_attention():
        in_thread(lambda: compiled(X))
        assert not is_served_compiled(lambda: compiled(X))
    torch._dynamo.reset()


def test_calls_that_a_compiled_program_makes_outside_of_its_graphs() -> None:
    """After a graph break the operator is called eagerly. Dynamo must not compile our Python kernel there, so it counts
    only one frame."""

    def broken(x: Tensor) -> Tensor:
        try:
            torch._dynamo.graph_break()
            return F.scaled_dot_product_attention(x, x, x, dropout_p=0.3)
        finally:
            pass

    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    with dlkernels.patch_attention():
        counters.clear()
        torch.compile(broken, backend="eager")(Q)
    assert counters["frames"]["total"] == 1, counters
    torch._dynamo.reset()


def test_export() -> None:
    class Model(nn.Module):
        forward = staticmethod(split)

    with dlkernels.patch_attention():
        exported = torch.export.export(Model(), (X,)).module()
        assert is_served(lambda: exported(X))
    torch.testing.assert_close(exported(X), split(X))
    assert not is_served(lambda: exported(X))


CACHED = """
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import dlkernels

f = torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q), fullgraph=True)
q = torch.ones(1, 2, 16, 8)
for switched in (True, False, True, False):
    torch._dynamo.reset()  # what is left are the caches on disk
    counters.clear()
    if switched:
        with dlkernels.patch_attention():
            f(q)
    else:
        f(q)
    with torch.profiler.profile() as profile:
        f(q)
    names = [event.key for event in profile.key_averages()]
    assert ("dlkernels::attention" in names) == switched, names
    print("hits", counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"])
"""


@pytest.mark.heavy
def test_the_caches_of_inductor(tmp_path: Any) -> None:
    """A program without the switch does not get code from the cache that was compiled with it, nor the other way round.
    Each gets its own code from the cache."""
    output = run_python(CACHED, timeout=300, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    hits = [int(line.split()[1]) for line in output.splitlines() if line.startswith("hits")]
    assert hits[:2] == [0, 0] and min(hits[2:]) > 0, hits
