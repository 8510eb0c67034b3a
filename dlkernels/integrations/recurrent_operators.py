"""Our kernels in the place of torch's recurrent operators: aten::lstm, gru, rnn_tanh and rnn_relu for padded (`input`)
and packed (`data`) sequences, and the four cells.

The kernels are in Python although a call costs some microseconds more than from C++. A C++ kernel behind torch's stable
ABI empties lists of tensors that a TorchScript program still holds, such as a layer's weights, because the ABI moves
the tensors out of the list (seen with torch 2.13). So calls without gradients go from here to the kernel directly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dlkernels._core import extension
from dlkernels._core.private_torch import are_transforms_active, composite, skip_in_dynamo
from dlkernels._core.routing import ONLY_SCALAR
from dlkernels.integrations import counts
from dlkernels.integrations.switch import PLAIN, Kernels, Switch
from dlkernels.rnn import functional, functional_cells
from dlkernels.rnn.kinds import KINDS, Kind
from dlkernels.rnn.operators import cell, direct
from dlkernels.rnn.routing import route

__all__ = ["SWITCH"]

_REFUSALS = (IndexError, NotImplementedError, RuntimeError, TypeError, ValueError)


def _has_kernels() -> bool:
    return extension.HAVE_NATIVE and not extension.prefers_torch


def _why_not(x: Tensor, projected: bool) -> str | None:
    """Why a call is left to torch; None if our kernels serve it."""
    reason = SWITCH.why_not(x)
    if reason is not None:
        return reason
    # A torch.func transform that has reached this level of dispatch can no longer handle an autograd.Function.
    if are_transforms_active():
        return "inside a torch.func transform"
    if not _has_kernels():
        return ONLY_SCALAR if extension.HAVE_NATIVE else extension.why_not
    try:
        decided = route(x, projected=projected)
    except NotImplementedError:
        return "forward-mode differentiation"
    return None if decided.native else decided.reason


@functools.cache
def _kernel_name(mode: str, isa: str, dtype: torch.dtype) -> str:
    """Of the kernel that large batches take; `isa` is the instruction set in force, empty on CUDA."""
    if not isa:
        return f"cuda/{mode}"
    return str(extension.native.plan(mode, dtype, 50, 64, 64, 64)["kernel"])  # type: ignore[union-attr]


class _Operator:
    """One of torch's operators, and what serves it."""

    def __init__(self, overload: Any, kind: Kind) -> None:
        self.kind = kind
        self.name = overload._name.removeprefix("aten::").removesuffix(".default")
        self.torchs = composite(overload)
        self.results = 3 if kind.has_cell_state else 2

    def count_served(self, x: Tensor) -> None:
        isa = extension.native.isa() if x.is_cpu else ""  # type: ignore[union-attr]
        counts.count_served(self.name, _kernel_name(self.kind.mode, isa, x.dtype))

    def serve(self, x: Tensor, projected: bool, arrange: Callable[[], Callable[[], Any]], given: Sequence[Any]) -> Any:
        """Runs the call that `arrange` returns, or torch's own kernel where our kernels do not serve the call. If
        `arrange` refuses the arguments, torch's kernel raises torch's error."""
        reason = _why_not(x, projected)
        if reason is None:
            try:
                call = arrange()
            except _REFUSALS as error:
                reason = f"refused: {str(error).partition(chr(10))[0]}"
        if reason is not None:
            counts.count_left(self.name, reason)
            return self.torchs(*given)
        self.count_served(x)
        return call()


def _layer(of: _Operator) -> Callable[..., tuple[Tensor, ...]]:
    """The kernel of a layer, which takes the arguments of aten's `input` overload and `batch_sizes`."""
    kind, mode, has_cell_state = of.kind, of.kind.mode, of.kind.has_cell_state
    has_kernels = _has_kernels()

    def layer(
        given: Sequence[Any], x: Tensor, batch_sizes: Tensor | None, hx: Any, params: list[Tensor], has_biases: bool,
        num_layers: int, dropout: float, train: bool, bidirectional: bool, batch_first: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        h0, c0, fits = hx, None, True
        if has_cell_state:
            fits = len(hx) == 2
            h0, c0 = hx if fits else (None, None)
        count, rest = divmod(len(params), max(num_layers, 1) * (1 + bidirectional))
        fits = fits and not rest and has_biases == (count >= 4)
        if has_kernels and SWITCH.is_on and fits:
            found = direct.layers_without_gradients(
                mode, x, h0, c0, params, None, batch_sizes, None, num_layers, bidirectional, batch_first, dropout, train
            )
            if found is not None:
                of.count_served(x)
                return tuple(found)

        def arrange() -> Callable[[], Any]:
            if not fits or (batch_sizes is None and x.dim() != 3):
                raise ValueError("the weights, the states or the rank of the input are not those of a layer")
            stack = functional.Stack(num_layers, bidirectional, batch_first, dropout, train, batch_sizes=batch_sizes)
            return functional.arrange(kind, x, h0, c0, params, stack).run

        return tuple(of.serve(x, count % 2 == 1, arrange, given)[: of.results])

    return layer


def _layer_of_input(of: _Operator) -> Callable[..., tuple[Tensor, ...]]:
    layer = _layer(of)

    def kernel(*given: Any) -> tuple[Tensor, ...]:
        return layer(given, given[0], None, *given[1:])

    return kernel


def _layer_of_data(of: _Operator) -> Callable[..., tuple[Tensor, ...]]:
    layer = _layer(of)

    def kernel(*given: Any) -> tuple[Tensor, ...]:
        return layer(given, *given, False)

    return kernel


def _cell(of: _Operator) -> Callable[..., Any]:
    kind, mode, has_cell_state = of.kind, of.kind.mode, of.kind.has_cell_state
    has_kernels = _has_kernels()

    def kernel(
        x: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
    ) -> Any:
        h, c, fits = hx, None, True
        if has_cell_state:
            fits = len(hx) == 2
            h, c = hx if fits else (None, None)
        if has_kernels and SWITCH.is_on and fits and type(x) in PLAIN:
            found = cell.plain_cell(mode, (x, h, c, w_ih, w_hh, b_ih, b_hh))
            if found is not None:
                of.count_served(x)
                return (found[0], found[1]) if has_cell_state else found[0]

        def arrange() -> Callable[[], Any]:
            if not fits:
                raise ValueError("there are not two states")
            arranged = functional_cells.arrange_cell(kind, x, h, c, w_ih, w_hh, b_ih, b_hh)
            return lambda: cell.cell(*arranged)

        results = of.serve(x, False, arrange, (x, hx, w_ih, w_hh, b_ih, b_hh))
        if isinstance(results, Tensor):
            return results
        return (results[0], results[1]) if has_cell_state else results[0]

    return kernel


def _register() -> Kernels:
    kernels: dict[str, Callable[..., Any]] = {}
    for mode, kind in KINDS.items():
        layer, step = getattr(torch.ops.aten, mode), getattr(torch.ops.aten, f"{mode}_cell")
        kernels[f"{mode}.input"] = _layer_of_input(_Operator(layer.input, kind))
        kernels[f"{mode}.data"] = _layer_of_data(_Operator(layer.data, kind))
        kernels[f"{mode}_cell"] = _cell(_Operator(step.default, kind))
    # Dynamo must not trace the kernels where a compiled program calls the operators outside of its graphs.
    for kernel in kernels.values():
        skip_in_dynamo(kernel)
    return Kernels(kernels)


SWITCH = Switch("recurrent", _register)
