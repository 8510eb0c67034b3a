"""Code around our layers, such as a replaced self_attn, hooks or overridden blocks, receives the masks that torch.nn
would pass."""

from __future__ import annotations

import copy
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import dlkernels
from dlkernels.functional import attention, attention_map
from dlkernels.nn import MultiheadAttention
from tests.support.attention_modules import twin

pytestmark = [
    pytest.mark.filterwarnings("ignore:Lower right causal bias will produce NaNs"),
    pytest.mark.o0_skip(reason="the layers are Python around functional.attention"),
]

B, T, S, E, H = 2, 5, 7, 8, 2
PADDING = torch.arange(S) >= torch.tensor([S, 4])[:, None]
MASK = torch.rand(S, S) < 0.2
FLOAT = MASK.double() * -1.5

Call = tuple[tuple[Any, ...], dict[str, Any]]


def spy_on(module: nn.Module, method: str, seen: list[Any]) -> None:
    """Replaces a method of the instance by one that records its arguments and calls the original."""
    original = getattr(module, method)

    def recorded(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        return original(*args, **kwargs)

    setattr(module, method, types.MethodType(recorded, module))


class Replacement(nn.Module):
    """A user's own attention module with the attributes that the layer reads."""

    def __init__(self, seen: list[Any], original: nn.MultiheadAttention) -> None:
        super().__init__()
        self.seen, self.original = seen, original
        self.batch_first, self._qkv_same_embed_dim = original.batch_first, True
        self.num_heads, self.in_proj_bias = original.num_heads, original.in_proj_bias

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.seen.append((args, kwargs))
        for name in ("attn_mask", "key_padding_mask"):
            if kwargs[name] is not None and kwargs[name].is_floating_point():
                kwargs[name] = kwargs[name] + 0.25 * torch.arange(S)
        return self.original(*args, **kwargs)


def pre_hook(layer: nn.Module, seen: list[Any]) -> None:
    layer.self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args, dict(kwargs))), with_kwargs=True
    )


def hook(layer: nn.Module, seen: list[Any]) -> None:
    layer.self_attn.register_forward_hook(
        lambda module, args, kwargs, out: seen.append((args, dict(kwargs))), with_kwargs=True
    )


def replaced(layer: nn.Module, seen: list[Any]) -> None:
    layer.self_attn = Replacement(seen, layer.self_attn)


def subclassed(layer: nn.Module, seen: list[Any]) -> None:
    base: Any = type(layer.self_attn)

    class Own(base):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            seen.append((args, dict(kwargs)))
            return super().forward(*args, **kwargs)

    layer.self_attn.__class__ = Own


def own_block(layer: nn.Module, seen: list[Any]) -> None:
    base: Any = type(layer)

    class Own(base):  # type: ignore[misc]
        def _sa_block(self, x: Tensor, attn_mask: Any, key_padding_mask: Any, is_causal: bool = False) -> Tensor:
            seen.append(((x, attn_mask, key_padding_mask), {"is_causal": is_causal}))
            if attn_mask is not None:
                attn_mask = attn_mask + 0.5
            return super()._sa_block(x, attn_mask, key_padding_mask, is_causal)  # type: ignore[no-any-return]

    layer.__class__ = Own


WAYS: dict[str, Callable[[nn.Module, list[Any]], None]] = {
    "pre-hook": pre_hook, "hook": hook, "replaced self_attn": replaced, "subclass of the attention": subclassed,
    "_sa_block of a subclass": own_block,
    "_sa_block of the instance": lambda layer, seen: spy_on(layer, "_sa_block", seen),
    "forward of the attention": lambda layer, seen: spy_on(layer.self_attn, "forward", seen),
}  # fmt: skip
MASKS: dict[str, dict[str, Any]] = {
    "none": {}, "padding": {"src_key_padding_mask": PADDING}, "mask": {"src_mask": MASK},
    "both": {"src_mask": MASK, "src_key_padding_mask": PADDING}, "additive mask": {"src_mask": FLOAT},
    "mixed": {"src_mask": FLOAT, "src_key_padding_mask": PADDING},
    "mixed the other way": {"src_mask": MASK, "src_key_padding_mask": PADDING.double() * -9},
    "hint": {"src_mask": torch.ones(S, S).triu(1).bool(), "is_causal": True},
}  # fmt: skip


