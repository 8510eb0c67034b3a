"""Compares the Transformer layers with torch.nn's, and tests that our attention runs and that dropout draws as
torch's."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dlkernels
from dlkernels.nn import MultiheadAttention, TransformerDecoderLayer, TransformerEncoderLayer
from tests.support.attention_modules import Spy, check, error_of, operators, spy, twin
from tests.support.instruction_sets import use_isa

__all__ = ["spy"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.o0_skip(reason="the layers are Python around functional.attention"),
]

B, T, S, E, H = 2, 5, 7, 8, 2
PADDING = torch.arange(S) >= torch.tensor([S, 4])[:, None]
OF_TORCH = {"aten::_transformer_encoder_layer_fwd", "aten::_native_multi_head_attention"}


def causal(length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(length, dtype=dtype)


def batch(length: int, batch_first: bool, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(B, length, E, dtype=dtype)
    return (x if batch_first else x.transpose(0, 1).contiguous()).requires_grad_()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_arguments(norm_first: bool, batch_first: bool, training: bool, best_isa: str) -> None:
    decoder_masks: list[dict[str, Any]] = [
        {}, {"tgt_key_padding_mask": PADDING[:, 2:]}, {"tgt_mask": causal(T, torch.float64), "tgt_is_causal": True},
        {"memory_key_padding_mask": PADDING, "memory_mask": torch.rand(T, S).lt(0.3)},
        {"memory_mask": causal(S, torch.float64)[:T], "memory_is_causal": True},
        {"tgt_mask": torch.rand(B * H, T, T) < 0.2},
    ]  # fmt: skip
    for activation, bias in itertools.product(["relu", "gelu", torch.tanh, nn.SiLU()], [True, False]):
        options: dict[str, Any] = {
            "activation": activation, "bias": bias, "batch_first": batch_first, "norm_first": norm_first,
            "dim_feedforward": 12, "dropout": 0.0, "layer_norm_eps": 1e-3, "dtype": torch.float64,
        }  # fmt: skip
        encoder = nn.TransformerEncoderLayer(E, H, **options).train(training)
        decoder = nn.TransformerDecoderLayer(E, H, **options).train(training)
        with use_isa(best_isa):
            for masks in (
                {}, {"src_key_padding_mask": PADDING}, {"src_mask": causal(S, torch.float64), "is_causal": True},
                {"src_mask": torch.rand(S, S) < 0.1, "src_key_padding_mask": PADDING},
            ):  # fmt: skip
                check(twin(encoder), encoder, torch.float64, batch(S, batch_first), **masks)
            for masks in decoder_masks:
                args = (batch(T, batch_first), batch(S, batch_first))
                check(twin(decoder), decoder, torch.float64, *args, **masks)
            check(twin(encoder), encoder, torch.float64, batch(S, True)[0])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_dropout_draws_what_torch_draws(norm_first: bool, batch_first: bool) -> None:
    """With attention dropout 0, the dropout masks of several layers are bit-equal to torch's."""
    options: dict[str, Any] = {"batch_first": batch_first, "norm_first": norm_first, "dtype": torch.float64}
    theirs = nn.Transformer(E, H, 2, 2, 16, 0.4, **options)
    for module in theirs.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    ours = twin(theirs)
    src, tgt = batch(S, batch_first), batch(T, batch_first)
    results = []
    for model in (ours, theirs):
        torch.manual_seed(11)
        out = model(src, tgt, tgt_mask=causal(T, torch.float64))
        results.append([out, *torch.autograd.grad(out.square().sum(), [src, tgt, *model.parameters()])])
        results[-1].append(torch.rand(3))  # equal only if both leave the generator in the same state
    torch.testing.assert_close(results[0], results[1])
    assert torch.equal(results[0][0] == 0, results[1][0] == 0)


def test_attention_dropout_is_the_same_in_expectation() -> None:
    ours = twin(nn.TransformerEncoderLayer(E, H, 16, 0.3, batch_first=True))
    x = torch.randn(1, S, E)
    torch.manual_seed(1)
    first = ours(x)
    torch.manual_seed(1)
    assert torch.equal(ours(x), first)
    assert not torch.equal(ours(x), first)


