"""The recurrent layers with layer normalisation, zoneout and recurrent dropout, written once more: one sequence and one
step at a time, without dlkernels.reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm
from torch.nn.utils.rnn import PackedSequence

GATES = {"lstm": 4, "gru": 3}


@dataclass
class Masks:
    """What one layer drew: dropout [D, B, H], zoneout_c and zoneout_h bool [D, T, B, H] or [D, rows, H], None for those
    that do not exist."""

    dropout: Tensor | None = None
    zoneout_c: Tensor | None = None
    zoneout_h: Tensor | None = None


def draw(
    directions: int, rows: tuple[int, ...], batch: int, hidden: int, zoneout: Any, recurrent_dropout: float, lstm: bool,
    device: str = "cpu",
) -> Masks:  # fmt: skip
    """The masks of one layer in training, from the generator of `device` in the order in which a layer draws them. They
    are on the CPU."""
    masks = Masks()
    if recurrent_dropout:
        kept = torch.rand(directions, batch, hidden, device=device).cpu() >= recurrent_dropout
        masks.dropout = kept.double() / (1 - recurrent_dropout)
    of_c, of_h = zoneout if isinstance(zoneout, tuple) else (zoneout, zoneout)
    if of_c and lstm:
        masks.zoneout_c = torch.rand(directions, *rows, hidden, device=device).cpu() < of_c
    if of_h:
        masks.zoneout_h = torch.rand(directions, *rows, hidden, device=device).cpu() < of_h
    return masks


def norm(v: Tensor, gain: Tensor, eps: float) -> Tensor:
    return layer_norm(v, v.shape, gain, None, eps)


def one_step(
    mode: str, x: Tensor, h: Tensor, c: Tensor, w: dict[str, Tensor], eps: float, dropout: Tensor | None
) -> tuple[Tensor, Tensor]:
    """h' and c' of one sequence, before zoneout; `w` has the weights of the direction by the names of the cell's."""
    H = h.shape[0]
    gi, gh = w["weight_ih"] @ x, w["weight_hh"] @ (h if dropout is None else h * dropout.to(h.dtype))
    if "norm_ih" in w:
        if mode == "lstm":
            gi, gh = norm(gi, w["norm_ih"], eps), norm(gh, w["norm_hh"], eps)
        else:
            gi, gh = (
                torch.cat([norm(v[: 2 * H], gain[: 2 * H], eps), norm(v[2 * H :], gain[2 * H :], eps)])
                for v, gain in ((gi, w["norm_ih"]), (gh, w["norm_hh"]))
            )
    gi, gh = gi + w.get("bias_ih", 0), gh + w.get("bias_hh", 0)
    if mode == "lstm":
        pre = gi + gh
        i, f, g, o = (pre[k * H : (k + 1) * H] for k in range(4))
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        seen = norm(c, w["norm_c"], eps) + w.get("bias_c", 0) if "norm_c" in w else c
        return o.sigmoid() * seen.tanh(), c
    r, z = (gi[: 2 * H] + gh[: 2 * H]).sigmoid().split(H)
    n = (gi[2 * H :] + r * gh[2 * H :]).tanh()
    return (1 - z) * n + z * h, c


def zoned(mask: Tensor | None, rate: float, at: Any, old: Tensor, new: Tensor) -> Tensor:
    if mask is not None:
        return torch.where(mask[at], old, new)
    return rate * old + (1 - rate) * new


def direction(
    mode: str, xs: list[Tensor], rows: list[Any], h: Tensor, c: Tensor, w: dict[str, Tensor], eps: float,
    dropout: Tensor | None, zoneout: tuple[Tensor | None, Tensor | None], rates: tuple[float, float], reverse: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:  # fmt: skip
    """One sequence in one direction: its inputs and, for each, the index of its masks."""
    ys: list[Any] = [None] * len(xs)
    for t in reversed(range(len(xs))) if reverse else range(len(xs)):
        new_h, new_c = one_step(mode, xs[t], h, c, w, eps, dropout)
        c = zoned(zoneout[0], rates[0], rows[t], c, new_c) if mode == "lstm" else c
        h = zoned(zoneout[1], rates[1], rows[t], h, new_h)
        ys[t] = h
    return ys, h, c


def layers(
    module: Any, input: Any, hx: Any, lengths: Tensor | None, params: dict[str, Tensor], masks: list[Masks]
) -> dict[str, Tensor]:
    """y, h and c of a layer of dlkernels.nn, batched, with these parameters by name and the masks of each layer;
    without masks it is evaluation. y of a PackedSequence is its data."""
    mode, D, H = module.op_mode, 1 + module.bidirectional, module.hidden_size
    of_c, of_h = module.zoneout if isinstance(module.zoneout, tuple) else (module.zoneout, module.zoneout)
    if isinstance(input, PackedSequence):
        sizes = input.batch_sizes.tolist()
        first = [sum(sizes[:t]) for t in range(len(sizes))]
        rows = [[first[t] + b for t in range(len(sizes)) if b < sizes[t]] for b in range(sizes[0])]
        indices: list[list[Any]] = [list(of_one) for of_one in rows]
        flat, batch = input.data, sizes[0]
        if hx is not None and input.sorted_indices is not None:
            hx = tuple(state.index_select(1, input.sorted_indices) for state in hx)
    else:
        padded = input.transpose(0, 1) if module.batch_first else input
        T, batch = padded.shape[:2]
        ends = [T] * batch if lengths is None else lengths.tolist()
        rows = [[t * batch + b for t in range(ends[b])] for b in range(batch)]
        indices = [[(t, b) for t in range(ends[b])] for b in range(batch)]
        flat = padded.flatten(0, 1)
    layer_input, last_h, last_c = flat, [], []
    for k in range(module.num_layers):
        drawn = masks[k] if masks else Masks()
        outputs = []
        for d in range(D):
            suffix = f"_l{k}" + ("_reverse" if d else "")
            w = {name.removesuffix(suffix): p for name, p in params.items() if name.endswith(suffix)}
            entry = k * D + d
            per_row: list[Any] = [flat.new_zeros(H)] * flat.shape[0]
            of_h_n, of_c_n = [], []
            for b in range(batch):
                h, c = (flat.new_zeros(H), flat.new_zeros(H)) if hx is None else (hx[0][entry, b], hx[-1][entry, b])
                ys, h, c = direction(
                    mode, [layer_input[row] for row in rows[b]], indices[b], h, c, w, getattr(module, "eps", 0.0),
                    None if drawn.dropout is None else drawn.dropout[d, b],
                    (None if drawn.zoneout_c is None else drawn.zoneout_c[d],
                     None if drawn.zoneout_h is None else drawn.zoneout_h[d]),
                    (0.0, 0.0) if masks else (of_c, of_h), bool(d),
                )  # fmt: skip
                for row, y in zip(rows[b], ys, strict=True):
                    per_row[row] = y
                of_h_n.append(h)
                of_c_n.append(c)
            outputs.append(torch.stack(per_row))
            last_h.append(torch.stack(of_h_n))
            last_c.append(torch.stack(of_c_n))
        layer_input = torch.cat(outputs, -1)
    y = layer_input
    states = {"h": torch.stack(last_h), "c": torch.stack(last_c)}
    if isinstance(input, PackedSequence):
        if input.unsorted_indices is not None:
            states = {name: state.index_select(1, input.unsorted_indices) for name, state in states.items()}
    else:
        y = y.view(T, batch, -1)
        y = y.transpose(0, 1) if module.batch_first else y
    return {"y": y, **states} if mode == "lstm" else {"y": y, "h": states["h"]}
