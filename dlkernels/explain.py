"""Which kernel runs a layer for a given input, and why. Nothing is computed: the decision alone is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils.rnn import PackedSequence

from dlkernels import _native
from dlkernels._autocast import autocast_dtype
from dlkernels.autograd import route
from dlkernels.explain_attention import ATTENTION_FUNCTIONS, explain_function, explain_one
from dlkernels.explain_layers import ATTENTION_LAYERS, attention_calls
from dlkernels.explanation import Explanation, LayerExplanation, describe, settings
from dlkernels.nn import GRUCell, LSTMCell, RNNCell
from dlkernels.nn.rnn import RecurrentLayer

__all__ = ["Explanation", "LayerExplanation", "explain"]

_OUR_CELLS = (RNNCell, LSTMCell, GRUCell)
_ATTENTION_OF_TORCH = (
    torch.nn.MultiheadAttention, torch.nn.TransformerEncoderLayer, torch.nn.TransformerDecoderLayer,
)  # fmt: skip
_OF_TORCH = (torch.nn.RNNBase, torch.nn.RNNCellBase, *_ATTENTION_OF_TORCH)
_CELL_MODES = {torch.nn.LSTMCell: "lstm", torch.nn.GRUCell: "gru"}


@dataclass(frozen=True)
class _Call:
    """The sizes of a call, whatever form its input has."""

    text: str
    input: Tensor
    states: list[Tensor]
    steps: int
    batch: int


def explain(target: Any, *args: Any, **kwargs: Any) -> Explanation:
    """Says which kernel `target(*args, **kwargs)` would run if it were called now, in the present grad mode, autocast,
    thread and determinism settings, and why. Nothing is run.

    target: a recurrent layer or cell, MultiheadAttention, a Transformer layer, `functional.attention`,
    `functional.scaled_dot_product_attention`, or torch's function of that name, as `patch_attention` would route it.
    """
    if any(target is function for function in ATTENTION_FUNCTIONS):
        return explain_function(target, *args, **kwargs)
    if isinstance(target, ATTENTION_LAYERS):
        return _attention_layer(target, *args, **kwargs)
    if isinstance(target, _ATTENTION_OF_TORCH) and args:
        return _not_ours(target, args[0])
    return _layer(target, *args, **kwargs)


def _attention_layer(layer: Module, *args: Any, **kwargs: Any) -> Explanation:
    explained = []
    for call in attention_calls(layer, *args, **kwargs):
        if call.reason:
            grad = torch.is_grad_enabled() and call.q.requires_grad
            explained.append(LayerExplanation(call.name, "torch", call.reason, grad))
        else:
            explained.append(explain_one(call.name, call.q, call.k, call.v, **call.options))
    first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    return Explanation(repr(layer), f"{describe('input', first)}, {settings(first)}", tuple(explained))


def _layer(
    layer: Module, input: Tensor | PackedSequence, hx: Any = None, *, lengths: Tensor | None = None, bptt_steps: int = 0
) -> Explanation:
    if not isinstance(input, (Tensor, PackedSequence)):
        raise TypeError(f"explain(): argument 'input' must be Tensor or PackedSequence, not {type(input).__name__}")
    if not isinstance(layer, (RecurrentLayer, *_OUR_CELLS)):
        return _not_ours(layer, input)
    if isinstance(layer, RecurrentLayer):
        call = _layer_call(layer, input, hx, lengths, bptt_steps)
        layers = _explain_stack(layer, call)
    else:
        call = _cell_call(input, hx)
        layers = (_explain_cell(layer, call),)
    return Explanation(repr(layer), f"{call.text}, {settings(call.input)}", layers)


def _not_ours(layer: Module, input: Any) -> Explanation:
    if not isinstance(layer, _OF_TORCH):
        raise TypeError(
            f"explain: expected a recurrent layer or cell, an attention layer or an attention function, got "
            f"{type(layer).__name__}"
        )
    of_torch = type(layer).__module__.startswith("torch.")
    reason = "torch.nn layer: not patched" if of_torch else "not a layer of dlkernels"
    data = input.data if isinstance(input, PackedSequence) else input
    only = LayerExplanation("whole module", "torch", reason, grad=False)
    return Explanation(repr(layer), describe("input", data), (only,))


def _states(hx: Any) -> list[Tensor]:
    return [] if hx is None else [hx] if isinstance(hx, Tensor) else list(hx)


def _layer_call(
    layer: RecurrentLayer, input: Any, hx: Any, lengths: Tensor | None, bptt_steps: int
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
        text = describe("input", input) + (", with lengths" if lengths is not None else "")
    if bptt_steps:
        text += f", gradients cut every {bptt_steps} steps"
    return _Call(text + (", given hx" if states else ", hx zeros"), data, states, steps, batch)


def _cell_call(input: Any, hx: Any) -> _Call:
    states = _states(hx)
    text = describe("input", input) + (", given hx" if states else ", hx zeros")
    return _Call(text, input, states, 1, input.size(0) if input.dim() == 2 else 1)


def _compute_dtype(input: Tensor) -> torch.dtype:
    dtype = autocast_dtype(input)
    return input.dtype if dtype is None or input.dtype == torch.float64 else dtype


def _explain_stack(layer: RecurrentLayer, call: _Call) -> tuple[LayerExplanation, ...]:
    weights = layer.weight_list()
    prepacked = layer._prepacked
    packed = prepacked.why_not(weights) or "used" if prepacked is not None else ""
    per_layer = len(weights) // layer.num_layers
    directions = 2 if layer.bidirectional else 1
    outputs = (layer.proj_size or layer.hidden_size) * directions
    explained = []
    for index in range(layer.num_layers):
        # A layer's input is recorded for autograd if anything below it is.
        tensors = [call.input, *call.states, *weights[: (index + 1) * per_layer]]
        sizes = {
            "I": layer.input_size if index == 0 else outputs,
            "H": layer.hidden_size, "P": layer.proj_size, "D": directions,
        }  # fmt: skip
        explained.append(_explain_one(f"layer {index}", layer.op_mode, call, tensors, sizes, packed))
    return tuple(explained)


def _explain_cell(cell: Any, call: _Call) -> LayerExplanation:
    mode = next((mode for base, mode in _CELL_MODES.items() if isinstance(cell, base)), None)
    weights = [cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh]
    tensors = [call.input, *call.states, *(weight for weight in weights if weight is not None)]
    sizes = {"I": cell.input_size, "H": cell.hidden_size, "P": 0, "D": 1}
    return _explain_one("cell", mode or f"rnn_{cell.nonlinearity}", call, tensors, sizes, "")


def _explain_one(
    name: str, mode: str, call: _Call, tensors: list[Tensor], sizes: dict[str, int], packed: str
) -> LayerExplanation:  # fmt: skip
    dtype = _compute_dtype(call.input)
    probe = torch.empty(0, dtype=dtype, device=call.input.device)
    decided = route(probe, *tensors, projected=sizes["P"] > 0)
    grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if not decided.native:
        packed = packed and "ignored: no kernel runs"
        return LayerExplanation(name, "reference", decided.reason, grad, packed_weights=packed)
    if call.batch == 0 or sizes["H"] == 0:
        return LayerExplanation(name, "nothing", "there is nothing to compute", grad)
    native = _native.native
    assert native is not None

    def plan(backward: bool) -> dict[str, Any]:
        if call.input.is_cuda and name == "cell":
            reason = "products by torch, one fused kernel for gates and state"
            return {"kernel": f"cuda/cell/{mode}", "kind": "cell", "reason": reason}
        if call.input.is_cuda:
            return dict(native.cuda_plan(
                mode, dtype, call.steps, call.batch, sizes["H"], sizes["D"], backward, call.input.device.index
            ))  # fmt: skip
        return dict(native.plan(
            mode, dtype, call.steps, call.batch, *(sizes[key] for key in "IHPD"), torch.get_num_threads(), backward,
            torch.are_deterministic_algorithms_enabled(), packed == "used" and not backward,
            call.input.numel() // max(1, call.input.size(-1)),
        ))  # fmt: skip

    if packed and packed != "used":
        packed = f"ignored: {packed}"
    return LayerExplanation(name, "native", decided.reason, grad, plan(False), plan(True) if grad else {}, packed)
