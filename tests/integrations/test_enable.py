"""Tests `dlkernels.enable`: which calls of torch's operators our kernels serve, and that all others run in torch. The
results are compared in test_contract.py (entries "enabled ...") and the errors in rnn/test_bad_input.py."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pack_padded_sequence

import dlkernels
from dlkernels._core import extension
from dlkernels.integrations.enable import Enabled
from tests.support.fresh_python import run_python

pytestmark = [
    pytest.mark.usefixtures("native"),
    pytest.mark.o0_skip(reason="Python and dispatch around kernels that other tests call as well"),
]

T, B, I, H = 5, 3, 4, 6
X, ROW = torch.randn(T, B, I), torch.randn(B, I)
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTM(I, H, 2, bidirectional=True),
    "gru": lambda: nn.GRU(I, H, bias=False),
    "rnn_tanh": lambda: nn.RNN(I, H, batch_first=True),
    "rnn_relu": lambda: nn.RNN(I, H, 3, nonlinearity="relu"),
}
CELLS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTMCell(I, H),
    "gru": lambda: nn.GRUCell(I, H, bias=False),
    "rnn_tanh": lambda: nn.RNNCell(I, H),
    "rnn_relu": lambda: nn.RNNCell(I, H, nonlinearity="relu"),
}
Q = torch.randn(2, 2, 4, 8)


def packed() -> Any:
    return pack_padded_sequence(X, torch.tensor([5, 2, 4]), enforce_sorted=False)


CALLS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    **{f"{mode}.input": (layer, lambda: X) for mode, layer in LAYERS.items()},
    **{f"{mode}.data": (layer, packed) for mode, layer in LAYERS.items()},
    **{f"{mode}_cell": (cell, lambda: ROW) for mode, cell in CELLS.items()},
}


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [] if result is None else [t for part in result for t in flat(part)]


def assert_close(found: Any, expected: Any) -> None:
    for mine, theirs in zip(flat(found), flat(expected), strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-6)


def served(handle: Enabled) -> dict[str, int]:
    calls: dict[str, int] = {}
    for (operator, _), count in handle.served.items():
        calls[operator] = calls.get(operator, 0) + count
    return calls


@pytest.fixture(autouse=True)
def off_again() -> Iterator[None]:
    yield
    dlkernels.disable()


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", CALLS)
def test_served(name: str, mode: Callable[[], Any]) -> None:
    make, given = CALLS[name]
    module, x = make(), given()
    with mode():
        expected = module(x)
        with dlkernels.enable() as handle:
            found = module(x)
        assert type(module).__module__.startswith("torch.nn")
        assert served(handle) == {name: 1} and not handle.left
        assert_close(found, expected)
        ((_, kernel),) = handle.served
        assert extension.native is not None
        isas = list(extension.native.available_isas())
        assert kernel in {f"cpu/{isa}/{name.replace('_cell', '').split('.')[0]}" for isa in isas}


@pytest.mark.parametrize("name", CALLS)
def test_gradients(name: str) -> None:
    make, given = CALLS[name]
    module, x = make(), given()

    def gradients() -> list[Tensor]:
        loss = sum(y.square().sum() for y in flat(module(x)) if y.is_floating_point())
        return list(torch.autograd.grad(loss, list(module.parameters())))

    expected = gradients()
    with dlkernels.enable() as handle:
        assert_close(gradients(), expected)
    assert served(handle) == {name: 1}


@pytest.mark.parametrize("name", ["lstm.input", "gru.data", "lstm_cell", "rnn_relu_cell"])
def test_gradient_of_the_input_with_frozen_weights(name: str) -> None:
    make, given = CALLS[name]
    module = make().requires_grad_(False)
    x = given()
    data = x if isinstance(x, Tensor) else x.data
    leaf = data.clone().requires_grad_()
    wanted = leaf if isinstance(x, Tensor) else x._replace(data=leaf)

    def gradient() -> Tensor:
        return torch.autograd.grad(sum(y.square().sum() for y in flat(module(wanted)) if y.requires_grad), leaf)[0]

    expected = gradient()
    with dlkernels.enable() as handle:
        assert_close(gradient(), expected)
        state = torch.zeros(B, H, requires_grad=True)
        assert torch.gru_cell(ROW, state, torch.ones(3 * H, I), torch.ones(3 * H, H)).requires_grad
    assert served(handle)[name] == 1


def test_dropout_draws_torchs_masks() -> None:
    layer = nn.GRU(I, H, 2, dropout=0.5)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            torch.manual_seed(0)
            expected = layer(X)
            with dlkernels.enable() as handle:
                torch.manual_seed(0)
                assert_close(layer(X), expected)
            assert served(handle) == {"gru.input": 1}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("name", ["lstm.input", "gru.data", "lstm_cell", "rnn_tanh_cell"])
def test_autocast(name: str, mode: Callable[[], Any]) -> None:
    make, given = CALLS[name]
    module, x = make(), given()
    with mode(), torch.autocast("cpu", torch.bfloat16):
        expected = module(x)
        with dlkernels.enable() as handle:
            found = module(x)
    assert served(handle) == {name: 1}
    for mine, theirs in zip(flat(found), flat(expected), strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=0.05, atol=0.05)


def test_deterministic_algorithms_reach_the_kernels() -> None:
    """In this mode the results of a sequence do not depend, to the bit, on the batch that it is in."""
    layer, x = nn.LSTM(64, 64), torch.randn(3, 40, 64)
    torch.use_deterministic_algorithms(True)
    try:
        with dlkernels.enable(), torch.no_grad():
            together = layer(x)[0]
            assert all(torch.equal(layer(x[:, b : b + 1])[0], together[:, b : b + 1]) for b in range(40))
    finally:
        torch.use_deterministic_algorithms(False)


def test_scripted() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.layer = nn.LSTMCell(I, H), nn.GRU(H, H)

        def forward(self, x: Tensor) -> Tensor:
            h, c = self.cell(x[0])
            for t in range(1, x.size(0)):
                h, c = self.cell(x[t], (h, c))
            return self.layer(h.unsqueeze(0))[0]

    model = Loop()
    expected = model(X)
    scripted = torch.jit.script(model)
    traced = torch.jit.trace(model, (X,))
    with dlkernels.enable() as handle:
        assert_close(scripted(X), expected)
        assert_close(traced(X), expected)
        with torch.no_grad():
            assert_close(scripted(X), expected)
    # torch.jit.trace records a layer as one operator, but a cell as the operators of which torch's cell consists.
    assert served(handle) == {"lstm_cell": 2 * T, "gru.input": 3}


def test_lists_of_a_script_keep_their_tensors() -> None:
    """torch's stable ABI would move the tensors out of a list that the script still holds."""

    @torch.jit.script
    def twice(x: Tensor, hx: list[Tensor], w_ih: Tensor, w_hh: Tensor) -> tuple[Tensor, list[Tensor]]:
        h, c = torch.lstm_cell(x, hx, w_ih, w_hh)
        h, c = torch.lstm_cell(x + c, hx, w_ih, w_hh)
        return h, hx

    given = torch.randn(B, H), [torch.randn(B, H), torch.randn(B, H)], torch.randn(4 * H, H), torch.randn(4 * H, H)
    with torch.no_grad():
        expected = twice(*given)
        with dlkernels.enable() as handle:
            assert_close(twice(*given), expected)
    assert served(handle) == {"lstm_cell": 2}


