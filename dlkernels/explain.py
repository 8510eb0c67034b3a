"""Which kernel runs a layer for a given input, and why. Nothing is computed: the decision alone is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils.rnn import PackedSequence

from dlkernels import _native
from dlkernels.autograd import route
from dlkernels.functional import autocast_dtype
from dlkernels.nn import GRUCell, LSTMCell, RNNCell
from dlkernels.nn.rnn import RecurrentLayer

__all__ = ["Explanation", "LayerExplanation", "explain"]

_OUR_CELLS = (RNNCell, LSTMCell, GRUCell)
_CPU_DETAILS = ("threads", "split", "recurrence", "chunk_steps")
_CUDA_DETAILS = ("kind", "blocks", "groups", "tile", "barriers_per_step")
_CELL_MODES = {torch.nn.LSTMCell: "lstm", torch.nn.GRUCell: "gru"}


@dataclass(frozen=True)
class LayerExplanation:
    """How one layer of the stack, or the cell, would run.

    path: "native" (a compiled kernel), "reference" (PyTorch operations), "torch" (not a layer of dlkernels) or
    "nothing" (an empty batch). `forward` and `backward` are the plans of the native path: kernel, isa, threads, split
    (serial, rows or units), recurrence (dot or tiles), chunk_steps, directions_side_by_side, reason; on CUDA kernel,
    kind (cluster, grid or steps), blocks, slices, groups, tile, shared_bytes, barriers_per_step, reason.
    """

    name: str
    path: str
    reason: str
    grad: bool
    forward: dict[str, Any] = field(default_factory=dict)
    backward: dict[str, Any] = field(default_factory=dict)
    packed_weights: str = ""

    @property
    def kernel(self) -> str:
        """For example "cpu/avx512/lstm"; the path where no kernel of ours runs."""
        return str(self.forward.get("kernel", self.path))

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.kernel} ({self.reason})"]
        for title, plan in (("forward", self.forward), ("backward", self.backward)):
            if plan:
                keys = _CUDA_DETAILS if "kind" in plan else _CPU_DETAILS
                details = ", ".join(f"{key} {plan[key]}" for key in keys if key in plan)
                lines += [f"  {title}: {details}", f"    {plan['reason']}"]
        if self.packed_weights:
            lines.append(f"  prepacked weights: {self.packed_weights}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Explanation:
    """`layers` has one entry for each layer of the stack, one for a cell. `str()` is for reading."""

    module: str
    call: str
    layers: tuple[LayerExplanation, ...]

    @property
    def kernel(self) -> str:
        return self.layers[0].kernel

    @property
    def native(self) -> bool:
        return all(layer.path == "native" for layer in self.layers)

    def __str__(self) -> str:
        return "\n".join([self.module, self.call, *map(str, self.layers)])


@dataclass(frozen=True)
class _Call:
    """The sizes of a call, whatever form its input has."""

    text: str
    input: Tensor
    states: list[Tensor]
    steps: int
    batch: int


def explain(
    layer: Module, input: Tensor | PackedSequence, hx: Any = None, *, lengths: Tensor | None = None, bptt_steps: int = 0
) -> Explanation:
    """Says which kernel `layer(input, hx, lengths=lengths, bptt_steps=bptt_steps)` would run if it were called now, in
    the present grad mode, autocast, thread and determinism settings, and why. The layer is not run.
    """
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
    return Explanation(repr(layer), f"{call.text}, {_settings(call.input)}", layers)


def _not_ours(layer: Module, input: Any) -> Explanation:
    known = (torch.nn.RNNBase, torch.nn.RNNCellBase)
    if not isinstance(layer, known):
        raise TypeError(f"explain: expected a recurrent layer or cell, got {type(layer).__name__}")
    of_torch = type(layer).__module__.startswith("torch.")
    reason = "torch.nn layer: not patched" if of_torch else "not a layer of dlkernels"
    data = input.data if isinstance(input, PackedSequence) else input
    only = LayerExplanation("whole module", "torch", reason, grad=False)
    return Explanation(repr(layer), _describe("input", data), (only,))


def _describe(name: str, tensor: Tensor) -> str:
    return f"{name} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} {tensor.device}"


def _settings(input: Tensor) -> str:
    parts = [f"grad mode {'on' if torch.is_grad_enabled() else 'off'}", f"{torch.get_num_threads()} threads"]
    if torch.are_deterministic_algorithms_enabled():
        parts.append("deterministic")
    dtype = autocast_dtype(input)
    if dtype is not None:
        parts.append(f"autocast {str(dtype).removeprefix('torch.')}")
    return ", ".join(parts)


def _states(hx: Any) -> list[Tensor]:
    return [] if hx is None else [hx] if isinstance(hx, Tensor) else list(hx)


def _layer_call(
    layer: RecurrentLayer, input: Any, hx: Any, lengths: Tensor | None, bptt_steps: int
) -> _Call:  # fmt: skip
    states = _states(hx)
    if isinstance(input, PackedSequence):
        steps, batch = len(input.batch_sizes), int(input.batch_sizes[0])
        text = f"packed {_describe('input', input.data)} of {batch} sequences, up to {steps} steps"
        data = input.data
    else:
        if input.dim() not in (2, 3):
            raise ValueError(f"explain: expected input to be 2D or 3D, got {input.dim()}D")
        data = input
        time, rows = (1, 0) if layer.batch_first and input.dim() == 3 else (0, 1)
        steps, batch = input.size(time), input.size(rows) if input.dim() == 3 else 1
        text = _describe("input", input) + (", with lengths" if lengths is not None else "")
    if bptt_steps:
        text += f", gradients cut every {bptt_steps} steps"
    return _Call(text + (", given hx" if states else ", hx zeros"), data, states, steps, batch)


def _cell_call(input: Any, hx: Any) -> _Call:
    states = _states(hx)
    text = _describe("input", input) + (", given hx" if states else ", hx zeros")
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
