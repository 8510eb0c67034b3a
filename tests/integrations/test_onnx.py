"""Tests torch.export and torch.onnx.export(dynamo=True) of our layers: batch and time stay dynamic, ONNX Runtime gives
the same results, and the layers are LSTM, GRU and RNN there. The ONNX part is skipped where onnxscript or onnxruntime
is not installed."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import dlkernels
from tests.support.fresh_python import run_python

pytestmark = [
    pytest.mark.usefixtures("native"),
    pytest.mark.o0_skip(reason="Python around kernels that other tests call as well"),
    pytest.mark.filterwarnings("ignore"),
]

T, B, I, H = 5, 3, 4, 6


class First(nn.Module):
    """The first result of a module."""

    def __init__(self, module: nn.Module, **options: Any) -> None:
        super().__init__()
        self.module, self.options = module, options

    def forward(self, x: Tensor) -> Tensor:
        result = self.module(x, **self.options)
        return result if isinstance(result, Tensor) else result[0]


class States(First):
    """All results of an LSTM, in one tensor."""

    def forward(self, x: Tensor) -> Tensor:
        y, (h, c) = self.module(x)
        return torch.cat([y[-1], *h, *c], -1)


class Attend(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q = x.unsqueeze(1)
        return dlkernels.functional.attention(q, q, q, causal=True, softcap=5.0)


def ours(name: str, **options: Any) -> nn.Module:
    return First(getattr(dlkernels.nn, name)(I, H, **options))


RECURRENT: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "LSTM": ("LSTM", lambda: ours("LSTM", num_layers=2, bidirectional=True)),
    "LSTM states": ("LSTM", lambda: States(dlkernels.nn.LSTM(I, H, bidirectional=True))),
    "LSTM no bias": ("LSTM", lambda: ours("LSTM", bias=False, batch_first=True)),
    "GRU": ("GRU", lambda: ours("GRU", bidirectional=True, batch_first=True)),
    "RNN": ("RNN", lambda: ours("RNN", bidirectional=True)),
    "RNN relu": ("RNN", lambda: ours("RNN", nonlinearity="relu", num_layers=2)),
    "patched": ("GRU", lambda: First(dlkernels.patch(nn.GRU(I, H)))),
}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "attention": Attend,
    "MultiheadAttention": lambda: dlkernels.patch(nn.TransformerEncoderLayer(I, 2, 8, batch_first=True)),
}
DYNAMIC = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


@pytest.mark.parametrize("name", [*RECURRENT, *OTHERS])
def test_export_keeps_batch_and_time_dynamic(name: str) -> None:
    model = made(RECURRENT[name][1] if name in RECURRENT else OTHERS[name])
    program = torch.export.export(model, (torch.randn(T, B, I),), dynamic_shapes=DYNAMIC)
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    x = torch.randn(T + 2, B - 1, I)
    torch.testing.assert_close(torch.export.load(saved).module()(x), model(x))


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_torchs_own_layers_export_with_dynamic_time(name: str) -> None:
    model = made(lambda: First(getattr(nn, name)(I, H, 2)))
    with dlkernels.enable(compile=True):
        program = torch.export.export(model, (torch.randn(T, B, I),), dynamic_shapes=DYNAMIC)
    x = torch.randn(T + 2, B - 1, I)
    torch.testing.assert_close(program.module()(x), model(x))
    assert not any("dlkernels" in str(node.target) for node in program.graph.nodes)  # it loads without the package


def test_a_saved_program_names_the_package(tmp_path: Path) -> None:
    """Without the package a program with our operators does not load, and torch's log names them."""
    torch.export.save(torch.export.export(made(RECURRENT["GRU"][1]), (torch.randn(T, B, I),)), tmp_path / "gru.pt2")
    code = f"""
        import logging, torch
        said = []
        logging.getLogger("torch.export").addFilter(lambda record: said.append(record.exc_info))
        try:
            torch.export.load({str(tmp_path / "gru.pt2")!r})
        except Exception:
            assert "torch.ops.dlkernels" in str(said), said
        else:
            raise AssertionError("loaded")
        import dlkernels
        torch.export.load({str(tmp_path / "gru.pt2")!r})
    """
    run_python(code)


def onnx_runs(model: nn.Module, x: Tensor, other: Tensor) -> tuple[set[str], Tensor]:
    """The operators of the ONNX model, exported with x, and its result for `other`."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install onnxruntime")
    program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=DYNAMIC, verbose=False)
    assert program is not None
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    (result,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    return {node.op_type for node in program.model.graph}, torch.from_numpy(result)


@pytest.mark.parametrize("name", RECURRENT)
def test_onnx(name: str) -> None:
    operator, make = RECURRENT[name]
    model, other = made(make), torch.randn(T + 2, B - 1, I)
    operators, result = onnx_runs(model, torch.randn(T, B, I), other)
    assert operator in operators
    torch.testing.assert_close(result, model(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OTHERS)
def test_onnx_of_attention(name: str) -> None:
    model, other = made(OTHERS[name]), torch.randn(T + 2, B - 1, I)
    _, result = onnx_runs(model, torch.randn(T, B, I), other)
    torch.testing.assert_close(result, model(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
def test_onnx_of_cells(name: str) -> None:
    model, other = made(lambda: ours(name)), torch.randn(B - 1, I)

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x.flatten(0, 1))

    _, result = onnx_runs(Rows(), torch.randn(T, B, I), other[None])
    torch.testing.assert_close(result, model(other), rtol=1e-4, atol=1e-5)


def test_torch_finds_no_decompositions_of_our_operators() -> None:
    """In torch's table they would change other programs: where the variable CI is set, Inductor raises for an operator
    that it is to call although the table has its decomposition."""
    packets = [getattr(torch.ops.dlkernels, name) for name in torch.ops.dlkernels]
    ours = [getattr(packet, overload) for packet in packets for overload in packet.overloads()]
    assert ours
    assert not torch._decomp.get_decompositions(ours)
