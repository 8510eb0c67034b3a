"""Our kernels in the place of torch's recurrent operators: aten::lstm, gru, rnn_tanh and rnn_relu for padded (`input`)
and packed (`data`) sequences, and the four cells.

The kernels are in Python although a call costs some microseconds more than from C++. A C++ kernel behind torch's stable
ABI empties lists of tensors that a TorchScript program still holds, such as a layer's weights, because the ABI moves
the tensors out of the list (seen with torch 2.13). So calls without gradients take a way with few steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dlkernels._core import extension
from dlkernels._core.private_torch import (
    are_transforms_active,
    composite,
    forward_ad,
    is_any_autocast_enabled,
    skip_in_dynamo,
)
from dlkernels.integrations import counts
from dlkernels.integrations.switch import Kernels, Switch
from dlkernels.rnn import functional
from dlkernels.rnn.kinds import KINDS, Kind
from dlkernels.rnn.operators import cell, sequence
from dlkernels.rnn.routing import route

__all__ = ["SWITCH"]

is_grad_enabled = torch.is_grad_enabled
is_deterministic = torch.are_deterministic_algorithms_enabled
_PLAIN = (Tensor, torch.nn.Parameter)
_REFUSALS = (IndexError, NotImplementedError, RuntimeError, TypeError, ValueError)


def _is_common(x: Tensor) -> bool:
    """Whether the operator alone, which checks its arguments, can serve the call if no gradient is wanted: tensors on
    the CPU, no autocast and no transform."""
    return (
        SWITCH.is_on
        and type(x) in _PLAIN
        and x.is_cpu
        and not are_transforms_active()
        and not is_any_autocast_enabled()
        and forward_ad._current_level < 0
    )


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _has_kernels() -> bool:
    return extension.HAVE_NATIVE and not extension.only_scalar()


def _why_not(x: Tensor, projected: bool) -> str | None:
    """Why a call is left to torch; None if our kernels serve it."""
    reason = SWITCH.why_not(x)
    if reason is not None:
        return reason
    # A torch.func transform that has reached this level of dispatch can no longer handle an autograd.Function.
    if are_transforms_active():
        return "inside a torch.func transform"
    if not _has_kernels():
        return "only scalar kernels exist for this processor" if extension.HAVE_NATIVE else extension.why_not
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
    kind, forward = of.kind, sequence.eager_operators.get(of.kind.mode) if _has_kernels() else None

    def layer(
        given: Sequence[Any], x: Tensor, batch_sizes: Tensor | None, hx: Any, params: list[Tensor], has_biases: bool,
        num_layers: int, dropout: float, train: bool, bidirectional: bool, batch_first: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        count, rest = divmod(len(params), max(num_layers, 1) * (1 + bidirectional))
        fits = not rest and has_biases == (count >= 4) and (not kind.has_cell_state or len(hx) == 2)
        if not fits:
            h0, c0 = None, None
        elif kind.has_cell_state:
            h0, c0 = hx
        else:
            h0, c0 = hx, None
        common = forward is not None and num_layers == 1 and fits and _is_common(x)
        if common and not (is_grad_enabled() and _wants_gradient(x, h0, c0, *params)):
            try:
                found = forward(  # type: ignore[misc]
                    x, h0, c0, params, None, batch_sizes, None, bidirectional, batch_first, False,
                    is_deterministic(),
                )  # fmt: skip
            except _REFUSALS:
                pass  # torch's kernel raises its own error below
            else:
                of.count_served(x)
                return found[: of.results]  # type: ignore[no-any-return]

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
    kind, forward = of.kind, cell.eager_operators.get(of.kind.mode) if _has_kernels() else None

    def kernel(
        x: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
    ) -> Any:
        fits = True
        if not kind.has_cell_state:
            h, c = hx, None
        elif len(hx) == 2:
            h, c = hx
        else:
            h, c, fits = None, None, False
        common = forward is not None and fits and _is_common(x)
        if common and not (is_grad_enabled() and _wants_gradient(x, h, c, w_ih, w_hh, b_ih, b_hh)):
            try:
                found = forward(  # type: ignore[misc]
                    x, h, c, w_ih, w_hh, b_ih, b_hh, False, is_deterministic()
                )
            except _REFUSALS:
                pass  # torch's kernel raises its own error below
            else:
                of.count_served(x)
                return (found[0], found[1]) if kind.has_cell_state else found[0]

        def arrange() -> Callable[[], Any]:
            if not fits:
                raise ValueError("there are not two states")
            arranged = functional.arrange_cell(kind, x, h, c, w_ih, w_hh, b_ih, b_hh)
            return lambda: cell.cell(*arranged)

        results = of.serve(x, False, arrange, (x, hx, w_ih, w_hh, b_ih, b_hh))
        if isinstance(results, Tensor):
            return results
        return (results[0], results[1]) if kind.has_cell_state else results[0]

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
