"""Images: timm's vision transformer, and its attention with relative positions and with a pooling query."""

from __future__ import annotations

import torch
from timm.layers import AttentionPoolLatent
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos

from tests.thirdparty.case import Step, case, decided, inference, training

SIZES = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 10}
# Our kernels leave small calls to torch. These are larger.
ATTENTION = "scaled_dot_product_attention"


@case("VisionTransformer", ATTENTION)
def vit(dtype: torch.dtype) -> Step:
    model = decided(VisionTransformer(**SIZES))
    return training(model, model, torch.randn(4, 3, 32, 32), dtype=dtype)


@case("VisionTransformer, inference", ATTENTION)
def vit_inference(dtype: torch.dtype) -> Step:
    model = decided(VisionTransformer(**SIZES))
    return inference(model, model, torch.randn(4, 3, 32, 32), dtype=dtype)


@case("VisionTransformerRelPos, with a trained bias", ATTENTION)
def relative(dtype: torch.dtype) -> Step:
    model = decided(VisionTransformerRelPos(**SIZES, rel_pos_type="bias"))
    return training(model, model, torch.randn(4, 3, 32, 32), dtype=dtype)


@case("AttentionPoolLatent", ATTENTION)
def pool(dtype: torch.dtype) -> Step:
    model = decided(AttentionPoolLatent(64, num_heads=4))
    return training(model, model, torch.randn(64, 50, 64), dtype=dtype)
