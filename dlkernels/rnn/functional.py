"""Recurrent layers as functions, which take the weights as arguments; `dlkernels.functional` exports them.

They take floating-point tensors of one dtype and one device. On the CPU there are kernels for float32, float64,
bfloat16 and float16; calls without a kernel run on `dlkernels.reference`, and `dlkernels.explain` tells which do. Under
autocast input, states and weights may have any dtypes but float64. Products may be rounded to autocast's dtype, sums
and states are float32 inside, and results have the dtypes that torch.nn returns: autocast's dtype, or on the CPU
possibly the dtype to which it and the state's promote (docs/differences.md). Gradients have the dtypes of the
arguments.

Sizes in this module: T steps, B sequences, I input features, H hidden units, D directions, L layers, P projected units,
O = P with a projection and H without. Errors have the types that torch.nn raises for the same mistake: RuntimeError for
sizes, devices, bad batch_sizes and a T of 0, ValueError for the rank and dtype of the input and for values out of range
(on CUDA lengths are clamped instead, because a check would have to wait for the device), TypeError for arguments of a
wrong type.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import dropout as apply_dropout

from dlkernels._core import extension
from dlkernels._core.autocast import cast
from dlkernels._core.checks import is_readable
from dlkernels._core.dtypes import DTYPES
from dlkernels._core.private_torch import forward_ad, is_any_autocast_enabled
from dlkernels.rnn import checks
from dlkernels.rnn.dtypes import SAME, Types, recurrent_types
from dlkernels.rnn.kinds import KINDS, Kind, rnn_mode
from dlkernels.rnn.operators import by_torch, direct
from dlkernels.rnn.operators.arguments import SequenceConfig, SequenceInputs
from dlkernels.rnn.operators.sequence import sequence
from dlkernels.rnn.routing import Extras, is_call_for_torch, route
from dlkernels.rnn.variants import Rates, Variation, check_gains, of_layer, variation

__all__ = ["gru", "lstm", "rnn"]

Pair = tuple[Tensor, Tensor]

_is_compiling = torch.compiler.is_compiling


def lstm(
    input: Tensor, hx: Pair | None, weights: Sequence[Tensor], *, num_layers: int = 1, bidirectional: bool = False,
    batch_first: bool = False, dropout: float = 0.0, training: bool = False, lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None, bptt_steps: int | None = 0, packed: Sequence[Tensor] | None = None,
    resets: Tensor | None = None, return_cells: bool = False, zoneout: Rates = 0.0, recurrent_dropout: float = 0.0,
) -> tuple[Tensor, Pair] | tuple[Tensor, Pair, Tensor]:  # fmt: skip
    """Long short-term memory (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000).

        i = sigmoid(W_ii x + b_ii + W_hi h + b_hi)      f = sigmoid(W_if x + b_if + W_hf h + b_hf)
        g = tanh(W_ig x + b_ig + W_hg h + b_hg)         o = sigmoid(W_io x + b_io + W_ho h + b_ho)
        c' = f * c + i * g                              h' = o * tanh(c')
    and with a projection (Sak et al. 2014)             h' = W_hr (o * tanh(c'))

    input: [T, B, I], [B, T, I] with `batch_first`, [T, I] unbatched, or the data [rows, I] of a PackedSequence with its
        `batch_sizes` (int64 [T] on the CPU, descending).
    hx: (h_0 [L*D, B, O], c_0 [L*D, B, H]) or None for zeros; unbatched without B.
    weights: flat, as `torch.nn.LSTM._flat_weights` has them: for each layer and direction w_ih [4H, I], w_hh [4H, O],
        then b_ih, b_hh [4H] if there are biases, then w_hr [P, H] if there is a projection.
    dropout: probability with which an output of every layer but the last is zeroed when `training`; the masks are those
        of torch.nn for the same seed.
    lengths: integers [B] of 0..T, in any order, for padded batches: outputs after a sequence's end are 0, its states
        are its last ones (h_0, c_0 for length 0) and its reverse direction starts at its own end.
    bptt_steps: k > 0 cuts the gradient that flows through the state before every k-th step (truncated back-propagation
        through time); 0 or None never cuts.
    packed: one buffer of `dlkernels.rnn.operators.pack` for each layer, made of these weights.
    resets: bool, [T, B], [B, T] if `batch_first`, [T] of unbatched input, or [rows] in the order of packed input. A
        flag at step t separates the steps before t from those from t on, in every layer: the forward direction takes
        step t, and the reverse direction step t - 1, with a state of zeros, and no gradient crosses the boundary. A
        flag at a sequence's first step drops h_0 and c_0 of the forward direction; flags in the padding have no effect.
    return_cells: whether c of every step of the last layer is returned too.
    zoneout: a rate, or a pair of them for c and for h (Krueger et al. 2017). When `training`, each unit keeps its old
        value with that probability; otherwise the state is the average that this gives. h' is computed from the c'
        before that. Not with a projection.
    recurrent_dropout: when `training`, one mask [D, B, H] for all steps of a layer, of 0 with this probability and else
        1 / (1 - p), multiplies h where it enters W_hh h (Gal and Ghahramani 2016). Not with a projection.

    All masks are drawn from torch's generator. Returns output (the layout of `input`, D*O features) and (h_n, c_n),
    shaped as hx; with `return_cells` also the cell states in the layout of the output with D*H features, 0 in the
    padding.
    """
    return run(KINDS["lstm"], input, hx, weights, Stack(
        num_layers, bidirectional, batch_first, dropout, training, lengths, batch_sizes, bptt_steps, packed, resets,
        return_cells, variation(KINDS["lstm"], zoneout, recurrent_dropout, training),
    ))  # fmt: skip


def gru(
    input: Tensor, hx: Tensor | None, weights: Sequence[Tensor], *, num_layers: int = 1, bidirectional: bool = False,
    batch_first: bool = False, dropout: float = 0.0, training: bool = False, lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None, bptt_steps: int | None = 0, packed: Sequence[Tensor] | None = None,
    resets: Tensor | None = None, zoneout: float = 0.0, recurrent_dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gated recurrent units (Cho et al. 2014), with torch's and cuDNN's reset gate after the matrix product.

        r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)      z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
        n = tanh(W_in x + b_in + r * (W_hn h + b_hn))   h' = (1 - z) * n + z * h

    Arguments as for `lstm`, but hx: h_0 [L*D, B, H] or None, weights w_ih [3H, I], w_hh [3H, H], b_ih, b_hh [3H], and
    zoneout: one rate. The z * h of h' is not dropped by `recurrent_dropout`. Returns output and h_n.
    """
    return run(KINDS["gru"], input, hx, weights, Stack(
        num_layers, bidirectional, batch_first, dropout, training, lengths, batch_sizes, bptt_steps, packed, resets,
        False, variation(KINDS["gru"], zoneout, recurrent_dropout, training),
    ))  # fmt: skip


