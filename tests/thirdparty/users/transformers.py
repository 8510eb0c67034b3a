"""EnCodec, an audio codec with an LSTM in its encoder and in its decoder."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import EncodecConfig, EncodecModel

from tests.thirdparty.case import Step, case, inference, training


def _model() -> EncodecModel:
    return EncodecModel(EncodecConfig(
        num_filters=4, hidden_size=32, upsampling_ratios=[4, 4], codebook_size=64, num_lstm_layers=2,
    ))  # fmt: skip


@case("EncodecEncoder", "lstm.input")
def encoder(dtype: torch.dtype) -> Step:
    model = _model().encoder
    return training(model, model, torch.randn(2, 1, 640), dtype=dtype)


@case("EncodecDecoder", "lstm.input")
def decoder(dtype: torch.dtype) -> Step:
    model = _model().decoder
    return training(model, model, torch.randn(2, 32, 40), dtype=dtype)


@case("EncodecModel, inference: codes and audio", "lstm.input")
def codec(dtype: torch.dtype) -> Step:
    model = _model()
    for quantizer in model.quantizer.layers:  # whose embeddings are 0 before the training
        quantizer.codebook.embed.normal_(std=0.1)

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        found = model(x)
        return found.audio_codes, found.audio_values

    return inference(model, call, torch.randn(2, 1, 640), dtype=dtype)
