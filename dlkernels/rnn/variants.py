"""Layer normalisation, zoneout and recurrent dropout in a call of layers: their checks, their masks, and where their
tensors stand among the weights of an operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlkernels._core.dtypes import compute_dtype
from dlkernels.rnn.kinds import Kind, kind_of
from dlkernels.rnn.operators.arguments import SequenceConfig, SequenceInputs, VariantConfig
from dlkernels.rnn.reference.variants import mix_states

__all__ = ["Variation", "gain_shapes", "of_layer", "split_weights", "variation", "zoneout_of_cell", "zoneout_rates"]

Rates = float | tuple[float, float]


class Variation(NamedTuple):
    """How a call of layers differs from the plain one.

    gains: of layer normalisation, flat: for each layer and direction those of `gain_shapes`; None without it.
    eps: is added to the variance. zoneout: the rates of c and of h. recurrent_dropout: the rate of the mask.
    """

    gains: Sequence[Tensor] | None = None
    eps: float = 1e-5
    zoneout: tuple[float, float] = (0.0, 0.0)
    recurrent_dropout: float = 0.0


def variation(kind: Kind, zoneout: Any, recurrent_dropout: Any, training: bool) -> Variation | None:
    """The variation of a call without layer normalisation; None if it computes what the plain one does."""
    if not zoneout and not recurrent_dropout:
        return None
    rates = zoneout_rates(kind, zoneout)
    check_recurrent_dropout(recurrent_dropout)
    if not any(rates) and not (training and recurrent_dropout):
        return None
    return Variation(zoneout=rates, recurrent_dropout=recurrent_dropout)


def _is_rate(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def zoneout_rates(kind: Kind, value: Any) -> tuple[float, float]:
    """The rates of c and of h. Raises ValueError."""
    rates = value if kind.has_cell_state and isinstance(value, (tuple, list)) else (value, value)
    if len(rates) != 2 or not all(_is_rate(rate) for rate in rates):
        pair = ", or a pair of them, of c and of h" if kind.has_cell_state else ""
        raise ValueError(
            "zoneout should be a number in range [0, 1] representing the probability of a unit keeping its old value"
            f"{pair}, got {value!r}"
        )
    return (rates[0] if kind.has_cell_state else 0.0), rates[1]


def zoneout_of_cell(
    kind: Kind, zoneout: Any, old: Sequence[Tensor | None], new: Sequence[Tensor], training: bool
) -> list[Tensor]:
    """The states of a cell after zoneout. old and new are h, then c for the lstm; old None is zeros. When `training`,
    it draws the masks from torch's generator, that of c before that of h, as a layer of one step does."""
    of_c, of_h = zoneout_rates(kind, zoneout)
    mixed: list[Tensor] = []
    for before, after, rate in reversed(list(zip(old, new, (of_h, of_c), strict=False))):
        before = torch.zeros_like(after) if before is None else before
        drawn = torch.rand(after.shape, device=after.device) < rate if rate and training else rate
        mixed.append(mix_states(drawn, before, after))
    return mixed[::-1]


def check_recurrent_dropout(value: Any) -> None:
    if not _is_rate(value):
        raise ValueError(
            "recurrent_dropout should be a number in range [0, 1] representing the probability of a unit of h being "
            f"zeroed for a whole sequence, got {value!r}"
        )


def gain_shapes(kind: Kind, hidden: int, bias: bool) -> dict[str, tuple[int, ...]]:
    """The parameters of layer normalisation in one direction, by name and in their order."""
    shapes: dict[str, tuple[int, ...]] = {"norm_ih": (kind.gates * hidden,), "norm_hh": (kind.gates * hidden,)}
    if kind.has_cell_state:
        shapes["norm_c"] = (hidden,)
        if bias:
            shapes["bias_c"] = (hidden,)
    return shapes


def split_weights(
    function: str, kind: Kind, weights: Any, num_layers: Any, directions: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Splits the flat weights of layers with layer normalisation, for each layer and direction w_ih, w_hh[, b_ih, b_hh]
    and then those of `gain_shapes`, into the plain ones and the others. Raises TypeError or RuntimeError."""
    if not isinstance(weights, (tuple, list)):
        raise TypeError(f"{function}(): argument 'weights' must be tuple of Tensors, not {type(weights).__name__}")
    if isinstance(num_layers, bool) or not isinstance(num_layers, int):
        raise TypeError(f"num_layers should be of type int, got: {type(num_layers).__name__}")
    if num_layers <= 0:
        raise ValueError("num_layers must be greater than zero")
    counts = {plain + len(gain_shapes(kind, 1, plain == 4)): plain for plain in (2, 4)}
    count, rest = divmod(len(weights), num_layers * directions)
    if rest or count not in counts:
        of_c = ", norm_c, then bias_c if there are biases" if kind.has_cell_state else ""
        raise RuntimeError(
            f"weights: expected w_ih, w_hh, then b_ih, b_hh if there are biases, then norm_ih, norm_hh{of_c}, for each "
            f"of {num_layers} layers x {directions} directions, got {len(weights)} tensors"
        )
    plain: list[Tensor] = []
    gains: list[Tensor] = []
    for at in range(0, len(weights), count):
        plain += weights[at : at + counts[count]]
        gains += weights[at + counts[count] : at + count]
    return plain, gains


def check_gains(kind: Kind, layer: int, gains: Sequence[Tensor], hidden: int, bias: bool, directions: int) -> None:
    """Checks the shapes of one layer's gains; raises RuntimeError."""
    expected = list(gain_shapes(kind, hidden, bias).items()) * directions
    for (name, shape), gain in zip(expected, gains, strict=True):
        if gain.shape != shape:
            raise RuntimeError(f"weights of layer {layer}: expected {name} of size {shape}, got {tuple(gain.shape)}")


def of_layer(
    of: Variation, cfg: SequenceConfig, given: SequenceInputs, layer: int, num_layers: int, training: bool
) -> tuple[SequenceConfig, SequenceInputs]:
    """The operator's arguments for one layer, from those of the plain one. When `training`, it draws the masks from
    torch's generator: that of recurrent dropout, then those of c and of h."""
    x, weights = given.x, list(given.weights)
    if of.gains is not None:
        count = len(of.gains) // num_layers
        weights += of.gains[layer * count : (layer + 1) * count]
    if not training:
        return cfg._replace(variant=VariantConfig(of.gains is not None, of.eps, *of.zoneout)), given._replace(
            weights=weights
        )
    directions = 2 if cfg.bidirectional else 1
    hidden = given.weights[1].shape[0] // kind_of(cfg.mode).gates
    if given.batch_sizes is not None:
        rows: tuple[int, ...] = (x.shape[0],)
        batch = int(given.batch_sizes[0])
    else:
        rows = (x.shape[1], x.shape[0]) if cfg.batch_first else (x.shape[0], x.shape[1])
        batch = rows[1]
    rate, (rate_c, rate_h) = of.recurrent_dropout, of.zoneout
    if rate:
        kept = torch.rand(directions, batch, hidden, device=x.device) >= rate
        scale = 1 / (1 - rate) if rate < 1 else 0.0
        weights.append(kept.to(compute_dtype(x.dtype)) * scale)
    weights += [
        torch.rand(directions, *rows, hidden, device=x.device) < each for each in (rate_c, rate_h) if each
    ]  # fmt: skip
    variant = VariantConfig(
        of.gains is not None, of.eps, dropout_mask=bool(rate), mask_c=bool(rate_c), mask_h=bool(rate_h)
    )
    return cfg._replace(variant=variant), given._replace(weights=weights)
