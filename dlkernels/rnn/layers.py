"""RNN, LSTM and GRU with every argument, parameter name and input form of their torch.nn namesakes.

They derive from `torch.nn.RNNBase`, not from `torch.nn.LSTM`, GRU and RNN, because Dynamo refuses instances of those.
Nothing is cached between calls: the weights are looked up by name in every forward, so parametrizations, weight tying,
`functional_call` and writes through `.data` take effect at once. The one exception is the copy that `prepack()` makes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn import Module, RNNBase
from torch.nn.utils.rnn import PackedSequence

from dlkernels._core import extension
from dlkernels._core.private_torch import is_any_autocast_enabled
from dlkernels._core.tools import PUBLIC_MODULE, KnownLayer, is_tracing
from dlkernels.rnn import functional
from dlkernels.rnn.kinds import KINDS, Kind, rnn_mode
from dlkernels.rnn.operators import direct
from dlkernels.rnn.prepacked import Packing, Prepackable
from dlkernels.rnn.routing import Extras, is_call_for_torch
from dlkernels.rnn.variants import Rates, Variation, check_recurrent_dropout, variation, zoneout_rates

__all__ = ["GRU", "LSTM", "RNN", "RecurrentLayer"]

_is_compiling = torch.compiler.is_compiling


@dataclass(frozen=True)
class FlatWeights:
    """The list that a program read from or assigned to `_flat_weights`, and the weights by name at that time."""

    weights: list[Any]
    named: list[Any]

    def holds(self, named: list[Any]) -> bool:
        """Whether a call uses the list. If a weight was replaced by name since, it uses `named`, as torch.nn does."""
        pairs = zip(named, self.named, strict=True)
        return all(now is None or then is None or now is then for now, then in pairs)


class RecurrentLayer(KnownLayer, Prepackable, RNNBase):
    """The base of the three layers. `hx` is one tensor, or for the LSTM a pair."""

    _NO_STATE = ("_prepacked", "_flat")
    _flat: FlatWeights | None = None

    # Attributes of the instance only if they are not 0: other layers have no more attributes than torch.nn's.
    zoneout: Rates = 0.0
    recurrent_dropout: float = 0.0

    def _set_regularisation(self, zoneout: Any, recurrent_dropout: Any) -> None:
        zoneout_rates(self._kind, zoneout)
        check_recurrent_dropout(recurrent_dropout)
        if (zoneout or recurrent_dropout) and self.proj_size:
            raise ValueError(f"zoneout and recurrent_dropout take no proj_size, got proj_size={self.proj_size}")
        if zoneout:
            self.zoneout = zoneout
        if recurrent_dropout:
            self.recurrent_dropout = recurrent_dropout

    def _varied(self, weights: list[Tensor]) -> tuple[list[Tensor], Variation | None]:
        """The plain ones of the weights, and how a call made now differs from the plain one; None if it does not."""
        return weights, variation(self._kind, self.zoneout, self.recurrent_dropout, self.training)

    @property
    def op_mode(self) -> str:
        """The name of the layer's operators: "lstm", "gru", "rnn_tanh" or "rnn_relu"."""
        return self.mode.lower()

    # torch.nn's forward reads the list `_flat_weights`, and programs that compute the weights anew assign to it or to
    # its items. Here the list exists from when a program reads or assigns it until a weight is replaced by name.

    @property
    def _flat_weights(self) -> list[Any]:
        named = self._named_weights(None)
        if self._flat is None or not self._flat.holds(named):
            self.__dict__["_flat"] = FlatWeights(list(named), named)
        return self.__dict__["_flat"].weights  # type: ignore[no-any-return]

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Any]) -> None:
        self.__dict__["_flat"] = FlatWeights(weights, self._named_weights(None))

    def _named_weights(self, *missing: None) -> list[Any]:
        """The weights by name. A weight that was deleted is given as `missing`, or without it raises AttributeError."""
        parameters: dict[str, Any] = self._parameters
        try:
            return [parameters[name] for name in self._flat_weights_names]
        except KeyError:  # parametrized, weight-normed or replicated: an attribute of another kind
            return [getattr(self, name, *missing) for name in self._flat_weights_names]

    def _init_flat_weights(self) -> None:
        self.__dict__.pop("_flat", None)

    def _update_flat_weights(self) -> None:
        pass

    def flatten_parameters(self) -> None:
        """Does nothing: the kernels read the weights where they are stored."""

    def __setattr__(self, attr: str, value: Any) -> None:
        if self._flat is not None and attr in self._flat_weights_names:
            self._flat.weights[self._flat_weights_names.index(attr)] = value
        Module.__setattr__(self, attr, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        Module.__setstate__(self, state)  # type: ignore[no-untyped-call]

    def weight_list(self) -> list[Tensor]:
        """The weights as they are now, in the order of `_flat_weights_names`."""
        flat = self._flat
        if flat is not None:
            if flat.holds(self._named_weights(None)):
                return list(flat.weights)
            del self.__dict__["_flat"]
        return self._named_weights()

    def _packing(self) -> Packing:
        weights = self.weight_list()
        if self._flat is None and any(self._parameters.get(name) is None for name in self._flat_weights_names):
            raise RuntimeError("prepack: a weight is computed anew in every call; remove its parametrization first")
        return Packing(self.op_mode, weights, self.num_layers, bool(self.bidirectional))

    def _called(
        self, input: Any, hx: Any, lengths: Tensor | None, bptt_steps: int, resets: Tensor | None,
        return_cells: bool = False,
    ) -> Any:  # fmt: skip
        if lengths is None and not bptt_steps and return_cells is False:
            if type(input) is Tensor and not _is_compiling():
                # With T = 1, the steps in Python of `_run` would take as long as the kernel.
                served = direct.layer_module(self.__dict__, input, hx, resets)
                if served is not None:
                    return served
            if resets is None and is_tracing() and self._varied([])[1] is None:
                return self._traced(input, hx)
        return self._run(input, hx, Extras(lengths, bptt_steps, resets, return_cells))

    def _run(self, input: Any, hx: Any, extras: Extras) -> Any:
        # `functional.run` does the checks. The calls on the arguments here, such as `dim()`, are those that torch.nn
        # makes as well, so that arguments of a wrong type raise the same exceptions.
        weights, varied = self._varied(self.weight_list())
        if extension.prefers_torch and varied is None and self._is_torchs(input, weights, extras):
            extension.announce_torch()
            try:
                return self._traced(input, hx)
            finally:
                self.__dict__.pop("_flat", None)  # torch's forward has read the list
        packed_input = isinstance(input, PackedSequence)
        batch_sizes = None
        if packed_input:
            if extras.lengths is not None:
                raise ValueError("lengths: a PackedSequence has its own, pass one or the other")
            input, batch_sizes, sorted_indices, unsorted_indices = input
            if hx is not None:
                hx = self.permute_hidden(hx, sorted_indices)
            self._check_packed(input, batch_sizes, hx, weights)
        else:
            input.dim()
            if hx is not None:
                self._check_states(input, hx)
        if not isinstance(self.bidirectional, bool):
            raise TypeError(f"bidirectional should be of type bool, got: {type(self.bidirectional).__name__}")
        given = hx if isinstance(hx, (tuple, list)) else (hx,)
        stack = functional.Stack(
            self.num_layers, self.bidirectional, self.batch_first, self.dropout, self.training, extras.lengths,
            batch_sizes, extras.bptt_steps,
            None if varied is not None else self._usable_buffers(weights, input, *given), extras.resets,
            extras.return_cells, varied,
        )  # fmt: skip
        result = functional.run(self._kind, input, hx, weights, stack)
        if not packed_input:
            return result
        output, hidden, *cells = result
        output, *cells = (
            PackedSequence(each, batch_sizes, sorted_indices, unsorted_indices) for each in (output, *cells)
        )
        return output, self.permute_hidden(hidden, unsorted_indices), *cells

    def extra_repr(self) -> str:
        text = super().extra_repr()
        for name in ("zoneout", "recurrent_dropout"):
            if getattr(self, name):
                text += f", {name}={getattr(self, name)}"
        return text

    def _is_torchs(self, input: Any, weights: list[Tensor], extras: Extras) -> bool:
        """Whether torch.nn's forward runs the call, without our checks before it. That looks the weights up more than
        once, which computes parametrized ones more than once; and it accepts packed rows that belong to no sequence."""
        return (
            type(input) is Tensor
            and self._flat is None
            and is_call_for_torch(self.op_mode, input, extras)
            and all(type(weight) is torch.nn.Parameter for weight in weights)
        )

    _kind: Kind

    # torch's forward: torch.jit.trace records it, as a saved file may hold torch's operators, and they have gradients;
    # and it runs where torch's operators are faster.
    _traced: Any

    def _check_states(self, input: Tensor, hx: Any) -> None:
        hx.dim()

    def _check_packed(self, data: Tensor, batch_sizes: Tensor, hx: Any, weights: list[Tensor]) -> None:
        batch_sizes[0]  # raises IndexError if it is empty, as in torch
        if hx is not None:
            hx.size()
        elif batch_sizes.is_floating_point():
            raise TypeError(f"batch_sizes should be of dtype torch.int64, got {batch_sizes.dtype}")


class _OneState(RecurrentLayer):
    @overload
    def forward(
        self, input: Tensor, hx: Tensor | None = None, *, lengths: Tensor | None = None, bptt_steps: int = 0,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    @overload
    def forward(
        self, input: PackedSequence, hx: Tensor | None = None, *, lengths: None = None, bptt_steps: int = 0,
        resets: Tensor | None = None,
    ) -> tuple[PackedSequence, Tensor]: ...  # fmt: skip

    def forward(
        self, input: Any, hx: Any = None, *, lengths: Tensor | None = None, bptt_steps: int = 0,
        resets: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """As in torch.nn, with three more arguments. `lengths` [B] replaces packing: rows may have any order, outputs
        after a sequence's end are 0, and h_n is its last state. `bptt_steps` = k cuts the gradient of the state before
        every k-th step (0: never). `resets`, bool [T, B] ([B, T] if `batch_first`, [rows] for a PackedSequence, in the
        order of its data): a flag at step t separates the steps before t from those from t on. The forward direction
        takes step t, and the reverse direction step t - 1, with a state of zeros, and no gradient crosses the boundary.
        """
        return self._called(input, hx, lengths, bptt_steps, resets)


class RNN(_OneState):
    """`torch.nn.RNN` on fused kernels: Elman layers with tanh or ReLU."""

    __module__ = PUBLIC_MODULE

    nonlinearity: str

    @overload
    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, nonlinearity: str = "tanh", bias: bool = True,
        batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False, device: Any = None,
        dtype: Any = None,
    ) -> None: ...  # fmt: skip

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _refuse_proj_size(kwargs)
        if len(args) > 3:
            nonlinearity = args[3]
            args = args[:3] + args[4:]
        else:
            nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        super().__init__(f"RNN_{nonlinearity.upper()}", *args, **kwargs)
        self.nonlinearity = nonlinearity

    @property
    def _kind(self) -> Kind:  # type: ignore[override]
        return KINDS[rnn_mode(self.mode[4:].lower())]

    _traced: Any = torch.nn.RNN.forward


class GRU(_OneState):
    """`torch.nn.GRU` on fused kernels, with two more arguments by name. `zoneout` is the probability with which, in
    training, a unit of h keeps its old value at a step; in evaluation h is the average that this gives (Krueger et al.
    2017). `recurrent_dropout` is the probability with which, in training, a unit of h is 0 for all steps of a sequence
    where h enters W_hh h (Gal and Ghahramani 2016). ValueError for numbers outside of [0, 1]."""

    __module__ = PUBLIC_MODULE

    @overload
    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, device: Any = None, dtype: Any = None, *,
        zoneout: float = 0.0, recurrent_dropout: float = 0.0,
    ) -> None: ...  # fmt: skip

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init__(self, *args: Any, zoneout: float = 0.0, recurrent_dropout: float = 0.0, **kwargs: Any) -> None:
        _refuse_proj_size(kwargs)
        super().__init__("GRU", *args, **kwargs)
        self._set_regularisation(zoneout, recurrent_dropout)

    _kind = KINDS["gru"]

    _traced: Any = torch.nn.GRU.forward


class LSTM(RecurrentLayer):
    """`torch.nn.LSTM` on fused kernels, projections (`proj_size`) included, with two more arguments by name. `zoneout`
    is a probability, or a pair of them for c and for h, with which, in training, a unit of the state keeps its old
    value at a step; in evaluation the state is the average that this gives, and h' is computed from the c' before that
    (Krueger et al. 2017). `recurrent_dropout` is the probability with which, in training, a unit of h is 0 for all
    steps of a sequence where h enters W_hh h (Gal and Ghahramani 2016). ValueError for numbers outside of [0, 1], and
    for either of the two with a projection."""

    __module__ = PUBLIC_MODULE

    @overload
    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, proj_size: int = 0, device: Any = None, dtype: Any = None,
        *, zoneout: Rates = 0.0, recurrent_dropout: float = 0.0,
    ) -> None: ...  # fmt: skip

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init__(self, *args: Any, zoneout: Rates = 0.0, recurrent_dropout: float = 0.0, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)
        self._set_regularisation(zoneout, recurrent_dropout)

    @overload
    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None, *, lengths: Tensor | None = None,
        bptt_steps: int = 0, resets: Tensor | None = None, return_cells: Literal[False] = False,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...  # fmt: skip

    @overload
    def forward(
        self, input: PackedSequence, hx: tuple[Tensor, Tensor] | None = None, *, lengths: None = None,
        bptt_steps: int = 0, resets: Tensor | None = None, return_cells: Literal[False] = False,
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]: ...  # fmt: skip

    @overload
    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None, *, lengths: Tensor | None = None,
        bptt_steps: int = 0, resets: Tensor | None = None, return_cells: Literal[True],
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]: ...  # fmt: skip

    @overload
    def forward(
        self, input: PackedSequence, hx: tuple[Tensor, Tensor] | None = None, *, lengths: None = None,
        bptt_steps: int = 0, resets: Tensor | None = None, return_cells: Literal[True],
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor], PackedSequence]: ...  # fmt: skip

    def forward(
        self, input: Any, hx: Any = None, *, lengths: Tensor | None = None, bptt_steps: int = 0,
        resets: Tensor | None = None, return_cells: bool = False,
    ) -> Any:  # fmt: skip
        """As `GRU.forward`, where h_n and c_n are the last states. With `return_cells` there is a third result: c of
        every step of the last layer, in the layout of the output with D*H features, 0 in the padding.
        """
        return self._called(input, hx, lengths, bptt_steps, resets, return_cells)

    _kind = KINDS["lstm"]

    _traced: Any = torch.nn.LSTM.forward
    get_expected_cell_size = torch.nn.LSTM.get_expected_cell_size
    check_forward_args = torch.nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = torch.nn.LSTM.permute_hidden  # type: ignore[assignment]

    def _check_states(self, input: Tensor, hx: Any) -> None:
        if isinstance(hx, Tensor):
            torch.nn.LSTM.forward(self, input, hx)  # type: ignore[call-overload]  # raises, in one of several ways
        hx[0].dim(), hx[1].dim()

    def _check_packed(self, data: Tensor, batch_sizes: Tensor, hx: Any, weights: list[Tensor]) -> None:
        # torch.nn.LSTM does not check packed input, and its kernels raise other errors for some mistakes.
        batch_sizes[0]
        if hx is None and batch_sizes.is_floating_point():
            raise TypeError(f"batch_sizes should be of dtype torch.int64, got {batch_sizes.dtype}")
        if data.dtype != weights[0].dtype and not is_any_autocast_enabled():
            raise RuntimeError(f"RNN input dtype ({data.dtype}) does not match weight dtype ({weights[0].dtype})")
        if isinstance(hx, (tuple, list)):
            for name, state in zip(("hx", "cx"), hx, strict=False):
                if isinstance(state, Tensor) and state.dim() < 3:
                    raise IndexError(f"For packed input, {name} should be 3-D but got {state.dim()}-D tensor")


def _refuse_proj_size(kwargs: dict[str, Any]) -> None:
    if "proj_size" in kwargs:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
