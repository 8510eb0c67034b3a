"""Tests `dlkernels.enable`: which calls of torch's operators our kernels serve, and that all others run in torch. The
results are compared in test_contract.py (entries "enabled ...") and the errors in rnn/test_bad_input.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.autograd import forward_ad

import dlkernels
from dlkernels._core import extension
from dlkernels.integrations import sdpa_operator
from tests.support.enabled_calls import CALLS, LAYERS, MARKS, ROW, B, H, I, Q, T, X, assert_close, flat, served
from tests.support.enabled_calls import off_again as off_again

pytestmark = MARKS


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
        try:
            expected = module(x)
        except RuntimeError as error:  # oneDNN has no bfloat16 LSTM for machines without AVX-512
            if "primitive descriptor" not in str(error):
                raise
            with torch.autocast("cpu", enabled=False):
                expected = tuple(y.bfloat16() for y in flat(module(x)))
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_small_calls_are_left_to_torch(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, training: bool) -> None:
    monkeypatch.setattr(sdpa_operator, "LEAST_SCORES", sdpa_operator.Least(40, 30, 20))
    scores = 40 if dtype == torch.float32 else 20 if training else 30
    small, enough = (torch.randn(1, 2, n // 10, 8, dtype=dtype, requires_grad=training) for n in (scores - 10, scores))
    kv = torch.randn(1, 2, 5, 8, dtype=dtype)
    with dlkernels.enable() as handle:
        found = F.scaled_dot_product_attention(small, kv, kv)
        assert sum(handle.left.values()) == 1
        assert sum(handle.served.values()) == 0
        F.scaled_dot_product_attention(small, kv, kv, dropout_p=0.5)
        F.scaled_dot_product_attention(enough, kv, kv)
        assert sum(handle.left.values()) == 1
        assert sum(handle.served.values()) == 2
    assert torch.equal(found, F.scaled_dot_product_attention(small, kv, kv))
