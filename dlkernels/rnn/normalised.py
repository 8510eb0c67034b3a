"""LSTM and GRU with layer normalisation as functions; `dlkernels.functional` exports them. dtypes, devices and errors
are those of `dlkernels.rnn.functional`, whose sizes this module uses too: G is 4 for the LSTM and 3 for the GRU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dlkernels.rnn import checks
from dlkernels.rnn.functional import Pair, Stack, run
from dlkernels.rnn.kinds import KINDS, Kind
from dlkernels.rnn.variants import Rates, Variation, check_recurrent_dropout, split_weights, zoneout_rates

__all__ = ["check_eps", "layer_norm_gru", "layer_norm_gru_cell", "layer_norm_lstm", "layer_norm_lstm_cell"]


def layer_norm_lstm(
    input: Tensor, hx: Pair | None, weights: Sequence[Tensor], *, num_layers: int = 1, bidirectional: bool = False,
    batch_first: bool = False, dropout: float = 0.0, training: bool = False, lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None, bptt_steps: int | None = 0, eps: float = 1e-5, zoneout: Rates = 0.0,
    recurrent_dropout: float = 0.0,
) -> tuple[Tensor, Pair]:  # fmt: skip
    """The LSTM with layer normalisation (Ba et al. 2016, equations 20 to 22):

        i, f, g, o = sigmoid(.), sigmoid(.), tanh(.), sigmoid(.)
                     of LN(W_ih x) * norm_ih + b_ih + LN(W_hh h) * norm_hh + b_hh
        c' = f * c + i * g      h' = o * tanh(LN(c') * norm_c + bias_c)

    LN(v) = (v - mean(v)) / sqrt(variance(v) + eps), over all 4H values of a product and over the H of c'.

    weights: flat: for each layer and direction w_ih [4H, I], w_hh [4H, H], then b_ih, b_hh [4H] if there are biases,
        then norm_ih, norm_hh [4H], norm_c [H], then bias_c [H] if there are biases.
    eps: a number that is not negative. The other arguments and the results are those of `dlkernels.functional.lstm`.
    """
    return _run(KINDS["lstm"], input, hx, weights, eps, zoneout, recurrent_dropout, Stack(
        num_layers, bidirectional, batch_first, dropout, training, lengths, batch_sizes, bptt_steps
    ))  # fmt: skip


def layer_norm_gru(
    input: Tensor, hx: Tensor | None, weights: Sequence[Tensor], *, num_layers: int = 1, bidirectional: bool = False,
    batch_first: bool = False, dropout: float = 0.0, training: bool = False, lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None, bptt_steps: int | None = 0, eps: float = 1e-5, zoneout: float = 0.0,
    recurrent_dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The GRU with layer normalisation (Ba et al. 2016, in the supplement), with torch's reset gate after the product:

        x_r, x_z, x_n = LN(W_ih x) * norm_ih + b_ih     h_r, h_z, h_n = LN(W_hh h) * norm_hh + b_hh
        r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)   n = tanh(x_n + r * h_n)     h' = (1 - z) * n + z * h

    LN normalises the 2H values of r and z together and the H values of n apart from them, in each of the products.

    weights: flat: for each layer and direction w_ih [3H, I], w_hh [3H, H], then b_ih, b_hh [3H] if there are biases,
        then norm_ih, norm_hh [3H].
    eps: a number that is not negative. The other arguments and the results are those of `dlkernels.functional.gru`.
    """
    return _run(KINDS["gru"], input, hx, weights, eps, zoneout, recurrent_dropout, Stack(
        num_layers, bidirectional, batch_first, dropout, training, lengths, batch_sizes, bptt_steps
    ))  # fmt: skip


def layer_norm_lstm_cell(
    input: Tensor, hx: Pair | None, weights: Sequence[Tensor], *, eps: float = 1e-5, zoneout: Rates = 0.0,
    training: bool = False,
) -> Pair:  # fmt: skip
    """One step of `layer_norm_lstm`: input [B, I] or [I], hx = (h, c) [B, H] or [H] each or None for zeros -> (h', c').
    weights: those of one layer and direction."""
    h, c = _step(KINDS["lstm"], input, hx, weights, eps, zoneout, training)
    return h, c


def layer_norm_gru_cell(
    input: Tensor, hx: Tensor | None, weights: Sequence[Tensor], *, eps: float = 1e-5, zoneout: float = 0.0,
    training: bool = False,
) -> Tensor:  # fmt: skip
    """One step of `layer_norm_gru`: input [B, I] or [I], hx [B, H] or [H] or None for zeros -> h'. weights: those of
    one layer and direction."""
    return _step(KINDS["gru"], input, hx, weights, eps, zoneout, training)[0]


def check_eps(eps: Any) -> None:
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not eps >= 0:
        raise ValueError(f"eps should be a number that is not negative, got {eps!r}")


def _run(
    kind: Kind, input: Any, hx: Any, weights: Any, eps: Any, zoneout: Any, recurrent_dropout: Any, stack: Stack
) -> tuple[Tensor, Any]:
    function = f"layer_norm_{kind.function}"
    plain, gains = split_weights(function, kind, weights, stack.num_layers, 2 if stack.bidirectional else 1)
    check_eps(eps)
    check_recurrent_dropout(recurrent_dropout)
    varied = Variation(gains, eps, zoneout_rates(kind, zoneout), recurrent_dropout)
    return run(kind, input, hx, plain, stack._replace(variation=varied))


def _step(
    kind: Kind, input: Any, hx: Any, weights: Any, eps: Any, zoneout: Any, training: bool
) -> Sequence[Tensor]:  # fmt: skip
    """(h',) or (h', c'): a cell is a layer of one step."""
    function, name = f"layer_norm_{kind.function}_cell", f"LayerNorm{kind.layer}Cell"
    checks.tensor(function, "input", input)
    checks.cell_rank(name, input)
    h, c = checks.states(kind, function, hx)
    plain, _ = split_weights(function, kind, weights, 1, 1)
    x, batched = (input, True) if input.dim() == 2 else (input.unsqueeze(0), False)
    if not batched:
        h, c = (None if state is None else state.unsqueeze(0) for state in (h, c))
    checks.cell(name, x, h, c, plain[0], plain[1], kind.gates)
    states = [state.unsqueeze(0) for state in (h, c) if state is not None]
    one_step = (states[0], states[1]) if len(states) == 2 else states[0] if states else None
    _, new = _run(kind, x.unsqueeze(0), one_step, weights, eps, zoneout, 0.0, Stack(training=training))
    new = new if kind.has_cell_state else (new,)
    return [state.squeeze(0) if batched else state.squeeze(0).squeeze(0) for state in new]
