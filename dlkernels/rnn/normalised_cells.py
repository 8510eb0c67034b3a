"""LayerNormLSTMCell and LayerNormGRUCell, which torch.nn does not have: the cells with layer normalisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter, RNNCellBase

from dlkernels._core.tools import PUBLIC_MODULE, KnownLayer
from dlkernels.rnn import normalised
from dlkernels.rnn.kinds import KINDS, Kind
from dlkernels.rnn.normalised_layers import reset_gains
from dlkernels.rnn.variants import Rates, gain_shapes, zoneout_rates

__all__ = ["LayerNormGRUCell", "LayerNormLSTMCell"]


class _NormalisedCell(KnownLayer, RNNCellBase):
    """The parameters: weight_ih, weight_hh, bias_ih and bias_hh of torch.nn's cell, and the gains."""

    _kind: Kind

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool, device: Any, dtype: Any, eps: float, zoneout: Rates
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=self._kind.gates, device=device, dtype=dtype)
        normalised.check_eps(eps)
        zoneout_rates(self._kind, zoneout)
        self.eps = eps
        self.zoneout = zoneout
        self._gain_names = []
        for name, shape in gain_shapes(self._kind, hidden_size, bool(bias)).items():
            setattr(self, name, Parameter(torch.empty(shape, device=device, dtype=dtype)))
            self._gain_names.append(name)
        reset_gains(self._parameters)

    def reset_parameters(self) -> None:
        """Draws the weights and biases as torch.nn does; gains are 1 and the bias of c is 0."""
        super().reset_parameters()
        reset_gains(self._parameters)

    def weight_list(self) -> list[Tensor]:
        """The weights as they are now, those that exist, in the order of `dlkernels.functional.layer_norm_lstm`."""
        plain = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        return [
            weight for weight in (*plain, *(getattr(self, name) for name in self._gain_names)) if weight is not None
        ]

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.eps != 1e-5:
            text += f", eps={self.eps}"
        return f"{text}, zoneout={self.zoneout}" if self.zoneout else text


class LayerNormLSTMCell(_NormalisedCell):
    """One step of `dlkernels.nn.LayerNormLSTM`: input [B, I] or [I], hx = (h, c) [B, H] or [H] each or None for zeros
    -> (h', c'). Arguments and parameters are those of torch.nn.LSTMCell, and `eps`, `zoneout`, norm_ih, norm_hh [4H],
    norm_c [H], and with biases bias_c [H]."""

    __module__ = PUBLIC_MODULE
    _kind = KINDS["lstm"]

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None, dtype: Any = None, *,
        eps: float = 1e-5, zoneout: Rates = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(input_size, hidden_size, bias, device, dtype, eps, zoneout)

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        return normalised.layer_norm_lstm_cell(
            input, hx, self.weight_list(), eps=self.eps, zoneout=self.zoneout, training=self.training
        )


class LayerNormGRUCell(_NormalisedCell):
    """One step of `dlkernels.nn.LayerNormGRU`: input [B, I] or [I], hx [B, H] or [H] or None for zeros -> h'. Arguments
    and parameters are those of torch.nn.GRUCell, and `eps`, `zoneout`, norm_ih and norm_hh [3H]."""

    __module__ = PUBLIC_MODULE
    _kind = KINDS["gru"]

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None, dtype: Any = None, *,
        eps: float = 1e-5, zoneout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(input_size, hidden_size, bias, device, dtype, eps, zoneout)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        zoneout: Any = self.zoneout
        return normalised.layer_norm_gru_cell(
            input, hx, self.weight_list(), eps=self.eps, zoneout=zoneout, training=self.training
        )
