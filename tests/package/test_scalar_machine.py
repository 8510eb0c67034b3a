"""Tests what runs on a machine for which only scalar kernels exist: torch's operators, with the meaning of ours."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import dlkernels
import dlkernels.nn
from dlkernels import functional as DF
from dlkernels import reference
from dlkernels._core import extension, routing
from dlkernels.explain import explain
from dlkernels.info import info
from tests.support.fresh_python import ROOT, run_python
from tests.support.module_pairs import EVERY_KIND, Kind, flat, inputs_of, pair

pytestmark = [
    pytest.mark.usefixtures("scalar_machine"),
    pytest.mark.o0_skip(reason="it is about torch's operators"),
    pytest.mark.filterwarnings("ignore:dlkernels leaves layers and attention to torch"),
]
T, B, I, H = 5, 3, 4, 6
LAYERS: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 2}),
    ("LSTM", {"bias": False, "batch_first": True}),
    ("GRU", {"num_layers": 2, "bidirectional": True}),
    ("RNN", {"nonlinearity": "relu"}),
]
Q = torch.randn(2, 4, 7, 8, generator=torch.Generator().manual_seed(0))
LSE, SOFTCAP = {"return_lse": True}, {"softcap": 5.0}


def ran(call: Any) -> tuple[Any, str]:
    """The result of `call`, and "torch" or the name of our operator that ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = call()
    ours = {event.name for event in profile.events() if event.name.startswith("dlkernels::")}
    return result, ", ".join(ours - {"dlkernels::private_copy"}) or "torch"


def close(ours: Any, theirs: Any) -> None:
    for actual, expected in zip(flat(ours), flat(theirs), strict=True):
        torch.testing.assert_close(actual, expected)


def test_the_machine(native: Any) -> None:
    assert native.available_isas() == ["scalar"]
    assert extension.prefers_torch
    assert routing.is_for_torch(Q)


