"""Tests resets inside a sequence (`resets=`) and c of every step (`return_cells=`) of the recurrent layers on a CUDA
device. They are compared with the reference in float64 on the CPU. Run in the same way as recurrent_cuda.py."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from cases import pairwise
from device import KINDS, best_plan, no_host_sync, plan_kind
from device import replayable as replayable_on_device
from recurrent_cases import DTYPES, a_case, uneven, with_cuda_kernels
from timing import DEVICE
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from turns import ON_GPU, first_shard, mine

import dlkernels
from tests.support.layer_cases import Case, Data, Results, error, leaf, make_data, new_layer

# T, B, I, H
SMALL = ((5, 3, 4, 40), (1, 2, 3, 1), (6, 18, 5, 70), (4, 9, 7, 33))
LARGE = ((5, 3, 4, 40), (1, 2, 3, 1), (33, 9, 70, 130), (17, 70, 33, 256), (9, 130, 16, 300))
FACTORS: dict[str, tuple[Any, ...]] = {
    "mode": ("lstm", "gru", "rnn_tanh"),
    "dtype": DTYPES,
    "kind": KINDS,
    "size": LARGE if ON_GPU else SMALL,
    "form": ("padded", "lengths", "packed"),
    "bidirectional": (False, True),
    "batch_first": (False, True),
    "hx": (True, False),
    "contiguous": (True, False),
    "layers": (1, 2),
    "bptt_steps": (0, 2),
    "cotangents": ("all", "cells", "hc"),
}
CASES = pairwise(FACTORS)
# Of the largest value. Products of 16-bit operands are rounded to 16 bits at every step.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def label(row: dict[str, Any]) -> str:
    flags = [name for name in ("bidirectional", "batch_first", "hx", "contiguous") if row[name]]
    sizes = "x".join(map(str, row["size"]))
    words = (str(row[name]).removeprefix("torch.") for name in ("mode", "dtype", "kind", "form", "cotangents"))
    return "-".join([*words, sizes, f"l{row['layers']}", f"k{row['bptt_steps']}", *flags])


def as_case(row: dict[str, Any], seed: int) -> Case:
    T, B, I, H = row["size"]
    lengths = tuple(1 + (3 * b + T - 1) % T for b in range(B))
    if row["form"] == "lengths" and B > 2:
        lengths = (*lengths[:1], 0, *lengths[2:])
    return Case(
        T=T, B=B, I=I, H=H, lengths=None if row["form"] == "padded" else lengths, packed=row["form"] == "packed",
        seed=seed, **{name: value for name, value in row.items() if name not in ("kind", "size", "form")},
    )  # fmt: skip


def some_resets(case: Case) -> Tensor:
    """A third of the steps of every sequence, some of them first steps and some in the padding: bool [T, B]."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    return torch.rand(case.T, case.B, generator=generator) < 1 / 3


def weights_of(case: Case, parameters: dict[str, Tensor]) -> list[list[Tensor]]:
    """The weights of each layer in the order of the operators."""
    ends = ("", "_reverse")[: case.D]
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return [[parameters[f"{name}_l{n}{end}"] for end in ends for name in names] for n in range(case.layers)]


def gradients_of(case: Case, data: Data, dcells: Tensor, outputs: Results, leaves: Results) -> Results:
    """The gradients of all leaves that some wanted output reaches."""
    wanted = {"all": ("y", "h_n", "c_n", "cells"), "cells": ("cells",), "hc": ("h_n", "c_n")}[case.cotangents]
    if case.mode != "lstm":
        wanted = ("y", "h_n")
    cotangents = {"y": data.dy, "h_n": data.dh, "c_n": data.dc, "cells": dcells}
    picked = [name for name in wanted if name in outputs]
    grads = torch.autograd.grad(
        [outputs[name] for name in picked], list(leaves.values()),
        [cotangents[name].to(outputs[name].dtype) for name in picked], allow_unused=True,
    )  # fmt: skip
    return {
        f"d{name}": torch.zeros_like(at) if grad is None else grad
        for (name, at), grad in zip(leaves.items(), grads, strict=True)
    }


def of_reference(case: Case, data: Data, dcells: Tensor, resets: Tensor) -> Results:
    parameters = {name: value.clone().requires_grad_() for name, value in data.params.items()}
    x = leaf(data.x, torch.float64, True)
    h0, c0 = leaf(data.h0, torch.float64, True), leaf(data.c0, torch.float64, True)
    lengths = None if case.lengths is None else torch.tensor(case.lengths)
    results: tuple[Tensor, ...] = (x,)
    states: list[list[Tensor]] = [[], []]
    for n, weights in enumerate(weights_of(case, parameters)):
        here = slice(n * case.D, (n + 1) * case.D)
        results = dlkernels.reference.sequence(
            case.mode, results[0], None if h0 is None else h0[here], None if c0 is None else c0[here], weights, None,
            lengths, case.bidirectional, False, case.bptt_steps, resets=resets, return_cells=case.is_lstm,
        )  # fmt: skip
        for kept, state in zip(states, results[1:], strict=False):
            kept.append(state)
    outputs = {"y": results[0], "h_n": torch.cat(states[0])}
    if case.is_lstm:
        outputs |= {"c_n": torch.cat(states[1]), "cells": results[3]}
    leaves = {name: at for name, at in {"x": x, "h0": h0, "c0": c0, **parameters}.items() if at is not None}
    return {**outputs, **gradients_of(case, data, dcells, outputs, leaves)}


