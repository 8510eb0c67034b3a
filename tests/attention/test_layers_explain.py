"""`explain` of attention and Transformer layers names the kernel that the call runs, or says why none runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dlkernels
from dlkernels.attention.explain_layers import attention_calls
from dlkernels.nn import MultiheadAttention, TransformerDecoderLayer, TransformerEncoderLayer
from tests.support.attention_modules import Spy, spy

__all__ = ["spy"]

pytestmark = [
    pytest.mark.o0_skip(reason="explain of layers is Python alone"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]

B, T, S, E, H = 2, 5, 7, 8, 2
PADDING = torch.arange(S) >= torch.tensor([S, 4])[:, None]
CAUSAL = nn.Transformer.generate_square_subsequent_mask(T)


def calls() -> dict[str, tuple[nn.Module, tuple[Tensor, ...], dict[str, Any]]]:
    x, memory = torch.randn(B, T, E), torch.randn(B, S, E)
    attention = MultiheadAttention(E, H, batch_first=True, dropout=0.1)
    extended = MultiheadAttention(E, H, add_bias_kv=True, add_zero_attn=True).eval()
    parametrized = MultiheadAttention(E, H, batch_first=True)
    nn.utils.parametrizations.weight_norm(parametrized, "in_proj_weight")
    nested = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(5, E)])
    encoder = TransformerEncoderLayer(E, H, 16, batch_first=True).eval()
    decoder = TransformerDecoderLayer(E, H, 16, batch_first=True, norm_first=True)
    lean = {"need_weights": False}
    return {
        "plain": (attention, (x, x, x), lean),
        "padding": (attention, (x, memory, memory), {"key_padding_mask": PADDING, **lean}),
        "hint": (attention, (x, x, x), {"attn_mask": CAUSAL, "is_causal": True, **lean}),
        "unbatched": (attention, (x[0], memory[0], memory[0]), lean),
        "appended keys": (extended, (x.transpose(0, 1),) * 3, {"attn_mask": CAUSAL, **lean}),
        "parametrized": (parametrized, (x, x, x), lean),
        "nested": (attention, (nested,) * 3, lean),
        "encoder": (encoder, (memory,), {"src_key_padding_mask": PADDING}),
        "decoder": (decoder, (x, memory), {"tgt_mask": CAUSAL, "memory_key_padding_mask": PADDING}),
    }


def shape_of(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) and value.dim() > 1 else repr(value)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", list(calls()))
def test_is_what_the_call_asks_for(name: str, grad: bool, spy: Spy) -> None:
    layer, args, kwargs = calls()[name]
    with torch.set_grad_enabled(grad):
        explained = dlkernels.explain(layer, *args, **kwargs)
        asked = attention_calls(layer, *args, **kwargs)
        assert not spy.calls
        before = vars(layer).keys()
        layer(*args, **kwargs)
        assert vars(layer).keys() == before
    assert len(asked) == len(spy.calls) == len(explained.layers)
    for guess, call, entry in zip(asked, spy.calls, explained.layers, strict=True):
        real = {"q": call.pop("q"), "k": call.pop("k"), "v": call.pop("v")}
        for which, tensor in real.items():
            placeholder = getattr(guess, which)
            assert (placeholder.shape, placeholder.dtype) == (tensor.shape, tensor.dtype)
            assert entry.grad == tensor.requires_grad
        assert {k: shape_of(v) for k, v in guess.options.items()} == {k: shape_of(v) for k, v in call.items()}
        assert entry.name == guess.name
        assert entry.grad == grad
    assert explained.native
    assert explained.kernel.startswith("cpu/")
    assert explained.kernel in str(explained)
    assert all(bool(entry.backward) == grad for entry in explained.layers)


def test_names_of_the_parts() -> None:
    layer, args, kwargs = calls()["decoder"]
    assert [entry.name for entry in dlkernels.explain(layer, *args, **kwargs).layers] == ["self_attn", "multihead_attn"]


def test_what_runs_no_kernel() -> None:
    x = torch.randn(B, T, E)
    explained = dlkernels.explain(MultiheadAttention(E, H), x, x, x)
    assert not explained.native
    assert "need_weights=True" in explained.layers[0].reason
    theirs = nn.TransformerEncoderLayer(E, H, 16)
    assert "not patched" in str(dlkernels.explain(theirs, x))
    assert "not patched" in str(dlkernels.explain(theirs.self_attn, x, x, x, need_weights=False))
    ours = dlkernels.patch(theirs)
    assert dlkernels.explain(ours, x).native
    ours.self_attn.__class__ = nn.MultiheadAttention
    assert "MultiheadAttention is not a layer of dlkernels" in str(dlkernels.explain(ours, x))


def test_autocast_and_mistakes() -> None:
    x, layer = torch.randn(B, T, E), TransformerEncoderLayer(E, H, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention_calls(layer, x)[0].q.dtype == torch.bfloat16
    for call in (lambda: layer(x, is_causal=True), lambda: dlkernels.explain(layer, x, is_causal=True)):
        with pytest.raises(RuntimeError, match="is_causal"):
            call()
    with pytest.raises(TypeError):
        dlkernels.explain(layer)
    attention = MultiheadAttention(E, H)
    with pytest.raises(AssertionError, match="batched"):
        dlkernels.explain(attention, x, x[0], x)
