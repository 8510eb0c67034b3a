"""Tells which kernel runs a recurrent layer or cell for a given input, and why."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils.rnn import PackedSequence

from dlkernels._core import extension
from dlkernels._core.autocast import autocast_dtype
from dlkernels._core.explanation import Explanation, LayerExplanation, describe, settings
from dlkernels.rnn import checks
from dlkernels.rnn.cells import GRUCell, LSTMCell, RNNCell
from dlkernels.rnn.kinds import KINDS
from dlkernels.rnn.layers import RecurrentLayer
from dlkernels.rnn.normalised_cells import LayerNormGRUCell, LayerNormLSTMCell
from dlkernels.rnn.prepacked import BITS
from dlkernels.rnn.routing import NO_EXTRAS, Extras, route_of_call

__all__ = ["LAYERS", "explain_layer"]

LAYERS = (RecurrentLayer, RNNCell, LSTMCell, GRUCell, LayerNormLSTMCell, LayerNormGRUCell)
_CELL_MODES = {torch.nn.LSTMCell: "lstm", torch.nn.GRUCell: "gru"}


@dataclass(frozen=True)
class _Call:
    """A call's text, tensors and sizes, independent of the form of its input."""

    text: str
    input: Tensor
    states: list[Tensor]
    steps: int
    batch: int
    extras: Extras = NO_EXTRAS


def explain_layer(
    layer: Module, input: Tensor | PackedSequence, hx: Any, extras: Extras
) -> Explanation:  # fmt: skip
    """Tells what a call of one of LAYERS with these arguments would run. An input of another size, dtype or device than
    the layer's raises the error of the call itself."""
    if isinstance(layer, RecurrentLayer):
        call = _layer_call(layer, input, hx, extras)
        layers = _explain_stack(layer, call)
    else:
        call = _cell_call(input, hx)
        layers = (_explain_cell(layer, call),)
    return Explanation(repr(layer), f"{call.text}, {settings(call.input)}", layers)


def _states(hx: Any) -> list[Tensor]:
    return [] if hx is None else [hx] if isinstance(hx, Tensor) else list(hx)


def _layer_call(
    layer: RecurrentLayer, input: Any, hx: Any, extras: Extras
) -> _Call:  # fmt: skip
    states = _states(hx)
    if isinstance(input, PackedSequence):
        steps, batch = len(input.batch_sizes), int(input.batch_sizes[0])
        text = f"packed {describe('input', input.data)} of {batch} sequences, up to {steps} steps"
        data = input.data
    else:
        if input.dim() not in (2, 3):
            raise ValueError(f"explain: expected input to be 2D or 3D, got {input.dim()}D")
        data = input
        time, rows = (1, 0) if layer.batch_first and input.dim() == 3 else (0, 1)
        steps, batch = input.size(time), input.size(rows) if input.dim() == 3 else 1
        text = describe("input", input) + (", with lengths" if extras.lengths is not None else "")
    if extras.bptt_steps:
        text += f", gradients cut every {extras.bptt_steps} steps"
    if extras.resets is not None:
        text += ", with resets"
    if extras.return_cells:
        text += ", c of every step returned"
    text += ", given hx" if states else ", hx zeros"
    return _Call(text, data, states, steps, batch, extras)


def _cell_call(input: Any, hx: Any) -> _Call:
    states = _states(hx)
    text = describe("input", input) + (", given hx" if states else ", hx zeros")
    return _Call(text, input, states, 1, input.size(0) if input.dim() == 2 else 1)


def _compute_dtype(input: Tensor) -> torch.dtype:
    dtype = autocast_dtype(input)
    return input.dtype if dtype is None or input.dtype == torch.float64 else dtype


def _explain_stack(layer: RecurrentLayer, call: _Call) -> tuple[LayerExplanation, ...]:
    weights = layer.weight_list()
    checks.same_kind(call.input, call.states, weights, mixed=autocast_dtype(call.input) is not None)
    checks.input_size(call.input, weights[0])
    varied = layer._varied(weights)[1]
    packed = _packing(layer, call, weights) if varied is None else _Packing()
    per_layer = len(weights) // layer.num_layers
    directions = 2 if layer.bidirectional else 1
    outputs = (layer.proj_size or layer.hidden_size) * directions
    explained = []
    for index in range(layer.num_layers):
        # Autograd records a layer if it records any of the layers below, so all of their weights count.
        tensors = [call.input, *call.states, *weights[: (index + 1) * per_layer]]
        sizes = {
            "I": layer.input_size if index == 0 else outputs,
            "H": layer.hidden_size, "P": layer.proj_size, "D": directions,
        }  # fmt: skip
        here = call
        if varied is not None and index < layer.num_layers - 1:  # only the last layer returns its cells
            here = replace(call, extras=call.extras._replace(return_cells=False))
        explained.append(
            _explain_one(f"layer {index}", layer.op_mode, here, tensors, sizes, packed, varied is not None)
        )
    return tuple(explained)


