"""What other programs do to a model that holds our layers, against the same done to torch.nn's: torch.fx, TorchScript,
FlopCounterMode, torch.ao.quantization, pruning, and programs that write to `_flat_weights`."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import dlkernels

T, B, F = 5, 3, 4

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated"),
]


class Kind(NamedTuple):
    name: str
    make: Callable[[Any], nn.Module]
    inputs: int = 1
    of_one_step: bool = False


KINDS = [
    Kind("LSTM", lambda lib: lib.LSTM(F, 6)),
    Kind("LSTM-deep", lambda lib: lib.LSTM(F, 6, 2, bidirectional=True, batch_first=True, proj_size=2)),
    Kind("GRU", lambda lib: lib.GRU(F, 6)),
    Kind("GRU-deep", lambda lib: lib.GRU(F, 6, 2, bidirectional=True, batch_first=True)),
    Kind("RNN", lambda lib: lib.RNN(F, 6, bias=False)),
    Kind("RNN-relu", lambda lib: lib.RNN(F, 6, 2, nonlinearity="relu")),
    Kind("LSTMCell", lambda lib: lib.LSTMCell(F, 6), 1, True),
    Kind("GRUCell", lambda lib: lib.GRUCell(F, 6), 1, True),
    Kind("RNNCell", lambda lib: lib.RNNCell(F, 6), 1, True),
    Kind("MultiheadAttention", lambda lib: lib.MultiheadAttention(F, 2), 3),
    Kind("TransformerEncoderLayer", lambda lib: lib.TransformerEncoderLayer(F, 2, 8, 0.0)),
    Kind("TransformerDecoderLayer", lambda lib: lib.TransformerDecoderLayer(F, 2, 8, 0.0), 2),
]
EVERY_KIND = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
LAYERS = ("LSTM", "GRU", "RNN")


class Holder(nn.Module):
    """A model with the layer in the middle."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.before, self.layer = nn.Linear(F, F), layer

    def forward(self, *inputs: Tensor) -> Any:
        first = self.before(inputs[0])
        return self.layer(first, *inputs[1:])


class OneInput(nn.Module):
    """The same for torch.fx, which traces no *args and takes annotations that are strings for objects."""

    def __init__(self, layer: nn.Module, inputs: int) -> None:
        super().__init__()
        self.before, self.layer, self.inputs = nn.Linear(F, F), layer, inputs

    def forward(self, x):
        return self.layer(*[self.before(x)] * self.inputs)


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result if part is not None for tensor in flat(part)]


def pair(kind: Kind, how: str) -> tuple[nn.Module, nn.Module]:
    """torch's and ours, patched or native, with the same weights."""
    theirs = kind.make(nn)
    if how == "patched":
        return theirs, dlkernels.patch(theirs, copy=True)
    ours = kind.make(dlkernels.nn)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs_of(kind: Kind, steps: int = T) -> list[Tensor]:
    shape = (B, F) if kind.of_one_step else (steps, B, F)
    return [torch.randn(shape) for _ in range(kind.inputs)]


def assert_same(theirs: Any, ours: Any) -> None:
    torch.testing.assert_close(flat(ours), flat(theirs))


def gradients(module: Any, inputs: list[Tensor]) -> list[Tensor]:
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    loss = sum((tensor.sin() * (k + 1)).sum() for k, tensor in enumerate(flat(module(*inputs))))
    return list(torch.autograd.grad(loss, [*inputs, *module.parameters()]))


# torch.fx


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
    assert type(layer).__module__.startswith("dlkernels.nn.")
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


# torch.jit


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
    return traced, [text for text in texts if "oneDNN" not in text]  # said once in a process


@EVERY_KIND
@pytest.mark.parametrize(("how", "training"), [("patched", True), ("native", False)])
def test_jit_trace_is_that_of_torch(kind: Kind, how: str, training: bool) -> None:
    theirs, ours = (Holder(layer).train(training) for layer in pair(kind, how))
    ours.before.load_state_dict(theirs.before.state_dict())
    inputs, others = inputs_of(kind), inputs_of(kind)
    if kind.name == "MultiheadAttention":  # they cannot be one tensor here, which torch's fast path asks for
        inputs[2], others[2] = inputs[1], others[1]
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
    """What torch has no layer for is recorded as the operators of the reference."""
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
    if isinstance(ours, nn.RNNBase):  # TorchScript knows no forward of a root with overloads
        theirs, ours = nn.Sequential(theirs), nn.Sequential(ours)
    assert_same(theirs(*inputs), torch.jit.script(ours)(*inputs))


# _flat_weights: what is done to the layer, and whether a copy of it goes the same way


def _scaled(layer: Any, factor: float) -> list[Tensor]:
    return [weight.detach() * factor for weight in layer.parameters()]


def _assign(layer: Any) -> None:
    layer._flat_weights = _scaled(layer, 0.5)


def _assign_item(layer: Any) -> None:
    layer._flat_weights[1] = _scaled(layer, 2.0)[1]


