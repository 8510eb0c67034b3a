"""Compares layers and cells of dlkernels.nn with torch.nn: constructors, forms of input, state and kinds of weights."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import dlkernels
from dlkernels._core import extension
from dlkernels.rnn import functional_cells

LAYERS = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def pair(name: str, *args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """Returns torch's module and ours with the same weights; the default dtype is float64."""
    kwargs.setdefault("dtype", torch.float64)
    theirs = getattr(nn, name)(*args, **kwargs)
    ours = getattr(dlkernels.nn, name)(*args, **kwargs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def flatten(result: Any) -> list[Tensor]:
    if isinstance(result, PackedSequence):
        return [result.data]
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in flatten(part)]


def assert_same(theirs: Any, ours: Any) -> None:
    expected, got = flatten(theirs), flatten(ours)
    assert len(expected) == len(got)
    for a, b in zip(expected, got, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)


def grads(module: nn.Module, result: Any, inputs: list[Tensor]) -> list[Tensor]:
    loss = sum(((k + 1) * tensor.sin()).sum() for k, tensor in enumerate(flatten(result)))
    wanted = [tensor for tensor in inputs if tensor.requires_grad] + list(module.parameters())
    return list(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))


def compare(theirs: nn.Module, ours: nn.Module, input: Any, hx: Any = None) -> None:
    """Asserts that outputs and all gradients are equal, and also outputs under no_grad."""
    tensors = [*flatten(input), *([] if hx is None else flatten(hx))]
    expected, got = theirs(input, hx), ours(input, hx)
    assert type(expected) is type(got)
    assert_same(expected, got)
    if isinstance(input, PackedSequence):
        for a, b in zip(expected[0][1:], got[0][1:], strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
    assert_same(grads(theirs, expected, tensors), grads(ours, got, tensors))
    with torch.no_grad():
        assert_same(theirs(input, hx), ours(input, hx))


def state(layer: nn.Module, batch: int | None) -> Any:
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    shape = (rows,) if batch is None else (rows, batch)
    h = torch.randn(*shape, layer.proj_size or layer.hidden_size, dtype=torch.float64, requires_grad=True)
    if layer.mode != "LSTM":
        return h
    return h, torch.randn(*shape, layer.hidden_size, dtype=torch.float64, requires_grad=True)


VARIANTS = [
    ("RNN", {}), ("LSTM", {}), ("GRU", {}), ("RNN", {"nonlinearity": "relu", "bias": False}),
    ("LSTM", {"proj_size": 3, "num_layers": 2}), ("LSTM", {"proj_size": 2, "bias": False, "bidirectional": True}),
    ("GRU", {"num_layers": 2, "bidirectional": True}), ("LSTM", {"num_layers": 3, "batch_first": True}),
    ("RNN", {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    ("GRU", {"bias": False, "batch_first": True}),
]  # fmt: skip


def make_input(form: str, batch_first: bool) -> tuple[Any, int | None]:
    shape = (2, 5, 4) if batch_first else (5, 2, 4)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    if form == "padded":
        return x, 2
    if form == "unbatched":
        return torch.randn(5, 4, dtype=torch.float64, requires_grad=True), None
    if form == "strided":
        return torch.randn(*shape[::-1], dtype=torch.float64).permute(2, 1, 0)[..., ::1].requires_grad_(), 2
    if form == "no batch":
        return torch.randn((0, 5, 4) if batch_first else (5, 0, 4), dtype=torch.float64), 0
    lengths = torch.tensor([5, 3] if form == "packed" else [2, 5])
    return pack_padded_sequence(x, lengths, batch_first, enforce_sorted=form == "packed"), 2


@pytest.mark.parametrize("with_hx", [False, True])
@pytest.mark.parametrize("form", ["padded", "unbatched", "strided", "no batch", "packed", "packed unsorted"])
@pytest.mark.parametrize(("name", "kwargs"), VARIANTS, ids=str)
def test_forms_and_constructors(name: str, kwargs: dict[str, Any], form: str, with_hx: bool) -> None:
    theirs, ours = pair(name, 4, 6, **kwargs)
    assert repr(theirs) == repr(ours)
    input, batch = make_input(form, kwargs.get("batch_first", False))
    compare(theirs, ours, input, state(theirs, batch) if with_hx else None)


@pytest.mark.parametrize("args", [(4, 6, 2), (4, 6, 2, False, True, 0.0, True)], ids=str)
def test_positional_arguments(args: tuple[Any, ...]) -> None:
    for name in LAYERS:
        positional = (*args[:3], "relu", *args[3:]) if name == "RNN" else args
        theirs, ours = pair(name, *positional)
        assert repr(theirs) == repr(ours)
        compare(theirs, ours, torch.randn(2, 3, 4, dtype=torch.float64))
    theirs, ours = pair("LSTM", 4, 6, 1, True, False, 0.0, False, 3)
    compare(theirs, ours, torch.randn(2, 3, 4, dtype=torch.float64))


@pytest.mark.parametrize("name", LAYERS)
def test_dropout_draws_the_same_masks(name: str) -> None:
    theirs, ours = pair(name, 4, 6, num_layers=3, dropout=0.5)
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    results = []
    for training in (True, False):
        for layer in (theirs, ours):
            torch.manual_seed(1)
            results.append(layer.train(training)(x))
    assert_same(results[0], results[1])
    assert_same(results[2], results[3])
    assert not torch.equal(results[1][0], results[3][0])


def test_dropout_warning_and_repr() -> None:
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        dlkernels.nn.GRU(3, 4, dropout=0.5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", [*CELLS, "relu"])
def test_cells(name: str, bias: bool) -> None:
    extra = {"nonlinearity": "relu"} if name == "relu" else {}
    theirs, ours = pair("RNNCell" if name == "relu" else name, 4, 6, bias=bias, **extra)
    assert repr(theirs) == repr(ours)
    assert isinstance(ours, type(theirs))
    for shape in ((3, 4), (1, 4), (4,), (0, 4)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        compare(theirs, ours, x)
        h = torch.randn(*shape[:-1], 6, dtype=torch.float64, requires_grad=True)
        compare(theirs, ours, x, (h, torch.randn_like(h).requires_grad_()) if name == "LSTMCell" else h)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CELLS)
def test_common_calls_of_cells_go_past_the_checks(name: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    function = f"{name.lower().removesuffix('cell')}_cell"
    honest = getattr(functional_cells, function)

    def spy(*args, **options):
        checked.append(name)
        return honest(*args, **options)

    monkeypatch.setattr(functional_cells, function, spy)
    cell = getattr(dlkernels.nn, name)(4, 6)
    with torch.set_grad_enabled(training):
        out = cell(torch.randn(3, 4))
        h = out[0] if name == "LSTMCell" else out
        assert not checked and h.requires_grad == training
        cell(torch.randn(4))
        with pytest.raises(RuntimeError, match="input has inconsistent input_size"):
            cell(torch.randn(3, 5))
        h = torch.randn(3, 6)
        elsewhere = h.to("meta")
        with pytest.raises(RuntimeError, match="not at the same device"):
            cell(torch.randn(3, 4), (h, elsewhere) if name == "LSTMCell" else elsewhere)
    assert checked == [name] * 3


@pytest.mark.parametrize("name", CELLS)
def test_only_what_the_operator_refuses_is_tried_again(name: str) -> None:
    """A cell repeats a call with all checks only if the operator rejected it, not if user code or the tracer raised."""
    cell = getattr(dlkernels.nn, name)(4, 6)
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        raise RuntimeError("no room")

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, pytest.raises(RuntimeError, match="no room"):
        cell(torch.randn(3, 4))
    assert len(packed) == 1
    with pytest.raises(RuntimeError, match="Cannot insert a Tensor that requires grad as a constant"):
        torch.jit.trace(lambda x: cell(x), (torch.randn(3, 4),), check_trace=False)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("sizes", [(3, 0), (0, 3)])
def test_cells_of_size_zero(name: str, sizes: tuple[int, int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about initialising a weight without elements
        theirs, ours = pair(name, *sizes)
    compare(theirs, ours, torch.randn(2, sizes[0], dtype=torch.float64))


@pytest.mark.parametrize("name", CELLS)
def test_cell_with_one_bias(name: str) -> None:
    theirs, ours = pair(name, 4, 6)
    for cell in (theirs, ours):
        cell.bias_hh = None
    compare(theirs, ours, torch.randn(2, 4, dtype=torch.float64))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lengths_agree_with_packing(name: str, dtype: torch.dtype) -> None:
    layer = getattr(dlkernels.nn, name)(4, 6, bidirectional=True, dtype=dtype)
    x = torch.randn(5, 3, 4, dtype=dtype)
    lengths = torch.tensor([2, 5, 3])
    expected, hidden = layer(pack_padded_sequence(x, lengths, enforce_sorted=False))
    got, hidden_got = layer(x, lengths=lengths.int())
    padded, _ = nn.utils.rnn.pad_packed_sequence(expected)
    tolerance = {"rtol": 3e-2, "atol": 1e-2} if dtype.itemsize == 2 else {}
    torch.testing.assert_close(got, padded, **tolerance)
    for a, b in zip(flatten(hidden), flatten(hidden_got), strict=True):
        torch.testing.assert_close(b, a, **tolerance)


def test_lengths_zero_and_mistakes() -> None:
    layer, x = dlkernels.nn.GRU(4, 6), torch.randn(5, 2, 4)
    h0 = torch.randn(1, 2, 6)
    y, h = layer(x, h0, lengths=torch.tensor([0, 5]))
    assert torch.equal(h[:, 0], h0[:, 0])
    assert not y[:, 0].any()
    with pytest.raises(ValueError, match="lengths"):
        layer(pack_padded_sequence(x, torch.tensor([5, 5])), lengths=torch.tensor([5, 5]))
    with pytest.raises(ValueError, match="lengths"):
        layer(x[:, 0], lengths=torch.tensor([5]))


@pytest.mark.parametrize("name", LAYERS)
def test_bptt_steps_cut_the_gradient(name: str) -> None:
    layer = getattr(dlkernels.nn, name)(4, 6, dtype=torch.float64)
    x = torch.randn(6, 2, 4, dtype=torch.float64, requires_grad=True)
    whole = torch.autograd.grad(layer(x)[0][-1].sum(), x)[0]
    cut = torch.autograd.grad(layer(x, bptt_steps=2)[0][-1].sum(), x)[0]
    assert not cut[:4].any()
    torch.testing.assert_close(cut[4:], whole[4:])


STATE_MODULES = [(name, {"num_layers": 2, "bidirectional": True}) for name in LAYERS] + [(name, {}) for name in CELLS]


@pytest.mark.parametrize(("name", "kwargs"), STATE_MODULES, ids=str)
def test_state(name: str, kwargs: dict[str, Any]) -> None:
    theirs, ours = pair(name, 4, 6, **kwargs)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(3, 2, 4, dtype=torch.float64) if name in LAYERS else torch.randn(2, 4, dtype=torch.float64)
    expected = ours(x)
    saved = io.BytesIO()
    torch.save(ours, saved)
    saved.seek(0)
    copies = [
        copy.deepcopy(ours), copy.copy(ours), pickle.loads(pickle.dumps(ours)), torch.load(saved, weights_only=False),
    ]  # fmt: skip
    for again in copies:
        assert type(again) is type(ours)
        assert_same(expected, again(x))
    with torch.no_grad():
        next(copies[0].parameters()).add_(1.0)
    assert_same(expected, ours(x))
    ours.share_memory()
    assert_same(expected, ours(x))
    assert ours.to(torch.float32).half().double().weight_ih_l0.dtype == torch.float64 if name in LAYERS else True
    if name in LAYERS:
        flat = [weight for weights in ours.all_weights for weight in weights]
        assert [w.shape for w in flat] == [w.shape for weights in theirs.all_weights for w in weights]
        assert all(a is b for a, b in zip(ours._flat_weights, flat, strict=True))
        ours.flatten_parameters()


def test_meta_device_and_materialisation() -> None:
    layer = dlkernels.nn.LSTM(4, 6, device="meta")
    y, (h, c) = layer(torch.empty(3, 2, 4, device="meta"))
    assert (y.shape, h.shape, c.shape, y.device.type) == ((3, 2, 6), (1, 2, 6), (1, 2, 6), "meta")
    layer.to_empty(device="cpu").reset_parameters()
    assert layer(torch.randn(3, 2, 4))[0].isfinite().all()


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_weights_of_every_kind(name: str) -> None:
    """Each edit is made to torch's module and to ours, and must change the results of both in the same way."""
    suffix = "_l0" if name in LAYERS else ""
    x = torch.randn(3, 2, 4, dtype=torch.float64) if name in LAYERS else torch.randn(2, 4, dtype=torch.float64)
    h = torch.randn((1, 2, 6) if name in LAYERS else (2, 6), dtype=torch.float64)
    hx = (h, h) if name.startswith("LSTM") else h

    def data(m: nn.Module) -> None:
        getattr(m, f"weight_hh{suffix}").data.mul_(0.5)

    def numpy(m: nn.Module) -> None:
        getattr(m, f"weight_ih{suffix}").detach().numpy()[:] *= 0.5

    def assign(m: nn.Module) -> None:
        setattr(m, f"bias_hh{suffix}", nn.Parameter(getattr(m, f"bias_hh{suffix}").detach() + 1))

    def parametrized(m: nn.Module) -> None:
        parametrize.register_parametrization(m, f"weight_hh{suffix}", Doubled())

    def spectral(m: nn.Module) -> None:
        torch.manual_seed(3)
        nn.utils.parametrizations.spectral_norm(m, f"weight_ih{suffix}").eval()

    def tied(m: nn.Module) -> None:
        setattr(m, f"bias_ih{suffix}", getattr(m, f"bias_hh{suffix}"))

    def weight_norm(m: nn.Module) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nn.utils.weight_norm(m, f"weight_hh{suffix}")

    def new_weight_norm(m: nn.Module) -> None:
        nn.utils.parametrizations.weight_norm(m, f"weight_hh{suffix}")

    def unparametrized(m: nn.Module) -> None:
        parametrize.register_parametrization(m, f"weight_hh{suffix}", Doubled())
        parametrize.remove_parametrizations(m, f"weight_hh{suffix}", leave_parametrized=True)

    for edit in (data, numpy, assign, parametrized, spectral, tied, weight_norm, new_weight_norm, unparametrized):
        theirs, ours = pair(name, 4, 6)
        before = flatten(ours(x, hx))[0]
        for module in (theirs, ours):
            edit(module)
        compare(theirs, ours, x, hx)
        if edit not in (weight_norm, new_weight_norm):  # weight norm alone does not change the results
            assert not torch.equal(before, flatten(ours(x, hx))[0]), edit.__name__
        if edit in (parametrized, new_weight_norm):
            assert_same(ours(x, hx), copy.deepcopy(ours)(x, hx))

    theirs, ours = pair(name, 4, 6)
    other = {key: value + 0.1 for key, value in theirs.state_dict().items()}
    assert_same(torch.func.functional_call(theirs, other, (x,)), torch.func.functional_call(ours, other, (x,)))


def test_deleted_weight_names_the_attribute() -> None:
    layer = dlkernels.nn.GRU(3, 5)
    del layer.weight_hh_l0
    with pytest.raises(AttributeError, match="weight_hh_l0"):
        layer(torch.randn(2, 2, 3))


def test_packed_sequence_with_rows_to_spare_is_refused() -> None:
    sizes = pack_sequence([torch.randn(3, 3)]).batch_sizes
    with pytest.raises(RuntimeError, match="batch_sizes"):
        dlkernels.nn.GRU(3, 5)(PackedSequence(torch.randn(4, 3), sizes))


def test_prepacked_layers_say_so() -> None:
    layer = dlkernels.nn.LSTM(4, 6)
    plain = repr(layer)
    assert layer.prepack() is layer
    if extension.HAVE_NATIVE:
        assert repr(layer) == "LSTM(4, 6, prepacked=True)"
    assert repr(copy.deepcopy(layer)) == repr(pickle.loads(pickle.dumps(layer))) == plain
    assert layer.unpack() is layer
    assert repr(layer) == plain


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_autocast_with_everything_in_its_dtype(name: str) -> None:
    module = getattr(dlkernels.nn, name)(4, 6, dtype=torch.bfloat16)
    x = torch.randn(3, 2, 4).bfloat16() if name in LAYERS else torch.randn(2, 4).bfloat16()
    expected = flatten(module(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = flatten(module(x))
    for result, other in zip(results, expected, strict=True):
        assert result.dtype == torch.bfloat16 and torch.equal(result, other)


def test_prepacked_layer_compiles_and_sees_writes() -> None:
    layer, x = dlkernels.nn.GRU(4, 6).prepack(), torch.randn(3, 2, 4)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x)[0], layer(x)[0])
        layer.weight_hh_l0.mul_(0.5)
        torch.testing.assert_close(compiled(x)[0], layer.unpack()(x)[0])