def of_layer(case: Case, data: Data, dcells: Tensor, resets: Tensor) -> Results:
    """Outputs and gradients, time-major and padded with zeros."""
    layer = new_layer(case, data, case.dtype)
    x = leaf(data.x, case.dtype, case.contiguous, case.batch_first)
    assert x is not None
    h0, c0 = leaf(data.h0, case.dtype, case.contiguous), leaf(data.c0, case.dtype, case.contiguous)
    hx = None if h0 is None else (h0, c0) if case.is_lstm else h0
    more: dict[str, Any] = {"return_cells": True} if case.is_lstm else {}
    flags = resets.t() if case.batch_first else resets
    if case.packed:
        sizes = torch.tensor(case.lengths)
        flags = pack_padded_sequence(flags.float(), sizes, case.batch_first, enforce_sorted=False).data.bool()
        packed = pack_padded_sequence(x, sizes, case.batch_first, enforce_sorted=False)
        y, state, *cells = layer(packed, hx, bptt_steps=case.bptt_steps, resets=flags.to(DEVICE), **more)
        y, *cells = (pad_packed_sequence(each, case.batch_first, total_length=case.T)[0] for each in (y, *cells))
    else:
        lengths = None if case.lengths is None else torch.tensor(case.lengths, device=DEVICE)
        y, state, *cells = layer(
            x, hx, lengths=lengths, bptt_steps=case.bptt_steps, resets=flags.to(DEVICE), **more
        )  # fmt: skip
    if case.batch_first:
        y, *cells = (each.transpose(0, 1) for each in (y, *cells))
    outputs = {"y": y, "h_n": state[0], "c_n": state[1], "cells": cells[0]} if cells else {"y": y, "h_n": state}
    assert all(value.dtype == case.dtype for value in outputs.values())
    leaves = {name: at for name, at in {"x": x, "h0": h0, "c0": c0, **dict(layer.named_parameters())}.items()
              if at is not None}  # fmt: skip
    grads = gradients_of(case, data, dcells, outputs, leaves)
    if case.batch_first:
        grads["dx"] = grads["dx"].transpose(0, 1)
    return {**{name: value.detach() for name, value in outputs.items()}, **grads}


def check(case: Case, resets: Tensor) -> None:
    data = make_data(case)
    generator = torch.Generator().manual_seed(case.seed + 2)
    dcells = torch.rand(case.T, case.B, case.D * case.H, generator=generator, dtype=torch.float64) * 2 - 1
    dcells = dcells.to(case.dtype).double()
    ref = of_reference(case, data, dcells, resets)
    ours = of_layer(case, data.to(DEVICE), dcells.to(DEVICE), resets)
    assert ours.keys() == ref.keys()
    wrong = {}
    for name, value in ours.items():
        off, limit = error(value, ref[name]), TOLERANCE[case.dtype] * max(1.0, float(ref[name].detach().abs().max()))
        if not off <= limit:
            wrong[name] = f"{off:.2e}, limit {limit:.2e}"
        if case.lengths is not None and name in ("y", "cells", "dx"):
            padding = torch.arange(case.T)[:, None] >= torch.tensor(case.lengths)
            assert not value.cpu()[padding].any(), f"{case}: {name} is not 0 in the padding"
    assert not wrong, f"{case}: {wrong}"
    if case.hx and case.D == 1 and case.layers == 1:  # gradients that no rounding may let through
        dropped = resets[0] if case.lengths is None else resets[0] & (torch.tensor(case.lengths) > 0)
        assert not ours["dh0"].cpu()[0, dropped].any()


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
        check(case, some_resets(case))


@first_shard
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["lstm", "gru", "rnn_relu"])
def test_flags_that_separate_nothing(mode: str, kind: str) -> None:
    """Without a flag, and with flags in the padding alone, all results have the bits of a call without resets."""
    case = dataclasses.replace(a_case(mode), lengths=None)
    data = make_data(case).to(DEVICE)
    layer = new_layer(case, data, case.dtype)
    lengths = torch.tensor([0, *uneven(case)[1:]], device=DEVICE)
    padding = torch.arange(case.T, device=DEVICE)[:, None] >= lengths
    state = data.h0.to(case.dtype)
    hx = (state, data.c0.to(case.dtype)) if mode == "lstm" else state

    def run(resets: Tensor | None) -> list[Tensor]:
        x = data.x.to(case.dtype).requires_grad_()
        y, states = layer(x, hx, lengths=lengths, resets=resets)
        ends = list(states) if mode == "lstm" else [states]
        return [
            y,
            *ends,
            *torch.autograd.grad([y, *ends], [x, *layer.parameters()], list(map(torch.ones_like, [y, *ends]))),
        ]

    with best_plan(kind):
        plain = run(None)
        for resets in (padding, torch.zeros_like(padding)):
            assert all(map(torch.equal, run(resets), plain))


