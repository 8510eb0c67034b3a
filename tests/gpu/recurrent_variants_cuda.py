"""Tests layer normalisation, zoneout and recurrent dropout of the recurrent layers on a CUDA device, by the cases of
the CPU (tests/rnn/test_variants.py). Run in the same way as recurrent_cuda.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from device import EMULATED, no_host_sync
from device import replayable as replayable_on_device
from recurrent_cases import DTYPES, with_cuda_kernels
from timing import DEVICE
from torch import Tensor
from turns import ON_GPU, first_shard, mine

import dlkernels
from dlkernels._core.routing import no_kernel
from dlkernels.rnn.operators import sequence as sequence_operators
from dlkernels.testing import error
from tests.support.variant_cases import FORMS, SEED, check, in_form, results, variants

VARIANTS = {name: replace(case, device=DEVICE) for name, case in variants().items()}
SOME = ("LayerNormLSTM-all", "LayerNormGRU-all", "LSTM-zoneout-rates", "GRU-dropout")
# T, B, I, H: parts without variance, threads with several units, and sums over several segments of rows.
SIZES = {"one": (3, 2, 1, 1), "wide": (2, 2, 3, 520), "many": (3, 24, 4, 9)}
# The emulation is slow: there each variant has one of the forms and one 16-bit dtype.
IN_FORMS = [
    (variant, form)
    for i, variant in enumerate(VARIANTS)
    for k, form in enumerate(FORMS)
    if ON_GPU or (i + k + 1) % len(FORMS) == 0
]
IN_DTYPES = [
    (variant, dtype) for i, variant in enumerate(VARIANTS) for k, dtype in enumerate(DTYPES) if ON_GPU or k == 1 + i % 2
]


@pytest.mark.parametrize(("variant", "form"), [pair for i, pair in enumerate(IN_FORMS) if mine(i)])
def test_layers_equal_the_oracle(variant: str, form: str) -> None:
    check(replace(in_form(VARIANTS[variant], form), dtype=torch.float32))


@pytest.mark.parametrize(("variant", "dtype"), [pair for i, pair in enumerate(IN_DTYPES) if mine(i)])
def test_every_dtype(variant: str, dtype: torch.dtype) -> None:
    check(replace(VARIANTS[variant], dtype=dtype, H=33, I=20, T=8))


@first_shard
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", SOME[:2])
def test_sizes(variant: str, size: str) -> None:
    T, B, I, H = SIZES[size]
    check(replace(VARIANTS[variant], T=T, B=B, I=I, H=H, dtype=torch.float32, bidirectional=True))


@first_shard
@pytest.mark.parametrize("form", ("plain", "lengths", "packed"))
@pytest.mark.parametrize("variant", ("LayerNormLSTM-all-evaluated", "LayerNormGRU-all-evaluated"))
def test_truncated_gradients(variant: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The float64 reference runs here whatever the device has."""
    case = in_form(VARIANTS[variant], form)

    def gradients(module: Any, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
        given: Any = x
        options: dict[str, Any] = {"bptt_steps": 2}
        lengths = case.arguments(dtype)[2]
        if case.packed:
            given = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        elif lengths is not None:
            options["lengths"] = lengths.to(x.device)
        y = module(given, **options)[0]
        y = y.data if case.packed else y
        return [y, *torch.autograd.grad((y * y.detach().cos()).sum(), [x, *module.parameters()])]

    x = case.arguments(torch.float32)[0]
    ours = gradients(case.module(torch.float32).to(DEVICE), x.to(DEVICE).requires_grad_(), torch.float32)
    monkeypatch.setattr(sequence_operators, "route", lambda *tensors, **others: no_kernel("for this test"))
    theirs = gradients(case.module(torch.float64), x.double().requires_grad_(), torch.float64)
    for got, reference in zip(ours, theirs, strict=True):
        assert error(got, reference) <= 2e-4 * max(1.0, float(reference.detach().abs().max()))


@with_cuda_kernels
@first_shard
@pytest.mark.parametrize("variant", ("LayerNormLSTM-all", "LayerNormGRU-all"))
def test_autocast(variant: str) -> None:
    """The results have the dtypes of the plain layer's, and gradients those of the parameters."""
    case = VARIANTS[variant]
    module = case.module(torch.float32).to(DEVICE)
    plain = getattr(dlkernels.nn, case.name.removeprefix("LayerNorm"))(case.I, case.H, device=DEVICE)
    x = case.arguments(torch.float32)[0].to(DEVICE)
    torch.manual_seed(SEED)
    wide = module(x)[0]
    with torch.autocast(DEVICE, torch.bfloat16):
        torch.manual_seed(SEED)
        (y, state), (plain_y, plain_state) = module(x), plain(x)
    assert y.dtype == plain_y.dtype
    assert [one.dtype for one in state] == [one.dtype for one in plain_state]
    torch.testing.assert_close(y.float(), wide, rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert {p.grad.dtype for p in module.parameters()} == {torch.float32}


@first_shard
@pytest.mark.parametrize("variant", SOME)
def test_an_empty_batch(variant: str) -> None:
    case = replace(VARIANTS[variant], B=0)
    for name, value in results(case, torch.float32).items():
        assert not value.any(), name


@with_cuda_kernels
@first_shard
@pytest.mark.parametrize("variant", SOME)
def test_results_repeat(variant: str) -> None:
    """Sums are made in a fixed order."""
    case = replace(VARIANTS[variant], training=False, B=5, H=40)
    module = case.module(torch.float32).to(DEVICE)
    x = case.arguments(torch.float32)[0].to(DEVICE).requires_grad_()
    first, again = (module(x)[0] for _ in range(2))
    assert torch.equal(first, again)
    grads = [torch.autograd.grad(y.square().sum(), [x, *module.parameters()]) for y in (first, again)]
    assert all(map(torch.equal, *grads))


@first_shard
@pytest.mark.parametrize("variant", SOME)
def test_graphs_and_no_host_sync(variant: str) -> None:
    """Nothing waits for the device, and a CUDA graph of forward and backward reads the lengths of each replay."""
    case = replace(VARIANTS[variant], training=False)
    module = case.module(torch.float32).to(DEVICE)
    x = case.arguments(torch.float32)[0].to(DEVICE).requires_grad_()
    lengths = torch.tensor([1 + b % case.T for b in range(case.B)], device=DEVICE)

    def work() -> list[Tensor]:
        y = module(x, lengths=lengths)[0]
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])]

    work()
    with no_host_sync():
        work()
    replay = replayable_on_device(work)
    lengths.copy_(lengths.flip(0))
    replayed = [value.clone() for value in replay()]
    for first, second in zip(replayed, work(), strict=True):
        assert torch.equal(first, second)


