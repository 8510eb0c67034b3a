"""The recurrent layers on a CUDA device against float64 on the CPU.

Run by check.py: DLKERNELS_SHARD=2/8 takes each eighth case, DLKERNELS_DEADLINE ends a run in time. Without a GPU two
others run for them: the CPU's kernels, which rehearses this file, and those of csrc/cuda under emulation
(`python tests/cuda/run.py boundary`), which tests their torch boundary.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gpuless"))

from cases import pairwise
from device import CUDA_KERNELS, EMULATED, KINDS, NAMES, ON_GPU, best_plan, no_host_sync, other_stream, plan_kind
from device import replayable as replayable_on_device
from helpers import Case, assert_same_results, check_case, error, make_data, new_layer, run_layer
from timing import DEADLINE, DEVICE

import dlkernels
from dlkernels import _native
from dlkernels.testing import within_rule

SHARD, _, SHARDS = os.environ.get("DLKERNELS_SHARD", "0/1").partition("/")
MODES = ("lstm", "gru", "rnn_tanh", "rnn_relu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# T, B, I, H: one of everything; several slices, several tiles; nothing a multiple of anything.
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


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    if time.time() > DEADLINE:
        pytest.skip("NOT RUN: the time of this part was over")
    torch.manual_seed(0)
    yield


def label(row: dict[str, Any]) -> str:
    flags = [name for name in ("bidirectional", "batch_first", "bias", "hx", "contiguous") if row[name]]
    sizes = "x".join(map(str, row["size"]))
    words = (str(row[name]).removeprefix("torch.") for name in ("mode", "dtype", "kind", "form", "cotangents"))
    return "-".join([*words, sizes, f"l{row['layers']}", f"k{row['bptt_steps']}", *flags])


def mine(index: int) -> bool:
    return index % int(SHARDS) == int(SHARD)


first_shard = pytest.mark.skipif(not mine(0), reason="in the first shard")
on_a_gpu = pytest.mark.skipif(not ON_GPU, reason="a rehearsal: only a GPU shows this")
with_cuda_kernels = pytest.mark.skipif(not CUDA_KERNELS, reason="a rehearsal: the CPU's kernels do not do this")


def as_case(row: dict[str, Any], seed: int) -> Case:
    T, B, I, H = row["size"]
    # Of every kind, one of length 0 where the form can say it; pack_padded_sequence cannot.
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
    data = make_data(Case(mode, T=1, B=B, I=I, H=H, dtype=dtype))
    parameters = {key.removesuffix("_l0"): value for key, value in data.params.items()}
    states = [data.h0[0], data.c0[0]] if data.c0 is not None else [data.h0[0]]

    def run(package: Any, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
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

    ours, theirs = run(dlkernels.nn, dtype, DEVICE), run(torch.nn, dtype, "cpu")
    ref = run(torch.nn, torch.float64, "cpu")
    for key, value in ours.items():
        verdict = within_rule(value, theirs[key], ref[key], dtype, grad=key.startswith("d"))
        # One throw of the dice, without the second look that layers get.
        assert verdict.ours <= 2 * verdict.limit, f"{key}: {verdict}"


def a_case(mode: str = "lstm", dtype: torch.dtype = torch.bfloat16, **more: Any) -> Case:
    T, B, I, H = (40, 33, 48, 200) if ON_GPU else (4, 9, 6, 40)
    return Case(mode, **{"T": T, "B": B, "I": I, "H": H, "dtype": dtype, "bidirectional": True, **more})


def uneven(case: Case) -> tuple[int, ...]:
    return tuple(1 + (3 * b + case.T - 1) % case.T for b in range(case.B))


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
    """Frozen weights, an input without gradient, no states: what remains has the same bits."""
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


def arguments(**changes: Any) -> tuple[Any, ...]:
    """Of the operator `lstm`."""
    f32 = {"device": DEVICE}
    weights = [torch.zeros(8, 3, **f32), torch.zeros(8, 2, **f32), torch.zeros(8, **f32), torch.zeros(8, **f32)]
    call: dict[str, Any] = {
        "x": torch.zeros(4, 5, 3, **f32), "h0": None, "c0": None, "weights": weights, "packed": None,
        "batch_sizes": None, "lengths": None, "bidirectional": False, "batch_first": False, "save": True,
        "deterministic": False,
    }  # fmt: skip
    return tuple({**call, **changes}.values())


@first_shard
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.zeros(4, 5, 3, dtype=torch.int64)}, "x must be"),
        ({"x": torch.zeros(4, 5, 2)}, "w_ih must have shape"),
        ({"x": torch.zeros(5, 3)}, "x must"),
        ({"h0": torch.zeros(1, 4, 2)}, "h0 must have shape"),
        ({"c0": torch.zeros(1, 5, 2, dtype=torch.bfloat16)}, "c0 must be float32"),
        ({"weights": [torch.zeros(8, 3), torch.zeros(8, 2), torch.zeros(8)]}, "weights must hold"),
        ({"bidirectional": True}, "weights must hold|w_ih|w_hh"),
        ({"lengths": torch.zeros(4, dtype=torch.int64)}, "lengths must"),
        ({"x": torch.zeros(4, 3), "batch_sizes": torch.tensor([1, 3])}, "batch_sizes must be positive"),
        ({"x": torch.zeros(4, 3), "batch_sizes": torch.tensor([2, 1])}, "batch_sizes must sum"),
        ({"x": torch.zeros(4, 3), "batch_sizes": torch.tensor([3, 1], dtype=torch.int32)}, "batch_sizes must be int64"),
    ],
)
def test_refusals(changes: dict[str, Any], words: str) -> None:
    """The operator itself, behind the checks in Python: no call may reach a kernel that it does not fit."""
    torch.ops.dlkernels.lstm(*arguments())

    def move(value: Any) -> Any:
        return [move(item) for item in value] if isinstance(value, list) else (
            value.to(DEVICE) if isinstance(value, Tensor) else value)  # fmt: skip

    moved = {name: value if name == "batch_sizes" else move(value) for name, value in changes.items()}
    with pytest.raises((RuntimeError, ValueError), match=words if CUDA_KERNELS else ""):
        torch.ops.dlkernels.lstm(*arguments(**moved))


@first_shard
def test_no_kernel_for_float64_and_projections() -> None:
    doubles = torch.zeros(3, 2, 4, device=DEVICE, dtype=torch.float64)
    layer = dlkernels.nn.LSTM(4, 6, device=DEVICE, dtype=torch.float64)
    projected = dlkernels.nn.LSTM(4, 6, proj_size=2, device=DEVICE)
    explained = dlkernels.explain(layer, doubles), dlkernels.explain(projected, doubles.float())
    if ON_GPU:
        assert explained[0].layers[0].reason == "no kernel for torch.float64 on cuda"
        assert explained[1].layers[0].reason == "no CUDA kernel for projections"
        assert dlkernels.explain(layer.float(), doubles.float()).kernel.startswith("cuda/")
        layer.double()
    if not EMULATED:  # which serves all CPU tensors, and these types not
        peer = torch.nn.LSTM(4, 6, device=DEVICE, dtype=torch.float64)
        layer.load_state_dict(peer.state_dict())
        torch.testing.assert_close(layer(doubles + 1)[0], peer(doubles + 1)[0])


@first_shard
def test_autocast() -> None:
    case = a_case(dtype=torch.float32)
    data = make_data(case).to(DEVICE)
    layer = new_layer(case, data, torch.float32)
    x = data.x.float()
    with torch.autocast(DEVICE, torch.bfloat16):
        y, (h, c) = layer(x)
        assert y.dtype == h.dtype == c.dtype == torch.bfloat16
        if ON_GPU:
            assert dlkernels.explain(layer, x).kernel.startswith("cuda/")
    y.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())
    with torch.no_grad():
        assert torch.equal(y, layer.bfloat16()(x.bfloat16())[0])


@first_shard
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["padded", "lengths", "packed"])
def test_cuda_graph(kind: str, form: str) -> None:
    """Captured once with both passes, replayed for other values."""
    case = a_case()
    data = make_data(case).to(DEVICE)
    layer = new_layer(case, data, case.dtype)
    x = data.x.to(case.dtype).requires_grad_()
    lengths = torch.tensor([1 + b % case.T for b in range(case.B)], device=DEVICE)

    def work() -> list[Tensor]:
        if form == "packed":
            sizes = torch.arange(case.T, 0, -1).clamp(max=case.B)
            rows = int(sizes.sum())
            given = torch.nn.utils.rnn.PackedSequence(x.flatten(0, 1)[:rows], sizes)
            y = layer(given)[0].data
        else:
            y = layer(x, lengths=lengths if form == "lengths" else None)[0]
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])]

    with best_plan(kind):
        replay = replayable_on_device(work)
        with torch.no_grad():
            x.mul_(0.5)
            lengths.copy_(lengths.flip(0))
        replayed = [value.clone() for value in replay()]
        for first, second in zip(replayed, work(), strict=True):
            assert torch.equal(first, second)


@first_shard
@pytest.mark.parametrize("mode", ["lstm", "gru", "rnn_tanh"])
def test_other_streams_and_no_host_sync(mode: str) -> None:
    case = a_case(mode)
    data = make_data(case).to(DEVICE)
    layer = new_layer(case, data, case.dtype)
    cell = {"lstm": dlkernels.nn.LSTMCell, "gru": dlkernels.nn.GRUCell, "rnn_tanh": dlkernels.nn.RNNCell}[mode](
        case.I, case.H, device=DEVICE, dtype=case.dtype
    )
    x = data.x.to(case.dtype).requires_grad_()
    lengths = torch.full((case.B,), case.T - 1, device=DEVICE)

    def work() -> tuple[Tensor, ...]:
        y = layer(x, lengths=lengths)[0]
        stepped = cell(x[0])
        h = stepped[0] if mode == "lstm" else stepped
        return torch.autograd.grad(y.float().sum() + h.float().sum(), [x, *layer.parameters(), *cell.parameters()])

    with best_plan("steps"):
        work()
    plain = work()
    for kind in KINDS:
        with best_plan(kind), no_host_sync():
            work()
    with other_stream():
        elsewhere = work()
    assert all(map(torch.equal, plain, elsewhere))


@first_shard
@pytest.mark.skipif(bool(EMULATED), reason="the emulated operators are not what the compiler's fakes are about")
@pytest.mark.parametrize("mode", ["lstm", "gru"])
def test_compiles_whole(mode: str) -> None:
    case = a_case(mode, dtype=torch.float32)
    data = make_data(case).to(DEVICE)
    layer = new_layer(case, data, case.dtype)
    x = data.x.to(case.dtype).requires_grad_()
    compiled = torch.compile(lambda x: layer(x)[0] * 2, fullgraph=True, backend="aot_eager")
    first = torch.autograd.grad(compiled(x).sum(), [x, *layer.parameters()])
    second = torch.autograd.grad((layer(x)[0] * 2).sum(), [x, *layer.parameters()])
    for ours, theirs in zip(first, second, strict=True):
        assert error(ours, theirs) <= 1e-4 * float(theirs.abs().max())


@first_shard
def test_gradients_of_samples_and_of_gradients() -> None:
    """vmap(grad) asks the backward for its gate gradients; the second derivative is the reference's."""
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
def test_patched_models_and_back() -> None:
    model = torch.nn.Sequential(torch.nn.LSTM(6, 10)).to(DEVICE)
    x = torch.randn(4, 3, 6, device=DEVICE)
    theirs = model(x)[0]
    patched = dlkernels.patch(model)
    assert isinstance(patched[0], dlkernels.nn.LSTM)
    torch.testing.assert_close(patched(x)[0], theirs, rtol=1e-3, atol=1e-4)
    assert type(dlkernels.unpatch(patched)[0]) is torch.nn.LSTM


def test_what_is_used_of_torch_cuda_exists() -> None:
    assert [name for name in NAMES if not hasattr(torch.cuda, name)] == []


@on_a_gpu
@first_shard
def test_this_build_is_for_this_gpu() -> None:
    major, minor = torch.cuda.get_device_capability()
    archs = _native.native.build_info()["cuda_archs"].split()
    assert any(arch.rstrip("a") == f"{major}{minor}" or (arch == "80" and major == 8) for arch in archs), archs


@first_shard
def test_every_plan_for_one_case() -> None:
    case = a_case("gru")
    case = dataclasses.replace(case, lengths=uneven(case))
    for kind in KINDS:
        with best_plan(kind):
            check_case(case, DEVICE)