@pytest.mark.parametrize("layers", [1, 3])
def test_encoder_in_inference_runs_our_attention(layers: int, spy: Spy) -> None:
    """With eval, no_grad and a padding mask torch.nn.TransformerEncoder passes nested tensors to its layers, and
    torch's own layers take their fast path."""
    theirs = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 16, batch_first=True), layers).eval()
    ours = twin(theirs)
    assert ours.enable_nested_tensor
    assert ours.use_nested_tensor
    x = torch.randn(B, S, E)
    with torch.no_grad():
        with operators() as of_torch:
            expected = theirs(x, src_key_padding_mask=PADDING)
        assert "aten::_transformer_encoder_layer_fwd" in of_torch.names
        assert "aten::_nested_tensor_from_mask" in of_torch.names
        assert not spy.calls
        with operators() as of_ours:
            found = ours(x, src_key_padding_mask=PADDING)
    assert "aten::_nested_tensor_from_mask" in of_ours.names
    assert not of_ours.names & OF_TORCH
    assert not any("scaled_dot_product" in name for name in of_ours.names)
    assert len(spy.calls) == layers
    for call in spy.calls:
        assert call["cu_seqlens_q"].tolist() == [0, S, S + 4]
        assert call["q"].shape == (S + 4, H, E // H)
    torch.testing.assert_close(found, expected)
    assert not found[PADDING].any()


def test_the_operator_itself_runs(native: Any) -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 16, batch_first=True), 2).eval()
    dlkernels.patch(encoder)
    with torch.no_grad(), operators() as seen:
        encoder(torch.randn(B, S, E), src_key_padding_mask=PADDING)
    assert "dlkernels::attention" in seen.names
    with operators() as seen:
        encoder.train()(torch.randn(B, S, E), src_key_padding_mask=PADDING).sum().backward()
    assert {"dlkernels::attention", "dlkernels::attention_backward"} <= seen.names


@pytest.mark.parametrize(
    "masks",
    [{}, {"mask": causal(S)}, {"mask": causal(S), "src_key_padding_mask": PADDING},
     {"src_key_padding_mask": PADDING.flip(1)}, {"mask": causal(S), "is_causal": True}],
    ids=["none", "causal", "both", "padding at the left", "hint"],
)  # fmt: skip
def test_encoder_in_inference_with_other_masks(masks: dict[str, Tensor], spy: Spy) -> None:
    theirs = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 16, batch_first=True), 2).eval()
    x = torch.randn(B, S, E)
    with torch.no_grad():
        torch.testing.assert_close(twin(theirs)(x, **masks), theirs(x, **masks))
    assert len(spy.calls) == 2
    assert all(call.get("cu_seqlens_q") is None for call in spy.calls)


def test_our_layers_in_torchs_stacks(spy: Spy) -> None:
    encoder = nn.TransformerEncoder(TransformerEncoderLayer(E, H, 16, batch_first=True), 2, nn.LayerNorm(E)).eval()
    decoder = nn.TransformerDecoder(TransformerDecoderLayer(E, H, 16, batch_first=True), 2).eval()
    model = nn.Transformer(E, H, custom_encoder=encoder, custom_decoder=decoder, batch_first=True)
    assert encoder.use_nested_tensor
    with torch.no_grad():
        x = torch.randn(B, S, E)
        options = {"src_key_padding_mask": PADDING, "memory_key_padding_mask": PADDING, "tgt_mask": causal(S)}
        out = model.eval()(x, x, **options)
    assert len(spy.calls) == 2 + 4
    native = copy.deepcopy(model)
    for module in native.modules():
        for ours, theirs in (
            (TransformerEncoderLayer, nn.TransformerEncoderLayer),
            (TransformerDecoderLayer, nn.TransformerDecoderLayer),
            (MultiheadAttention, nn.MultiheadAttention),
        ):
            if type(module) is ours:
                module.__class__ = theirs
    with torch.no_grad():
        torch.testing.assert_close(out, native(x, x, **options))
    assert len(spy.calls) == 2 + 4


@pytest.mark.parametrize("layer", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_state(layer: str) -> None:
    torch.manual_seed(7)
    theirs = getattr(nn, layer)(E, H, 16, 0.0, norm_first=True)
    torch.manual_seed(7)
    ours = getattr(dlkernels.nn, layer)(E, H, 16, 0.0, norm_first=True)
    assert isinstance(ours, getattr(nn, layer))
    assert type(ours.self_attn) is MultiheadAttention
    assert repr(ours) == repr(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    args = [torch.randn(S, B, E)] * (1 if "Encoder" in layer else 2)
    expected = ours(*args)
    saved = io.BytesIO()
    torch.save(ours, saved)
    saved.seek(0)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(saved, weights_only=False)):
        assert type(again) is type(ours)
        assert torch.equal(again(*args), expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compile(training: bool, backend: str) -> None:
    torch.compiler.reset()
    model = nn.Transformer(E, H, 1, 1, 16, 0.0, batch_first=True).train(training)
    dlkernels.patch(model)
    src, tgt = torch.randn(B, S, E, requires_grad=True), torch.randn(B, T, E)
    options = {
        "src_key_padding_mask": PADDING, "memory_key_padding_mask": PADDING, "tgt_mask": causal(T),
        "src_is_causal": False, "tgt_is_causal": True,  # otherwise torch.nn reads the mask's values
    }  # fmt: skip
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    found, expected = compiled(src, tgt, **options), model(src, tgt, **options)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), src) for y in (found, expected)))


