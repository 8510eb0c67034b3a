"""Tests that the recurrent layers on a CUDA device work with torch: refusals, autocast, CUDA graphs, streams, devices,
torch.compile, dropout between layers. Run in the same way as recurrent_cuda.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device import CUDA_KERNELS, EMULATED, KINDS, NAMES, best_plan, no_host_sync, other_stream
from device import replayable as replayable_on_device
from recurrent_cases import a_case
from recurrent_refusals import CALLS, MISTAKES, of_the_cpu, outcome
from timing import DEVICE
from torch import Tensor
from turns import ON_GPU, first_shard, on_a_gpu

import dlkernels
from dlkernels._core import extension
from tests.support.layer_cases import error, make_data, new_layer


def arguments(**changes: Any) -> tuple[Any, ...]:
    """The arguments of the operator `lstm`."""
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
        ({"weights": [torch.zeros(8, 3), torch.zeros(8, 2), torch.zeros(8)]}, "w_hr must have shape"),
        ({"bidirectional": True}, "weights must hold|w_ih|w_hh"),
        ({"lengths": torch.zeros(4, dtype=torch.int64)}, "lengths must"),
        ({"x": torch.zeros(4, 3), "batch_sizes": torch.tensor([1, 3])}, "batch_sizes must be positive"),
        ({"x": torch.zeros(4, 3), "batch_sizes": torch.tensor([2, 1])}, "batch_sizes must sum"),
        ({"x": torch.zeros(4, 3), "batch_sizes": torch.tensor([3, 1], dtype=torch.int32)}, "batch_sizes must be int64"),
    ],
)
def test_refusals(changes: dict[str, Any], words: str) -> None:
    """The operator is called without the checks in Python: it must refuse every call that does not fit its kernels."""
    torch.ops.dlkernels.lstm(*arguments())

    def move(value: Any) -> Any:
        return [move(item) for item in value] if isinstance(value, list) else (
            value.to(DEVICE) if isinstance(value, Tensor) else value)  # fmt: skip

    moved = {name: value if name == "batch_sizes" else move(value) for name, value in changes.items()}
    with pytest.raises((RuntimeError, ValueError), match=words if CUDA_KERNELS else ""):
        torch.ops.dlkernels.lstm(*arguments(**moved))


@first_shard
def test_one_rule_on_both_devices() -> None:
    cpu = of_the_cpu()
    for operator in CALLS:
        assert cpu[operator] == outcome(operator, DEVICE) == []
    here = {name: outcome(name, DEVICE) for name in MISTAKES}
    different = [f"{name}: {cpu[name]} on the CPU, {here[name]}" for name in MISTAKES if cpu[name] != here[name]]
    assert not different, "\n".join(different)
    assert all(here.values()), [name for name in here if not here[name]]
    # torch.nn raises this type for invalid batch_sizes too.
    of_values = ("bptt_steps", "negative eps", "zoneout_h above 1", "zoneout_c below 0", "zoneout_c")
    assert {here[name][0] for name in here if not name.endswith(of_values)} == {"RuntimeError"}


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
    if not EMULATED:  # the emulated operators serve all CPU tensors and have no reference path for these types
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
    if CUDA_KERNELS:  # these round their operands to the dtype of the products; the CPU kernels need not
        with torch.no_grad():
            assert torch.equal(y, layer.bfloat16()(x.bfloat16())[0])


@first_shard
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["padded", "lengths", "packed"])
def test_cuda_graph(kind: str, form: str) -> None:
    """Forward and backward are captured once and replayed for other values."""
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
    archs = extension.native.build_info()["cuda_archs"].split()
    assert any(arch.rstrip("a") == f"{major}{minor}" or (arch == "80" and major == 8) for arch in archs), archs


@first_shard
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_between_layers(kind: str) -> None:
    """The dropout masks are torch's: they equal those of torch's dropout between two single-layer calls, and repeat for
    the same seed."""
    case = a_case(dtype=torch.float32, layers=2)
    data = make_data(case).to(DEVICE)
    layer = new_layer(case, data, case.dtype)
    layer.dropout = 0.4
    x = data.x.to(case.dtype).requires_grad_()
    leaves = [x, *layer.parameters()]

    def by_level(level: int, x: Tensor) -> Tensor:
        weights = [p for name, p in layer.named_parameters() if f"_l{level}" in name]
        return dlkernels.functional.lstm(x, None, weights, num_layers=1, bidirectional=True)[0]

    def ours() -> list[Tensor]:
        torch.manual_seed(3)
        y = layer(x)[0]
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    with best_plan(kind):
        first, again = ours(), ours()
        torch.manual_seed(3)
        y = by_level(1, torch.nn.functional.dropout(by_level(0, x), 0.4, training=True))
        expected = [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]
        layer.eval()
        calm = layer(x)[0]
    assert all(map(torch.equal, first, again))
    assert all(map(torch.equal, first, expected))
    assert not torch.equal(first[0], calm)


@on_a_gpu
@first_shard
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="this machine has one GPU")
def test_another_device_than_the_current_one() -> None:
    case = a_case()
    results = []
    for device in ("cuda:0", "cuda:1"):
        data = make_data(case).to(device)
        layer = new_layer(case, data, case.dtype)
        x = data.x.to(case.dtype).requires_grad_()
        with torch.cuda.device(0):
            y = layer(x)[0]
            grads = torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])
            assert all(value.device == torch.device(device) for value in (y, *grads))
            results.append([value.cpu() for value in (y.detach(), *grads)])
    assert all(map(torch.equal, *results))
    layer.to("cuda:0")
    with pytest.raises((RuntimeError, ValueError), match="device"):
        layer(x)
