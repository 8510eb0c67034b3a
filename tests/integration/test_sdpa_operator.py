"""`patch_attention`: torch's operator served by our kernels, in every thread and in the recomputation of a backward."""

from __future__ import annotations

import _thread
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import CheckpointError, checkpoint

import dlkernels
from dlkernels.integration import sdpa_operator
from dlkernels.testing import within_rule
from tests.support.attention_modules import operators
from tests.support.fresh_python import run_python
from tests.support.sdpa_calls import MISTAKES, OURS, K, Q, V, attempt, draw

pytestmark = [
    pytest.mark.usefixtures("native"),
    pytest.mark.o0_skip(reason="Python around calls that attention/test_functional.py makes as well"),
]

E, H = 8, 2
X = draw(2, 5, E)
BACKWARD = f"{OURS}_backward"


# The kernels go when no other thread may be calling them. pytest-timeout's own thread would be one.
no_other_thread = pytest.mark.timeout(300, method="signal")


def is_registered() -> bool:
    name = "aten::scaled_dot_product_attention"
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "AutogradCPU")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is remembered from before, so that leaving takes the kernels away. Threads that other tests left behind,
    such as those of Inductor, do not call them and do not count."""
    before = _thread._count()
    counted = types.SimpleNamespace(_count=lambda: max(0, _thread._count() - before))
    monkeypatch.setattr(sdpa_operator, "_thread", counted)
    sdpa_operator._state.draws.clear()
    yield
    assert sdpa_operator._state.users == 0
    sdpa_operator._state.draws.clear()


def is_served(function: Callable[[], Any] = lambda: F.scaled_dot_product_attention(Q, K, K)) -> bool:
    with operators() as seen:
        function()
    theirs = [name for name in seen.names if "scaled_dot_product" in name]
    assert (OURS in seen.names) == (not theirs), seen.names
    return OURS in seen.names


def is_served_compiled(function: Callable[[], Any]) -> bool:
    """As `is_served`, by the profiler: Dynamo refuses dispatch modes."""
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


# When it is on


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
    """It is on until the last one leaves, for both."""
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
    """Inductor's caches must not get a graph of torch's kernel under the key of ours."""

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
        assert "dlkernels" in seen[0] and seen[1] == ""
        assert "dlkernels" in tag()
    assert tag() == ""


@no_other_thread
def test_a_block_that_another_thread_leaves() -> None:
    """The tag of the thread that entered goes when it next traces a call."""
    block = dlkernels.patch_attention()
    block.__enter__()
    in_thread(lambda: block.__exit__(None, None, None))
    torch._dynamo.reset()
    compiled = torch.compile(split, backend="aot_eager", fullgraph=True)
    assert not is_served_compiled(lambda: compiled(X))
    assert torch.compiler.config.cache_key_tag == ""
    torch._dynamo.reset()
    with dlkernels.patch_attention():
        pass
    assert not is_registered()


@no_other_thread
def test_calls_while_another_thread_enters_and_leaves() -> None:
    """The dispatcher's tables are read without a lock: a kernel is only taken away where nobody can be calling it."""
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
from dlkernels.integration import sdpa_operator
from tests.support.regions_and_forks import in_forked_child

def grad_kernel():
    q = torch.ones(1, 1, 2, 4, requires_grad=True)
    return F.scaled_dot_product_attention(q, q, q).grad_fn.name()

def child():
    assert grad_kernel() == "AttentionBackward"
    with dlkernels.patch_attention():
        assert grad_kernel() == "AttentionBackward"
    switch.__exit__(None, None, None)
    assert "ScaledDotProduct" in grad_kernel(), grad_kernel()

switch = dlkernels.patch_attention()
with switch:
    with sdpa_operator._state.lock:  # as another thread may hold it
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


# Who is reached


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


# What is left to torch is torch's


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


# Recomputation


def block(x: Tensor, p: float) -> Tensor:
    q = x * 1.5
    return F.scaled_dot_product_attention(q, q.sin(), q.cos(), dropout_p=p).tanh()


def forward(x: Tensor, p: float, how: bool | None) -> Tensor:
    """Three blocks, the second one nested if checkpointed."""
    if how is None:
        return block(block(block(x, p), p), p).square().sum()

    def kept(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda y: checkpoint(function, y, use_reentrant=how)

    inner = kept(lambda y: block(y, p))
    return inner(kept(lambda y: block(inner(y), p))(x)).square().sum()


def gradient(p: float, how: bool | None, context: Any = None, backward_context: Any = None) -> Tensor:
    """With the forward inside of the one, and the backward in the other."""
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
    assert torch.equal(gradient(0.4, reentrant), torchs)  # from the same seed


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
    """A non-reentrant checkpoint compares what the recomputation saves with what was saved first, and raises; a
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
        assert not sdpa_operator._state.draws  # nothing recomputes this one
        with torch.no_grad():
            for _ in range(8):
                F.scaled_dot_product_attention(Q, K, V, dropout_p=0.5)
    assert len(sdpa_operator._state.draws) == 3


# torch.compile and torch.export


def split(x: Tensor) -> Tensor:
    x = x.unflatten(-1, (2, 4)).transpose(1, 2)
    return F.scaled_dot_product_attention(x, x, x, is_causal=True).transpose(1, 2).flatten(-2)


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
    """The mark in Inductor's cache key belongs to the thread that entered the block, so a compilation in another thread
    must not take our kernels."""
    torch._dynamo.reset()
    compiled = torch.compile(split, backend="aot_eager", fullgraph=True)
    with dlkernels.patch_attention():
        in_thread(lambda: compiled(X))
        assert not is_served_compiled(lambda: compiled(X))
    torch._dynamo.reset()


def test_calls_that_a_compiled_program_makes_outside_of_its_graphs() -> None:
    """Behind a graph break the operator is called eagerly. Dynamo must not begin to compile our Python kernel there: it
    sees one frame."""

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
import sys
import torch
import torch.nn.functional as F

f = torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q) * 2, fullgraph=True)
q = torch.ones(1, 2, 16, 8)
if sys.argv[1] == "on":
    import dlkernels
    with dlkernels.patch_attention():
        f(q)
else:
    f(q)
with torch.profiler.profile() as profile:
    f(q)
print([event.key for event in profile.key_averages()])
"""


@pytest.mark.heavy
def test_the_caches_of_inductor(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process without the switch must not be given code that was compiled with it, nor the other way round."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for mode in ("on", "off", "on"):
        done = subprocess.run([sys.executable, "-c", CACHED, mode], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert ("dlkernels::attention" in done.stdout) == (mode == "on"), done.stdout