def _assign_after_a_call(layer: Any) -> None:
    layer(torch.randn(T, B, F))
    weights = layer._flat_weights
    layer(torch.randn(T, B, F))
    weights[0] = _scaled(layer, 3.0)[0]


def _assign_then_the_same_by_name(layer: Any) -> None:
    _assign(layer)
    layer.weight_hh_l0 = layer.weight_hh_l0


def _assign_then_another_by_name(layer: Any) -> None:
    _assign(layer)
    layer.weight_hh_l0 = nn.Parameter(_scaled(layer, 0.1)[1])


def _assign_then_to(layer: Any) -> None:
    _assign(layer)
    layer.to(torch.float32).float()


def _assign_then_functional_call(layer: Any) -> None:
    _assign(layer)
    torch.func.functional_call(layer, {"bias_ih_l0": _scaled(layer, 7.0)[2]}, (torch.randn(T, B, F),))


def _assign_without_the_parameters(layer: Any) -> None:
    weights = _scaled(layer, 0.5)
    for name in layer._flat_weights_names:
        del layer._parameters[name]
    layer._flat_weights = weights


def _weight_drop(layer: Any) -> None:
    raw = layer.weight_hh_l0
    del layer._parameters["weight_hh_l0"]
    layer.register_parameter("weight_hh_l0_raw", nn.Parameter(raw.data))
    layer.weight_hh_l0 = layer.weight_hh_l0_raw * 0.5
    layer.flatten_parameters = lambda: None


def _weight_drop_twice(layer: Any) -> None:
    _weight_drop(layer)
    layer(torch.randn(T, B, F))
    layer.weight_hh_l0 = layer.weight_hh_l0_raw * 0.25


def _pruned(layer: Any) -> None:
    prune.l1_unstructured(layer, "weight_hh_l0", amount=0.5)


def _assign_then_parametrize(layer: Any) -> None:
    _assign(layer)
    nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")


def _spectral_norm(layer: Any) -> None:
    torch.manual_seed(1)
    nn.utils.spectral_norm(layer, "weight_hh_l0")


USES = [
    _assign, _assign_item, _assign_after_a_call, _assign_then_the_same_by_name, _assign_then_another_by_name,
    _assign_then_to, _assign_then_functional_call, _assign_without_the_parameters, _weight_drop, _weight_drop_twice,
    _pruned, _assign_then_parametrize, _spectral_norm,
]  # fmt: skip


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__.strip("_"))
@pytest.mark.parametrize("name", LAYERS)
def test_flat_weights_are_those_of_torch(name: str, use: Callable[[Any], None]) -> None:
    theirs = getattr(nn, name)(F, 6)
    ours = getattr(dlkernels.nn, name)(F, 6)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(T, B, F)
    torch.manual_seed(2)
    use(theirs)
    torch.manual_seed(2)
    use(ours)
    for _ in range(2):
        with torch.no_grad():
            assert_same(theirs(x), ours(x))
        assert_same(theirs(x), ours(x))
    assert_same(theirs._flat_weights, ours._flat_weights)
    expected, result = flat(theirs(x))[0], flat(ours(x))[0]
    assert expected.requires_grad == result.requires_grad
    if expected.requires_grad:
        expected.sum().backward(retain_graph=True)  # a dropped weight was computed once, for several calls
        result.sum().backward(retain_graph=True)
    for want, got in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert (want.grad is None) == (got.grad is None)
        if want.grad is not None:
            torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_assigned_weights_survive_patch_and_unpatch_and_serve_prepack(name: str) -> None:
    layer = getattr(nn, name)(F, 6)
    x = torch.randn(T, B, F)
    plain = layer(x)
    layer._flat_weights = _scaled(layer, 0.5)
    expected = layer(x)
    dlkernels.patch(layer)
    assert_same(expected, layer(x))
    with torch.no_grad():
        assert_same(expected, layer.prepack()(x))
    compiled = torch.compile(lambda x: layer(x)[0], backend="eager", fullgraph=True)
    assert_same(expected[0], compiled(x))
    dlkernels.unpatch(layer)
    assert_same(expected, layer(x))
    layer._init_flat_weights()
    assert_same(plain, dlkernels.patch(layer)(x))


@pytest.mark.parametrize("name", LAYERS)
def test_prepack_after_another_layers_weight_was_assigned(name: str) -> None:
    layer, other = getattr(dlkernels.nn, name)(F, 6).prepack(), getattr(dlkernels.nn, name)(F, 6)
    x = torch.randn(T, B, F)
    peer = getattr(nn, name)(F, 6)
    peer.load_state_dict(layer.state_dict())
    layer.weight_hh_l0 = other.weight_hh_l0
    with torch.no_grad():
        peer.weight_hh_l0.copy_(other.weight_hh_l0)
        assert_same(peer(x), layer(x))
        layer.prepack()
        assert_same(peer(x), layer(x))
        other.weight_hh_l0.mul_(0.5)
        peer.weight_hh_l0.mul_(0.5)
        assert_same(peer(x), layer(x))


# FlopCounterMode


