"""Tests that `dlkernels.enable` serves the operator of torch's fast path, which nn.MultiheadAttention and
nn.TransformerEncoderLayer call in inference, and what it leaves to torch."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import dlkernels
from dlkernels.testing import assert_close_to_reference
from tests.support.enabled_calls import MARKS, served
from tests.support.enabled_calls import off_again as off_again
from tests.support.fresh_python import run_python
from tests.support.module_samples import ATTENTION, STACKS, build_theirs, samples, tensors

pytestmark = [
    *MARKS,
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:Support for mismatched"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage"),
]

OPERATOR = "_native_multi_head_attention"
B, T, E, H = 3, 9, 16, 4
RANDOM = torch.Generator().manual_seed(0)  # so that X does not depend on the modules that were imported before
X = torch.randn(B, T, E, generator=RANDOM)
LENGTHS = torch.tensor([9, 4, 1])
PADDING = torch.arange(T) >= LENGTHS[:, None]
CAUSAL = torch.ones(T, T, dtype=torch.bool).triu(1)
EACH_HEAD = (torch.rand(B * H, T, T, generator=RANDOM) > 0.6).index_fill(2, torch.tensor(0), False)


def attention() -> nn.Module:
    return nn.MultiheadAttention(E, H, batch_first=True).eval()


def layer(**kwargs: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(E, H, 24, batch_first=True, **kwargs).eval()


def randomised(module: nn.Module) -> nn.Module:
    """The module with biases and norms that are not 0 and 1."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


def of_attention(**kwargs: Any) -> tuple[Callable[[], nn.Module], Callable[..., Any]]:
    return attention, lambda module, x: module(x, x, x, need_weights=False, **kwargs)


def nested(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor([x[b, :length] for b, length in enumerate(LENGTHS.tolist())])


# How the module is made and called, and how often it then calls the operator.
CALLS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any], int]] = {
    "attention": (*of_attention(), 1),
    "attention, padding": (*of_attention(key_padding_mask=PADDING), 1),
    "attention, causal": (*of_attention(attn_mask=CAUSAL), 1),
    "attention, a mask of each head": (*of_attention(attn_mask=EACH_HEAD), 1),
    "attention, both masks": (*of_attention(attn_mask=CAUSAL, key_padding_mask=PADDING), 1),
    "attention, not contiguous": (
        attention, lambda m, x: m(y := x.mT.contiguous().mT, y, y, need_weights=False), 1
    ),
    "attention, nested": (attention, lambda m, x: m(y := nested(x), y, y, need_weights=False), 1),
    "layer": (layer, lambda m, x: m(x), 1),
    "layer, norm first, gelu": (lambda: layer(norm_first=True, activation="gelu"), lambda m, x: m(x), 1),
    "layer, padding": (layer, lambda m, x: m(x, src_key_padding_mask=PADDING), 1),
    "layer, causal": (layer, lambda m, x: m(x, src_mask=CAUSAL, is_causal=True), 1),
    "layer, nested": (layer, lambda m, x: m(nested(x)), 1),
    "encoder": (lambda: nn.TransformerEncoder(layer(), 2).eval(), lambda m, x: m(x), 2),
    "encoder, made nested": (
        lambda: nn.TransformerEncoder(layer(), 2).eval(), lambda m, x: m(x, src_key_padding_mask=PADDING), 2
    ),
}  # fmt: skip


def flat(result: Any) -> Tensor:
    found = result[0] if isinstance(result, tuple) else result
    return found.to_padded_tensor(0.0) if found.is_nested else found  # type: ignore[no-any-return]