@first_shard
@pytest.mark.skipif(bool(EMULATED), reason="the emulated operators are not what the compiler's fakes are about")
@pytest.mark.parametrize("variant", SOME)
def test_compiles_whole(variant: str) -> None:
    case = VARIANTS[variant]
    module = case.module(torch.float32).to(DEVICE)
    x = case.arguments(torch.float32)[0].to(DEVICE).requires_grad_()
    compiled = torch.compile(lambda x: module(x)[0] * 2, fullgraph=True, backend="aot_eager")
    found = []
    for run in (compiled, lambda x: module(x)[0] * 2):
        torch.manual_seed(SEED)
        found.append(torch.autograd.grad(run(x).sum(), [x, *module.parameters()]))
    for ours, theirs in zip(*found, strict=True):
        assert error(ours, theirs) <= 1e-4 * float(theirs.abs().max())


@first_shard
def test_what_explain_says() -> None:
    layer, x = dlkernels.nn.LayerNormLSTM(4, 6, device=DEVICE), torch.zeros(3, 2, 4, device=DEVICE)
    cell = dlkernels.nn.LayerNormGRUCell(4, 6, device=DEVICE)
    explained = dlkernels.explain(layer, x), dlkernels.explain(cell, x[0])
    assert all(one.native for one in explained)
    if ON_GPU:
        assert [one.kernel for one in explained] == ["cuda/steps/lstm", "cuda/steps/gru"]
        resets = torch.zeros(3, 2, dtype=torch.bool, device=DEVICE)
        assert dlkernels.explain(layer, x, resets=resets).kernel == "reference"