def test_attention_is_served() -> None:
    layer = nn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(2, 5, 16)
    expected = layer(x, x, x, need_weights=False)[0]
    with dlkernels.enable() as handle:
        assert_close(layer(x, x, x, need_weights=False)[0], expected)
    assert served(handle) == {"scaled_dot_product_attention": 1}


def test_each_family_alone() -> None:
    layer = nn.LSTM(I, H)

    def both() -> None:
        layer(X)
        nn.functional.scaled_dot_product_attention(Q, Q, Q)

    with dlkernels.enable(attention=False) as handle:
        both()
    assert served(handle) == {"lstm.input": 1}
    with dlkernels.enable(recurrent=False) as handle:
        both()
    assert served(handle) == {"scaled_dot_product_attention": 1}
    with dlkernels.enable(recurrent=False, attention=False) as handle:
        both()
    assert not handle.served and not handle.left


def forward_mode() -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(nn.GRUCell(I, H)(forward_ad.make_dual(ROW, ROW))).tangent


LEFT: dict[str, tuple[str, Callable[[], Any]]] = {
    "vmap's inner call": ("torch.func", lambda: torch.func.grad(lambda x: nn.GRU(I, H)(x)[0].sum())(X)),
    "complex numbers": ("no kernel", lambda: nn.RNNCell(I, H, dtype=torch.complex64)(ROW.to(torch.complex64))),
    "a mistake": ("refused", lambda: torch.gru_cell(ROW, ROW, torch.ones(6, 4), torch.ones(6, 2))),
    "a transform": ("torch.func", lambda: torch.func.jvp(nn.GRUCell(I, H), (ROW,), (ROW,))),
    "forward mode": ("forward-mode", forward_mode),
}