def flat(seen: list[Call]) -> list[Any]:
    values: list[Any] = []
    for args, kwargs in seen:
        for value in (*args, *(item for pair in sorted(kwargs.items()) for item in pair)):
            values.append((value.dtype, value.detach()) if isinstance(value, Tensor) else value)
    return values


def run(layer: nn.Module, x: Tensor, options: dict[str, Any]) -> tuple[list[Any], list[str]]:
    x = x.detach().requires_grad_()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = layer(x, **options)
    return [out, *torch.autograd.grad(out.square().sum(), x)], [str(w.message) for w in caught]


def compare(theirs: nn.Module, ours: nn.Module, way: Any, x: Tensor, options: dict[str, Any]) -> None:
    theirs, ours = copy.deepcopy(theirs), copy.deepcopy(ours)
    seen: tuple[list[Call], list[Call]] = ([], [])
    way(theirs, seen[0])
    way(ours, seen[1])
    expected, found = run(theirs, x, options), run(ours, x, options)
    torch.testing.assert_close(found[0], expected[0])
    assert found[1] == expected[1]
    assert len(seen[0]) == len(seen[1]) > 0
    a, b = flat(seen[0]), flat(seen[1])
    assert len(a) == len(b)
    for mine, other in zip(b, a, strict=True):
        if isinstance(other, tuple):
            assert mine[0] == other[0]
            torch.testing.assert_close(mine[1], other[1])
        else:
            assert mine == other and type(mine) is type(other)


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("way", WAYS)
def test_encoder_layer(way: str, masks: str) -> None:
    theirs = nn.TransformerEncoderLayer(E, H, 16, 0.0, batch_first=True, dtype=torch.float64)
    ours = twin(theirs)
    compare(theirs, ours, WAYS[way], torch.randn(B, S, E, dtype=torch.float64), MASKS[masks])


def test_global_hooks() -> None:
    theirs = nn.TransformerEncoderLayer(E, H, 16, 0.0, batch_first=True, dtype=torch.float64)
    found = []
    for layer in (theirs, twin(theirs)):
        seen: list[Any] = []
        handle = nn.modules.module.register_module_forward_pre_hook(lambda module, args, seen=seen: seen.append(args))
        out = layer(torch.ones(B, S, E, dtype=torch.float64), src_key_padding_mask=PADDING)
        handle.remove()
        found.append((len(seen), out))
    # A global hook gets no keyword arguments, which the masks are, so only the number of calls is compared.
    assert found[0][0] == found[1][0] > 1
    torch.testing.assert_close(found[1][1], found[0][1])


def test_untouched_layers_keep_boolean_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = []
    original = MultiheadAttention._attend

    def attend(self: Any, *args: Any, **options: Any) -> Any:
        kinds.append(options["attn_mask"].dtype)
        return original(self, *args, **options)

    monkeypatch.setattr(MultiheadAttention, "_attend", attend)
    layer = dlkernels.nn.TransformerEncoderLayer(E, H, 16, batch_first=True)
    x = torch.randn(B, S, E)
    layer(x, src_key_padding_mask=PADDING)
    handle = layer.self_attn.register_forward_pre_hook(lambda *_: None)
    layer(x, src_key_padding_mask=PADDING)
    handle.remove()
    layer(x, src_key_padding_mask=PADDING)
    assert kinds == [torch.bool, torch.float32, torch.bool]


DECODER_MASKS: dict[str, dict[str, Any]] = {
    "none": {}, "padding": {"tgt_key_padding_mask": PADDING[:, 2:], "memory_key_padding_mask": PADDING},
    "masks": {"tgt_mask": MASK[:T, :T], "memory_mask": MASK[:T]},
    "additive": {"tgt_mask": FLOAT[:T, :T], "memory_mask": FLOAT[:T]},
    "mixed": {"memory_mask": FLOAT[:T], "memory_key_padding_mask": PADDING},
    "hint": {"tgt_mask": torch.ones(T, T).triu(1).bool(), "tgt_is_causal": True},
}  # fmt: skip


