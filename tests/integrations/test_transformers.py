"""Tests attn_implementation="dlkernels" on tiny random models of transformers: logits, losses, gradients and greedy
generation are those of "eager". Skipped where transformers is not installed."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")

from dlkernels.integrations.transformers import register  # noqa: E402
from tests.support.attention_modules import operators  # noqa: E402

pytestmark = pytest.mark.usefixtures("native")

SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 49,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
IMAGES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
# The lengths of the samples of a batch; shorter ones are padded on the left where the model generates.
LENGTHS = (9, 6, 1)


def config(name: str) -> Any:
    t = transformers
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return {
        "BERT": lambda: t.BertConfig(**SIZES, **no_dropout),
        "GPT-2": lambda: t.GPT2Config(
            vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=49,
        ),
        "ViT": lambda: t.ViTConfig(**IMAGES, **no_dropout),
        "Llama": lambda: t.LlamaConfig(**GROUPED),
        "Gemma2": lambda: t.Gemma2Config(
            **GROUPED, sliding_window=4, attn_logit_softcapping=5.0, query_pre_attn_scalar=8,
            layer_types=["sliding_attention", "full_attention"],
        ),
        "gpt-oss": lambda: t.GptOssConfig(
            **GROUPED, sliding_window=4, num_local_experts=2, num_experts_per_tok=1,
            layer_types=["sliding_attention", "full_attention"], rope_scaling=None,
        ),
        "T5": lambda: t.T5Config(
            vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0, pad_token_id=0,
            eos_token_id=49, decoder_start_token_id=0,
        ),
        "Whisper": lambda: t.WhisperConfig(
            vocab_size=50, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=10,
            max_target_positions=32, dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=49,
            decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
        ),
    }[name]()  # fmt: skip


MODELS: dict[str, str] = {
    "BERT": "BertForMaskedLM", "GPT-2": "GPT2LMHeadModel", "ViT": "ViTForImageClassification",
    "Llama": "LlamaForCausalLM", "Gemma2": "Gemma2ForCausalLM", "gpt-oss": "GptOssForCausalLM",
    "T5": "T5ForConditionalGeneration", "Whisper": "WhisperForConditionalGeneration",
}  # fmt: skip
GENERATING = [name for name in MODELS if name not in ("BERT", "ViT")]


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """The model with eager attention, and the same with ours."""
    register()
    cls = getattr(transformers, MODELS[name])
    made = []
    for attention in ("eager", "dlkernels"):
        torch.manual_seed(0)
        model = cls._from_config(config(name), attn_implementation=attention).train()
        # Random attention would hide mistakes: with the usual initial weights all scores are near 0.
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(3.0) if weight.dim() == 2 else weight.add_(0.1)
        made.append(model)
    made[1].load_state_dict(made[0].state_dict())
    return made[0], made[1]


def tokens(left: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    longest = max(LENGTHS)
    ids = torch.randint(2, 49, (len(LENGTHS), longest), generator=generator)
    at = torch.arange(longest)
    lengths = torch.tensor(LENGTHS)[:, None]
    kept = at >= longest - lengths if left else at < lengths
    return {"input_ids": ids.where(kept, 0), "attention_mask": kept.long()}


def arguments(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    if name == "ViT":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator), "labels": torch.tensor([0, 1])}
    if name == "Whisper":
        labels = torch.randint(2, 49, (2, 7), generator=generator)
        return {"input_features": torch.randn(2, 8, 20, generator=generator), "labels": labels}
    given = tokens(left=name not in ("BERT", "T5"))
    kept = given["attention_mask"].bool()
    if name not in ("BERT", "T5"):  # a token is predicted from the one before it, which may be padding
        kept = kept & kept.roll(1, 1)
    labels = given["input_ids"].masked_fill(~kept, -100)
    return {**given, "labels": labels}


def outcome(model: nn.Module, given: dict[str, Tensor]) -> list[Tensor]:
    model.zero_grad()
    result = model(**given)
    result.loss.backward()
    logits = result.logits
    if "attention_mask" in given and logits.shape[:2] == given["attention_mask"].shape:
        logits = logits[given["attention_mask"].bool()]  # rows of padding attend to nothing and have no meaning
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return [logits.detach(), result.loss.detach(), *grads]


def assert_near(found: list[Tensor], expected: list[Tensor]) -> None:
    """Eager computes its softmax in float32, whatever the dtype of the model is, so float32 is the dtype to compare."""
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max() + 1e-7


@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_and_gradients(name: str) -> None:
    eager, ours = pair(name)
    with operators() as seen:
        found = outcome(ours, arguments(name))
    assert {"dlkernels::attention", "dlkernels::attention_backward"} <= seen.names
    assert_near(found, outcome(eager, arguments(name)))


@pytest.mark.parametrize("name", GENERATING)
def test_greedy_generation(name: str) -> None:
    """With a cache, and from prompts that are padded on the left."""
    eager, ours = (model.eval() for model in pair(name))
    given = {k: v for k, v in arguments(name).items() if k != "labels"}
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    assert torch.equal(ours.generate(**given, **options), eager.generate(**given, **options))


def test_switched_in_a_model_that_exists() -> None:
    eager, _ = pair("Llama")
    given = arguments("Llama")
    expected = outcome(eager, given)
    eager.set_attn_implementation("dlkernels")
    with operators() as seen:
        found = outcome(eager, given)
    assert "dlkernels::attention" in seen.names
    assert_near(found, expected)


def test_attention_weights_are_refused() -> None:
    _, ours = pair("Llama")
    call: Callable[[], Any] = lambda: ours(**arguments("Llama"), output_attentions=True)  # noqa: E731
    try:
        result = call()
    except ValueError as error:
        assert "output_attentions" in str(error)
    else:
        assert not result.attentions or all(a is None for a in result.attentions)