@pytest.mark.parametrize("what", LEFT)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_left_to_torch(what: str, mode: Callable[[], Any]) -> None:
    reason, call = LEFT[what]

    def outcome() -> Any:
        torch.manual_seed(0)
        try:
            return call()
        except Exception as error:
            return type(error), str(error).splitlines()[0]

    with mode():
        expected = outcome()
        with dlkernels.enable() as handle:
            found = outcome()
    if isinstance(expected[0], type):
        assert found == expected
    else:
        assert_close(found, expected)
    assert {reason in why for _, why in handle.left} == {True} and not handle.served, handle.report()


def test_errors_of_hooks_keep_their_type() -> None:
    """torch.utils.checkpoint ends a recomputation by an exception of its own."""

    class Own(Exception):
        pass

    def refuse(_: Tensor) -> Tensor:
        raise Own("kept", 3)

    with (
        dlkernels.enable(),
        torch.autograd.graph.saved_tensors_hooks(refuse, refuse),
        pytest.raises(Own) as caught,
    ):
        nn.LSTM(I, H)(X)
    assert caught.value.args == ("kept", 3)


def test_handles() -> None:
    layer = nn.GRU(I, H)

    def is_served() -> bool:
        with dlkernels.enable(False, False) as counter, torch.no_grad():
            layer(X)
        return bool(counter.served)

    assert not is_served()
    first, second = dlkernels.enable(), dlkernels.enable()
    first.disable()
    assert is_served() and second.is_on and not first.is_on
    first.disable()
    assert is_served()
    with dlkernels.enable():
        second.disable()
        assert is_served()
    assert not is_served()
    with pytest.raises(KeyError), dlkernels.enable():
        raise KeyError
    assert not is_served()
    dlkernels.enable()
    dlkernels.enable(attention=False)
    dlkernels.disable()
    dlkernels.disable()
    assert not is_served()


def test_counts_end_with_the_handle() -> None:
    layer = nn.GRU(I, H)
    outer = dlkernels.enable()
    layer(X)
    with dlkernels.enable() as inner:
        layer(X)
    layer(X)
    assert served(inner) == {"gru.input": 1} and served(outer) == {"gru.input": 3}
    assert outer.report().splitlines()[1].split()[:2] == ["gru.input", "3"]
    assert "3 calls" in repr(outer)
    assert dlkernels.enable(attention=False).report() == "no call of an operator that dlkernels serves"


def test_a_model_whose_attention_is_not_reached() -> None:
    class MyAttention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(x @ x.mT, -1) @ x

    class AttentionBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = MyAttention()

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x)  # type: ignore[no-any-return]

    model = nn.Sequential(AttentionBlock(), AttentionBlock())
    with dlkernels.enable() as handle:
        model(Q)
        assert 'attn_implementation="eager"' in handle.report()
        nn.functional.scaled_dot_product_attention(Q, Q, Q)
        assert "eager" not in handle.report()
    report = dlkernels.patch_report(model)
    assert report.own_attention == {"MyAttention": 2} and "MyAttention (2)" in str(report)
    assert "own attention" not in str(dlkernels.patch_report(nn.MultiheadAttention(4, 2)))


