"""What layer normalisation, zoneout and recurrent dropout change in a step of the lstm and of the gru."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from dlkernels.rnn.kinds import DirectionWeights
from dlkernels.rnn.reference.cells import step

__all__ = ["Gains", "OneDirection", "Variant", "mix_states"]


class Gains(NamedTuple):
    """The parameters of layer normalisation in one direction: G gates, H hidden units."""

    ih: Tensor  # [G*H], of W_ih x
    hh: Tensor  # [G*H], of W_hh h
    c: Tensor | None = None  # [H], of the lstm's c'
    c_bias: Tensor | None = None  # [H], None for zeros


class Variant(NamedTuple):
    """How the cells of a layer differ from the plain ones.

    gains: of each direction, for layer normalisation (Ba et al. 2016, equations 20 to 22); None for none. The products
        W_ih x and W_hh h are normalised apart, each over all G*H values, for the gru over the 2H of r and z and the H
        of n; then they are multiplied by their gains, and the biases b_ih and b_hh follow. The lstm's h' is
        o tanh(LN(c') gain + bias), and c' itself is not normalised.
    eps: is added to the variance.
    dropout: [D, B, H], multiplies h where it enters W_hh h and nowhere else (Gal and Ghahramani 2016): 0 or
        1 / (1 - p). None for ones.
    zoneout_c, zoneout_h: what of c and of h keeps its old value (Krueger et al. 2017): bool
        [D, T, B, H], or [D, rows, H] for packed data, or a rate, by which the old and the new value are averaged. h' is
        computed from c' before that has been zoned out.
    """

    gains: Sequence[Gains] | None = None
    eps: float = 1e-5
    dropout: Tensor | None = None
    zoneout_c: Tensor | float = 0.0
    zoneout_h: Tensor | float = 0.0

    def padded(self, row: Tensor) -> Variant:
        """The same for data that are padded: row [T, B] is the row of the packed data that each comes from."""

        def gather(zoneout: Tensor | float) -> Tensor | float:
            return zoneout[:, row] if isinstance(zoneout, Tensor) else zoneout

        return self._replace(zoneout_c=gather(self.zoneout_c), zoneout_h=gather(self.zoneout_h))

    def direction(self, d: int, dtype: torch.dtype, in_order: Callable[[Tensor], Tensor]) -> OneDirection:
        """The same for direction d. `in_order` brings [T, B, H] to its order of steps."""
        gains = None
        if self.gains is not None:
            gains = Gains(*(None if t is None else t.to(dtype) for t in self.gains[d]))  # type: ignore[arg-type]
        zoneouts = (
            in_order(zoneout[d]) if isinstance(zoneout, Tensor) else zoneout
            for zoneout in (self.zoneout_c, self.zoneout_h)
        )  # fmt: skip
        dropout = None if self.dropout is None else self.dropout[d].to(dtype)
        return OneDirection(gains, self.eps, dropout, *zoneouts)


class OneDirection(NamedTuple):
    """The fields of `Variant` for one direction, in its order of steps."""

    gains: Gains | None
    eps: float
    dropout: Tensor | None
    zoneout_c: Tensor | float
    zoneout_h: Tensor | float

    def input_gates(self, mode: str, x: Tensor, w: DirectionWeights) -> Tensor:
        """W_ih x, normalised, and b_ih."""
        if self.gains is None:
            return linear(x, w.w_ih, w.b_ih)
        return self._normalised_gates(mode, linear(x, w.w_ih), self.gains.ih, w.b_ih)

    def step(
        self, mode: str, s: int, gi: Tensor, h: Tensor, c: Tensor | None, w: DirectionWeights
    ) -> tuple[Tensor, Tensor | None]:
        """h' and c' after step s."""
        seen = h if self.dropout is None else h * self.dropout
        if self.gains is None:
            new_h, new_c = step(mode, gi, linear(seen, w.w_hh, w.b_hh), h, c)
        else:
            gh = self._normalised_gates(mode, linear(seen, w.w_hh), self.gains.hh, w.b_hh)
            new_h, new_c = step(mode, gi, gh, h, c, self._normalised_c)
        if c is not None and new_c is not None:
            new_c = mix_states(_at(self.zoneout_c, s), c, new_c)
        return mix_states(_at(self.zoneout_h, s), h, new_h), new_c

    def _normalised_gates(self, mode: str, products: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        if mode == "gru":
            hidden = products.shape[-1] // 3
            parts = [self._normalised(part) for part in torch.split(products, [2 * hidden, hidden], -1)]
            normalised = torch.cat(parts, -1)
        else:
            normalised = self._normalised(products)
        normalised = normalised * gain
        return normalised if bias is None else normalised + bias

    def _normalised_c(self, c: Tensor) -> Tensor:
        assert self.gains is not None and self.gains.c is not None
        normalised = self._normalised(c) * self.gains.c
        return normalised if self.gains.c_bias is None else normalised + self.gains.c_bias

    def _normalised(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps)


def _at(zoneout: Tensor | float, s: int) -> Tensor | float:
    return zoneout[s] if isinstance(zoneout, Tensor) else zoneout


def mix_states(zoneout: Tensor | float, old: Tensor, new: Tensor) -> Tensor:
    """The state after zoneout: a mask tells which units keep their old value, a rate how much of it each keeps."""
    if isinstance(zoneout, Tensor):
        return torch.where(zoneout, old, new)
    return new if zoneout == 0 else zoneout * old + (1 - zoneout) * new
