"""RNNCell, LSTMCell and GRUCell: torch.nn's classes with another forward.

A cell computes for only a few microseconds, so checks in Python would cost too much. If a call is a common one
(batched, on the CPU, no transform), forward passes the module unchecked to the kernel, or its weights to the autograd
Function around the operator if a gradient is wanted; both refuse arguments that do not fit. All other calls and the
refused ones go to the functional form, whose checks raise torch.nn's errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from dlkernels._core.extension import HAVE_NATIVE
from dlkernels._core.private_torch import is_tracing
from dlkernels._core.tools import PUBLIC_MODULE, KnownLayer
from dlkernels.rnn import checks, functional_cells
from dlkernels.rnn.kinds import KINDS, rnn_mode
from dlkernels.rnn.operators import direct
from dlkernels.rnn.operators.cell import plain_cell
from dlkernels.rnn.prepacked import Packing, Prepackable
from dlkernels.rnn.variants import Rates, zoneout_of_cell, zoneout_rates

__all__ = ["GRUCell", "LSTMCell", "RNNCell"]

_is_compiling = torch.compiler.is_compiling
_ELMAN_MODES = {"tanh": "rnn_tanh", "relu": "rnn_relu"}

Weights = tuple[Any, Any, Any, Any]


def _served(mode: str, cell: _Cell, x: Any, hx: Any) -> Any:
    """The result of forward if it is a plain call without gradients, else None."""
    return None if _is_compiling() else direct.cell_module(mode, cell.__dict__, x, hx)


def _unchecked(mode: str, cell: _Cell, x: Any, h: Any, c: Any) -> Sequence[Tensor] | None:
    """Runs the cell without checks in Python and returns h', then c' for the lstm. Returns None if the call is not a
    common one or the operator refuses it."""
    if not HAVE_NATIVE or _is_compiling() or cell._prepacked is not None:
        return None
    weights: dict[str, Any] = cell._parameters
    try:
        given = (x, h, c, weights["weight_ih"], weights["weight_hh"], weights["bias_ih"], weights["bias_hh"])
    except KeyError:  # a parametrized weight
        return None
    return plain_cell(mode, given)


def _reset(input: Tensor, hx: Any, resets: Any) -> Any:
    """hx with zeros where a flag is set."""
    flags = checks.resets(resets, tuple(input.shape[:-1]), input.device).unsqueeze(-1)
    if isinstance(hx, Tensor):
        return torch.where(flags, 0, hx)
    if isinstance(hx, (tuple, list)):
        return tuple(torch.where(flags, 0, state) if isinstance(state, Tensor) else state for state in hx)
    return hx


def _weights(cell: Any) -> Weights:
    return cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh


def _check_rank(name: str, tensor: Any, what: str) -> None:
    if tensor.dim() not in (1, 2):
        raise ValueError(f"{name}: Expected {what} to be 1D or 2D, got {tensor.dim()}D instead")


def _check(name: str, input: Any, states: dict[str, Any], weights: Weights) -> None:
    """Checks the ranks, for which torch.nn raises other exceptions than the functional form."""
    _check_rank(name, input, "input")
    for what, state in states.items():
        _check_rank(name, state, what)
    for what, state in states.items():
        if input.dim() == 1 and state.dim() == 2:
            raise RuntimeError(f"For unbatched 1-D input, {what} should also be 1-D but got 2-D tensor")
    # These calls raise IndexError if a weight does not have the dimension.
    w_ih, w_hh = weights[:2]
    if isinstance(w_ih, Tensor) and isinstance(w_hh, Tensor):
        w_ih.size(0 if name == "RNNCell" else 1), w_hh.size(1)


class _Cell(KnownLayer, Prepackable):
    _mode: str
    zoneout: Rates = 0.0  # an attribute of the instance only if it is not 0

    def _set_zoneout(self, zoneout: Any) -> None:
        zoneout_rates(KINDS[self._mode], zoneout)
        if zoneout:
            self.zoneout = zoneout

    def extra_repr(self) -> str:
        text: str = super().extra_repr()
        return f"{text}, zoneout={self.zoneout}" if self.zoneout else text

    def weight_list(self) -> list[Tensor]:
        """The weights as they are now, those that exist."""
        return [weight for weight in _weights(self) if weight is not None]

    def _packing(self) -> Packing:
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        if any(name not in self._parameters for name in names):
            raise RuntimeError("prepack: a weight is computed anew in every call; remove its parametrization first")
        return Packing(self._mode, self.weight_list())

    def _packed(self, *given: Any) -> Tensor | None:
        """The packed weights if a call with the tensors `given` uses them."""
        buffers = None if self._prepacked is None else self._usable_buffers(self.weight_list(), *given)
        return None if buffers is None else buffers[0]

    def _slow_forward(self, *input: Any, **kwargs: Any) -> Any:
        """torch.nn.Module calls this only while torch.jit.trace runs. The trace then records the operator of torch.nn's
        own cell, unless a subclass has another forward."""
        theirs = _RECORDED.get(type(self).forward)
        beyond_torch = self.zoneout or kwargs.get("resets") is not None
        if theirs is None or beyond_torch or "forward" in self.__dict__ or not is_tracing():
            return super()._slow_forward(*input, **kwargs)  # type: ignore[no-untyped-call]
        self.__dict__["forward"] = MethodType(theirs, self)
        try:
            return super()._slow_forward(*input, **kwargs)  # type: ignore[no-untyped-call]
        finally:
            del self.__dict__["forward"]


class RNNCell(_Cell, torch.nn.RNNCell):
    """`torch.nn.RNNCell` on a fused kernel."""

    __module__ = PUBLIC_MODULE

    @property
    def _mode(self) -> str:  # type: ignore[override]
        return KINDS[rnn_mode(self.nonlinearity)].mode

    def forward(self, input: Tensor, hx: Tensor | None = None, *, resets: Tensor | None = None) -> Tensor:
        """As in torch.nn. `resets`, bool [B]: the step takes a state of zeros for the sequences whose flag is set."""
        if resets is not None:
            hx = _reset(input, hx, resets)
        mode = _ELMAN_MODES.get(self.nonlinearity)
        if mode is not None:
            served = _served(mode, self, input, hx)
            if served is not None:
                return served  # type: ignore[no-any-return]
            out = _unchecked(mode, self, input, hx, None)
            if out is not None:
                return out[0]
        weights = _weights(self)
        _check("RNNCell", input, {} if hx is None else {"hidden": hx}, weights)
        if mode is None:
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        packed = self._packed(input, hx)
        return functional_cells.rnn_cell(input, hx, *weights, nonlinearity=self.nonlinearity, packed=packed)


class GRUCell(_Cell, torch.nn.GRUCell):
    """`torch.nn.GRUCell` on a fused kernel, with `zoneout` by name as in `dlkernels.nn.GRU`."""

    __module__ = PUBLIC_MODULE
    _mode = "gru"

    def __init__(self, *args: Any, zoneout: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._set_zoneout(zoneout)

    def forward(self, input: Tensor, hx: Tensor | None = None, *, resets: Tensor | None = None) -> Tensor:
        """As in torch.nn, with `resets` as in `RNNCell.forward`."""
        if resets is not None:
            hx = _reset(input, hx, resets)
        if self.zoneout:
            new = functional_cells.gru_cell(input, hx, *_weights(self), packed=self._packed(input, hx))
            return zoneout_of_cell(KINDS["gru"], self.zoneout, (hx,), (new,), self.training)[0]
        served = _served("gru", self, input, hx)
        if served is not None:
            return served  # type: ignore[no-any-return]
        out = _unchecked("gru", self, input, hx, None)
        if out is not None:
            return out[0]
        weights = _weights(self)
        _check("GRUCell", input, {} if hx is None else {"hidden": hx}, weights)
        return functional_cells.gru_cell(input, hx, *weights, packed=self._packed(input, hx))


class LSTMCell(_Cell, torch.nn.LSTMCell):
    """`torch.nn.LSTMCell` on a fused kernel, with `zoneout` by name as in `dlkernels.nn.LSTM`."""

    __module__ = PUBLIC_MODULE
    _mode = "lstm"

    def __init__(self, *args: Any, zoneout: Rates = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._set_zoneout(zoneout)

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None, *, resets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As in torch.nn, with `resets` as in `RNNCell.forward`."""
        if resets is not None:
            hx = _reset(input, hx, resets)
        if self.zoneout:
            old: Any = (None, None) if hx is None else tuple(hx)
            new = functional_cells.lstm_cell(input, hx, *_weights(self), packed=self._packed(input, *old))
            mixed = zoneout_of_cell(KINDS["lstm"], self.zoneout, old, new, self.training)
            return mixed[0], mixed[1]
        served = _served("lstm", self, input, hx)
        if served is not None:
            return served  # type: ignore[no-any-return]
        h = c = None
        if type(hx) is tuple and len(hx) == 2:
            h, c = hx
        # A pair with one missing state is a mistake. It and any other kind of hx are left to the checks below.
        if hx is None or (h is not None and c is not None):
            out = _unchecked("lstm", self, input, h, c)
            if out is not None:
                return out[0], out[1]
        weights = _weights(self)
        states = {} if hx is None else {f"hx[{at}]": state for at, state in enumerate(hx)}
        _check("LSTMCell", input, states, weights)
        if hx is not None and input.dim() == 1:
            hx = hx[0], hx[1]
        return functional_cells.lstm_cell(input, hx, *weights, packed=self._packed(input, *states.values()))


_RECORDED: dict[Any, Any] = {
    RNNCell.forward: torch.nn.RNNCell.forward,
    GRUCell.forward: torch.nn.GRUCell.forward,
    LSTMCell.forward: torch.nn.LSTMCell.forward,
}
