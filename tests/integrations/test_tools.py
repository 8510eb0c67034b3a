"""torch.fx, TorchScript and torch.ao.quantization treat a model with our layers as they treat one with torch.nn's."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import dlkernels
from tests.support.module_pairs import EVERY_KIND, KINDS, LAYERS, B, F, Kind, T, assert_same, flat, inputs_of, pair

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated"),
]


class Holder(nn.Module):
    """A model that calls `layer` on the output of another layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.before, self.layer = nn.Linear(F, F), layer

    def forward(self, *inputs: Tensor) -> Any:
        first = self.before(inputs[0])
        return self.layer(first, *inputs[1:])


class OneInput(nn.Module):
    """Does the same as Holder for torch.fx, which does not trace *args and takes string annotations for objects."""

    def __init__(self, layer: nn.Module, inputs: int) -> None:
        super().__init__()
        self.before, self.layer, self.inputs = nn.Linear(F, F), layer, inputs

    def forward(self, x):
        return self.layer(*[self.before(x)] * self.inputs)


def gradients(module: Any, inputs: list[Tensor]) -> list[Tensor]:
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    loss = sum((tensor.sin() * (k + 1)).sum() for k, tensor in enumerate(flat(module(*inputs))))
    return list(torch.autograd.grad(loss, [*inputs, *module.parameters()]))


