"""FlopCounterMode counts as many operations for our operators as for torch.nn's."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import dlkernels
from tests.support.fresh_python import run_python
from tests.support.module_pairs import KINDS, LAYERS, B, F, T, flat, inputs_of


def flops(module: nn.Module, inputs: Any, output: Callable[[Any], Tensor]) -> tuple[int, int]:
    """Returns the operations of forward and backward. oneDNN is off, because torch counts 0 for its LSTM operator."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter:
            result = output(module(*inputs))
            forward = counter.get_total_flops()
            result.sum().backward(retain_graph=True)  # all calls share the graph that packed the sequence
        return forward, counter.get_total_flops() - forward
    finally:
        torch._C._set_mkldnn_enabled(before)


VARIANTS: list[dict[str, Any]] = [
    {}, {"bias": False}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True}, {"proj_size": 2},
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), [
    (name, options) for name, options in itertools.product(LAYERS, VARIANTS)
    if name == "LSTM" or "proj_size" not in options
])  # fmt: skip
@pytest.mark.parametrize("with_gradient", [True, False])
def test_flops_of_layers(name: str, options: dict[str, Any], with_gradient: bool) -> None:
    x = torch.randn(T, B, F, requires_grad=with_gradient)
    directions = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    batch = T if options.get("batch_first") else B
    h = torch.randn(directions, batch, options.get("proj_size", 6), requires_grad=with_gradient)
    c = torch.randn(directions, batch, 6, requires_grad=with_gradient)
    packed = pack_padded_sequence(x, torch.tensor([5, 3, 2]))
    calls = (
        ((x,), lambda result: result[0]),
        ((x, (h, c) if name == "LSTM" else h), lambda result: result[0]),
        ((packed,), lambda result: result[0].data),
    )
    theirs, ours = (getattr(lib, name)(F, 6, **options) for lib in (nn, dlkernels.nn))
    for inputs, output in calls:
        expected = flops(theirs, inputs, output)
        assert min(expected) > 0
        assert flops(ours, inputs, output) == expected


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize("with_state", [True, False])
def test_flops_of_cells(name: str, with_gradient: bool, with_state: bool) -> None:
    x = torch.randn(B, F, requires_grad=with_gradient)
    h = torch.randn(B, 6, requires_grad=with_gradient)
    inputs = (x, (h, h) if name == "LSTMCell" else h) if with_state else (x,)
    expected = flops(getattr(nn, name)(F, 6), inputs, lambda result: flat(result)[0])
    assert min(expected) > 0
    assert flops(getattr(dlkernels.nn, name)(F, 6), inputs, lambda result: flat(result)[0]) == expected


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flops_of_attention(kv_heads: int) -> None:
    q, k, v = ((B, 4, 7, 8), (B, kv_heads, 9, 8), (B, kv_heads, 9, 5))
    tensors = [torch.randn(shape, requires_grad=True) for shape in (q, k, v)]
    with FlopCounterMode(display=False) as counter:
        o = dlkernels.functional.attention(*tensors)
        forward = counter.get_total_flops()
        o.sum().backward()
    assert forward == sdpa_flop_count(q, k, v)
    assert counter.get_total_flops() - forward == sdpa_backward_flop_count((B, 4, 7, 5), q, k, v)
    with FlopCounterMode(display=False) as counter:
        dlkernels.functional.attention_map(*tensors[:2], rows=2, cols=2)
    assert counter.get_total_flops() == 2 * B * 4 * 7 * 9 * 8


def test_flops_of_packed_attention() -> None:
    lengths = [3, 1, 4]
    cu = torch.tensor([0, 3, 4, 8], dtype=torch.int32)
    q = torch.randn(8, 2, 6, requires_grad=True)
    shapes = [(1, 2, n, 6) for n in lengths]
    with FlopCounterMode(display=False) as counter:
        o = dlkernels.functional.attention(q, q, q, cu_seqlens_q=cu, cu_seqlens_k=cu)
        forward = counter.get_total_flops()
        o.sum().backward()
    assert forward == sum(sdpa_flop_count(s, s, s) for s in shapes)
    assert counter.get_total_flops() - forward == sum(sdpa_backward_flop_count(s, s, s, s) for s in shapes)


@pytest.mark.parametrize("name", ["MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_flops_of_attention_modules(name: str) -> None:
    """torch counts nothing for its fused attention on the CPU, so ours is compared with its unfused attention."""
    kind = next(kind for kind in KINDS if kind.name == name)
    inputs = inputs_of(kind)
    options = {"need_weights": False} if name == "MultiheadAttention" else {}
    counts = []
    for lib in (nn, dlkernels.nn):
        module = kind.make(lib)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            result = flat(module(*inputs, **options))[0]
            forward = counter.get_total_flops()
            result.sum().backward()
        counts.append((forward, counter.get_total_flops() - forward))
    # Our backward computes five products. The unfused one computes four, because it does not recompute the scores.
    attentions = 2 if name == "TransformerDecoderLayer" else 1
    assert counts[1] == (counts[0][0], counts[0][1] + attentions * 2 * B * 2 * T * T * (F // 2))


def test_the_counter_may_be_imported_before_the_package_or_after_it() -> None:
    for order in ("import dlkernels; from torch.utils import flop_counter",
                  "from torch.utils import flop_counter; import dlkernels"):  # fmt: skip
        run_python(f"""
import sys, torch
{order}
with flop_counter.FlopCounterMode(display=False) as counter:
    dlkernels.nn.RNNCell(3, 5)(torch.zeros(2, 3))
    dlkernels.functional.attention(*torch.zeros(3, 1, 1, 4, 8))
assert counter.get_total_flops() == 2 * 2 * (3 * 5 + 5 * 5) + 2 * 2 * 4 * 4 * 8
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("dlkernels")]
""")


def test_flops_of_a_layer_without_input_features() -> None:
    weights = [torch.zeros(16, 0), torch.zeros(16, 4)]
    with FlopCounterMode(display=False) as counter:
        dlkernels.functional.lstm(torch.zeros(5, 2, 0), None, weights)
    assert counter.get_total_flops() == 2 * 5 * 2 * 16 * 4