def _explain_cell(cell: Any, call: _Call) -> LayerExplanation:
    if isinstance(cell, (LayerNormLSTMCell, LayerNormGRUCell)):
        return _explain_normalised_cell(cell, call)
    mode = next((mode for base, mode in _CELL_MODES.items() if isinstance(cell, base)), None)
    mode = mode or f"rnn_{cell.nonlinearity}"
    weights = [w for w in (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh) if w is not None]
    checks.same_kind(call.input, call.states, weights, RuntimeError, autocast_dtype(call.input) is not None)
    checks.cell_rank(type(cell).__name__, call.input)
    given = [tensor if tensor.dim() != 1 else tensor[None] for tensor in (call.input, *call.states)]
    h, c = [*given[1:], None, None][:2]
    checks.cell(type(cell).__name__, given[0], h, c, cell.weight_ih, cell.weight_hh, KINDS[mode].gates)
    tensors = [call.input, *call.states, *weights]
    sizes = {"I": cell.input_size, "H": cell.hidden_size, "P": 0, "D": 1}
    return _explain_one("cell", mode, call, tensors, sizes, _packing(cell, call, weights))


def _explain_normalised_cell(cell: Any, call: _Call) -> LayerExplanation:
    weights = cell.weight_list()
    checks.same_kind(call.input, call.states, weights, mixed=autocast_dtype(call.input) is not None)
    checks.cell_rank(type(cell).__name__, call.input)
    checks.input_size(call.input, weights[0])
    tensors = [call.input, *call.states, *weights]
    sizes = {"I": cell.input_size, "H": cell.hidden_size, "P": 0, "D": 1}
    return _explain_one("cell", cell._kind.mode, call, tensors, sizes, _Packing(), True)


@dataclass(frozen=True)
class _Packing:
    """Whether a call uses packed weights: `text` says it, and is empty without any. `bits` as for `operators.pack`."""

    text: str = ""
    used: bool = False
    bits: int = 0


def _packing(layer: Any, call: _Call, weights: list[Tensor]) -> _Packing:
    prepacked = layer._prepacked
    if prepacked is None:
        return _Packing()
    reason = prepacked.why_not(weights, [call.input, *call.states])
    if reason:
        return _Packing(f"ignored: {reason}")
    if prepacked.dtype is None:
        return _Packing("used", True)
    name = str(prepacked.dtype).removeprefix("torch.")
    return _Packing(f"used, weights {name}", True, BITS[prepacked.dtype])


def _explain_one(
    name: str, mode: str, call: _Call, tensors: list[Tensor], sizes: dict[str, int], packed: _Packing,
    varies: bool = False,
) -> LayerExplanation:  # fmt: skip
    dtype = _compute_dtype(call.input)
    probe = torch.empty(0, dtype=dtype, device=call.input.device)
    decided = route_of_call(
        mode, probe, *tensors, projected=sizes["P"] > 0, varies=varies, extras=call.extras
    )  # fmt: skip
    grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if not decided.native:
        ignored = "ignored: no kernel runs" if packed.text else ""
        return LayerExplanation(name, decided.path, decided.reason, grad, packed_weights=ignored)
    if call.batch == 0 or sizes["H"] == 0:
        return LayerExplanation(name, "nothing", "there is nothing to compute", grad)
    native = extension.native
    assert native is not None

    def plan(backward: bool) -> dict[str, Any]:
        if call.input.is_cuda and varies:
            reason = "layer normalisation, zoneout or recurrent dropout: a product by torch and one kernel per step"
            return {"kernel": f"cuda/steps/{mode}", "kind": "steps", "reason": reason}
        if call.input.is_cuda and name == "cell":
            reason = "products by torch, one fused kernel for gates and state"
            return {"kernel": f"cuda/cell/{mode}", "kind": "cell", "reason": reason}
        if call.input.is_cuda:
            return dict(native.cuda_plan(
                mode, dtype, call.steps, call.batch, sizes["H"], sizes["D"], backward, call.input.device.index
            ))  # fmt: skip
        return dict(native.plan(
            mode, dtype, call.steps, call.batch, *(sizes[key] for key in "IHPD"), torch.get_num_threads(), backward,
            torch.are_deterministic_algorithms_enabled(), packed.used and not backward,
            call.input.numel() // max(1, call.input.size(-1)), 0 if backward else packed.bits, varies,
        ))  # fmt: skip

    return LayerExplanation(name, "native", decided.reason, grad, plan(False), plan(True) if grad else {}, packed.text)
