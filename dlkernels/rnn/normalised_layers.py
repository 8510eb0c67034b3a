"""LayerNormLSTM and LayerNormGRU, which torch.nn does not have: the layers with layer normalisation."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor
from torch.nn import Parameter

from dlkernels._core.tools import PUBLIC_MODULE
from dlkernels.rnn.layers import GRU, LSTM, RecurrentLayer
from dlkernels.rnn.normalised import check_eps
from dlkernels.rnn.prepacked import Packing
from dlkernels.rnn.routing import Extras
from dlkernels.rnn.variants import Rates, Variation, gain_shapes, split_weights, zoneout_rates

__all__ = ["LayerNormGRU", "LayerNormLSTM", "reset_gains"]


def reset_gains(parameters: dict[str, Any]) -> None:
    """Sets the gains among the named parameters to 1 and the biases of c to 0."""
    for name, parameter in parameters.items():
        if parameter is not None and name.startswith("norm_"):
            torch.nn.init.ones_(parameter)
        elif parameter is not None and name.startswith("bias_c"):
            torch.nn.init.zeros_(parameter)


class _Normalised(RecurrentLayer):
    eps: float

    def _add_gains(self, eps: float, device: Any, dtype: Any) -> None:
        """Registers the parameters of layer normalisation behind those of each layer and direction."""
        check_eps(eps)
        self.eps = eps
        directions = 2 if self.bidirectional else 1
        names = []
        for at, plain in enumerate(self._all_weights):
            suffix = f"_l{at // directions}" + ("_reverse" if at % directions else "")
            shapes = gain_shapes(self._kind, self.hidden_size, bool(self.bias))
            for name, shape in shapes.items():
                setattr(self, name + suffix, Parameter(torch.empty(shape, device=device, dtype=dtype)))
            names.append([*plain, *(name + suffix for name in shapes)])
        self._all_weights = names
        self._flat_weights_names = [name for group in names for name in group]
        reset_gains(self._parameters)

    def reset_parameters(self) -> None:
        """Draws the weights and biases as torch.nn does; gains are 1 and the bias of c is 0."""
        super().reset_parameters()
        reset_gains(self._parameters)

    def _varied(self, weights: list[Tensor]) -> tuple[list[Tensor], Variation]:
        kind = self._kind
        plain, gains = split_weights(
            type(self).__name__, kind, weights, self.num_layers, 2 if self.bidirectional else 1
        )
        return plain, Variation(gains, self.eps, zoneout_rates(kind, self.zoneout), self.recurrent_dropout)

    def _called(
        self, input: Any, hx: Any, lengths: Tensor | None, bptt_steps: int, resets: Tensor | None,
        return_cells: bool = False,
    ) -> Any:  # fmt: skip
        return self._run(input, hx, Extras(lengths, bptt_steps, resets, return_cells))

    def _packing(self) -> Packing:
        raise RuntimeError("prepack: layers with layer normalisation have no packed weights")

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.eps == 1e-5 else f", eps={self.eps}")


class LayerNormLSTM(_Normalised, LSTM):
    """The LSTM with layer normalisation (Ba et al. 2016, equations 20 to 22):

        i, f, g, o = sigmoid(.), sigmoid(.), tanh(.), sigmoid(.)
                     of LN(W_ih x) * norm_ih + b_ih + LN(W_hh h) * norm_hh + b_hh
        c' = f * c + i * g      h' = o * tanh(LN(c') * norm_c + bias_c)

    LN(v) = (v - mean(v)) / sqrt(variance(v) + eps), over all 4H values of a product and over the H of c'.

    The arguments are those of `dlkernels.nn.LSTM`, without `proj_size` and with `eps`. The parameters are those of
    torch.nn.LSTM, and for each layer and direction norm_ih_l0, norm_hh_l0 [4H] and norm_c_l0 [H], which begin as ones,
    and with biases bias_c_l0 [H], which begins as zeros. `forward` takes and returns what that of the LSTM does.
    """

    __module__ = PUBLIC_MODULE

    @overload
    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, device: Any = None, dtype: Any = None, *, eps: float = 1e-5,
        zoneout: Rates = 0.0, recurrent_dropout: float = 0.0,
    ) -> None: ...  # fmt: skip

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init__(self, *args: Any, eps: float = 1e-5, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size: LayerNormLSTM has no projection")
        if len(args) > 7:  # device and dtype follow, where LSTM has proj_size between
            args = (*args[:7], 0, *args[7:])
        super().__init__(*args, **kwargs)
        weight = self.weight_ih_l0
        self._add_gains(eps, weight.device, weight.dtype)


class LayerNormGRU(_Normalised, GRU):
    """The GRU with layer normalisation (Ba et al. 2016, in the supplement), with torch's reset gate after the product:

        x_r, x_z, x_n = LN(W_ih x) * norm_ih + b_ih     h_r, h_z, h_n = LN(W_hh h) * norm_hh + b_hh
        r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)   n = tanh(x_n + r * h_n)     h' = (1 - z) * n + z * h

    LN(v) = (v - mean(v)) / sqrt(variance(v) + eps) normalises the 2H values of r and z together and the H values of n
    apart from them, in each of the products.

    The arguments are those of `dlkernels.nn.GRU` and `eps`. The parameters are those of torch.nn.GRU, and for each
    layer and direction norm_ih_l0, norm_hh_l0 [3H], which begin as ones. `forward` takes and returns what that of the
    GRU does.
    """

    __module__ = PUBLIC_MODULE

    @overload
    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, device: Any = None, dtype: Any = None, *, eps: float = 1e-5,
        zoneout: float = 0.0, recurrent_dropout: float = 0.0,
    ) -> None: ...  # fmt: skip

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init__(self, *args: Any, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        weight = self.weight_ih_l0
        self._add_gains(eps, weight.device, weight.dtype)