@first_shard
@pytest.mark.parametrize("kind", KINDS)
def test_steps_apart(kind: str) -> None:
    """With a flag at every step, no step depends on another one, nor on h0 and c0 in the first direction."""
    case = a_case(dtype=torch.float32)
    data = make_data(case).to(DEVICE)
    layer = new_layer(case, data, torch.float32)
    hx = (torch.full_like(data.h0, torch.nan).float(), torch.full_like(data.c0, torch.nan).float())
    for state in hx:
        state[1::2] = 0
    x = data.x.float()
    with best_plan(kind):
        y, _, cells = layer(
            x, hx, resets=torch.ones(case.T, case.B, dtype=torch.bool, device=DEVICE), return_cells=True
        )
        for t in range(case.T):
            alone, _, c = layer(x[t : t + 1], return_cells=True)
            torch.testing.assert_close(y[t : t + 1], alone, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(cells[t : t + 1], c, rtol=1e-5, atol=1e-6)


@first_shard
def test_gradients_of_samples_and_of_gradients() -> None:
    """Per-sample gradients, for which vmap(grad) uses the gate gradients of the backward, with resets that are mapped
    too; and a second derivative."""
    case = a_case(dtype=torch.float32, T=4, B=5, H=17)
    data = make_data(case).to(DEVICE)
    layer = new_layer(case, data, torch.float32)
    parameters = {name: value.detach() for name, value in layer.named_parameters()}
    x, resets = data.x.float(), some_resets(case).to(DEVICE)

    def loss(parameters: dict[str, Tensor], sample: Tensor, flags: Tensor) -> Tensor:
        given = {"resets": flags.unsqueeze(1), "return_cells": True}
        y, _, cells = torch.func.functional_call(layer, parameters, (sample.unsqueeze(1),), given)
        return y.square().sum() + cells.square().sum()

    mapped = torch.func.vmap(torch.func.grad(loss), (None, 1, 1))(parameters, x, resets)
    for b in range(case.B):
        for name, value in torch.func.grad(loss)(parameters, x[:, b], resets[:, b]).items():
            torch.testing.assert_close(mapped[name][b], value, rtol=1e-4, atol=1e-5)

    def second(x: Tensor, results: tuple[Tensor, Tensor]) -> Tensor:
        (first,) = torch.autograd.grad(sum(each.square().sum() for each in results), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    given = x.clone().requires_grad_()
    y, _, cells = layer(given, resets=resets, return_cells=True)
    wide = make_data(case).x.requires_grad_()
    (weights,) = weights_of(case, make_data(case).params)
    ref_y, _, _, ref_cells = dlkernels.reference.sequence(
        "lstm", wide, None, None, weights, bidirectional=True, resets=resets.cpu(), return_cells=True
    )
    ref = second(wide, (ref_y, ref_cells))
    assert error(second(given, (y, cells)), ref) <= 1e-4 * float(ref.abs().max())


@with_cuda_kernels
@first_shard
def test_autocast() -> None:
    """y has the dtype of the products, c of every step that of c_n."""
    case = a_case(dtype=torch.float32)
    data = make_data(case).to(DEVICE)
    layer = new_layer(case, data, torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        y, (_, c), cells = layer(data.x.float(), resets=some_resets(case).to(DEVICE), return_cells=True)
    assert y.dtype == torch.bfloat16
    assert cells.dtype == c.dtype
    (y.sum() + cells.sum()).backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())


@first_shard
@pytest.mark.parametrize("kind", KINDS)
def test_flags_are_read_on_the_device(kind: str) -> None:
    """Nothing waits for the device, and a CUDA graph reads the flags of each replay."""
    case = a_case(dtype=torch.float32)
    data = make_data(case).to(DEVICE)
    layer = new_layer(case, data, torch.float32)
    x, resets = data.x.float(), some_resets(case).to(DEVICE)
    with best_plan(kind), torch.no_grad():
        expected = [layer(x, resets=flags)[0] for flags in (resets, ~resets)]
        flags = resets.clone()
        with no_host_sync():
            layer(x, resets=flags)
        replay = replayable_on_device(lambda: layer(x, resets=flags)[0])
        for change, wanted in zip((resets, ~resets), expected, strict=True):
            flags.copy_(change)
            assert torch.equal(replay(), wanted)
