"""Reinforcement learning: recurrent policies on tensordicts, with trajectories that end in the middle of a batch."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.modules import GRUModule, LSTMModule, set_recurrent_mode

from tests.thirdparty.case import Step, case, training

BATCH, TIME, INPUT, HIDDEN = 4, 20, 12, 48


def _step(model: nn.Module, states: int, recurrent: bool, dtype: torch.dtype) -> Step:
    begins = torch.zeros(BATCH, TIME, 1, dtype=torch.bool)
    begins[0, 7] = begins[2, 3] = begins[2, 15] = True

    def call(x: Tensor, *before: Tensor) -> tuple[Tensor, ...]:
        given = {"observation": x, "is_init": begins, **dict(zip(model.in_keys[1:], before, strict=False))}
        data = TensorDict(given, [BATCH, TIME])
        if recurrent:
            with set_recurrent_mode(True):
                return tuple(model(data)[key] for key in model.out_keys)
        found, step = [], data[:, 0]
        for t in range(TIME):
            step = model(step)
            found.append(step["features"])
            if t + 1 < TIME:
                step = data[:, t + 1].update({key: step["next", key] for key in model.in_keys[1 : 1 + states]})
        return (torch.stack(found, 1),)

    before = [torch.randn(BATCH, TIME, model_layers(model), HIDDEN) for _ in range(states)]
    return training(model, call, torch.randn(BATCH, TIME, INPUT), *before, dtype=dtype)


def model_layers(model: nn.Module) -> int:
    return next(layer.num_layers for layer in model.modules() if isinstance(layer, nn.RNNBase))


def _lstm() -> nn.Module:
    return LSTMModule(INPUT, HIDDEN, num_layers=2, in_key="observation", out_key="features")


def _gru() -> nn.Module:
    return GRUModule(INPUT, HIDDEN, in_key="observation", out_key="features")


@case("LSTMModule, whole trajectories", "lstm.data")
def lstm(dtype: torch.dtype) -> Step:
    return _step(_lstm(), 2, True, dtype)


@case("LSTMModule, step by step", "lstm.input")
def lstm_steps(dtype: torch.dtype) -> Step:
    return _step(_lstm(), 2, False, dtype)


@case("GRUModule, whole trajectories", "gru.data")
def gru(dtype: torch.dtype) -> Step:
    return _step(_gru(), 1, True, dtype)


@case("GRUModule, step by step", "gru.input")
def gru_steps(dtype: torch.dtype) -> Step:
    return _step(_gru(), 1, False, dtype)