def test_threads() -> None:
    """Threads turn the switch on and off while others call: each call is served by one of the two kernels."""
    layer = nn.LSTM(I, H)
    with torch.no_grad():
        expected = layer(X)
    failed: list[BaseException] = []

    def guarded(function: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                with torch.no_grad():
                    for _ in range(200):
                        function()
            except BaseException as error:
                failed.append(error)

        return run

    def switch() -> None:
        with dlkernels.enable():
            pass

    threads = [threading.Thread(target=guarded(f)) for f in (switch, switch, lambda: assert_close(layer(X), expected))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    with dlkernels.enable() as handle:
        thread = threading.Thread(target=lambda: layer(X))
        thread.start()
        thread.join()
    assert served(handle) == {"lstm.input": 1}


def test_checkpoint_recomputes_on_the_same_kernels() -> None:
    layer = nn.LSTM(I, H, 2, dropout=0.5)

    def gradient(how: bool | None) -> Tensor:
        torch.manual_seed(0)
        x = X.clone().requires_grad_()
        call = lambda x: layer(x)[0]  # noqa: E731
        y = call(x) if how is None else torch.utils.checkpoint.checkpoint(call, x, use_reentrant=how)
        y.square().sum().backward()
        assert x.grad is not None
        return x.grad

    with dlkernels.enable() as handle:
        expected = gradient(None)
        for how in (True, False):
            torch.testing.assert_close(gradient(how), expected)
    assert served(handle) == {"lstm.input": 5} and not handle.left


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("mode", LAYERS)
def test_compiled(mode: str, grad: bool) -> None:
    """One operator a layer is in the graph, for any number of steps, and Dynamo's setting is restored."""
    layer = LAYERS[mode]()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    before = torch._dynamo.config.allow_rnn
    torch._dynamo.reset()
    with dlkernels.enable(compile=True), torch.set_grad_enabled(grad):
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=keep))
        for steps in (T, T + 3):
            x = torch.randn(B, steps, I) if layer.batch_first else torch.randn(steps, B, I)
            assert_close(compiled(x), layer(x))
            if grad:
                found, expected = (
                    torch.autograd.grad(run(x)[0].square().sum(), list(layer.parameters())) for run in (compiled, layer)
                )
                assert_close(found, expected)
    assert torch._dynamo.config.allow_rnn == before
    forward, *others = graphs
    ours = [str(node.target) for node in forward.graph.nodes if "dlkernels" in str(node.target)]
    assert ours.count(f"dlkernels.{mode}.default") == layer.num_layers
    assert len(others) <= 1  # the backward


def test_the_environment_turns_it_on_at_import() -> None:
    code = """
        import torch
        layer, x = torch.nn.LSTM(4, 6), torch.randn(5, 3, 4)
        import dlkernels
        layer(x)
        assert layer(x)[0].grad_fn.name() == {name!r}, layer(x)[0].grad_fn
        dlkernels.disable()
        assert layer(x)[0].grad_fn.name() != "SequenceBackward"
    """
    run_python(code.format(name="SequenceBackward"), DLKERNELS_ENABLE="1")


def test_import_registers_nothing_and_forks_inherit() -> None:
    run_python("""
        import torch, dlkernels
        from tests.support.regions_and_forks import in_forked_child
        found = torch._C._dispatch_has_kernel_for_dispatch_key
        names = [f"aten::{mode}.{form}" for mode in ("lstm", "gru", "rnn_relu") for form in ("input", "data")]
        names += ["aten::scaled_dot_product_attention", "aten::lstm_cell"]
        def registered():
            return [found(name, key) for name in names for key in ("AutogradCPU", "CPU", "CUDA")]
        assert not any(registered())
        layer, x = torch.nn.LSTM(4, 6), torch.randn(5, 3, 4)
        def child():
            with torch.no_grad():
                layer(x)
            with dlkernels.enable() as inner:
                layer(x)
            assert sum(inner.served.values()) == 1
            handle.disable()
            assert layer(x)[0].grad_fn.name() != "SequenceBackward"
        with dlkernels.enable() as handle:
            assert all(registered())
            in_forked_child(child)
            assert layer(x)[0].grad_fn.name() == "SequenceBackward"
        assert not any(registered())
    """)