def evaluated(call: Callable[..., Any], module: nn.Module, dtype: torch.dtype) -> Tensor:
    with torch.no_grad():
        return flat(call(module, X.to(dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_results(name: str, dtype: torch.dtype) -> None:
    make, call, calls = CALLS[name]
    module = randomised(make()).to(dtype)
    double = copy.deepcopy(module).double()
    expected, exact = evaluated(call, module, dtype), evaluated(call, double, torch.float64)
    with dlkernels.enable() as handle:
        found = evaluated(call, module, dtype)
    assert served(handle) == {OPERATOR: calls} and not handle.left, handle.report()
    assert "eager" not in handle.report()
    assert found.dtype == dtype and found.stride() == expected.stride()
    assert_close_to_reference(name, found, expected, exact, dtype)


@pytest.mark.parametrize("name", ATTENTION + STACKS)
def test_samples_of_torch(name: str) -> None:
    """None of torch's samples of nn.MultiheadAttention takes the fast path."""
    reached = 0
    for sample in samples(name, torch.float32, True):
        module = build_theirs(name, sample, torch.float32, False)
        args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
        with torch.no_grad():
            expected = tensors(module(*args, **kwargs))
            with dlkernels.enable() as handle:
                torch.testing.assert_close(tensors(module(*args, **kwargs)), expected)
        reached += OPERATOR in served(handle) or any(operator == OPERATOR for operator, _ in handle.left)
    assert bool(reached) == (name != "MultiheadAttention")


def run_operator(module: Any, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch._native_multi_head_attention(
        x, x, x, E, H, module.in_proj_weight, module.in_proj_bias, module.out_proj.weight, module.out_proj.bias, *rest
    )


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@pytest.mark.parametrize("mask_type", [0, 1, 2])
def test_kinds_of_masks(mask_type: int, kind: torch.dtype) -> None:
    """Every number that is not 0 hides a key, as in torch's kernel."""
    hidden = [CAUSAL, PADDING, EACH_HEAD.view(B, H, T, T)][mask_type]
    mask = hidden if kind == torch.bool else hidden * -0.25
    module = randomised(attention())
    with torch.no_grad():
        expected, none = run_operator(module, X, mask, False, True, mask_type)
        with dlkernels.enable() as handle:
            found, weights = run_operator(module, X, mask, False, True, mask_type)
    assert served(handle) == {OPERATOR: 1} and weights is none is None
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_modes_without_gradients(mode: Callable[[], Any]) -> None:
    module = layer().requires_grad_(False)
    with mode():
        expected = module(X)
        with dlkernels.enable() as handle:
            found = module(X)
    assert served(handle) == {OPERATOR: 1}
    torch.testing.assert_close(found, expected)
    assert found.is_inference() == expected.is_inference()


def dead_row() -> Any:
    return run_operator(attention(), X, PADDING.index_fill(0, torch.tensor(1), True), False, True, 1)


def under_autocast() -> Any:
    """torch.nn leaves the fast path there, but a program may call the operator by itself."""
    with torch.autocast("cpu", torch.bfloat16):
        return run_operator(attention(), X, None, False)


# What is left to torch: the call and the reason.
LEFT: dict[str, tuple[Callable[[], Any], str]] = {
    "weights": (lambda: attention()(X, X, X), "weights are asked for"),
    "a row that sees nothing": (dead_row, "nothing, for which torch gives NaN"),
    "two inputs": (
        lambda: torch._native_multi_head_attention(
            X, X + 1, X + 1, E, H, torch.ones(3 * E, E), torch.ones(3 * E), torch.ones(E, E), torch.ones(E), None, False
        ),
        "no self-attention",
    ),
    "complex numbers": (lambda: run_operator(attention().to(torch.complex64), X.cfloat(), None, False), "no kernel"),
    "under autocast, which makes three inputs of one": (under_autocast, "no self-attention"),
    "a batch of none": (lambda: run_operator(attention(), X[:0], None, False), "without elements"),
    "another dtype": (lambda: run_operator(attention(), X.double(), None, False), "differ in dtype"),
    "other features": (lambda: run_operator(attention(), X[..., 1:], None, False), "refused"),
    "no batch": (lambda: run_operator(attention(), X[0], None, False), "refused"),
    "a mask of another size": (lambda: run_operator(attention(), X, PADDING[:, 1:], False, True, 1), "refused"),
    "a mask without a type": (lambda: run_operator(attention(), X, PADDING, False), "refused"),
    "a mask beside nested": (lambda: run_operator(attention(), nested(X), PADDING, False, True, 1), "refused"),
}


def outcome(call: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        try:
            return tensors(call())
        except Exception as error:
            return type(error), str(error).splitlines()[0]


@pytest.mark.parametrize("name", LEFT)
def test_left_to_torch(name: str) -> None:
    call, reason = LEFT[name]
    expected = outcome(call)
    with dlkernels.enable() as handle:
        found = outcome(call)
    assert not handle.served and {reason in why for _, why in handle.left} == {True}, handle.report()
    if isinstance(expected, tuple):
        assert found == expected
    else:
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def usual_sizes(monkeypatch: pytest.MonkeyPatch, serve_small_calls: None) -> Iterator[None]:
    monkeypatch.undo()
    yield


@pytest.mark.usefixtures("usual_sizes")
@pytest.mark.parametrize("steps, dtype, dense, nested_alone", [
    (16, torch.float32, False, False), (64, torch.float32, True, True),
    (16, torch.bfloat16, False, False), (32, torch.bfloat16, True, False),
])  # fmt: skip
def test_small_calls(steps: int, dtype: torch.dtype, dense: bool, nested_alone: bool) -> None:
    """torch's kernel is faster for a few short sequences, but not for several nested ones."""
    module, x = attention().to(dtype), torch.randn(1, steps, E, dtype=dtype)
    one, two = (torch.nested.nested_tensor([x[0]] * count) for count in (1, 2))
    for given, ours in ((x, dense), (one, nested_alone), (two, True)):
        with torch.no_grad(), dlkernels.enable() as handle:
            module(given, given, given, need_weights=False)
        assert bool(handle.served) == ours, handle.report()
        assert {why for _, why in handle.left} == (set() if ours else {"faster in torch, as it is small"})


def test_training_takes_the_other_path() -> None:
    module = layer()
    with dlkernels.enable() as handle:
        module(X).sum().backward()
    assert served(handle) == {"scaled_dot_product_attention": 1}


@pytest.mark.usefixtures("scalar_machine")
def test_a_processor_without_vector_kernels() -> None:
    module = layer()
    with torch.no_grad():
        expected = module(X)
        with dlkernels.enable(recurrent=False) as handle:
            assert torch.equal(module(X), expected)
    assert list(handle.left) == [(OPERATOR, "only scalar kernels exist for this processor")] and not handle.served


def test_handles_in_any_order() -> None:
    module = layer()

    def is_served() -> bool:
        with dlkernels.enable(recurrent=False, attention=False) as counter, torch.no_grad():
            module(X)
        return bool(counter.served)

    first, second = dlkernels.enable(), dlkernels.enable(recurrent=False)
    first.disable()
    assert is_served()
    second.disable()
    assert not is_served()


def test_only_with_attention() -> None:
    with torch.no_grad(), dlkernels.enable(attention=False) as handle:
        layer()(X)
    assert not handle.served and not handle.left


def test_scripted_and_other_threads() -> None:
    module = layer()
    scripted = torch.jit.script(module)
    found: list[Tensor] = []

    def run() -> None:
        with torch.inference_mode():
            found.append(scripted(X))

    with torch.no_grad():
        expected = module(X)
    with dlkernels.enable() as handle:
        run()
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert served(handle) == {OPERATOR: 2}
    torch.testing.assert_close(found, [expected, expected])


def test_compiled() -> None:
    """A compiled graph has the operator in it, so that the switch decides when the graph runs."""
    module = layer()
    counter = CompileCounterWithBackend("inductor")
    torch._dynamo.reset()
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    with torch.no_grad():
        expected = module(X)
        for on in (False, True, False):
            with dlkernels.enable(attention=on) as handle:
                torch.testing.assert_close(compiled(X), expected)
            assert served(handle) == ({OPERATOR: 1} if on else {})
    torch._dynamo.reset()


def test_nothing_stays_registered() -> None:
    run_python("""
        import warnings
        warnings.simplefilter("error")
        import torch, dlkernels
        from torch import nn
        def registered():
            keys = ("CPU", "NestedTensorCPU")
            return [str(torch.library.get_kernel("aten::_native_multi_head_attention", key)) for key in keys]
        before = registered()
        module, x = nn.TransformerEncoderLayer(64, 4, batch_first=True).eval(), torch.randn(2, 64, 64)
        with torch.no_grad():
            expected = module(x)
            for _ in range(2):
                with dlkernels.enable() as handle, dlkernels.enable():
                    assert all(a != b for a, b in zip(before, registered()))
                    torch.testing.assert_close(module(x), expected)
                assert sum(handle.served.values()) == 1, handle.report()
                assert registered() == before
            assert torch.equal(module(x), expected)
    """)
