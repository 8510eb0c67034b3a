"""The layer of a case in ONNX Runtime and in OpenVINO: one ONNX node with the weights of the case.

The model is made once, for the sizes of the case, and both libraries pack its weights then. Input and outputs are not
copied: the libraries read and write torch's memory. Both keep their own defaults for how threads wait, which is what
their users have: without spinning ONNX Runtime takes up to 1.5 times as long for small layers on two threads. The
runner waits until these threads sleep before another side runs.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from .layers import Inputs, LayerCase

INSTALL = "pip install 'dlkernels[peers]'"
# The gates of ONNX as indices into those of torch: i, o, f, c of i, f, g, o; z, r, h of r, z, n.
GATES = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn": (0,)}
OUTPUTS = {"lstm": ("y", "h_n", "c_n"), "gru": ("y", "h_n"), "rnn": ("y", "h_n")}


class Unavailable(Exception):
    """A side cannot run here; the message says why."""


def library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as problem:
        if problem.name == name:
            raise Unavailable(f"{name} is not installed: {INSTALL}") from problem
        raise Unavailable(f"{name} cannot be imported: {problem}") from problem


def onnx_model(case: LayerCase, weights: dict[str, Tensor], dtype: torch.dtype) -> bytes:
    """A model of one LSTM, GRU or RNN: x [T, B, I] in; y [T, 1, B, H], h_n and, for an LSTM, c_n [1, B, H] out."""
    onnx = library("onnx")
    kind = _element(onnx, dtype)

    def in_order(name: str) -> Tensor:
        gates = weights[name].chunk(len(GATES[case.mode]))
        return torch.cat([gates[at] for at in GATES[case.mode]])

    def constant(name: str, value: Tensor) -> Any:
        raw = value.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
        return onnx.helper.make_tensor(name, kind, list(value.shape), raw, raw=True)

    values = {
        "W": in_order("weight_ih_l0")[None],
        "R": in_order("weight_hh_l0")[None],
        "b": torch.cat((in_order("bias_ih_l0"), in_order("bias_hh_l0")))[None],
    }
    # torch adds the recurrent bias of a GRU's new gate before the reset gate is applied.
    more = {"linear_before_reset": 1} if case.mode == "gru" else {}
    node = onnx.helper.make_node(
        case.mode.upper(), ["x", *values], list(OUTPUTS[case.mode]), hidden_size=case.H, **more
    )
    describe = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node], case.mode, [describe("x", kind, [case.T, case.B, case.I])],
        [describe(name, kind, list(shape)) for name, shape in shapes(case).items()],
        [constant(name, value) for name, value in values.items()],
    )  # fmt: skip
    # Only since operator set 22 do the layers take bfloat16. The older one is read by older releases too.
    versions = [onnx.helper.make_opsetid("", 22 if dtype == torch.bfloat16 else 17)]
    made: bytes = onnx.helper.make_model(graph, opset_imports=versions, ir_version=10).SerializeToString()
    return made


def shapes(case: LayerCase) -> dict[str, tuple[int, ...]]:
    return {name: (case.T, 1, case.B, case.H) if name == "y" else (1, case.B, case.H) for name in OUTPUTS[case.mode]}


def _element(onnx: Any, dtype: torch.dtype) -> int:
    kind: int = onnx.TensorProto.BFLOAT16 if dtype == torch.bfloat16 else onnx.TensorProto.FLOAT
    return kind


class Engine:
    """A compiled model with its buffers in torch's memory. Derived classes make `run`."""

    def __init__(self, case: LayerCase, inputs: Inputs, dtype: torch.dtype):
        self.dtype = getattr(torch, case.dtype)
        self.x = inputs.x.to(dtype, copy=True)
        self.outputs = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes(case).items()}

    def prepare(self) -> None:
        pass

    def results(self) -> dict[str, Tensor]:
        self()
        found = {name: value.to(self.dtype, copy=True) for name, value in self.outputs.items()}
        return found | {"y": found["y"].squeeze(1)}

    def __call__(self) -> None:
        raise NotImplementedError


class OnnxRuntime(Engine):
    def __init__(self, case: LayerCase, inputs: Inputs):
        runtime, onnx = library("onnxruntime"), library("onnx")
        dtype = getattr(torch, case.dtype)
        super().__init__(case, inputs, dtype)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = case.threads
        options.inter_op_num_threads = 1
        model = onnx_model(case, inputs.weights, dtype)
        try:
            self.session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as problem:
            if "NOT_IMPLEMENTED" in str(problem):
                raise Unavailable(f"it has no recurrent layers in {case.dtype} for the CPU") from problem
            raise
        kind = _element(onnx, dtype)
        self.binding = self.session.io_binding()
        self.binding.bind_input("x", "cpu", 0, kind, list(self.x.shape), self.x.data_ptr())
        for name, value in self.outputs.items():
            self.binding.bind_output(name, "cpu", 0, kind, list(value.shape), value.data_ptr())

    def __call__(self) -> None:
        self.session.run_with_iobinding(self.binding)


class OpenVino(Engine):
    """In bfloat16 the model is a float32 one that OpenVINO is told to compute in bfloat16, as its users do. Input and
    outputs are float32 then."""

    def __init__(self, case: LayerCase, inputs: Inputs):
        openvino = library("openvino")
        super().__init__(case, inputs, torch.float32)
        core = _core()
        precision = {"float32": "f32", "bfloat16": "bf16"}[case.dtype]
        settings = {
            "INFERENCE_NUM_THREADS": case.threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": precision
        }  # fmt: skip
        model = core.read_model(onnx_model(case, inputs.weights, torch.float32))
        compiled = core.compile_model(model, "CPU", settings)
        used = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        if used != precision:
            raise Unavailable(f"OpenVINO computes in {used} here")
        self.request = compiled.create_infer_request()
        self.request.set_input_tensor(openvino.Tensor(self.x.numpy(), shared_memory=True))
        for name, value in self.outputs.items():
            self.request.set_tensor(name, openvino.Tensor(value.numpy(), shared_memory=True))

    def __call__(self) -> None:
        self.request.infer()


@functools.cache
def _core() -> Any:
    return library("openvino").Core()


def versions() -> dict[str, str]:
    found = {}
    for name in ("onnx", "onnxruntime", "openvino"):
        try:
            # OpenVINO adds a commit.
            found[name] = str(library(name).__version__).partition("-")[0]
        except Unavailable as reason:
            found[name] = f"none: {reason}"
    return found
