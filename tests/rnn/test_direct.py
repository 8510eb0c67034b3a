"""Tests the forward calls that pass by torch's dispatcher: they return what the operators return, and they decline
every call that is not plain."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import dlkernels
from dlkernels.rnn.kinds import MODES
from dlkernels.rnn.operators import direct
from tests.support.direct_calls import CONTEXTS, INPUTS, call, layer_of, states_of
from tests.support.rnn_op_calls import GATES, LENGTHS, B, H, I, T, op

pytestmark = [
    pytest.mark.usefixtures("native"),
    pytest.mark.o0_skip(reason="the way to kernels that other tests call as well"),
]


def flat(results: Any) -> list[Tensor]:
    y, states = results
    return [y, *(states if isinstance(states, tuple) else (states,))]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [
    {}, {"num_layers": 3, "bidirectional": True}, {"num_layers": 2, "batch_first": True, "bias": False},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("with_states", [False, True], ids=["zeros", "states"])
def test_same_as_torch(mode: str, options: dict[str, Any], with_states: bool) -> None:
    layer = layer_of(mode, **options)
    x = torch.randn((B, T, I) if layer.batch_first else (T, B, I))
    states = states_of(layer) if with_states else ()
    with torch.no_grad():
        found = call(layer, x, states)
        expected = flat(layer(x, (states if len(states) == 2 else states[0]) if states else None))
    assert found is not None
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert not ours.requires_grad
    assert found[0].stride() == expected[0].stride()


@pytest.mark.parametrize("mode", MODES)
def test_states_that_are_views(mode: str) -> None:
    """The states of a stack may begin anywhere in their storage and have any strides."""
    layer = layer_of(mode, num_layers=2, bidirectional=True)
    x, states = torch.randn(T, B, I), states_of(layer)
    with torch.no_grad():
        expected = call(layer, x, states)
        assert expected is not None
        for strided in (
            lambda s: torch.cat([torch.full_like(s, float("nan")), s])[len(s) :],
            lambda s: torch.stack([torch.full_like(s, float("nan")), s], -1)[..., 1],
            lambda s: s.transpose(0, 1).contiguous().transpose(0, 1),
        ):
            found = call(layer, x, [strided(state) for state in states])
            assert found is not None
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_projection_packed_data_and_lengths() -> None:
    layer = layer_of("lstm", proj=2, num_layers=2, bidirectional=True)
    x, lengths = torch.randn(T, B, I), torch.tensor(sorted(LENGTHS, reverse=True))
    packed = pack_padded_sequence(x, lengths)
    with torch.no_grad():
        expected = layer(packed)
        found = call(layer, packed.data, batch_sizes=packed.batch_sizes)
        assert found is not None
        torch.testing.assert_close(found, [expected[0].data, *expected[1]])
        padded = call(layer, x, lengths=lengths)
        assert padded is not None
        torch.testing.assert_close(padded[1:], found[1:])


def test_prepacked_buffers() -> None:
    layer = dlkernels.nn.GRU(I, H, num_layers=2)
    x = torch.randn(T, B, I)
    with torch.no_grad():
        expected = call(layer, x)
        layer.prepack()
        assert layer._prepacked is not None
        found = call(layer, x, packed=layer._prepacked.buffers)
        assert found is not None
        assert expected is not None
        torch.testing.assert_close(found, expected)
        assert call(layer, x, packed=layer._prepacked.buffers[:1]) is None


@pytest.mark.parametrize("mode", MODES)
def test_cells(mode: str) -> None:
    gates = GATES[mode]
    x, h, c = torch.randn(B, I), torch.randn(B, H), torch.randn(B, H) if mode == "lstm" else None
    weights = [torch.randn(gates * H, I), torch.randn(gates * H, H), torch.randn(gates * H), torch.randn(gates * H)]
    for biases in (weights[2:], [None, None]):
        found = direct.cell(mode, x, h, c, *weights[:2], *biases)
        expected = op(f"{mode}_cell")(x, h, c, *weights[:2], *biases, False, False)
        assert found is not None
        torch.testing.assert_close(found, list(expected), rtol=0, atol=0)


@pytest.mark.parametrize("name", CONTEXTS)
def test_declines_in(name: str) -> None:
    layer, x = layer_of("gru"), torch.randn(T, B, I)
    with torch.no_grad():
        with CONTEXTS[name]():
            assert call(layer, x) is None
        assert call(layer, x) is not None


def test_declines_in_transforms_and_traces() -> None:
    layer, x = layer_of("gru"), torch.randn(T, B, I)
    seen: list[Any] = []

    def body(x: Tensor) -> Tensor:
        seen.append(call(layer, x))
        return x

    with torch.no_grad():
        torch.vmap(body)(torch.randn(2, T, B, I))
        torch.jit.trace(body, x, check_trace=False)
    assert len(seen) >= 2
    assert all(one is None for one in seen)


@pytest.mark.parametrize("name", INPUTS)
def test_declines(name: str) -> None:
    layer = layer_of("gru").requires_grad_(False)
    assert call(layer, INPUTS[name](torch.randn(T, B, I))) is None


def test_negative_views_are_right_through_the_layer() -> None:
    layer, x = dlkernels.nn.GRU(I, H), torch.randn(T, B, I)
    with torch.no_grad():
        torch.testing.assert_close(layer(torch._neg_view(x))[0], layer(-x)[0])


@pytest.mark.parametrize("states", [(torch.zeros(1, B, H + 1),), (torch.zeros(2, B, H),), (torch.zeros(B, H),)])
def test_declines_states(states: tuple[Tensor, ...]) -> None:
    layer = layer_of("gru").requires_grad_(False)
    assert call(layer, torch.randn(T, B, I), states) is None
    assert call(layer_of("gru", num_layers=3).requires_grad_(False), torch.randn(T, B, I), states) is None


def test_declines_wrong_arguments() -> None:
    assert direct.layers() is None  # type: ignore[call-arg]
    assert direct.cell("gru") is None
    x, weights = torch.randn(T, B, I), layer_of("gru").requires_grad_(False)._flat_weights
    assert direct.layers("gru", x, None, None, weights, None, None, None, 1, False, False) is not None
    for at, wrong in ((0, "gru2"), (0, 3), (4, None), (4, []), (4, weights[:3]), (5, weights), (8, 0), (8, "1"),
                      (8, 3), (9, 1), (10, None)):  # fmt: skip
        arguments = ["gru", x, None, None, weights, None, None, None, 1, False, False]
        arguments[at] = wrong
        assert direct.layers(*arguments) is None, (at, wrong)


def test_noncontiguous_tensors() -> None:
    layer = layer_of("lstm", num_layers=2).requires_grad_(False)
    x, h0, c0 = (
        torch.randn(T, B, 2 * I)[..., ::2],
        torch.randn(B, 2, H).transpose(0, 1),
        torch.randn(2, B, 2 * H)[..., ::2],
    )
    found = call(layer, x, (h0, c0))
    assert found is not None
    torch.testing.assert_close(found, flat(layer(x, (h0.contiguous(), c0.contiguous()))))


def test_deterministic_algorithms_reach_the_kernels() -> None:
    """In this mode the results of a sequence do not depend, to the bit, on the batch that it is in."""
    layer, cell, x = torch.nn.LSTM(64, 64), torch.nn.LSTMCell(64, 64), torch.randn(3, 40, 64)
    weights = [cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh]
    torch.use_deterministic_algorithms(True)
    try:
        with torch.no_grad():
            together, states = call(layer, x), direct.cell("lstm", x[0], None, None, *weights)
            assert together is not None
            assert states is not None
            for b in range(40):
                alone, state = call(layer, x[:, b : b + 1]), direct.cell("lstm", x[0, b : b + 1], None, None, *weights)
                assert alone is not None
                assert state is not None
                assert torch.equal(alone[0], together[0][:, b : b + 1])
                assert torch.equal(state[0], states[0][b : b + 1])
    finally:
        torch.use_deterministic_algorithms(False)


def test_inference_mode_gives_inference_tensors() -> None:
    layer, x = layer_of("gru"), torch.randn(T, B, I)
    with torch.inference_mode():
        found = call(layer, x)
    assert found is not None
    assert all(tensor.is_inference() for tensor in found)


def test_nothing_is_kept_alive() -> None:
    layer = layer_of("lstm").requires_grad_(False)
    states = states_of(layer)
    watched = []
    for served in (True, False):
        x = torch.randn(T, B, I if served else I + 1)
        found = call(layer, x, states)
        assert (found is not None) == served
        watched += [weakref.ref(x), *(weakref.ref(tensor) for tensor in found or ())]
        del x, found
    gc.collect()
    assert [ref() for ref in watched] == [None] * 5


def test_results_are_ordinary_tensors() -> None:
    found = call(layer_of("gru").requires_grad_(False), torch.randn(T, B, I))
    assert found is not None
    for tensor in found:
        assert type(tensor) is Tensor
        assert tensor.untyped_storage().resizable()
        tensor.add_(1)
        assert tensor._version == 1


def test_other_threads_run_meanwhile() -> None:
    """A call of some 100 ms does not hold the lock of Python's interpreter."""
    layer = torch.nn.LSTM(256, 256).requires_grad_(False)
    x, spent = torch.randn(1500, 16, 256), []

    def work() -> None:
        begin = time.perf_counter()
        assert call(layer, x) is not None
        spent.append(time.perf_counter() - begin)

    thread, longest_pause, last = threading.Thread(target=work), 0.0, time.perf_counter()
    thread.start()
    while not spent:
        now = time.perf_counter()
        longest_pause, last = max(longest_pause, now - last), now
    thread.join()
    assert longest_pause < spent[0] / 2, (longest_pause, spent)


def test_used_by_layers_functions_and_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("layers", "cell", "layer_module", "cell_module"):
        original = getattr(direct, name)
        monkeypatch.setattr(direct, name, lambda *a, name=name, f=original: (calls.append(name), f(*a))[1])
    x = torch.randn(T, B, I)
    with torch.no_grad():
        layer, cell = dlkernels.nn.LSTM(I, H, dropout=0.5, num_layers=2).eval(), dlkernels.nn.GRUCell(I, H)
        layer(x)
        layer(x[:, 0])  # without a batch dimension
        dlkernels.functional.lstm(x, None, layer._flat_weights, num_layers=2)
        cell(x[0])
        assert calls == ["layer_module", "layer_module", "layers", "layers", "cell_module"]
        calls.clear()
        layer.train()(x)
        assert calls == ["layer_module"]
    calls.clear()
    layer(x)
    cell(x[0])
    assert calls == ["layer_module", "cell_module"]
