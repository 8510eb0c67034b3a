"""Checks of what users pass to the recurrent layers, with torch.nn's exception types and messages where it has them.

The checks read shapes, dtypes and devices but no values of a tensor, so they do not synchronise with a device. The
operators check the values of lengths and batch_sizes; `values_for_reference` does so for CPU calls without a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from dlkernels._core.checks import tensor as tensor
from dlkernels.rnn.kinds import Kind, split_directions

# The dtypes that one call may mix under autocast.
_MIXED = (torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def bptt_steps(value: Any) -> int:
    """`value` as an int, 0 for None. Raises TypeError or ValueError."""
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"bptt_steps should be of type int, got: {type(value).__name__}")
    if not 0 <= value < 2**63:
        raise ValueError(f"bptt_steps should be 0 (never cut) or a positive 64-bit number of steps, got {value}")
    return value


def dropout(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Number) or not 0 <= value <= 1:  # type: ignore[operator]
        raise ValueError(
            "dropout should be a number in range [0, 1] representing the probability of an element being zeroed"
        )


def states(kind: Kind, function: str, hx: Any) -> tuple[Tensor | None, Tensor | None]:
    """h and c from `hx`: None, a tensor, or a pair for a cell with a cell state."""
    if hx is None:
        return None, None
    if not kind.has_cell_state:
        tensor(function, "hx", hx)
        return hx, None
    if not isinstance(hx, (tuple, list)):
        raise TypeError(f"{function}(): argument 'hx' must be a tuple of two tensors, not {type(hx).__name__}")
    if len(hx) != 2:
        raise RuntimeError(f"{function} expects two hidden states, got {len(hx)}")
    for state in hx:
        tensor(function, "hx", state)
    return hx[0], hx[1]


def same_kind(
    x: Tensor, states: Sequence[Tensor | None], weights: Sequence[Tensor | None],
    mismatch: type[Exception] = ValueError, mixed: bool = False,
) -> None:  # fmt: skip
    """Checks that all tensors are on one device and have one floating dtype, or with `mixed` any but float64.
    `mismatch` is the exception that torch.nn raises for an input of another dtype."""
    dtype, device = x.dtype, x.device
    allowed = _MIXED if mixed else ()
    first = weights[0]
    if first is not None and first.dtype != dtype and first.dtype not in allowed:
        raise mismatch(
            f"RNN input dtype ({dtype}) does not match weight dtype ({first.dtype}). "
            f"Convert input: input.to({first.dtype}), or convert model: model.to({dtype})"
        )
    if not dtype.is_floating_point:
        raise RuntimeError(f"input must be of a floating point dtype, got {dtype}")
    for kind, group in (("parameter", weights), ("hidden", states)):
        for other in group:
            if other is None:
                continue
            if other.device != device:
                raise RuntimeError(
                    f"Input and {kind} tensors are not at the same device, found input tensor at {device} and "
                    f"{kind} tensor at {other.device}"
                )
            if other.dtype != dtype and other.dtype not in allowed:
                raise RuntimeError(
                    f"Input and {kind} tensors are not the same dtype, found input tensor with {dtype} and "
                    f"{kind} tensor with {other.dtype}"
                )


def weight_count(kind: Kind, weights: Any, num_layers: int, directions: int) -> int:
    """Checks the list of weights and returns the number of weights per layer."""
    if not isinstance(weights, (tuple, list)):
        raise TypeError(f"{kind.function}(): argument 'weights' must be tuple of Tensors, not {type(weights).__name__}")
    for weight in weights:
        if not isinstance(weight, Tensor):
            tensor(kind.function, "weights", weight)
    if isinstance(num_layers, bool) or not isinstance(num_layers, int):
        raise TypeError(f"num_layers should be of type int, got: {type(num_layers).__name__}")
    if num_layers <= 0:
        raise ValueError("num_layers must be greater than zero")
    per_direction, rest = divmod(len(weights), num_layers * directions)
    if rest or per_direction not in kind.weight_counts:
        raise RuntimeError(
            f"weights: expected w_ih, w_hh, then b_ih, b_hh if there are biases"
            f"{', then w_hr if there is a projection' if kind.may_project else ''}, for each of {num_layers} layers x "
            f"{directions} directions, got {len(weights)} tensors"
        )
    return per_direction * directions


def layer_weights(
    kind: Kind, layer: int, weights: Sequence[Tensor], input_size: int, directions: int
) -> tuple[int, int]:
    """Checks the shapes of one layer and returns (H, O)."""
    hidden = outputs = -1
    for d, w in enumerate(split_directions(weights, directions)):
        if w.w_hh.dim() != 2 or w.w_ih.dim() != 2 or (w.w_hr is not None and w.w_hr.dim() != 2):
            raise RuntimeError(f"weights of layer {layer}: w_ih, w_hh and w_hr must have 2 dimensions")
        if d == 0:
            hidden, outputs = w.w_hh.shape[0] // kind.gates, w.w_hh.shape[1]
            if hidden <= 0:
                raise RuntimeError(f"weights of layer {layer}: hidden_size must be greater than zero")
        rows = kind.gates * hidden
        expected: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
            ("w_ih", w.w_ih, (rows, input_size)),
            ("w_hh", w.w_hh, (rows, outputs if w.w_hr is not None else hidden)),
            ("b_ih", w.b_ih, (rows,)),
            ("b_hh", w.b_hh, (rows,)),
            ("w_hr", w.w_hr, (outputs, hidden)),
        ]
        for name, weight, shape in expected:
            if weight is not None and weight.shape != shape:
                raise RuntimeError(
                    f"weights of layer {layer}: expected {name} of size {shape}, got {tuple(weight.shape)}"
                )
    return hidden, outputs


def rank(name: str, x: Tensor, packed: bool) -> None:
    dim = x.dim()
    if packed:
        if dim != 2:
            raise RuntimeError(f"input must have 2 dimensions, got {dim}")
    elif dim != 3 and dim != 2:
        raise ValueError(f"{name}: Expected input to be 2D or 3D, got {dim}D instead")


def state_ranks(batched: bool, h: Tensor | None, c: Tensor | None) -> None:
    expected = 3 if batched else 2
    if h is None or (h.dim() == expected and (c is None or c.dim() == expected)):
        return
    kind = f"For {'batched 3-D' if batched else 'unbatched 2-D'} input, "
    if c is None:
        raise RuntimeError(f"{kind}hx should also be {expected}-D but got {h.dim()}-D tensor")
    raise RuntimeError(f"{kind}hx and cx should also be {expected}-D but got ({h.dim()}-D, {c.dim()}-D) tensors")


def input_size(x: Tensor, w_ih: Tensor) -> None:
    if w_ih.dim() == 2 and x.shape[-1] != w_ih.shape[1]:
        raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {w_ih.shape[1]}, got {x.shape[-1]}")


def state_sizes(h: Tensor | None, c: Tensor | None, entries: int, batch: int, outputs: int, hidden: int) -> None:
    for i, (state, size) in enumerate(((h, outputs), (c, hidden))):
        if state is not None and state.shape != (entries, batch, size):
            name = "hidden" if c is None else f"hidden[{i}]"
            raise RuntimeError(f"Expected {name} size {(entries, batch, size)}, got {list(state.shape)}")


def batch_sizes(x: Tensor, sizes: Any) -> None:
    if not isinstance(sizes, Tensor):
        raise TypeError(f"batch_sizes should be a tensor, got: {type(sizes).__name__}")
    if sizes.dim() != 1 or sizes.dtype != torch.int64 or sizes.device.type not in ("cpu", "meta"):
        raise RuntimeError(
            f"batch_sizes should be a 1D CPU int64 tensor, got {sizes.dim()}D {sizes.device} {sizes.dtype}"
        )
    if sizes.shape[0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")


def lengths(value: Any, batch: int, device: torch.device) -> Tensor:
    """`value` as int64 on `device`; the values themselves are left to the operator."""
    if not isinstance(value, Tensor):
        raise TypeError(f"lengths should be a tensor, got: {type(value).__name__}")
    if value.dtype not in _INTEGERS:
        raise TypeError(f"lengths should be of an integer dtype, got: {value.dtype}")
    if value.shape != (batch,):
        raise RuntimeError(f"Expected lengths of size ({batch},), one for each sequence, got {tuple(value.shape)}")
    return value.to(device, torch.int64)


def resets(value: Any, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """`value` on `device`, a bool tensor with an entry for each row of the input."""
    if not isinstance(value, Tensor):
        raise TypeError(f"resets should be a tensor, got: {type(value).__name__}")
    if value.dtype != torch.bool:
        raise TypeError(f"resets should be of dtype torch.bool, got: {value.dtype}")
    if value.shape != shape:
        raise RuntimeError(f"Expected resets of size {shape}, one for each row of the input, got {tuple(value.shape)}")
    return value.to(device)


def return_cells(kind: Kind, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"return_cells should be of type bool, got: {type(value).__name__}")
    if value and not kind.has_cell_state:
        raise ValueError(f"return_cells: {kind.layer} has no cell state")
    return value


def values_for_reference(
    x: Tensor, sizes: Tensor | None, lengths: Tensor | None, steps: int
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Checks the values of batch_sizes and lengths and returns copies of both. The messages are those of the operators,
    which check the values themselves. This function is for eager calls only, because it reads the values. The call goes
    on with the copies, so that writes to the caller's tensors after the check have no effect."""
    if sizes is not None:
        rows, count = x.shape[0], sizes.shape[0]
        if count > rows:
            raise RuntimeError(
                f"batch_sizes must be positive and must sum to the rows of x, got {count} steps for {rows} rows"
            )
        sizes = sizes.clone()
        values = sizes.tolist()
        for t, value in enumerate(values):
            before = values[t - 1] if t else rows
            if not 0 < value <= before:
                end = f"after {before}" if t else f"for {rows} rows"
                raise RuntimeError(f"batch_sizes must be positive and must not increase, got {value} at step {t} {end}")
        if sum(values) != rows:
            raise RuntimeError(f"batch_sizes must sum to the rows of x, got {sum(values)} and {rows}")
    if lengths is not None:
        lengths = lengths.clone()
        for b, value in enumerate(lengths.tolist()):
            if not 0 <= value <= steps:
                raise ValueError(f"lengths must lie in 0..T (T={steps}), got {value} at position {b}")
    return sizes, lengths


