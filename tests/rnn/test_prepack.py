"""Weights are packed only on request; packed weights change no result and are not used after the weights changed."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch

import dlkernels.nn
from dlkernels._core import extension
from dlkernels.rnn import operators
from tests.support.instruction_sets import available_isas
from tests.support.layer_cases import (
    DTYPES,
    MODES,
    Case,
    Results,
    assert_same_results,
    disagreements,
    make_data,
    new_layer,
    run_layer,
    torch_results,
)


def case_for(mode: str, **more) -> Case:
    options = {"T": 6, "B": 9, "I": 10, "H": 37, "layers": 2, "bidirectional": True}
    return Case(mode, **{**options, "P": 12 if mode == "lstm_proj" else 0, **more})


def infer(layer: torch.nn.Module, case: Case) -> Results:
    return run_layer(case, make_data(case), case.dtype, dlkernels.nn, grad=False, layer=layer)


@pytest.fixture
def pack_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns a list of the modes for which `pack` was called, to detect packing that the user did not request."""
    from dlkernels.rnn import operators

    calls: list[str] = []
    honest = operators.pack

    def counted(mode, *args):
        calls.append(mode)
        return honest(mode, *args)

    monkeypatch.setattr(operators, "pack", counted)
    return calls


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_same_results(mode: str, dtype: torch.dtype, isa: str) -> None:
    for more in (
        {},
        {"B": 1},
        {"B": 1, "layers": 1, "bidirectional": False, "H": 64},
        {"lengths": (1, 6, 3, 3), "B": 4},
    ):
        case = case_for(mode, dtype=dtype, **{**more, "P": more.get("H", 37) // 3 if mode == "lstm_proj" else 0})
        data = make_data(case)
        layer = new_layer(case, data, dtype)
        plain, packed = infer(layer, case), infer(layer.prepack(), case)
        theirs, ref = torch_results(case, data, dtype), torch_results(case, data, torch.float64)
        for results in (plain, packed):
            assert not disagreements(case, data, results, theirs, ref)


@pytest.mark.parametrize("mode", MODES)
def test_same_bits_when_deterministic(mode: str, isa: str, deterministic: None) -> None:
    # A call of one time step packs panels on the fly unless the weights are prepacked.
    for batch, steps in ((1, 6), (9, 6), (1, 1), (9, 1), (40, 1)):
        case = case_for(mode, B=batch, T=steps)
        layer = new_layer(case, make_data(case), case.dtype)
        assert_same_results(infer(layer.prepack(), case), infer(layer.unpack(), case))


def test_the_packed_weights_are_used(native) -> None:
    """A packed layer does not read its weights: it does not notice NaN written through `.data`, as documented."""
    case = case_for("gru")
    layer = new_layer(case, make_data(case), case.dtype)
    expected = infer(layer, case)
    layer.prepack()
    layer.weight_hh_l0.data.fill_(float("nan"))
    for name, value in infer(layer, case).items():
        torch.testing.assert_close(value, expected[name])
    assert infer(layer.unpack(), case)["y"].isnan().any()


def test_nothing_packs_unasked(pack_calls: list[str], native) -> None:
    case = case_for("lstm")
    layer = new_layer(case, make_data(case), case.dtype)
    infer(layer, case)
    run_layer(case, make_data(case), case.dtype, dlkernels.nn, layer=layer)
    assert pack_calls == []
    layer.requires_grad_(False).prepack()
    assert len(pack_calls) == case.layers
    infer(layer, case)
    assert len(pack_calls) == case.layers


WRITES = {
    "data": lambda p: p.data.mul_(0.5),
    "data replaced": lambda p: setattr(p, "data", p.data * 0.5),
    "numpy": lambda p: np.multiply(p.detach().numpy(), 0.5, out=p.detach().numpy()),
    "no_grad": lambda p: torch.no_grad()(p.mul_)(0.5),
    "storage": lambda p: p.untyped_storage().copy_((p.detach() * 0.5).untyped_storage()),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("mode", MODES)
def test_writes_are_seen_without_prepack(mode: str, write: str) -> None:
    """There is no implicit cache: the next call uses the new weights, whichever way they were written."""
    for batch in (1, 9):
        case = case_for(mode, B=batch, layers=1)
        layer = new_layer(case, make_data(case), case.dtype)
        before = infer(layer, case)
        for parameter in layer.parameters():
            WRITES[write](parameter)
        fresh = getattr(torch.nn, type(layer).__name__)
        theirs = new_layer(case, make_data(case), case.dtype, torch.nn)
        assert isinstance(theirs, fresh)
        theirs.load_state_dict({name: p * 0.5 for name, p in theirs.state_dict().items()})
        after = infer(layer, case)
        expected = run_layer(case, make_data(case), case.dtype, torch.nn, grad=False, layer=theirs)
        assert not torch.equal(before["y"], after["y"])
        torch.testing.assert_close(after["y"], expected["y"])


def test_visible_writes_put_the_packed_copy_out_of_use() -> None:
    case = case_for("gru")
    layer = new_layer(case, make_data(case), case.dtype).prepack()
    state = {name: p * 0.5 for name, p in layer.state_dict().items()}
    theirs = new_layer(case, make_data(case), case.dtype, torch.nn)
    theirs.load_state_dict(state)
    expected = run_layer(case, make_data(case), case.dtype, torch.nn, grad=False, layer=theirs)["y"]
    layer.load_state_dict(state)
    torch.testing.assert_close(infer(layer, case)["y"], expected)

    layer = new_layer(case, make_data(case), case.dtype).prepack()
    for name, value in state.items():
        setattr(layer, name, torch.nn.Parameter(value.clone()))
    torch.testing.assert_close(infer(layer, case)["y"], expected)

    layer = new_layer(case, make_data(case), case.dtype).prepack()
    torch.testing.assert_close(
        torch.func.functional_call(layer, state, make_data(case).x.float())[0], expected_without_state(case, theirs)
    )


def expected_without_state(case: Case, layer: torch.nn.Module) -> torch.Tensor:
    return layer(make_data(case).x.float())[0]


@pytest.mark.parametrize("mode", MODES)
def test_training_after_prepack(mode: str) -> None:
    """A packed layer still trains: its gradients are right, and the next inference uses the new weights."""
    case = case_for(mode)
    data = make_data(case)
    layer = new_layer(case, data, case.dtype).prepack()
    plain = new_layer(case, data, case.dtype)
    for model in (layer, plain):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run = model(data.x.float())[0].square().sum()
        run.backward()
        optimizer.step()
    for (name, ours), expected in zip(layer.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, msg=name)
    torch.testing.assert_close(infer(layer, case)["y"], infer(plain, case)["y"])


@pytest.mark.parametrize("mode", MODES)
def test_another_isa_than_packed_for(mode: str, native) -> None:
    """Weights that were packed for another ISA are packed again or cause a clear error, never wrong results."""
    isas = available_isas()
    if len(isas) < 2:
        pytest.skip("one ISA here")
    case = case_for(mode)
    layer = new_layer(case, make_data(case), case.dtype)
    expected = infer(layer, case)
    try:
        for packed_for in isas:
            extension.choose_isa(packed_for)
            layer.prepack()
            for used_with in isas:
                extension.choose_isa(used_with)
                try:
                    actual = infer(layer, case)
                except RuntimeError as error:
                    assert packed_for != used_with and "pack" in str(error)
                else:
                    for name, value in actual.items():
                        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
            layer.unpack()
    finally:
        extension.choose_isa(None)


def test_a_foreign_buffer_is_refused(native) -> None:
    """The operator rejects a buffer of another mode, other sizes, a wrong dtype or half the length."""
    from dlkernels.rnn import operators

    def weights(mode: str, i: int, h: int) -> list[torch.Tensor]:
        gates = {"lstm": 4, "gru": 3}.get(mode, 1)
        return [torch.randn(gates * h, i), torch.randn(gates * h, h), torch.randn(gates * h), torch.randn(gates * h)]

    own = weights("gru", 5, 20)
    good = operators.pack("gru", own, False)
    foreign = {
        "other cell": operators.pack("lstm", weights("lstm", 5, 20), False),
        "other size": operators.pack("gru", weights("gru", 5, 24), False),
        "other directions": operators.pack("gru", own + own, True),
        "other dtype": operators.pack("gru", [w.double() for w in own], False),
        "cut": good[: good.numel() // 2].clone(),
        "empty": good[:0].clone(),
        "a few bytes": good[:3].clone(),
        "zeros": torch.zeros_like(good),
        "not bytes": torch.zeros(good.numel()),
    }
    x = torch.randn(3, 4, 5)

    def call(packed: torch.Tensor) -> torch.Tensor:
        return torch.ops.dlkernels.gru(x, None, None, own, packed, None, None, False, False, False, False)[0]

    call(good)
    for name, buffer in foreign.items():
        with pytest.raises(RuntimeError, match="pack"):
            call(buffer)
            pytest.fail(name)


@pytest.mark.parametrize("mode", MODES)
def test_copies_and_pickles(mode: str) -> None:
    case = case_for(mode)
    layer = new_layer(case, make_data(case), case.dtype).prepack()
    expected = infer(layer, case)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(layer),
        copy.copy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ]
    for other in copies:
        for name, value in infer(other, case).items():
            torch.testing.assert_close(value, expected[name])
    assert set(layer.state_dict()) == set(new_layer(case, make_data(case), case.dtype, torch.nn).state_dict())
    # The deep copy does not share its weights.
    for parameter in copies[0].parameters():
        parameter.data.zero_()
    assert not torch.equal(infer(copies[0], case)["y"], expected["y"])
    torch.testing.assert_close(infer(layer, case)["y"], expected["y"])


def test_moving_and_casting_forget_the_packed_copy() -> None:
    case = case_for("lstm")
    layer = new_layer(case, make_data(case), case.dtype).prepack()
    double = run_layer(case, make_data(case), torch.float64, dlkernels.nn, grad=False, layer=layer.double())
    single = torch_results(case, make_data(case), torch.float64)
    torch.testing.assert_close(double["y"], single["y"])


def test_prepack_says_what_it_cannot_do() -> None:
    with pytest.raises(RuntimeError, match=r"prepack.*CPU"):
        dlkernels.nn.GRU(3, 4, device="meta").prepack()
    layer = torch.nn.utils.parametrizations.weight_norm(dlkernels.nn.GRU(3, 4), "weight_hh_l0")
    with pytest.raises(RuntimeError, match="prepack"):
        layer.prepack()
    assert dlkernels.nn.GRU(3, 4).unpack() is not None, "unpack without prepack is no error"


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["lstm", "gru", "rnn_tanh"])
def test_padding_is_not_left_to_chance(mode: str, dtype: torch.dtype) -> None:
    rows = {"lstm": 4, "gru": 3, "rnn_tanh": 1}[mode] * 5
    weights = [torch.randn(shape).to(dtype) for shape in ((rows, 3), (rows, 5), (rows,), (rows,))]
    buffers = []
    for poison in (True, False):
        extension.native.set_poison(poison)
        buffers.append(operators.pack(mode, weights, False))
    assert torch.equal(*buffers)


def test_a_weight_of_another_layer_takes_the_copy_out_of_use(native, isa: str) -> None:
    """The packed copy is not used if a weight was replaced by one of another packed layer or if two were exchanged."""
    case = case_for("gru", layers=1, bidirectional=False)
    data = make_data(case)
    one, other = new_layer(case, data, case.dtype), new_layer(case, data, case.dtype)
    with torch.no_grad():  # both layers have the same versions, so that versions cannot tell them apart
        for layer, factor in ((one, 1.0), (other, 0.5)):
            for parameter in layer.parameters():
                parameter.mul_(factor)
    assert {p._version for p in one.parameters()} == {p._version for p in other.parameters()}
    theirs = new_layer(case, data, case.dtype, torch.nn)
    one.prepack(), other.prepack()
    for name in ("weight_hh_l0", "bias_ih_l0", "weight_ih_l0"):
        setattr(one, name, getattr(other, name))
        theirs.load_state_dict(one.state_dict())
        expected = run_layer(case, data, case.dtype, torch.nn, grad=False, layer=theirs)
        for key, value in infer(one, case).items():
            torch.testing.assert_close(value, expected[key], msg=lambda m, at=(name, key): f"{at}: {m}")
    # Both biases have the same shape, so only their identity tells them apart.
    one.prepack()
    one.bias_ih_l0, one.bias_hh_l0 = one.bias_hh_l0, one.bias_ih_l0
    theirs.load_state_dict(one.state_dict())
    expected = run_layer(case, data, case.dtype, torch.nn, grad=False, layer=theirs)
    torch.testing.assert_close(infer(one, case)["y"], expected["y"])


@pytest.mark.parametrize("how", ["assigned", "written"])
@pytest.mark.parametrize("layer_index", [0, 1])
def test_every_layer_of_the_stack_is_watched(layer_index: int, how: str, native) -> None:
    for direction in ("", "_reverse"):
        case = case_for("lstm")
        data = make_data(case)
        one, theirs = new_layer(case, data, case.dtype).prepack(), new_layer(case, data, case.dtype, torch.nn)
        name = f"weight_hh_l{layer_index}{direction}"
        if how == "assigned":
            setattr(one, name, torch.nn.Parameter(getattr(one, name).detach() * 0.5))
        else:
            with torch.no_grad():
                getattr(one, name).mul_(0.5)
        theirs.load_state_dict(one.state_dict())
        expected = run_layer(case, data, case.dtype, torch.nn, grad=False, layer=theirs)
        torch.testing.assert_close(infer(one, case)["y"], expected["y"])


def exchange(weight: torch.nn.Parameter, value: torch.Tensor) -> None:
    torch.utils.swap_tensors(weight, torch.nn.Parameter(value))


@pytest.mark.parametrize("call", ["plain", "with lengths", "cell"])
@pytest.mark.parametrize("give", [lambda p, value: setattr(p, "data", value), exchange], ids=["data", "swap_tensors"])
def test_other_memory_takes_the_copy_out_of_use(give, call: str, native) -> None:
    """Such a weight is the same object, and its version may be the same too. `load_state_dict(assign=True)` exchanges
    tensors where torch.__future__.set_swap_module_params_on_conversion is on."""
    layer: torch.nn.Module
    if call == "cell":
        layer, fresh, x = dlkernels.nn.GRUCell(4, 5), torch.nn.GRUCell(4, 5), torch.randn(2, 4)
    else:
        layer, fresh, x = dlkernels.nn.LSTM(4, 5), torch.nn.LSTM(4, 5), torch.randn(3, 2, 4)
    options = {"lengths": torch.tensor([3, 3])} if call == "with lengths" else {}
    for name, weight in layer.named_parameters():
        layer.prepack()
        give(weight, torch.randn(weight.shape))
        fresh.load_state_dict(layer.state_dict())
        with torch.no_grad():
            found, expected = layer(x, **options), fresh(x)
        if call != "cell":
            found, expected = found[0], expected[0]
        torch.testing.assert_close(found, expected, msg=lambda m, name=name: f"{name}: {m}")


def test_another_weight_in_the_same_memory_takes_the_copy_out_of_use(native) -> None:
    """It counts its versions anew, so that a write to it can give it the version of the one that was packed."""
    layer, fresh, x = dlkernels.nn.LSTM(4, 5), torch.nn.LSTM(4, 5), torch.randn(3, 2, 4)
    layer.prepack()
    old = layer.weight_hh_l0
    layer.weight_hh_l0 = torch.nn.Parameter(old.data)
    with torch.no_grad():
        while layer.weight_hh_l0._version < old._version:
            layer.weight_hh_l0.mul_(0.5)
        assert layer.weight_hh_l0._version == old._version > 0
        fresh.load_state_dict(layer.state_dict())
        for options in ({}, {"lengths": torch.tensor([3, 3])}):
            torch.testing.assert_close(layer(x, **options)[0], fresh(x)[0])


def test_loaded_by_exchange(native, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    layer, x = dlkernels.nn.GRU(4, 5), torch.randn(3, 2, 4)
    for _ in range(3):  # memory and objects that were freed are used again
        fresh = torch.nn.GRU(4, 5)
        layer.prepack().load_state_dict(fresh.state_dict(), assign=True)
        with torch.no_grad():
            torch.testing.assert_close(layer(x)[0], fresh(x)[0])