@EVERY_KIND
@pytest.mark.parametrize("how", ["built", "patched"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_layers_and_cells(kind: Kind, how: str, training: bool) -> None:
    theirs, ours = pair(kind, how)
    inputs = inputs_of(kind)
    with torch.set_grad_enabled(training):
        found, kernel = ran(lambda: ours(*inputs))
        expected = theirs(*inputs)
    assert kernel == "torch"
    close(found, expected)
    if training:
        gradients = [
            torch.autograd.grad(flat(result)[0].square().sum(), list(module.parameters()))
            for module, result in ((ours, found), (theirs, expected))
        ]
        close(*gradients)
    assert {layer.path for layer in explain(ours, *inputs).layers} <= {"torch"}


@pytest.mark.parametrize(("name", "options"), LAYERS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("hx", [False, True])
def test_stacks(name: str, options: dict[str, Any], packed: bool, hx: bool) -> None:
    theirs = getattr(torch.nn, name)(I, H, **options)
    ours = dlkernels.patch(theirs, copy=True)
    x: Any = torch.randn(B, T, I) if options.get("batch_first") else torch.randn(T, B, I)
    if packed:
        x = pack_padded_sequence(x, torch.tensor([5, 2, 4]), bool(options.get("batch_first")), enforce_sorted=False)
    states: Any = None
    if hx:
        hidden = theirs(x)[1]
        states = tuple(map(torch.ones_like, hidden)) if name == "LSTM" else torch.ones_like(hidden)
    (y, hidden), kernel = ran(lambda: ours(x, states))
    expected = theirs(x, states)
    assert kernel == "torch"
    close([y.data if packed else y, hidden], [expected[0].data if packed else expected[0], expected[1]])


def test_dropout_draws_the_masks_of_torch() -> None:
    theirs = torch.nn.GRU(I, H, 3, dropout=0.5)
    ours, x = dlkernels.patch(theirs, copy=True), torch.randn(T, B, I)
    results = []
    for layer in (ours, theirs):
        torch.manual_seed(1)
        results.append(layer(x))
    close(*results)
    close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("mode", ["lstm", "gru", "rnn"])
def test_functional(mode: str) -> None:
    layer = getattr(torch.nn, mode.upper())(I, H, 2)
    x, weights = torch.randn(T, B, I), list(layer.parameters())
    found, kernel = ran(lambda: getattr(DF, mode)(x, None, weights, num_layers=2))
    assert kernel == "torch"
    close(found, layer(x))
    cell = getattr(torch.nn, f"{mode.upper()}Cell")(I, H)
    found, kernel = ran(lambda: getattr(DF, f"{mode}_cell")(x[0], None, *cell.parameters()))
    assert kernel == "torch"
    close(found, cell(x[0]))


@pytest.mark.parametrize("given", ["lengths", "bptt_steps"])
def test_what_torchs_layers_lack(given: str) -> None:
    """It runs on our kernels, and explain says so."""
    layer, x = dlkernels.nn.LSTM(I, H), torch.randn(T, B, I)
    options: dict[str, Any] = {"lengths": torch.tensor([5, 2, 4])} if given == "lengths" else {"bptt_steps": 2}
    (y, _), kernel = ran(lambda: layer(x, **options))
    assert kernel == "dlkernels::lstm"
    (explained,) = explain(layer, x, **options).layers
    assert explained.kernel == "cpu/scalar/lstm"
    assert explained.reason.endswith(f"{routing.ONLY_SCALAR}, but torch's operator has no {given}=")
    if given == "lengths":
        packed = layer(pack_padded_sequence(x, options["lengths"], enforce_sorted=False))[0]
        torch.testing.assert_close(y[:2, 1], torch.nn.utils.rnn.pad_packed_sequence(packed)[0][:2, 1])


def test_mistakes_keep_their_errors() -> None:
    layer = dlkernels.nn.GRU(I, H)
    with pytest.raises(RuntimeError, match="input_size"):
        layer(torch.randn(T, B, I + 1))
    del layer.weight_hh_l0
    with pytest.raises(AttributeError, match="weight_hh_l0"):
        layer(torch.randn(T, B, I))
    with pytest.raises(RuntimeError, match="batch_sizes"):
        DF.gru(torch.randn(4, I), None, list(torch.nn.GRU(I, H).parameters()), batch_sizes=torch.tensor([2, 1]))


def test_transforms_and_compiled_code_stay_with_ours() -> None:
    layer, x = dlkernels.nn.GRU(I, H), torch.randn(2, T, B, I)
    close(torch.func.vmap(lambda one: layer(one)[0])(x), torch.stack([layer(one)[0] for one in x]))
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    found, kernel = ran(lambda: compiled(x[0]))
    assert "dlkernels::gru" in kernel
    close(found, layer(x[0]))


@pytest.mark.parametrize("options", [
    {}, {"causal": True}, {"causal": "bottom_right"}, {"softmax_scale": 0.3}, {"attn_mask": torch.rand(7, 5) < 0.7},
    {"attn_mask": torch.randn(2, 1, 7, 5)}, {"causal": True, "attn_mask": torch.rand(2, 1, 1, 5) < 0.5},
    {"causal": True, "attn_mask": torch.randn(4, 7, 5)},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_attention(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Values, gradients and second derivatives are those of the reference, rows that see nothing included."""
    q = Q.to(dtype).requires_grad_()
    k, v = (torch.randn(2, 2, 5, 8, dtype=dtype, requires_grad=True) for _ in range(2))
    o, kernel = ran(lambda: DF.attention(q, k, v, **options))
    assert kernel == "torch"
    assert explain(DF.attention, q, k, v, **options).kernel == "torch"
    mask = options.get("attn_mask")
    expected, _ = reference.attention(
        q, k, v, mask=None if mask is None else mask[(None,) * (4 - mask.dim())],
        softmax_scale=options.get("softmax_scale", 8**-0.5),
        causal={True: 1, "bottom_right": 2}.get(options.get("causal", False), 0),
    )  # fmt: skip
    rough = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(o, expected, **rough)
    firsts = [torch.autograd.grad(x.square().sum(), (q, k, v), create_graph=True) for x in (o, expected)]
    torch.testing.assert_close(*firsts, **rough)
    if dtype != torch.bfloat16:
        seconds = [torch.autograd.grad(sum(x.square().sum() for x in first), (q, k, v)) for first in firsts]
        torch.testing.assert_close(*seconds, rtol=1e-3, atol=1e-3)
    plain = torch.autograd.grad(DF.attention(q, k, v, **options).square().sum(), (q, k, v))
    torch.testing.assert_close(plain, firsts[1], **rough)


@pytest.mark.parametrize("hidden", [torch.nan, torch.inf])
def test_nothing_hidden_reaches_a_result(hidden: float) -> None:
    """torch multiplies it by 0, so such calls are ours."""
    k, mask = Q.clone(), torch.ones(7, 7, dtype=torch.bool)
    mask[:, 3] = False
    expected = DF.attention(Q, k, k, attn_mask=mask)
    k[:, :, 3] = hidden
    o, kernel = ran(lambda: DF.attention(Q, k, k, attn_mask=mask))
    assert kernel == "dlkernels::attention"
    torch.testing.assert_close(o, expected)
    layer = dlkernels.nn.MultiheadAttention(8, 2, batch_first=True)
    x, padding = torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)
    padding[:, 3:] = True
    clean = layer(x, x, x, padding, need_weights=False)[0]
    x[:, 3:] = hidden
    torch.testing.assert_close(layer(x, x, x, padding, need_weights=False)[0][:, :3], clean[:, :3])


@pytest.mark.parametrize("training", [False, True])
def test_queries_that_see_nothing(training: bool) -> None:
    layer, x = dlkernels.nn.MultiheadAttention(8, 2, batch_first=True).train(training), torch.randn(2, 5, 8)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1] = True
    with torch.set_grad_enabled(training):
        out = layer(x, x, x, padding, need_weights=False)[0]
    torch.testing.assert_close(out[1], layer.out_proj.bias.expand(5, 8))


@pytest.mark.parametrize(
    ("options", "missing"),
    [(LSE, "lse"), (SOFTCAP, "softcap"), ({"window": (2, 0)}, "window"), ({"sinks": torch.zeros(4)}, "sinks"),
     ({"alibi_slopes": torch.ones(4)}, "alibi_slopes")],
)  # fmt: skip
def test_what_torchs_attention_lacks(options: dict[str, Any], missing: str) -> None:
    _, kernel = ran(lambda: DF.attention(Q, Q, Q, **options))
    assert kernel == "dlkernels::attention"
    (explained,) = explain(DF.attention, Q, Q, Q, **options).layers
    assert explained.path == "native"
    assert explained.reason.endswith(f"torch's operator has no {missing}")


@pytest.mark.parametrize("masked", [False, True])
def test_packed_attention(masked: bool) -> None:
    """A call of torch for each sequence. The last row belongs to none."""
    q, k = torch.randn(9, 4, 8, requires_grad=True), torch.randn(8, 2, 8)
    ends_q = [0, 2, 3, 8] if masked else [0, 3, 3, 8]
    cu_q, cu_k = torch.tensor(ends_q, dtype=torch.int32), torch.tensor([0, 4, 6, 8], dtype=torch.int32)
    options = {"attn_mask": torch.randn(5, 4)} if masked else {"causal": True}
    given: Any = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, **options}
    o, kernel = ran(lambda: DF.attention(q, k, k, **given))
    assert kernel == "torch"
    extension.choose_isa("scalar")
    expected = DF.attention(q, k, k, **given)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x.square().sum(), q)[0] for x in (o, expected)))


def test_scaled_dot_product_attention() -> None:
    q = Q.clone().requires_grad_()
    o, kernel = ran(lambda: DF.scaled_dot_product_attention(q, q, q, is_causal=True))
    assert kernel == "torch"
    torch.testing.assert_close(o, torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True))
    assert explain(DF.scaled_dot_product_attention, q, q, q).kernel == "torch"
    (first,) = torch.autograd.grad(o.sum(), q, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), q)[0].isfinite().all()


def test_enable_leaves_everything_to_torch() -> None:
    layer, x = torch.nn.LSTM(I, H), torch.randn(T, B, I)
    with dlkernels.enable() as handle:
        layer(x)
        torch.nn.functional.scaled_dot_product_attention(Q, Q, Q)
    assert {why for _, why in handle.left} == {routing.ONLY_SCALAR}
    assert not handle.served


def test_it_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a warning, once; by info; by explain in the tests above."""
    monkeypatch.setattr(extension, "_announced", False)
    cell, x = dlkernels.nn.GRUCell(I, H), torch.randn(B, I)
    with pytest.warns(RuntimeWarning, match="only scalar kernels exist for this processor"):
        cell(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cell(x)
    found = info()
    assert found["isa"]["reason"].startswith(routing.ONLY_SCALAR)
    assert {row["reason"] for row in found["kernels"] if row["device"] == "cpu"} == {"for what torch's operators lack"}


def test_who_asks_for_the_scalar_kernels_gets_them() -> None:
    layer, x = dlkernels.nn.LSTM(I, H), torch.randn(T, B, I)
    extension.choose_isa("scalar")
    (y, _), kernel = ran(lambda: layer(x))
    assert kernel == "dlkernels::lstm"
    assert explain(layer, x).kernel == "cpu/scalar/lstm"
    extension.choose_isa(None)
    found, kernel = ran(lambda: layer(x)[0])
    assert kernel == "torch"
    torch.testing.assert_close(found, y)


REAL = """
import torch, dlkernels.nn
from dlkernels._core import extension
print(extension.native.build_info()["isas"], extension.prefers_torch)
layer, x = dlkernels.nn.LSTM(3, 4), torch.randn(2, 1, 3)
with torch.no_grad():
    layer(x)
print(dlkernels.explain(layer, x).kernel)
"""


@pytest.mark.heavy
def test_a_module_without_vector_kernels(tmp_path: Path) -> None:
    """A real one, as it is built for ARM: compiled without x86."""
    build = ROOT / "csrc" / "setup" / "native.py"
    module = tmp_path / "_C.so"
    subprocess.run(
        [sys.executable, build, "--opt", "0", "--out", module], check=True, capture_output=True,
        env={**os.environ, "CXXFLAGS": "-DDLK_NO_X86", "DLKERNELS_CUDA": "0"},
    )  # fmt: skip
    lines = run_python(REAL, DLKERNELS_NATIVE=str(module)).splitlines()
    assert lines == ["['scalar'] True", "torch"]
    lines = run_python(REAL, DLKERNELS_NATIVE=str(module), DLKERNELS_CPU_ISA="scalar").splitlines()
    assert lines == ["['scalar'] False", "cpu/scalar/lstm"]
