"""Diffusion models: attention with AttnProcessor2_0, a transformer block, and a small UNet with a condition."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from tests.thirdparty.case import Step, case, decided, training

# Our kernels leave small calls to torch. These are larger.
ATTENTION = "scaled_dot_product_attention"


@case("Attention with AttnProcessor2_0 and a mask", ATTENTION)
def attention(dtype: torch.dtype) -> Step:
    model = Attention(64, cross_attention_dim=32, heads=4, dim_head=16, processor=AttnProcessor2_0())
    hidden = torch.zeros(4, 1, 20).masked_fill(torch.arange(20) > torch.tensor([19, 12, 4, 0])[:, None, None], -10000.0)
    return training(decided(model), lambda x, e: model(x, encoder_hidden_states=e, attention_mask=hidden.to(dtype)),
                    torch.randn(4, 48, 64), torch.randn(4, 20, 32), dtype=dtype)  # fmt: skip


@case("BasicTransformerBlock", ATTENTION)
def block(dtype: torch.dtype) -> Step:
    model = BasicTransformerBlock(64, num_attention_heads=4, attention_head_dim=16, cross_attention_dim=32)
    return training(decided(model), lambda x, e: model(x, encoder_hidden_states=e), torch.randn(4, 48, 64),
                    torch.randn(4, 20, 32), dtype=dtype)  # fmt: skip


@case("UNet2DConditionModel", ATTENTION)
def unet(dtype: torch.dtype) -> Step:
    model = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, norm_num_groups=8,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return training(decided(model), lambda x, e: model(x, 3, e, return_dict=False), torch.randn(2, 4, 16, 16),
                    torch.randn(2, 7, 32), dtype=dtype)  # fmt: skip
