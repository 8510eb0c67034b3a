"""One step of each cell."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from dlkernels._core.autocast import without_autocast
from dlkernels._core.dtypes import compute_dtype
from dlkernels.rnn.kinds import kind_of


def step(
    mode: str, gi: Tensor, gh: Tensor, h: Tensor, c: Tensor | None, of_c: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The gate equations. gi = W_ih x + b_ih and gh = W_hh h + b_hh [B, G*H], h [B, H] (unused by lstm), c [B, H].
    With `of_c` the lstm's h' is o tanh(of_c(c')).

    lstm  i, f, o = sigmoid(.), g = tanh(.), c' = f c + i g, h' = o tanh(c')
          (Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000)
    gru   r, z = sigmoid(.), n = tanh(gi_n + r gh_n), h' = (1 - z) n + z h
          (Cho et al. 2014, with the reset gate after the matrix product, as torch and cuDNN have it)
    rnn   h' = tanh(gi + gh) or relu(gi + gh)
          (Elman 1990)
    """
    if mode == "lstm":
        assert c is not None
        i, f, g, o = (gi + gh).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c if of_c is None else of_c(c)), c
    if mode == "gru":
        (ri, zi, ni), (rh, zh, nh) = gi.chunk(3, -1), gh.chunk(3, -1)
        r, z = torch.sigmoid(ri + rh), torch.sigmoid(zi + zh)
        n = torch.tanh(ni + r * nh)
        return (1 - z) * n + z * h, None
    if mode == "rnn_tanh":
        return torch.tanh(gi + gh), None
    if mode == "rnn_relu":
        return torch.relu(gi + gh), None
    raise ValueError(f"unknown mode {mode!r}")


def cell(
    mode: str, x: Tensor, h: Tensor | None, c: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
    b_hh: Tensor | None, *, h_dtype: torch.dtype | None = None, c_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """One step: x [B, I], h and c [B, H] or None for zeros -> (h', c'), c' None for gru and rnn.

    The computation is in float32 or float64. h_dtype and c_dtype are the dtypes of the results, None for that of x.
    """
    dtype = compute_dtype(x.dtype)
    zeros = x.new_zeros((x.shape[0], w_hh.shape[1]), dtype=dtype)
    h = zeros if h is None else h.to(dtype)
    if kind_of(mode).has_cell_state:
        c = zeros if c is None else c.to(dtype)
    with without_autocast(x.device):
        gi = linear(x.to(dtype), w_ih.to(dtype), None if b_ih is None else b_ih.to(dtype))
        gh = linear(h, w_hh.to(dtype), None if b_hh is None else b_hh.to(dtype))
        h, c = step(mode, gi, gh, h, c)
    return h.to(h_dtype or x.dtype), None if c is None else c.to(c_dtype or x.dtype)