@EVERY_KIND
@pytest.mark.parametrize("how", ["patched", "native"])
def test_fx_keeps_layers_whole(kind: Kind, how: str) -> None:
    layer = pair(kind, how)[1]
    model = OneInput(layer, kind.inputs)
    (x,) = inputs_of(kind._replace(inputs=1))
    expected = model(x)
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["before", "layer"]
    assert "self.layer(" in traced.code
    again = torch.fx.symbolic_trace(traced)
    for graph in (traced, again, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        assert_same(expected, graph(x))
        assert type(graph.layer) is type(layer)
    assert type(layer).__module__ == "dlkernels.nn"
    assert copy.deepcopy(layer).__module__ == layer.__module__ == pickle.loads(pickle.dumps(layer)).__module__
    if how == "patched":
        dlkernels.unpatch(layer)
        assert layer.__module__ == type(layer).__module__
        assert "__module__" not in vars(layer)


def test_fx_calls_the_hooks_of_a_layer_once() -> None:
    model = OneInput(dlkernels.nn.GRU(F, 6), 1)
    calls = []
    model.layer.register_forward_hook(lambda *_: calls.append(1))
    traced = torch.fx.symbolic_trace(model)
    assert not calls
    traced(torch.randn(T, B, F))
    assert len(calls) == 1


@pytest.mark.parametrize("lib", [nn, dlkernels.nn])
def test_fx_traces_through_a_subclass(lib: Any) -> None:
    class Scaled(lib.GRUCell):  # type: ignore[misc, name-defined]
        def forward(self, input: Tensor) -> Tensor:
            return input * self.bias_ih[0]

    traced = torch.fx.symbolic_trace(nn.Sequential(Scaled(F, 6)))
    assert not [node for node in traced.graph.nodes if node.op == "call_module"]


def saved(traced: Any) -> Any:
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


def trace(module: nn.Module, inputs: list[Tensor]) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        traced = torch.jit.trace(module, tuple(inputs))
    texts = [f"{w.category.__name__}: {str(w.message).splitlines()[0]}" for w in caught]
    return traced, [text for text in texts if "oneDNN" not in text]  # torch warns of this once per process


@EVERY_KIND
@pytest.mark.parametrize(("how", "training"), [("patched", True), ("native", False)])
def test_jit_trace_is_that_of_torch(kind: Kind, how: str, training: bool) -> None:
    theirs, ours = (Holder(layer).train(training) for layer in pair(kind, how))
    ours.before.load_state_dict(theirs.before.state_dict())
    inputs, others = inputs_of(kind), inputs_of(kind)
    expected, their_warnings = trace(theirs, inputs)
    traced, our_warnings = trace(ours, inputs)
    assert our_warnings == their_warnings
    nodes = [[node.kind() for node in graph.inlined_graph.nodes()] for graph in (traced, expected)]
    assert nodes[0] == nodes[1]
    loaded = saved(traced)
    for given in (inputs, others):
        assert_same(theirs(*given), ours(*given))
        assert_same(theirs(*given), loaded(*given))
        for want, got in zip(gradients(theirs, given), gradients(loaded, given), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert_same(saved(expected).layer(*others), loaded.layer(*others))
    if isinstance(ours.layer, nn.RNNBase):
        longer = inputs_of(kind, T + 2)
        assert_same(theirs(*longer), loaded(*longer))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("grad", [True, False])
def test_jit_trace_of_states_packed_sequences_and_a_subclass(name: str, grad: bool) -> None:
    class Model(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, h: Tensor, lengths: Tensor) -> Any:
            hx = (h, h) if name == "LSTM" else h
            packed, last = self.layer(pack_padded_sequence(x, lengths), hx)
            return packed.data, last

    class Second(getattr(dlkernels.nn, name)):  # type: ignore[misc]
        def forward(self, input: Any, hx: Any = None) -> Any:
            output, last = super().forward(input, hx)
            return output, last

    x, h, lengths = torch.randn(T, B, F), torch.randn(1, B, F), torch.tensor([5, 3, 2])
    theirs = getattr(nn, name)(F, F)
    for ours in (getattr(dlkernels.nn, name)(F, F), Second(F, F)):
        ours.load_state_dict(theirs.state_dict())
        with torch.set_grad_enabled(grad):
            loaded = saved(torch.jit.trace(Model(ours), (x, h, lengths)))
            assert_same(Model(theirs)(x * 2, h, lengths), loaded(x * 2, h, lengths))
            longer, lengths_of_it = torch.randn(T + 1, B, F), torch.tensor([6, 6, 1])
            assert_same(Model(theirs)(longer, h, lengths_of_it), loaded(longer, h, lengths_of_it))


@pytest.mark.parametrize("grad", [True, False])
def test_jit_trace_of_the_functional_forms(grad: bool) -> None:
    """Calls that torch has no layer for are recorded as the operators of the reference."""
    layer, cell = dlkernels.nn.LSTM(F, 6), dlkernels.nn.GRUCell(F, 6)
    x, lengths = torch.randn(T, B, F), torch.tensor([2, 5, 3])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.cell = layer, cell

        def forward(self, x: Tensor) -> Any:
            q = x.unsqueeze(0)
            return (
                self.layer(x, lengths=lengths)[0], self.layer(x, bptt_steps=2)[0], self.cell.forward(x[0]),
                dlkernels.functional.attention(q, q, q, causal=True),
                dlkernels.functional.scaled_dot_product_attention(q, q, q, is_causal=True),
            )  # fmt: skip

    model = Model()
    with torch.set_grad_enabled(grad):
        loaded = saved(torch.jit.trace(model, (x,), check_trace=False))
        assert "dlkernels::" not in str(loaded.inlined_graph)
        assert_same(model(x * 2), loaded(x * 2))
    for want, got in zip(gradients(model, [x]), gradients(loaded, [x]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@EVERY_KIND
def test_jit_script_says_what_to_do(kind: Kind) -> None:
    theirs, ours = pair(kind, "patched")
    layer = dlkernels.patch(kind.make(nn))
    model = nn.Sequential(layer)
    for refused in (ours, model, kind.make(dlkernels.nn)):
        with pytest.raises(RuntimeError, match=rf"dlkernels\.nn\.{type(ours).__name__}\. Call dlkernels\.unpatch"):
            torch.jit.script(refused)
    assert model[0] is layer
    inputs = inputs_of(kind)
    dlkernels.unpatch(ours)
    if isinstance(ours, nn.RNNBase):  # TorchScript has no forward for a root module with overloads
        theirs, ours = nn.Sequential(theirs), nn.Sequential(ours)
    assert_same(theirs(*inputs), torch.jit.script(ours)(*inputs))


@pytest.mark.parametrize("name", ["LSTM", "GRU", "LSTMCell", "GRUCell", "RNNCell"])
def test_quantize_dynamic_says_that_it_passes_layers_by(name: str) -> None:
    kind = next(kind for kind in KINDS if kind.name == name)
    model = dlkernels.patch(nn.Sequential(kind.make(nn)))
    with pytest.warns(UserWarning, match=rf"does not know dlkernels\.nn\.{name} and leaves it in floating point"):
        quantized = torch.ao.quantization.quantize_dynamic(model)
    assert type(quantized[0]) is getattr(dlkernels.nn, name)
    (x,) = inputs_of(kind)
    assert_same(model(x), quantized(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*TypedStorage|.*deprecated")
        quantized = torch.ao.quantization.quantize_dynamic(dlkernels.unpatch(model))
    assert type(quantized[0]).__module__.startswith("torch.ao.nn.quantized.dynamic")


def test_qconfig_is_an_attribute_like_another() -> None:
    layer = dlkernels.nn.RNN(F, 6)
    assert not hasattr(layer, "qconfig")
    layer.qconfig = None
    assert layer.qconfig is None
    assert copy.deepcopy(layer).qconfig is None
    del layer.qconfig
    assert not hasattr(layer, "qconfig")


def test_the_report_speaks_of_tables_keyed_by_type() -> None:
    report = dlkernels.patch_report(dlkernels.patch(nn.Sequential(nn.LSTM(F, 6))))
    assert "torch.ao.quantization" in report.note
    assert report.note in str(report)
    assert not dlkernels.patch_report(nn.Sequential(nn.LSTM(F, 6))).note
