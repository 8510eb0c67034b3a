"""Inside a `patch_attention` block our kernels serve torch's operator in every thread, and torch serves all other
calls."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import dlkernels
from dlkernels.testing import within_rule
from tests.support.fresh_python import run_python
from tests.support.sdpa_calls import MISTAKES, K, Q, V, attempt, draw
from tests.support.sdpa_switch import (
    E,
    H,
    X,
    in_thread,
    is_registered,
    is_served,
    is_served_compiled,
    no_other_thread,
    split,
)
from tests.support.sdpa_switch import fresh_switch as fresh_switch

pytestmark = [
    pytest.mark.usefixtures("fresh_switch"),
    pytest.mark.usefixtures("native"),
    pytest.mark.o0_skip(reason="Python around calls that attention/test_functional.py makes as well"),
]


@no_other_thread
def test_nested_and_entered_again() -> None:
    switch = dlkernels.patch_attention()
    for _ in range(2):
        with switch:
            with switch, dlkernels.patch_attention():
                assert is_served()
            assert is_served()
        assert not is_served()
    assert not is_registered()


@no_other_thread
def test_left_in_another_order() -> None:
    first, second = dlkernels.patch_attention(), dlkernels.patch_attention()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert is_served()
    second.__exit__(None, None, None)
    assert not is_served()


def test_left_by_an_exception() -> None:
    with pytest.raises(KeyError), dlkernels.patch_attention():
        assert is_served()
        raise KeyError
    assert not is_served()


def test_decorator() -> None:
    @dlkernels.patch_attention()
    def decorated(depth: int) -> bool:
        return is_served() and (depth == 0 or decorated(depth - 1))

    assert decorated(2)
    assert not is_served()
    torch._dynamo.reset()
    traced = torch.compile(dlkernels.patch_attention()(square), backend="eager", fullgraph=True)
    assert is_served_compiled(lambda: traced(Q))


def test_two_threads_at_once() -> None:
    """The switch is on for both threads until the last one leaves its block."""
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with dlkernels.patch_attention():
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    with dlkernels.patch_attention():
        thread.start()
        assert entered.wait(60)
    assert is_served()
    leave.set()
    thread.join()
    assert not is_served()


def test_the_tag_belongs_to_the_thread_that_is_inside() -> None:
    """Inductor's caches must not store a graph with torch's kernel under the key of a graph with ours."""

    def tag() -> str:
        return torch.compiler.config.cache_key_tag

    with dlkernels.patch_attention():
        seen: list[str] = []

        def enter_and_leave() -> None:
            with dlkernels.patch_attention():
                with dlkernels.patch_attention():
                    pass
                seen.append(tag())
            seen.append(tag())

        in_thread(enter_and_leave)
        assert "attention" in seen[0] and "patch_attention" not in seen[1]
        assert "attention" in tag()
    assert "attention" not in tag()


@no_other_thread
def test_a_block_that_another_thread_leaves() -> None:
    """If another thread leaves the block, the thread that entered removes its tag when it next traces a call."""
    block = dlkernels.patch_attention()
    block.__enter__()
    in_thread(lambda: block.__exit__(None, None, None))
    torch._dynamo.reset()
    compiled = torch.compile(split, backend="aot_eager", fullgraph=True)
    assert not is_served_compiled(lambda: compiled(X))
    assert "attention" not in torch.compiler.config.cache_key_tag
    torch._dynamo.reset()
    with dlkernels.patch_attention():
        pass
    assert not is_registered()


@no_other_thread
def test_calls_while_another_thread_enters_and_leaves() -> None:
    """The dispatcher reads its tables without a lock, so a kernel is unregistered only if no other thread can call
    it."""
    stop, failed, calls = threading.Event(), [], [0, 0]

    def call(number: int) -> None:
        with torch.no_grad():
            while not stop.is_set():
                try:
                    F.scaled_dot_product_attention(Q, K, V)
                    calls[number] += 1
                except BaseException as error:
                    failed.append(error)
                    return

    threads = [threading.Thread(target=call, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(500):
            with dlkernels.patch_attention():
                pass
            assert is_registered()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failed and min(calls) > 0, (failed, calls)
    with dlkernels.patch_attention():
        pass
    assert not is_registered()


FORKED = """
import torch
import torch.nn.functional as F
import dlkernels
from dlkernels.integrations import sdpa_operator
from tests.support.regions_and_forks import in_forked_child

def grad_kernel():
    q = torch.ones(1, 1, 96, 4, requires_grad=True)
    return F.scaled_dot_product_attention(q, q, q).grad_fn.name()

def child():
    assert grad_kernel() == "AttentionBackward"
    with dlkernels.patch_attention():
        assert grad_kernel() == "AttentionBackward"
    switch.__exit__(None, None, None)
    assert "ScaledDotProduct" in grad_kernel(), grad_kernel()

switch = dlkernels.patch_attention()
with switch:
    with sdpa_operator.SWITCH.lock:  # as another thread may hold it
        in_forked_child(child)
    assert grad_kernel() == "AttentionBackward"
