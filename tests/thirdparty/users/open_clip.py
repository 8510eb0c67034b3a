"""Images and texts: CLIP, whose text side has a causal mask, and CoCa, whose decoder attends to the image."""

from __future__ import annotations

import torch
from open_clip.coca_model import CoCa, MultimodalCfg
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import nn

from tests.thirdparty.case import Step, case, decided, inference, training

# Our kernels leave small calls to torch. A batch of 16 is larger.
ATTENTION = "scaled_dot_product_attention"
TEXTS = torch.arange(16 * 16).reshape(16, 16) * 11 % 60 + 1
VISION = CLIPVisionCfg(layers=2, width=64, head_width=16, patch_size=8, image_size=32)


def _clip() -> nn.Module:
    text = CLIPTextCfg(context_length=16, vocab_size=64, width=64, heads=4, layers=2)
    return decided(CLIP(32, VISION, text))


@case("CLIP", ATTENTION)
def clip(dtype: torch.dtype) -> Step:
    model = _clip()
    return training(model, lambda images: model(images, TEXTS), torch.randn(16, 3, 32, 32), dtype=dtype)


@case("CLIP, inference: images by the fast path", ATTENTION, "_native_multi_head_attention")
def clip_inference(dtype: torch.dtype) -> Step:
    model = _clip()
    return inference(model, lambda images: model(images, TEXTS), torch.randn(16, 3, 32, 32), dtype=dtype)


@case("CoCa", ATTENTION)
def coca(dtype: torch.dtype) -> Step:
    decoder = MultimodalCfg(context_length=16, vocab_size=64, width=64, heads=4, layers=2)
    text = CLIPTextCfg(
        context_length=16, vocab_size=64, width=64, heads=4, layers=2, embed_cls=True, output_tokens=True
    )
    vision = CLIPVisionCfg(
        layers=2, width=64, head_width=16, patch_size=8, image_size=32, attentional_pool=True,
        attn_pooler_queries=16, attn_pooler_heads=4, output_tokens=True,
    )  # fmt: skip
    model = CoCa(64, decoder, text, vision)
    for weight in (
        model.text.cls_emb,
        model.text.positional_embedding,
        model.text.text_projection,
        model.text_decoder.text_projection,
    ):  # which CoCa leaves uninitialized
        nn.init.normal_(weight, std=0.1)
    decided(model)
    return training(model, lambda images: model(images, TEXTS), torch.randn(16, 3, 32, 32), dtype=dtype)