def cell_rank(name: str, x: Tensor) -> None:
    if x.dim() not in (1, 2):
        raise ValueError(f"{name}: Expected input to be 1D or 2D, got {x.dim()}D instead")


def cell(name: str, x: Tensor, h: Tensor | None, c: Tensor | None, w_ih: Tensor, w_hh: Tensor, gates: int) -> None:
    """Checks the sizes of one step. x is 2-D: unbatched calls have been given a batch dimension before."""
    batch, features = x.shape
    if w_hh.dim() != 2:
        raise RuntimeError(f"weight_hh must have 2 dimensions, got {w_hh.dim()}")
    hidden = w_hh.shape[-1]
    if w_ih.shape != (gates * hidden, features):
        if w_ih.dim() == 2 and w_ih.shape[1] != features:
            raise RuntimeError(f"input has inconsistent input_size: got {features} expected {w_ih.shape[1]}")
        raise RuntimeError(
            f"weight_ih first dim must be {gates} * hidden_size = {gates * hidden}, but got {tuple(w_ih.shape)}"
        )
    if w_hh.shape != (gates * hidden, hidden):
        raise RuntimeError(
            f"weight_hh must be of size ({gates} * hidden_size, hidden_size), but got {tuple(w_hh.shape)}"
        )
    for i, state in enumerate((h, c)):
        if state is None or state.shape == (batch, hidden):
            continue
        if state.dim() not in (1, 2):
            kind = "hidden" if c is None else f"hx[{i}]"
            raise ValueError(f"{name}: Expected {kind} to be 1D or 2D, got {state.dim()}D instead")
        if state.shape[0] != batch:
            raise RuntimeError(f"Input batch size {batch} doesn't match hidden{i} batch size {state.shape[0]}")
        raise RuntimeError(f"hidden{i} has inconsistent hidden_size: got {state.shape[-1]}, expected {hidden}")


def cell_biases(b_ih: Tensor | None, b_hh: Tensor | None, rows: int) -> None:
    if (b_ih is None) != (b_hh is None):
        raise RuntimeError("b_ih and b_hh: give both or neither")
    for name, bias in (("b_ih", b_ih), ("b_hh", b_hh)):
        if bias is not None and bias.shape != (rows,):
            raise RuntimeError(f"{name}: expected size ({rows},), got {tuple(bias.shape)}")