@pytest.mark.parametrize("masks", DECODER_MASKS)
@pytest.mark.parametrize("norm_first", [True, False])
def test_decoder_layer(norm_first: bool, masks: str) -> None:
    theirs = nn.TransformerDecoderLayer(E, H, 16, 0.0, batch_first=True, norm_first=norm_first, dtype=torch.float64)
    memory = torch.randn(B, S, E, dtype=torch.float64)

    def way(layer: nn.Module, seen: list[Any]) -> None:
        for module, method in ((layer, "_sa_block"), (layer, "_mha_block"), (layer.self_attn, "forward"),
                               (layer.multihead_attn, "forward")):  # fmt: skip
            spy_on(module, method, seen)

    options = {"memory": memory, **DECODER_MASKS[masks]}
    compare(theirs, twin(theirs), way, torch.randn(B, T, E, dtype=torch.float64), options)


@pytest.mark.parametrize("sizes", [(4, 6), (5, 5), (6, 4)])
@pytest.mark.parametrize("bias", [causal_upper_left, causal_lower_right])
def test_causal_bias(bias: Any, sizes: tuple[int, int]) -> None:
    """attn_mask may be a CausalBias of torch.nn.attention.bias."""
    m, n = sizes
    q, k = torch.randn(B, H, m, E, dtype=torch.float64, requires_grad=True), torch.randn(B, H, n, E).double()
    mask, causal = bias(m, n), "top_left" if bias is causal_upper_left else "bottom_right"
    found = attention(q, k, k, attn_mask=mask)
    visible = mask.variant.name == "UPPER_LEFT" or m <= n  # otherwise torch returns NaN and warns
    if visible:
        theirs = nn.functional.scaled_dot_product_attention(q, k, k, attn_mask=mask)
        torch.testing.assert_close(found, theirs)
        torch.testing.assert_close(*(torch.autograd.grad(o.square().sum(), q) for o in (found, theirs)))
    assert torch.equal(found, attention(q, k, k, causal=causal))  # type: ignore[arg-type]
    options: dict[str, Any] = {"rows": m, "cols": n}
    assert torch.equal(attention_map(q, k, attn_mask=mask, **options), attention_map(q, k, causal=causal, **options))
    with torch.autocast("cpu", torch.bfloat16):
        half = q.detach().float()
        assert torch.equal(attention(half, half, half, attn_mask=bias(m, m)), attention(half, half, half, causal=True))


@pytest.mark.parametrize("function", ["attention", "attention_map"])
def test_causal_bias_compiled(function: str) -> None:
    torch._dynamo.reset()
    q, k, mask = torch.randn(B, H, 4, E), torch.randn(B, H, 6, E), causal_lower_right(4, 6)
    call: Any = attention_map if function == "attention_map" else lambda q, k, **kw: attention(q, k, k, **kw)
    compiled = torch.compile(lambda q, k, mask: call(q, k, attn_mask=mask), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, mask), call(q, k, causal="bottom_right"))
    torch._dynamo.reset()


def test_causal_bias_that_does_not_fit() -> None:
    q, k = torch.randn(1, 1, 4, E), torch.randn(1, 1, 6, E)
    with pytest.raises(
        RuntimeError, match=r"attn_mask: expected a CausalBias for 4 queries and 6 keys, got .* 6 and 4"
    ):
        attention(q, k, k, attn_mask=causal_upper_left(6, 4))
    with pytest.raises(ValueError, match="causal: expected False, as attn_mask is a CausalBias, got 'top_left'"):
        attention(q, k, k, attn_mask=causal_upper_left(4, 6), causal="top_left")
    with pytest.raises(RuntimeError, match="4 queries and 6 keys"):
        attention_map(q, k, attn_mask=causal_lower_right(4, 4))
    cu = torch.tensor([0, 4])
    rows = torch.randn(4, 1, E)
    with pytest.raises(ValueError, match="attn_mask: expected None with cu_seqlens, got CausalBias"):
        attention(rows, rows, rows, cu_seqlens_q=cu, cu_seqlens_k=cu, attn_mask=causal_upper_left(4, 4))
