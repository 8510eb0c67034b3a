"""prepack(weights=...) keeps the weights of float32 layers and cells in fewer bits, and quantize() those of a model."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import dlkernels.nn
from dlkernels._core import extension
from dlkernels.rnn.prepacked import BITS
from dlkernels.testing import error
from tests.support.layer_cases import MODES, Case, Results, make_data, new_layer, run_layer, torch_results

NARROW = tuple(BITS)
CELLS = {"lstm": "LSTMCell", "gru": "GRUCell", "rnn_tanh": "RNNCell", "rnn_relu": "RNNCell"}


def case_for(mode: str, **more) -> Case:
    options = {"T": 6, "B": 9, "I": 10, "H": 37, "layers": 2, "bidirectional": True}
    case = {**options, **more}
    return Case(mode, **{**case, "P": max(1, case["H"] // 3) if mode == "lstm_proj" else 0})


def infer(layer: nn.Module, case: Case) -> Results:
    return run_layer(case, make_data(case), torch.float32, dlkernels.nn, grad=False, layer=layer)


def narrow_layer(case: Case, weights: torch.dtype) -> torch.nn.Module:
    return new_layer(case, make_data(case), torch.float32).prepack(weights)


def exact_results(case: Case) -> Results:
    return {k: v.detach() for k, v in torch_results(case, make_data(case), torch.float64).items() if k in "y h_n c_n"}


def relative(results: Results, exact: Results) -> float:
    return max(error(results[k], exact[k]) / max(1e-30, exact[k].abs().max().item()) for k in exact)


def tolerance(weights: torch.dtype) -> float:
    """The relative error that the rounding of weights and activations explains, with some room."""
    return 0.02 if weights == torch.bfloat16 else 0.04


CASES = [
    {},
    {"B": 1},
    {"B": 1, "layers": 1, "bidirectional": False, "H": 64, "I": 64},
    {"B": 40, "H": 65, "I": 33, "T": 3},
    {"B": 20, "T": 30, "H": 16, "I": 5},  # several chunks
    {"T": 1, "B": 3},
    {"I": 1, "H": 2, "layers": 1},
    {"lengths": (1, 6, 3, 0), "B": 4},
    {"lengths": (1, 6, 3, 3), "B": 4, "packed": True},
    {"batch_first": True, "contiguous": False, "bias": False},
    {"hx": False, "I": 3, "H": 129, "B": 2},
]


@pytest.mark.parametrize("more", CASES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weights", NARROW, ids=str)
def test_error(weights: torch.dtype, mode: str, more: dict, isa: str) -> None:
    case = case_for(mode, **more)
    found = infer(narrow_layer(case, weights), case)
    assert relative(found, exact_results(case)) <= tolerance(weights)
    if extension.HAVE_NATIVE:
        plain = infer(new_layer(case, make_data(case), torch.float32), case)
        assert any(not torch.equal(found[k], plain[k]) for k in found), "the packed weights were not used"


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_weights_are_only_rounded(mode: str, isa: str) -> None:
    """Without instructions for bfloat16 the result is that of a float32 layer with rounded weights."""
    if isa in ("avx512_bf16", "amx"):
        pytest.skip("rounds the activations too")
    case = case_for(mode)
    layer, rounded = narrow_layer(case, torch.bfloat16), new_layer(case, make_data(case), torch.float32)
    if extension.HAVE_NATIVE:
        with torch.no_grad():
            for name, parameter in rounded.named_parameters():
                if name.startswith("weight"):
                    parameter.copy_(parameter.bfloat16())
    found, expected = infer(layer, case), infer(rounded, case)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


def torch_dynamic(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kinds = {nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, nn.RNNCell}
        return torch.ao.quantization.quantize_dynamic(nn.ModuleList([layer]), kinds, dtype=torch.qint8)[0]


@pytest.mark.parametrize("size", [(8, 6, 24, 40), (1, 10, 64, 128), (33, 4, 17, 65)], ids=str)
@pytest.mark.parametrize("mode", ["lstm", "gru"])
@pytest.mark.parametrize("weights", NARROW, ids=str)
def test_no_less_exact_than_torchs_int8(weights: torch.dtype, mode: str, size: tuple[int, ...], isa: str) -> None:
    B, T, I, H = size
    theirs_worst = ours_worst = 0.0
    for seed in range(3):
        case = case_for(mode, B=B, T=T, I=I, H=H, seed=seed)
        data = make_data(case)
        theirs = torch_dynamic(new_layer(case, data, torch.float32, nn).eval())
        exact = exact_results(case)
        hx = (data.h0.float(), data.c0.float()) if case.is_lstm else data.h0.float()
        with torch.no_grad():
            y = theirs(data.x.float(), hx)[0]
        theirs_worst = max(theirs_worst, error(y, exact["y"]))
        ours_worst = max(ours_worst, error(infer(narrow_layer(case, weights), case)["y"], exact["y"]))
    assert ours_worst <= theirs_worst


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weights", NARROW, ids=str)
def test_same_bits_for_any_threads(weights: torch.dtype, mode: str, isa: str, deterministic: None) -> None:
    threads = torch.get_num_threads()
    for more in ({"B": 40, "H": 130, "I": 70}, {"B": 2, "H": 300, "I": 70, "T": 3}):
        case = case_for(mode, **more)
        layer = narrow_layer(case, weights)
        expected = infer(layer, case)
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                for name, value in infer(layer, case).items():
                    assert torch.equal(value, expected[name])
        finally:
            torch.set_num_threads(threads)
        # A sequence does not depend on its batch.
        few = torch.arange(2)
        data = make_data(case)
        states = [None if s is None else s[:, few].float() for s in (data.h0, data.c0)]
        with torch.no_grad():
            y = layer(data.x[:, few].float(), tuple(states) if case.is_lstm else states[0])[0]
        assert torch.equal(y, expected["y"][:, few])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["x", "h0", "weight_ih_l0", "weight_hh_l0"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weights", NARROW, ids=str)
def test_not_finite(weights: torch.dtype, mode: str, where: str, value: float, isa: str) -> None:
    """What is not finite never becomes a usual number: such outputs are NaN wherever torch's are, and may be elsewhere,
    but only in the sequences, or of all units if it is a weight, that it belongs to."""
    case = case_for(mode, layers=1, bidirectional=False, B=5, T=3)
    data = make_data(case)
    layer, theirs = (new_layer(case, data, torch.float32, package) for package in (dlkernels.nn, nn))
    if where.startswith("weight"):
        for module in (layer, theirs):
            with torch.no_grad():
                getattr(module, where)[3, 0] = value
    elif where == "x":
        data.x[1, 2, 0] = value
    else:
        data.h0[0, 2, 0] = value
    layer.prepack(weights)
    found = run_layer(case, data, torch.float32, dlkernels.nn, grad=False, layer=layer)
    expected = run_layer(case, data, torch.float32, nn, grad=False, layer=theirs)
    for name, should in expected.items():
        assert not (should.isnan() & ~found[name].isnan()).any(), name
        if not where.startswith("weight"):
            assert found[name][:, [0, 1, 3, 4]].isfinite().all(), "other sequences"
    if where == "x":
        assert found["y"][0].isfinite().all(), "the step before"
    if where.startswith("weight"):
        assert not torch.equal(found["y"], infer(new_layer(case, make_data(case), torch.float32), case)["y"])


@pytest.mark.parametrize("weights", NARROW, ids=str)
def test_zeros_and_extremes(weights: torch.dtype, isa: str) -> None:
    case = case_for("lstm", layers=1, bidirectional=False)
    layer = new_layer(case, make_data(case), torch.float32)
    x = torch.zeros(case.T, case.B, case.I)
    plain = dlkernels.nn.LSTM(case.I, case.H)
    plain.load_state_dict(layer.state_dict())
    with torch.no_grad():
        for module in (plain, layer):
            module.weight_hh_l0[5] = 0
            module.weight_ih_l0[:2] = 0
            module.weight_ih_l0[7, 0] = 1e-42  # a scale that is no normal number
        layer.prepack(weights)
        for values in (x, x + 1e-30, x + 1e30):
            assert relative({"y": layer(values)[0]}, {"y": plain(values)[0].double()}) <= tolerance(weights)


@pytest.mark.parametrize("mode", CELLS)
@pytest.mark.parametrize("weights", [None, *NARROW], ids=str)
def test_cells(weights: torch.dtype | None, mode: str, isa: str) -> None:
    more = {"nonlinearity": mode.removeprefix("rnn_")} if mode.startswith("rnn") else {}
    for B, I, H, bias in ((1, 7, 33, True), (5, 64, 64, False), (40, 9, 48, True)):
        theirs = getattr(nn, CELLS[mode])(I, H, bias=bias, **more).double()
        cell = getattr(dlkernels.nn, CELLS[mode])(I, H, bias=bias, **more)
        cell.load_state_dict(theirs.state_dict())
        assert cell.prepack(weights) is cell
        x, h, c = torch.randn(B, I), torch.randn(B, H), torch.randn(B, H)
        hx = (h, c) if mode == "lstm" else h
        exact_hx = (h.double(), c.double()) if mode == "lstm" else h.double()
        for given, exact in ((hx, exact_hx), (None, None)):
            with torch.no_grad():
                found, expected = cell(x, given), theirs(x.double(), exact)
            found, expected = (out if isinstance(out, tuple) else (out,) for out in (found, expected))
            allowed = 1e-5 if weights is None else tolerance(weights)
            for ours, ref in zip(found, expected, strict=True):
                assert relative({"": ours}, {"": ref}) <= allowed
        with torch.no_grad():  # unbatched
            one = cell(x[0], (h[0], c[0]) if mode == "lstm" else h[0])
            row = cell(x[:1], (h[:1], c[:1]) if mode == "lstm" else h[:1])
        assert torch.equal(one[0] if mode == "lstm" else one, row[0][0] if mode == "lstm" else row[0])
        # A gradient takes the float32 weights.
        y = cell(x, hx)
        (y[0] if mode == "lstm" else y).sum().backward()
        assert cell.weight_hh.grad is not None


def uses_packed(layer: nn.Module, x: Tensor) -> str:
    return dlkernels.explain(layer, x).layers[0].packed_weights


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
@pytest.mark.parametrize("weights", NARROW, ids=str)
def test_when_the_copy_is_used(weights: torch.dtype, name: str) -> None:
    layer = getattr(dlkernels.nn, name)(6, 8).prepack(weights)
    x = torch.randn(3, 4, 6)[: 3 if name == "LSTM" else 1].squeeze(0)
    text = str(weights).removeprefix("torch.")
    assert "gradients" in uses_packed(layer, x)
    with torch.no_grad():
        assert uses_packed(layer, x) == f"used, weights {text}"
        assert f"weights {text}" in str(dlkernels.explain(layer, x))
        with torch.autocast("cpu", torch.bfloat16):
            assert "autocast" in uses_packed(layer, x)
        torch.func.vmap(lambda x: layer(x)[0])(x.unsqueeze(0))
    layer.requires_grad_(False)
    assert uses_packed(layer, x) == f"used, weights {text}"
    wanting = x.clone().requires_grad_()
    assert "gradient" in uses_packed(layer, wanting)
    plain = copy.deepcopy(layer)
    results = layer(wanting), plain(wanting)
    for ours, expected in zip(*results, strict=True) if isinstance(results[0], tuple) else (results,):
        torch.testing.assert_close(ours, expected, msg="gradients are those of the float32 weights")
    with torch.no_grad():
        next(layer.parameters()).mul_(0.5)
    assert "written to" in uses_packed(layer, x)
    assert f"weights={text}" in repr(layer.prepack(weights))
    assert "prepacked=True" in repr(layer.prepack())
    assert "weights=" not in repr(layer.unpack()) + repr(layer.prepack(weights).double())


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("weights", NARROW, ids=str)
def test_state(weights: torch.dtype) -> None:
    case = case_for("gru")
    layer = narrow_layer(case, weights)
    plain = new_layer(case, make_data(case), torch.float32)
    for name, value in layer.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, plain.state_dict()[name])
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    cell = dlkernels.nn.LSTMCell(3, 4).prepack(weights)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
        assert "weights=" not in repr(other)
        for name, value in infer(other, case).items():
            torch.testing.assert_close(value, infer(plain, case)[name])
    for other in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
        assert "weights=" not in repr(other) and "weights=" in repr(cell)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("weights", NARROW, ids=str)
def test_a_buffer_of_fewer_bits_serves_no_training(weights: torch.dtype) -> None:
    layer = dlkernels.nn.GRU(3, 4).prepack(weights)
    own, buffer = layer.weight_list(), layer._prepacked.buffers[0]
    x = torch.randn(5, 2, 3)
    arguments = (x, None, None, own, buffer, None, None, False, False)
    with torch.no_grad():
        torch.ops.dlkernels.gru(*arguments, False, False)
        with pytest.raises(RuntimeError, match="packed: weights of fewer bits"):
            torch.ops.dlkernels.gru(*arguments, True, False)
        broken = buffer.clone()
        broken[:128] = 255
        with pytest.raises(RuntimeError, match="packed does not fit"):
            torch.ops.dlkernels.gru(x, None, None, own, broken, None, None, False, False, False, False)
        with pytest.raises(RuntimeError, match="packed does not fit"):
            torch.ops.dlkernels.gru(x, None, None, own, buffer[:-64], None, None, False, False, False, False)
    with pytest.raises(RuntimeError, match="bits must be"):
        torch.ops.dlkernels.pack("gru", own, False, 4)
    with pytest.raises(RuntimeError, match="float32"):
        torch.ops.dlkernels.pack("gru", [w.detach().double() for w in own], False, BITS[weights])


def test_refusals() -> None:
    layer = dlkernels.nn.LSTM(3, 4)
    for wrong in (torch.float16, torch.qint8, "int8", 8):
        with pytest.raises(ValueError, match=r"prepack: weights must be torch\.bfloat16 or torch\.int8, got"):
            layer.prepack(wrong)
        with pytest.raises(ValueError, match=r"quantize: weights must be torch\.bfloat16.*got"):
            dlkernels.quantize(layer, wrong)
    with pytest.raises(ValueError, match=r"weights=torch\.bfloat16 takes .*float32, got .*float64"):
        dlkernels.nn.GRUCell(3, 4).double().prepack(torch.bfloat16)
    with pytest.raises(ValueError, match="CPU"):
        dlkernels.nn.GRU(3, 4, device="meta").prepack(torch.bfloat16)
    cell = nn.utils.parametrizations.weight_norm(dlkernels.nn.GRUCell(3, 4), "weight_hh")
    with pytest.raises(RuntimeError, match="parametrization"):
        cell.prepack(torch.bfloat16)
    with pytest.raises(TypeError, match="model"):
        dlkernels.quantize("model")


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
@pytest.mark.parametrize("weights", NARROW, ids=str)
def test_bad_arguments_raise_the_errors_of_the_plain_layer(weights: torch.dtype, name: str) -> None:
    layer = getattr(dlkernels.nn, name)(6, 8).requires_grad_(False)
    calls = [torch.randn(2, 3, 5)[: 3 if name == "LSTM" else 1].squeeze(0), torch.randn(2, 2, 2, 6), "x"]
    for x in (*calls, torch.randn(2, 6).double()):
        texts = []
        for module in (layer, copy.deepcopy(layer).prepack(weights)):
            with pytest.raises(Exception) as caught:
                module(x)
            texts.append((caught.type, str(caught.value)))
        assert texts[0] == texts[1]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.lstm = nn.LSTM(6, 8, batch_first=True)
        self.rnn = dlkernels.nn.RNN(8, 8)
        self.cell = nn.GRUCell(8, 5)
        self.linear = nn.Linear(5, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        y, _ = self.lstm(self.embedding(tokens))
        return self.linear(self.cell(self.rnn(y)[0][:, -1]))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("weights", NARROW, ids=str)
def test_quantize(weights: torch.dtype) -> None:
    model, tokens = Model(), torch.randint(0, 10, (4, 7))
    expected = model(tokens)
    state = copy.deepcopy(model.state_dict())
    quantized = dlkernels.quantize(model, weights)
    assert quantized is not model and model.training and not quantized.training
    assert type(model.lstm) is nn.LSTM and all(p.requires_grad for p in model.parameters())
    found = quantized(tokens)
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)
    text = f"weights={str(weights).removeprefix('torch.')}"
    for layer in (quantized.lstm, quantized.rnn, quantized.cell):
        assert text in repr(layer)
    assert type(quantized.linear) is nn.Linear and quantized.linear.weight.requires_grad
    for name, value in quantized.state_dict().items():
        assert torch.equal(value, state[name])
    assert dlkernels.quantize(model, weights, inplace=True) is model and text in repr(model.lstm)
    assert torch.equal(model(tokens), found)
    x = pack_padded_sequence(torch.randn(4, 3, 6), torch.tensor([4, 2, 1]), enforce_sorted=True)
    model.lstm(x)
    assert type(dlkernels.unpatch(model).lstm) is nn.LSTM and type(model.rnn) is dlkernels.nn.RNN


@pytest.mark.usefixtures("native")
def test_quantize_says_what_it_left() -> None:
    class Own(nn.LSTM):
        pass

    model = nn.ModuleDict({
        "own": Own(3, 4), "short": nn.GRU(3, 4).half(), "good": nn.GRU(3, 4),
        "normed": nn.utils.parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0"),
    })  # fmt: skip
    with pytest.warns(UserWarning, match=r"left 3 layer\(s\)") as caught:
        quantized = dlkernels.quantize(model, torch.bfloat16)
    text = str(caught[0].message)
    for name, reason in (("own", "subclass"), ("short", "float32, got torch.float16"), ("normed", "parametrized")):
        assert f"{name}: " in text and reason in text
    assert "good" not in text and "weights=bfloat16" in repr(quantized["good"])
    assert type(quantized["short"]) is nn.GRU
