"""Compares results of the recurrent layers on a CUDA device with float64 on the CPU.

check.py runs this file. DLKERNELS_SHARD=2/8 runs every eighth case from number 2 on. Without a GPU the same tests run
on the CPU kernels, which tests the files themselves, or on the emulated kernels of csrc/rnn/cuda (`python
tests/cuda/run.py boundary`), which tests their torch boundary.
"""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import pytest
import torch
from cases import pairwise
from device import KINDS, best_plan, plan_kind
from recurrent_cases import DTYPES, a_case, uneven, with_cuda_kernels
from timing import DEVICE
from torch import Tensor
from turns import ON_GPU, first_shard, mine

import dlkernels
from dlkernels.testing import within_rule
from tests.support.layer_cases import (
    Case,
    Data,
    acceptable_nearby,
    assert_same_results,
    check_case,
    error,
    make_data,
    neighbours,
    new_layer,
    run_layer,
)

MODES = ("lstm", "gru", "rnn_tanh", "rnn_relu")
# T, B, I, H: with one slice and one tile, with all sizes 1, with several slices and tiles, and with sizes that are not
# multiples of any tile.
SMALL = ((5, 3, 4, 40), (1, 1, 3, 1), (3, 18, 5, 70), (4, 9, 7, 33))
LARGE = ((5, 3, 4, 40), (1, 1, 3, 1), (33, 9, 70, 130), (17, 70, 33, 256), (9, 130, 16, 300))
FACTORS: dict[str, tuple[Any, ...]] = {
    "mode": MODES,
    "dtype": DTYPES,
    "kind": KINDS,
    "size": LARGE if ON_GPU else SMALL,
    "form": ("padded", "lengths", "packed"),
    "bidirectional": (False, True),
    "batch_first": (False, True),
    "bias": (True, False),
    "hx": (True, False),
    "contiguous": (True, False),
    "layers": (1, 2),
    "bptt_steps": (0, 2),
    "cotangents": ("yhc", "y", "hc"),
}
CASES = pairwise(FACTORS)


def label(row: dict[str, Any]) -> str:
    flags = [name for name in ("bidirectional", "batch_first", "bias", "hx", "contiguous") if row[name]]
    sizes = "x".join(map(str, row["size"]))
    words = (str(row[name]).removeprefix("torch.") for name in ("mode", "dtype", "kind", "form", "cotangents"))
    return "-".join([*words, sizes, f"l{row['layers']}", f"k{row['bptt_steps']}", *flags])


def as_case(row: dict[str, Any], seed: int) -> Case:
    T, B, I, H = row["size"]
    # Uneven lengths. One is 0 where the form allows it; pack_padded_sequence does not.
    lengths = tuple(1 + (3 * b + T - 1) % T for b in range(B))
    if row["form"] == "lengths" and B > 2:
        lengths = (*lengths[:1], 0, *lengths[2:])
    return Case(
        T=T, B=B, I=I, H=H, lengths=None if row["form"] == "padded" else lengths, packed=row["form"] == "packed",
        seed=seed, **{name: value for name, value in row.items() if name not in ("kind", "size", "form")},
    )  # fmt: skip


@pytest.mark.parametrize(
    "index", [i for i in range(len(CASES)) if mine(i)], ids=[label(c) for i, c in enumerate(CASES) if mine(i)]
)
def test_pairs_of_features(index: int) -> None:
    row = CASES[index]
    case = as_case(row, index)
    with best_plan(row["kind"]):
        kind = plan_kind(case.mode, case.dtype, case.T, case.B, case.H, case.D)
        if not ON_GPU or torch.cuda.get_device_capability() >= (9, 0) or row["kind"] != "cluster":
            assert kind == row["kind"]
        check_case(case, DEVICE)


@first_shard
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("bias", "hx"), [(True, True), (False, False)])
def test_cells(mode: str, dtype: torch.dtype, bias: bool, hx: bool) -> None:
    B, I, H = 70, 9, 35
    name = {"lstm": "LSTMCell", "gru": "GRUCell"}.get(mode, "RNNCell")
    kwargs = {"nonlinearity": mode[4:]} if mode.startswith("rnn") else {}
    case = Case(mode, T=1, B=B, I=I, H=H, dtype=dtype)

    def run(data: Data, package: Any, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        parameters = {key.removesuffix("_l0"): value for key, value in data.params.items()}
        states = [data.h0[0], data.c0[0]] if data.c0 is not None else [data.h0[0]]
        cell = getattr(package, name)(I, H, bias=bias, dtype=dtype, device=device, **kwargs)
        with torch.no_grad():
            for key, parameter in cell.named_parameters():
                parameter.copy_(parameters[key])
        x = data.x[0].to(device, dtype).requires_grad_()
        given = [state.to(device, dtype).requires_grad_() for state in states] if hx else []
        out = cell(x, (tuple(given) if mode == "lstm" else given[0]) if hx else None)
        outputs = list(out) if mode == "lstm" else [out]
        leaves = {"x": x, **{f"state{i}": state for i, state in enumerate(given)}, **dict(cell.named_parameters())}
        cotangents = [d[0].to(device, dtype) for d in (data.dh, data.dc)][: len(outputs)]
        grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
        named = {f"out{i}": o.detach() for i, o in enumerate(outputs)}
        return {**named, **{f"d{key}": grad for key, grad in zip(leaves, grads, strict=True)}}

    def results(data: Data) -> tuple[dict[str, Tensor], ...]:
        peers = (run(data, torch.nn, of, "cpu") for of in (dtype, torch.float64))
        return run(data, dlkernels.nn, dtype, DEVICE), *peers

    data = make_data(case)
    ours, theirs, ref = results(data)
    verdicts = {key: within_rule(ours[key], theirs[key], ref[key], dtype, grad=key.startswith("d")) for key in ours}
    beyond = {key: verdict for key, verdict in verdicts.items() if not verdict.ok}
    if not beyond:
        return
    # The limit is proportional to torch's own error, a random quantity that was measured once. So a cell beyond its
    # limit is measured again on inputs nearby, as layers are by check_case.
    nearby = [results(moved) for moved in neighbours(case, data)]
    for key, verdict in beyond.items():
        errors = [statistics.median(error(found[i][key], found[2][key]) for found in nearby) for i in (0, 1)]
        fine = acceptable_nearby(verdict, (errors[0], errors[1]), ref[key], dtype, key.startswith("d"))
        assert fine, f"{key}: {verdict}, nearby {errors}"


@first_shard
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["lstm", "gru"])
def test_the_same_call_gives_the_same_bits(mode: str, kind: str) -> None:
    case = a_case(mode)
    case = dataclasses.replace(case, lengths=uneven(case))
    data = make_data(case).to(DEVICE)
    with best_plan(kind):
        first = run_layer(case, data, case.dtype, dlkernels.nn)
        for _ in range(50 if ON_GPU else 1):
            assert_same_results(run_layer(case, data, case.dtype, dlkernels.nn), first)