def flops(module: nn.Module, inputs: Any, output: Callable[[Any], Tensor]) -> tuple[int, int]:
    """Forward and backward. Without oneDNN, whose LSTM is one operator of no products to torch."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter:
            result = output(module(*inputs))
            forward = counter.get_total_flops()
            result.sum().backward(retain_graph=True)  # a PackedSequence is not packed anew for each call
        return forward, counter.get_total_flops() - forward
    finally:
        torch._C._set_mkldnn_enabled(before)


VARIANTS: list[dict[str, Any]] = [
    {}, {"bias": False}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True}, {"proj_size": 2},
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), [
    (name, options) for name, options in itertools.product(LAYERS, VARIANTS)
    if name == "LSTM" or "proj_size" not in options
])  # fmt: skip
@pytest.mark.parametrize("with_gradient", [True, False])
def test_flops_of_layers(name: str, options: dict[str, Any], with_gradient: bool) -> None:
    x = torch.randn(T, B, F, requires_grad=with_gradient)
    directions = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    batch = T if options.get("batch_first") else B
    h = torch.randn(directions, batch, options.get("proj_size", 6), requires_grad=with_gradient)
    c = torch.randn(directions, batch, 6, requires_grad=with_gradient)
    packed = pack_padded_sequence(x, torch.tensor([5, 3, 2]))
    calls = (
        ((x,), lambda result: result[0]),
        ((x, (h, c) if name == "LSTM" else h), lambda result: result[0]),
        ((packed,), lambda result: result[0].data),
    )
    theirs, ours = (getattr(lib, name)(F, 6, **options) for lib in (nn, dlkernels.nn))
    for inputs, output in calls:
        expected = flops(theirs, inputs, output)
        assert min(expected) > 0
        assert flops(ours, inputs, output) == expected


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize("with_state", [True, False])
def test_flops_of_cells(name: str, with_gradient: bool, with_state: bool) -> None:
    x = torch.randn(B, F, requires_grad=with_gradient)
    h = torch.randn(B, 6, requires_grad=with_gradient)
    inputs = (x, (h, h) if name == "LSTMCell" else h) if with_state else (x,)
    expected = flops(getattr(nn, name)(F, 6), inputs, lambda result: flat(result)[0])
    assert flops(getattr(dlkernels.nn, name)(F, 6), inputs, lambda result: flat(result)[0]) == expected


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flops_of_attention(kv_heads: int) -> None:
    q, k, v = ((B, 4, 7, 8), (B, kv_heads, 9, 8), (B, kv_heads, 9, 5))
    tensors = [torch.randn(shape, requires_grad=True) for shape in (q, k, v)]
    with FlopCounterMode(display=False) as counter:
        o = dlkernels.functional.attention(*tensors)
        forward = counter.get_total_flops()
        o.sum().backward()
    assert forward == sdpa_flop_count(q, k, v)
    assert counter.get_total_flops() - forward == sdpa_backward_flop_count((B, 4, 7, 5), q, k, v)
    with FlopCounterMode(display=False) as counter:
        dlkernels.functional.attention_map(*tensors[:2], rows=2, cols=2)
    assert counter.get_total_flops() == 2 * B * 4 * 7 * 9 * 8


def test_flops_of_packed_attention() -> None:
    lengths = [3, 1, 4]
    cu = torch.tensor([0, 3, 4, 8], dtype=torch.int32)
    q = torch.randn(8, 2, 6, requires_grad=True)
    shapes = [(1, 2, n, 6) for n in lengths]
    with FlopCounterMode(display=False) as counter:
        o = dlkernels.functional.attention(q, q, q, cu_seqlens_q=cu, cu_seqlens_k=cu)
        forward = counter.get_total_flops()
        o.sum().backward()
    assert forward == sum(sdpa_flop_count(s, s, s) for s in shapes)
    assert counter.get_total_flops() - forward == sum(sdpa_backward_flop_count(s, s, s, s) for s in shapes)


@pytest.mark.parametrize("name", ["MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_flops_of_attention_modules(name: str) -> None:
    """torch counts no products for its fused attention on the CPU: there its operators on the meta device are asked."""
    kind = next(kind for kind in KINDS if kind.name == name)
    inputs = inputs_of(kind)
    options = {"need_weights": False} if name == "MultiheadAttention" else {}
    counts = []
    for lib, backend in ((nn, torch.nn.attention.SDPBackend.MATH), (dlkernels.nn, None)):
        module = kind.make(lib)
        with (
            FlopCounterMode(display=False) as counter,
            torch.nn.attention.sdpa_kernel(backend or torch.nn.attention.SDPBackend.MATH),
        ):
            result = flat(module(*inputs, **options))[0]
            forward = counter.get_total_flops()
            result.sum().backward()
        counts.append((forward, counter.get_total_flops() - forward))
    # Of the backward's five products the unfused attention has kept one, the scores.
    attentions = 2 if name == "TransformerDecoderLayer" else 1
    assert counts[1] == (counts[0][0], counts[0][1] + attentions * 2 * B * 2 * T * T * (F // 2))


# Tables keyed by type


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
