"""Whole models in plain torch.nn, of the sizes that people train: what `dlkernels.enable()` has to be good for.

Each is an entry of MODELS: how to make the model and a batch, and its loss. Attention goes through
F.scaled_dot_product_attention or nn.MultiheadAttention, recurrence through nn.LSTM. Nothing is downloaded: weights and
data are random.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

Batch = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Model:
    """make: the model in training mode. batch: one batch. loss: a scalar of both."""

    make: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    loss: Callable[..., Tensor]


class Attention(nn.Module):
    """Self-attention with fused projections; fewer heads for keys and values if `kv_heads` says so."""

    def __init__(self, width: int, heads: int, kv_heads: int = 0, causal: bool = False, dropout: float = 0.0,
                 bias: bool = True, rotary: bool = False) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.kv_heads, self.causal, self.dropout = heads, kv_heads or heads, causal, dropout
        self.rotary, self.head = rotary, width // heads
        self.project = nn.Linear(width, (heads + 2 * self.kv_heads) * self.head, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        B, M, width = x.shape
        sizes = [self.heads * self.head] + 2 * [self.kv_heads * self.head]
        q, k, v = (part.view(B, M, -1, self.head).transpose(1, 2) for part in self.project(x).split(sizes, -1))
        if self.rotary:
            q, k = rotated(q), rotated(k)
        o = F.scaled_dot_product_attention(
            q, k, v, mask, self.dropout if self.training else 0.0, self.causal, enable_gqa=self.kv_heads != self.heads
        )
        return self.out(o.transpose(1, 2).reshape(B, M, width))  # type: ignore[no-any-return]


def rotated(x: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021)."""
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** -(torch.arange(half) / half)
    angles = torch.arange(x.shape[-2])[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Gated(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class Block(nn.Module):
    """A Transformer block with the normalization before (GPT-2, ViT, Llama) or after (BERT) its two parts."""

    def __init__(self, attention: Attention, feed_forward: nn.Module, norm: Callable[[], nn.Module],
                 norm_first: bool, dropout: float) -> None:  # fmt: skip
        super().__init__()
        self.attention, self.feed_forward = attention, feed_forward
        self.norm1, self.norm2, self.norm_first, self.dropout = norm(), norm(), norm_first, nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.norm_first:
            x = x + self.dropout(self.attention(self.norm1(x), mask))
            return x + self.dropout(self.feed_forward(self.norm2(x)))  # type: ignore[no-any-return]
        x = self.norm1(x + self.dropout(self.attention(x, mask)))
        return self.norm2(x + self.dropout(self.feed_forward(x)))  # type: ignore[no-any-return]


class Tokens(nn.Module):
    """Embeddings, blocks and a head over the vocabulary that shares its weights with the embedding."""

    def __init__(self, vocabulary: int, longest: int, width: int, blocks: list[Block], norm: nn.Module,
                 positions: bool = True) -> None:  # fmt: skip
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(longest, width) if positions else None
        self.blocks, self.norm = nn.ModuleList(blocks), norm
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embed(tokens)
        if self.positions is not None:
            x = x + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x, mask)
        return F.linear(self.norm(x), self.embed.weight)


def bert() -> nn.Module:
    """BERT-base (Devlin et al. 2018)."""
    blocks = [
        Block(Attention(768, 12, dropout=0.1), mlp(768), lambda: nn.LayerNorm(768), False, 0.1) for _ in range(12)
    ]
    return Tokens(30522, 512, 768, blocks, nn.LayerNorm(768))


def gpt2() -> nn.Module:
    """GPT-2 small (Radford et al. 2019)."""
    blocks = [
        Block(Attention(768, 12, causal=True, dropout=0.1), mlp(768), lambda: nn.LayerNorm(768), True, 0.1)
        for _ in range(12)
    ]
    return Tokens(50257, 1024, 768, blocks, nn.LayerNorm(768))


def llama() -> nn.Module:
    """A small model in the manner of Llama 3: grouped queries, rotary positions, SwiGLU, RMSNorm."""
    blocks = [
        Block(Attention(512, 8, 2, causal=True, bias=False, rotary=True), Gated(512, 1408),
              lambda: nn.RMSNorm(512), True, 0.0)
        for _ in range(8)
    ]  # fmt: skip
    return Tokens(32000, 0, 512, blocks, nn.RMSNorm(512), positions=False)


class VisionTransformer(nn.Module):
    """ViT-B/16 (Dosovitskiy et al. 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 768, 16, 16)
        self.first = nn.Parameter(torch.zeros(1, 1, 768))
        self.positions = nn.Parameter(torch.randn(1, 197, 768) * 0.02)
        self.blocks = nn.Sequential(
            *(Block(Attention(768, 12), mlp(768), lambda: nn.LayerNorm(768), True, 0.0) for _ in range(12))
        )
        self.norm, self.head = nn.LayerNorm(768), nn.Linear(768, 1000)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """nn.TransformerEncoder as torch ships it (Vaswani et al. 2017, base), for sequences of different lengths.

    With ReLU in place of GELU, roundings that turn a unit on or off would make most of the errors of both sides.
    """

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(512, 8, 2048, 0.1, "gelu", batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 6), nn.Linear(512, 1000)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=padding))  # type: ignore[no-any-return]


class Speech(nn.Module):
    """Deep Speech 2 in small (Amodei et al. 2016): convolutions, packed bidirectional LSTMs, characters by CTC."""

    def __init__(self) -> None:
        super().__init__()
        self.convolve = nn.Sequential(nn.Conv1d(80, 256, 11, 2, 5), nn.ReLU(), nn.Conv1d(256, 256, 11, 1, 5), nn.ReLU())
        self.rnn = nn.LSTM(256, 320, 3, bidirectional=True, dropout=0.1)
        self.head = nn.Linear(640, 29)

    def forward(self, sound: Tensor, lengths: Tensor) -> Tensor:
        x = self.convolve(sound).permute(2, 0, 1)
        packed, _ = self.rnn(pack_padded_sequence(x, lengths, enforce_sorted=False))
        y, _ = pad_packed_sequence(packed)
        return F.log_softmax(self.head(y).float(), -1)


def _tokens(vocabulary: int, B: int, M: int) -> Tensor:
    return torch.randint(vocabulary, (B, M + 1))


def _next_token(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).float().flatten(0, 1), tokens[:, 1:].flatten())


def _bert_batch() -> Batch:
    lengths = torch.tensor([128, 112, 80, 64])
    return _tokens(30522, 4, 127), (torch.arange(128) < lengths[:, None])[:, None, None]


def _masked_tokens(model: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens, mask).float().flatten(0, 1), tokens.flatten())


def _classes(model: nn.Module, *inputs: Tensor) -> Tensor:
    *given, target = inputs
    return F.cross_entropy(model(*given).float().flatten(0, -2), target.flatten())


def _encoder_batch() -> Batch:
    padding = torch.arange(256) >= torch.tensor([256, 200, 160, 120])[:, None]
    return torch.randn(4, 256, 512), padding, torch.randint(1000, (4, 256))


def _speech_batch() -> Batch:
    lengths = torch.tensor([200, 190, 170, 150, 140, 120, 100, 90])
    return torch.randn(8, 80, 400), lengths, torch.randint(1, 29, (8, 30)), torch.full((8,), 30)


def _ctc(model: nn.Module, sound: Tensor, lengths: Tensor, text: Tensor, text_lengths: Tensor) -> Tensor:
    return F.ctc_loss(model(sound, lengths), text, lengths, text_lengths)


MODELS = {
    "bert-base": Model(bert, _bert_batch, _masked_tokens),
    "gpt2": Model(gpt2, lambda: (_tokens(50257, 1, 256),), _next_token),
    "vit-b": Model(VisionTransformer, lambda: (torch.randn(2, 3, 224, 224), torch.randint(1000, (2,))), _classes),
    "llama-gqa": Model(llama, lambda: (_tokens(32000, 2, 256),), _next_token),
    "transformer-encoder": Model(Encoder, _encoder_batch, _classes),
    "speech-ctc": Model(Speech, _speech_batch, _ctc),
}