def test_export(native: Any) -> None:
    model = dlkernels.patch(nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 16, batch_first=True), 2).eval())
    x, options = torch.randn(B, S, E), {"src_key_padding_mask": PADDING}
    with torch.no_grad():
        exported = torch.export.export(model, (x,), options)
        targets = [str(node.target) for node in exported.graph.nodes]
        assert targets.count("dlkernels.attention.default") == 2
        found, expected = exported.module()(x, **options), model(x, **options)
    torch.testing.assert_close(found[~PADDING], expected[~PADDING])  # eager mode skips padding and returns 0


def mistakes() -> dict[str, dict[str, Any]]:
    x = torch.randn(S, B, E)
    found: dict[str, dict[str, Any]] = {"hint without mask": {"is_causal": True}}
    for name, value in (("None", None), ("list", [[1.0]]), ("int", x.long()), ("double", x.double()), ("1-D", x[0, 0]),
                        ("4-D", x[None]), ("features", x[..., :3])):  # fmt: skip
        found[f"x {name}"] = {"x": value}
    for name, mask in (("padding", PADDING), ("mask", causal(S))):
        found |= {
            f"{name} list": {name: mask.tolist()}, f"{name} int": {name: mask.long()},
            f"{name} 1-D": {name: mask[0]}, f"{name} 4-D": {name: mask[None, None]}, f"{name} rows": {name: mask[:1]},
            f"{name} columns": {name: mask[:, :3]}, f"{name} half": {name: mask.half()},
        }  # fmt: skip
    return found


def encoder_call(layer: nn.Module, given: dict[str, Any]) -> Callable[[], Any]:
    names = {"x": "src", "padding": "src_key_padding_mask", "mask": "src_mask", "is_causal": "is_causal"}
    x = torch.randn(S, B, E)
    return lambda: layer(**{"src": x, **{names[name]: value for name, value in given.items()}})


def decoder_call(layer: nn.Module, given: dict[str, Any], of: str) -> Callable[[], Any]:
    x = torch.randn(S, B, E)
    names = {"x": of, "padding": f"{of}_key_padding_mask", "mask": f"{of}_mask", "is_causal": f"{of}_is_causal"}
    return lambda: layer(**{"tgt": x, "memory": x, **{names[name]: value for name, value in given.items()}})


@pytest.mark.parametrize("norm_first", [True, False])
def test_mistakes(norm_first: bool) -> None:
    encoder = nn.TransformerEncoderLayer(E, H, 16, norm_first=norm_first)
    decoder = nn.TransformerDecoderLayer(E, H, 16, norm_first=norm_first)
    calls: dict[str, tuple[nn.Module, Callable[[nn.Module], Callable[[], Any]]]] = {}
    for name, given in mistakes().items():
        calls[f"src {name}"] = (encoder, lambda m, given=given: encoder_call(m, given))
        for of in ("tgt", "memory"):
            calls[f"{of} {name}"] = (decoder, lambda m, given=given, of=of: decoder_call(m, given, of))
    different, raised = {}, 0
    for name, (theirs, call) in calls.items():
        expected, found = error_of(call(theirs)), error_of(call(twin(theirs)))
        raised += expected is not None
        if found is not expected:
            different[name] = (found, expected)
    assert not different
    assert raised > 50


@pytest.mark.parametrize("layer", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_bad_construction(layer: str) -> None:
    for args, kwargs in (
        ((4, 3), {}), ((0, 1), {}), ((4, 0), {}), ((4, 2, -1), {}), ((4, 2, 8, 1.5), {}), ((4, 2, 8, 0.1, "tanh"), {}),
        ((4,), {}), ((4, 2), {"device": "nowhere"}), ((4, 2), {"dtype": torch.int64}), ((4, 2), {"more": 1}),
    ):  # fmt: skip
        ours = error_of(lambda a=args, k=kwargs: getattr(dlkernels.nn, layer)(*a, **k))
        assert ours is error_of(lambda a=args, k=kwargs: getattr(nn, layer)(*a, **k)) is not None, (args, kwargs)


def test_hint_without_mask_is_an_error_in_inference_too() -> None:
    layer = TransformerEncoderLayer(E, H, 16, batch_first=True).eval()
    with torch.no_grad(), pytest.raises(RuntimeError, match="is_causal"):
        layer(torch.randn(B, S, E), is_causal=True)


def test_activation_of_any_kind_with_nested_input() -> None:
    layer = TransformerEncoderLayer(E, H, 16, 0.0, activation=F.gelu, batch_first=True, norm_first=True)
    x = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(5, E)])
    alone = [layer(part[None])[0] for part in x.unbind()]
    torch.testing.assert_close(list(layer(x).unbind()), alone)