assert "ScaledDotProduct" in grad_kernel()
"""


def test_forked_child() -> None:
    run_python(FORKED, OMP_NUM_THREADS="1")


def test_import_registers_nothing() -> None:
    code = (
        "import torch, dlkernels\n"
        "found = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "name, keys = 'aten::scaled_dot_product_attention', ('CPU', 'AutogradCPU', 'CUDA', 'AutogradCUDA')\n"
        "assert not any(found(name, key) for key in keys)\n"
        "with dlkernels.patch_attention():\n"
        "    assert all(found(name, key) for key in keys)\n"
        "assert not any(found(name, key) for key in keys)\n"
        "assert torch.compiler.config.cache_key_tag == ''\n"
    )
    run_python(code)


def test_worker_thread() -> None:
    def work() -> Tensor:
        q = Q.clone().requires_grad_()
        assert is_served(lambda: F.scaled_dot_product_attention(q, K, V).sum().backward())
        assert q.grad is not None
        return q.grad

    q = Q.clone().requires_grad_()
    F.scaled_dot_product_attention(q, K, V).sum().backward()
    with dlkernels.patch_attention():
        torch.testing.assert_close(in_thread(work), q.grad)


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(E, H, 16, 0.0, batch_first=True)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, H, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]


class Functional(Attention):
    def forward(self, x: Tensor) -> Tensor:
        of = self.attention
        out = F.multi_head_attention_forward(
            x, x, x, E, H, of.in_proj_weight, of.in_proj_bias, None, None, False, 0.0, of.out_proj.weight,
            of.out_proj.bias, need_weights=False,
        )[0]  # fmt: skip
        return out


class Scripted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "TransformerEncoderLayer": encoder_layer, "MultiheadAttention": Attention,
    "multi_head_attention_forward": Functional, "TorchScript": lambda: torch.jit.script(Scripted()),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_what_comes_down_to_the_operator(name: str) -> None:
    model = MODELS[name]()
    double = model if name == "TorchScript" else MODELS[name]().double()
    double.load_state_dict(model.state_dict())

    def run(module: nn.Module, x: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        out = module(x)
        return [out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])]

    theirs, exact = run(model, X), run(double, X.double())
    with dlkernels.patch_attention():
        assert is_served(lambda: run(model, X))
        ours = run(model, X)
    for index, (a, b, c) in enumerate(zip(ours, theirs, exact, strict=True)):
        verdict = within_rule(a, b, c.detach(), torch.float32, grad=index > 0)
        assert verdict.ok or (a - b).abs().max() < 1e-5, (index, verdict)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str) -> None:
    args, kwargs = MISTAKES[name]
    expected = attempt(F.scaled_dot_product_attention, args, kwargs)
    with dlkernels.patch_attention():
        found = attempt(F.scaled_dot_product_attention, args, kwargs)
    assert type(found) is type(expected), (found, expected)
    if isinstance(expected, Tensor):
        assert found.shape == expected.shape and found.dtype == expected.dtype
        if not expected.is_meta:
            torch.testing.assert_close(found, expected, equal_nan=True)
    else:
        assert str(found) == str(expected)


def test_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        for tensors in ((Q, K, V), (Q, K.bfloat16(), V), (Q.double(), K.double(), V.double())):
            expected = F.scaled_dot_product_attention(*tensors)
            with dlkernels.patch_attention():
                found = F.scaled_dot_product_attention(*tensors)
                assert is_served(lambda tensors=tensors: F.scaled_dot_product_attention(*tensors))
            assert found.dtype == expected.dtype
            torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
        with dlkernels.patch_attention(), pytest.raises(RuntimeError, match="same dtype"):
            F.scaled_dot_product_attention(Q, K.double(), V)


def square(q: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, q, q).square()


BATCH = draw(3, 1, 2, 4, 6)
TRANSFORMED: dict[str, Callable[[], Any]] = {
    "vmap": lambda: torch.func.vmap(square)(BATCH),
    "grad": lambda: torch.func.grad(lambda q: square(q).sum())(BATCH[0]),
    "vmap of grad": lambda: torch.func.vmap(torch.func.grad(lambda q: square(q).sum()))(BATCH),
    "jacrev": lambda: torch.func.jacrev(square)(BATCH[0]),
    "jvp": lambda: torch.func.jvp(lambda q: F.scaled_dot_product_attention(q, BATCH[0], V[:1, :2, :4]),
                                  (BATCH[0],), (BATCH[1],)),
    "hessian": lambda: torch.func.hessian(lambda q: F.scaled_dot_product_attention(q, q, V[:1, :2, :4, :2]).sum())(
        BATCH[0]),
    "nested": lambda: F.scaled_dot_product_attention(*3 * (ragged(torch.strided),)).to_padded_tensor(0.0),
    "jagged": lambda: F.scaled_dot_product_attention(*3 * (ragged(torch.jagged),)).values(),
    "subclass": lambda: F.scaled_dot_product_attention(*3 * (TwoTensor(Q, 2 * Q),)).b,
    "meta": lambda: F.scaled_dot_product_attention(*3 * (Q.to("meta"),)).shape,
}  # fmt: skip


def ragged(layout: torch.layout) -> Tensor:
    parts = [X[0, :2], X[1]]
    return torch.nested.nested_tensor(parts, layout=layout).unflatten(-1, (2, 4)).transpose(1, 2)


@pytest.mark.parametrize("name", TRANSFORMED)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_and_other_kinds_of_tensors(name: str) -> None:
    expected = attempt(TRANSFORMED[name], (), {})
    with dlkernels.patch_attention():
        found = attempt(TRANSFORMED[name], (), {})
    if isinstance(expected, Exception):
        assert (type(found), str(found)) == (type(expected), str(expected))
    else:
        torch.testing.assert_close(found, expected)