@first_shard
@pytest.mark.parametrize("mode", ["lstm", "gru", "rnn_tanh"])
def test_only_what_is_wanted(mode: str) -> None:
    """Without the gradient of the weights or that of the input, the remaining gradients have the same bits."""
    case = a_case(mode)
    data = make_data(case).to(DEVICE)
    layer = new_layer(case, data, case.dtype)

    def grads(x_wanted: bool, weights_wanted: bool) -> dict[str, Tensor]:
        x = data.x.to(case.dtype).requires_grad_(x_wanted)
        layer.requires_grad_(weights_wanted)
        leaves = {**({"x": x} if x_wanted else {}), **(dict(layer.named_parameters()) if weights_wanted else {})}
        found = torch.autograd.grad(layer(x)[0], list(leaves.values()), data.dy.to(case.dtype))
        return dict(zip(leaves, found, strict=True))

    everything = grads(True, True)
    for wanted in ((True, False), (False, True)):
        for name, value in grads(*wanted).items():
            assert torch.equal(value, everything[name]), name


@with_cuda_kernels
@first_shard
def test_lengths_are_clamped() -> None:
    case = a_case(dtype=torch.float32)
    data = make_data(case).to(DEVICE)
    layer = new_layer(case, data, case.dtype)
    x = data.x.to(case.dtype)
    wild = torch.full((case.B,), case.T + 7, device=DEVICE)
    wild[0] = -3
    tame = wild.clamp(0, case.T)
    for ours, theirs in zip(layer(x, lengths=wild)[1], layer(x, lengths=tame)[1], strict=True):
        assert torch.equal(ours, theirs)


@first_shard
@pytest.mark.parametrize("mode", ["lstm", "gru"])
def test_nothing_in_the_batch(mode: str) -> None:
    case = a_case(mode, B=0)
    data = make_data(case).to(DEVICE)
    layer = new_layer(case, data, case.dtype)
    x = data.x.to(case.dtype).requires_grad_()
    y, _ = layer(x)
    y.sum().backward()
    assert y.shape == (case.T, 0, 2 * case.H)
    assert all(not parameter.grad.any() for parameter in layer.parameters())


@first_shard
def test_gradients_of_samples_and_of_gradients() -> None:
    """Per-sample gradients, for which vmap(grad) uses the gate gradients of the backward, and a second derivative,
    which is compared with that of the reference."""
    case = a_case(dtype=torch.float32, T=3, B=5, H=17, bidirectional=False)
    data = make_data(case).to(DEVICE)
    layer = new_layer(case, data, torch.float32)
    parameters = {name: value.detach() for name, value in layer.named_parameters()}
    x = data.x.float()

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (sample.unsqueeze(1),))[0].square().sum()

    mapped = torch.func.vmap(torch.func.grad(loss), (None, 1))(parameters, x)
    for b in range(case.B):
        for name, value in torch.func.grad(loss)(parameters, x[:, b]).items():
            torch.testing.assert_close(mapped[name][b], value, rtol=1e-4, atol=1e-5)
    given = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(layer(given)[0].square().sum(), given, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), given)
    peer = new_layer(case, make_data(case), torch.float64)
    wide = make_data(case).x.requires_grad_()
    y = dlkernels.reference.sequence("lstm", wide, None, None, peer.weight_list(), None, None, False, False, 0)[0]
    (first,) = torch.autograd.grad(y.square().sum(), wide, create_graph=True)
    (ref,) = torch.autograd.grad(first.square().sum(), wide)
    assert error(second, ref) <= 1e-4 * float(ref.abs().max())


@first_shard
def test_every_plan_for_one_case() -> None:
    case = a_case("gru")
    case = dataclasses.replace(case, lengths=uneven(case))
    for kind in KINDS:
        with best_plan(kind):
            check_case(case, DEVICE)