def rnn(
    input: Tensor, hx: Tensor | None, weights: Sequence[Tensor], *, nonlinearity: str = "tanh", num_layers: int = 1,
    bidirectional: bool = False, batch_first: bool = False, dropout: float = 0.0, training: bool = False,
    lengths: Tensor | None = None, batch_sizes: Tensor | None = None, bptt_steps: int | None = 0,
    packed: Sequence[Tensor] | None = None, resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Simple recurrent layer (Elman 1990): h' = tanh(W_ih x + b_ih + W_hh h + b_hh), or relu by `nonlinearity`.

    Arguments as for `lstm`, but hx: h_0 [L*D, B, H] or None, and weights w_ih [H, I], w_hh [H, H], b_ih, b_hh [H].
    Returns output and h_n. ValueError for another nonlinearity.
    """
    return run(KINDS[rnn_mode(nonlinearity)], input, hx, weights, Stack(
        num_layers, bidirectional, batch_first, dropout, training, lengths, batch_sizes, bptt_steps, packed, resets
    ))  # fmt: skip


class Stack(NamedTuple):
    """The arguments of a call of layers besides input, states and weights; see `lstm`."""

    num_layers: int = 1
    bidirectional: bool = False
    batch_first: bool = False
    dropout: float = 0.0
    training: bool = False
    lengths: Tensor | None = None
    batch_sizes: Tensor | None = None
    bptt_steps: int | None = 0
    packed: Sequence[Tensor] | None = None
    resets: Tensor | None = None
    return_cells: bool = False
    variation: Variation | None = None


def run(kind: Kind, input: Any, hx: Any, weights: Sequence[Tensor], stack: Stack) -> tuple[Any, ...]:
    """The common implementation of `lstm`, `gru` and `rnn`."""
    h0, c0 = (None, None) if hx is None else checks.states(kind, kind.function, hx)
    if not isinstance(input, Tensor):
        checks.tensor(kind.function, "input", input)
    if stack.batch_sizes is None and input.dim() == 2:
        y, h_n, c_n, cells = _unbatched(kind, input, h0, c0, weights, stack)
    else:
        y, h_n, c_n, cells = _batched(kind, input, h0, c0, weights, stack)
    states = (h_n, c_n) if kind.has_cell_state else h_n
    return (y, states, cells) if stack.return_cells else (y, states)


def _batched(
    kind: Kind, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor], stack: Stack
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    num_layers, bidirectional, batch_first, dropout, training, lengths, batch_sizes, bptt_steps, packed, *extra = stack
    found = None
    if not bptt_steps and extra == _NO_EXTRAS and not _is_compiling():
        found = direct.layers_without_gradients(
            kind.mode, x, h0, c0, weights, packed, batch_sizes, lengths, num_layers, bidirectional, batch_first,
            dropout, training,
        )  # fmt: skip
    if found is None:
        return arrange(kind, x, h0, c0, weights, stack).run()
    if dropout:
        checks.dropout(dropout)
    return found[0], found[1], found[-1], None


def _unbatched(
    kind: Kind, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor], stack: Stack
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    checks.weight_count(kind, weights, stack.num_layers, 2 if stack.bidirectional else 1)
    checks.state_ranks(False, h0, c0)
    if stack.lengths is not None:
        raise ValueError("lengths: needs batched 3-D input, got 2-D input")
    h0, c0 = (None if state is None else state.unsqueeze(1) for state in (h0, c0))
    resets = stack.resets
    if resets is not None:
        resets = checks.resets(resets, (x.shape[0],), x.device).unsqueeze(1)
    stack = stack._replace(batch_first=False, resets=resets)
    y, h_n, c_n, cells = _batched(kind, x.unsqueeze(1), h0, c0, weights, stack)
    cells = cells.squeeze(1) if cells is not None and stack.return_cells else None
    return y.squeeze(1), h_n.squeeze(1), c_n.squeeze(1) if kind.has_cell_state else c_n, cells


_NO_EXTRAS = [None, False, None]  # no resets, no cells, no variation


class Call(NamedTuple):
    """A checked call of layers; nothing has been computed yet. `dropout` is 0 if the call does not train."""

    cfg: SequenceConfig
    given: SequenceInputs
    num_layers: int
    dropout: float
    training: bool
    packed: Sequence[Tensor] | None
    variation: Variation | None = None

    @property
    def extras(self) -> Extras:
        return Extras(self.given.lengths, self.cfg.bptt_steps, self.given.resets, self.cfg.cells)

    def run(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(y, h_n, c_n, cells); cells is empty or None unless the call wants it."""
        cfg, given, num_layers, dropout, training, packed, varied = self
        if varied is not None:
            return _layer_by_layer(cfg, given, num_layers, dropout, None, varied, training)
        if extension.prefers_torch and is_call_for_torch(cfg.mode, given.x, self.extras):
            return *by_torch.layers(cfg, given, num_layers, dropout, training), None
        if num_layers == 1:
            return sequence(cfg, given if packed is None else given._replace(packed=packed[0]))
        return _layer_by_layer(cfg, given, num_layers, dropout, packed)


def arrange(
    kind: Kind, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor], stack: Stack
) -> Call:
    """Checks a call with batched or packed input."""
    num_layers, bidirectional, batch_first, dropout, training, lengths, batch_sizes, bptt_steps, packed, *_ = stack
    resets, return_cells, varied = stack.resets, stack.return_cells, stack.variation
    directions = 2 if bidirectional else 1
    count = checks.weight_count(kind, weights, num_layers, directions)
    checks.rank(kind.layer, x, batch_sizes is not None)
    if batch_sizes is None:
        checks.state_ranks(True, h0, c0)

    projected = count // directions % 2 == 1
    if projected and varied is not None:
        raise ValueError("zoneout and recurrent_dropout take no projection, got w_hr")
    types, mixed = SAME, False
    if is_any_autocast_enabled():
        types = recurrent_types(kind.mode, x, h0, c0, weights, projected=projected, batch_sizes=batch_sizes)
        mixed = types != SAME
    if mixed:
        weights = of_one_dtype(types, weights)
        if packed is not None and DTYPES[types.product] != weights[0].dtype:
            packed = None
    gains = () if varied is None or varied.gains is None else varied.gains
    checks.same_kind(x, (h0, c0), [*weights, *gains] if gains else weights, mixed=mixed)
    checks.input_size(x, weights[0])
    if dropout:
        checks.dropout(dropout)
    steps_between_cuts = checks.bptt_steps(bptt_steps)

    if batch_sizes is not None:
        if lengths is not None:
            raise ValueError("lengths: packed input has its own, pass lengths or batch_sizes")
        checks.batch_sizes(x, batch_sizes)
        if resets is not None:
            resets = checks.resets(resets, (x.shape[0],), x.device)
        batch_first, steps = False, 0
        # The number of sequences is a tensor's value. Compiled code does not read it: the operator checks the states.
        batch = None if torch.compiler.is_compiling() or (h0 is None and c0 is None) else int(batch_sizes[0])
    else:
        steps, batch = (x.shape[1], x.shape[0]) if batch_first else (x.shape[0], x.shape[1])
        if steps == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        if lengths is not None:
            lengths = checks.lengths(lengths, batch, x.device)
        if resets is not None:
            resets = checks.resets(resets, (x.shape[0], x.shape[1]), x.device)
            resets = resets.transpose(0, 1) if batch_first else resets

    features = x.shape[-1]
    for layer in range(num_layers):
        hidden, outputs = checks.layer_weights(
            kind, layer, weights[layer * count : (layer + 1) * count], features, directions
        )
        features = directions * outputs
        if gains:
            here = slice(layer * len(gains) // num_layers, (layer + 1) * len(gains) // num_layers)
            check_gains(kind, layer, gains[here], hidden, count // directions == 4, directions)
        if layer == 0 and batch is not None:
            checks.state_sizes(h0, c0, num_layers * directions, batch, outputs, hidden)
    has_values = lengths is not None or batch_sizes is not None
    if (
        has_values
        and x.is_cpu
        and is_readable(batch_sizes, lengths)
        and (extension.prefers_torch or forward_ad._current_level >= 0 or not route(x).native)
    ):
        batch_sizes, lengths = checks.values_for_reference(x, batch_sizes, lengths, steps)

    cfg = SequenceConfig(
        kind.mode, bool(bidirectional), bool(batch_first), steps_between_cuts,
        torch.are_deterministic_algorithms_enabled(), types, checks.return_cells(kind, return_cells),
    )  # fmt: skip
    given = SequenceInputs(x, h0, c0, None, batch_sizes, lengths, weights, resets)
    return Call(cfg, given, num_layers, dropout if training else 0.0, training, packed, varied)


def of_one_dtype(types: Types, weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """The weights in one dtype, which the operators require; it may differ from the dtypes of the other tensors."""
    if all(weight.dtype == weights[0].dtype for weight in weights):
        return weights
    return [cast(weight, DTYPES[types.product]) for weight in weights]


def _layer_by_layer(
    cfg: SequenceConfig, given: SequenceInputs, num_layers: int, dropout: float, packed: Sequence[Tensor] | None,
    varied: Variation | None = None, training: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    x, h0, c0, *_, weights, _ = given
    cells, return_cells = None, cfg.cells
    count = len(weights) // num_layers
    directions = 2 if cfg.bidirectional else 1
    h_n, c_n = [], []
    # torch draws the dropout masks on time-major outputs, so with dropout all layers but the last run time-major.
    swapped = bool(dropout) and cfg.batch_first
    if swapped:
        x = x.transpose(0, 1)
        cfg = cfg._replace(batch_first=False)
    for layer in range(num_layers):
        if layer and dropout:
            x = apply_dropout(x, dropout, True)
        if swapped and layer == num_layers - 1:
            x = x.transpose(0, 1)
            cfg = cfg._replace(batch_first=True)
        cfg = cfg._replace(cells=return_cells and layer == num_layers - 1)
        here = slice(layer * directions, (layer + 1) * directions)
        of_layer_cfg, inputs = cfg, given._replace(
            x=x, h0=None if h0 is None else h0[here], c0=None if c0 is None else c0[here],
            packed=None if packed is None else packed[layer], weights=weights[layer * count : (layer + 1) * count],
        )  # fmt: skip
        if varied is not None:
            of_layer_cfg, inputs = of_layer(varied, cfg, inputs, layer, num_layers, training)
        x, h, c, cells = sequence(of_layer_cfg, inputs)
        h_n.append(h)
        c_n.append(c)
    assert cells is not None
    return x, torch.cat(h_n), torch.cat(c_n) if KINDS[cfg.mode].has_cell_state else c_n[0], cells
