"""Tests the plans of layers on CUDA. Plain C++ makes them, so the tests need no GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

import dlkernels
from dlkernels._core import extension
from dlkernels._core.routing import no_kernel
from dlkernels.attention.routing import route as attention_route
from dlkernels.rnn.routing import route

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cuda"))

import predict

pytestmark = pytest.mark.o0_skip(reason="plans are integers, the same at -O0")

_compiled: Any = extension.native
SHARED_BYTES = 232448  # shared memory of a block on an H200
MULTIPROCESSORS = 132


def plan(mode: str, dtype: str, B: int, H: int, D: int = 1, backward: bool = False) -> dict[str, Any]:
    """Returns the plan for 10 time steps; a plan does not depend on their number."""
    return dict(_compiled.cuda_plan(mode, dtype, 10, B, H, D, backward))


@pytest.mark.parametrize(
    ("mode", "dtype", "B", "H", "D", "kind", "slices"),
    [
        ("lstm", "bfloat16", 1, 1, 1, "cluster", 1),
        ("lstm", "bfloat16", 64, 256, 2, "cluster", 8),
        ("gru", "float16", 64, 512, 1, "cluster", 16),
        ("rnn_tanh", "bfloat16", 8, 1024, 1, "cluster", 16),
        ("lstm", "float32", 16, 256, 1, "cluster", 8),
        ("lstm", "float32", 16, 512, 1, "cluster", 16),
        ("lstm", "float32", 64, 512, 1, "grid", 32),
        ("lstm", "bfloat16", 16, 1024, 2, "grid", 64),
        ("lstm", "float32", 8, 1024, 1, "grid", 64),
        ("lstm", "float32", 16, 1024, 1, "steps", 0),
        ("lstm", "bfloat16", 16, 4096, 1, "steps", 0),
        ("lstm", "bfloat16", 100000, 128, 1, "steps", 0),
    ],
)
def test_where_the_weights_stay(mode: str, dtype: str, B: int, H: int, D: int, kind: str, slices: int) -> None:
    chosen = plan(mode, dtype, B, H, D)
    assert (chosen["kind"], chosen["slices"]) == (kind, slices), chosen["reason"]
    assert chosen["kernel"] == f"cuda/{kind}/{mode}"


@pytest.mark.parametrize("mode", ["lstm", "gru", "rnn_relu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backward", [False, True])
def test_plans_fit_the_gpu_and_cover_the_call(mode: str, dtype: str, backward: bool) -> None:
    for D in (1, 2):
        for B in (1, 7, 8, 9, 64, 200):
            for H in (1, 33, 100, 300, 700, 1500):
                chosen = plan(mode, dtype, B, H, D, backward)
                if chosen["kind"] == "steps":
                    continue
                assert chosen["shared_bytes"] <= SHARED_BYTES
                assert chosen["groups"] == D * -(-B // chosen["tile"])
                assert chosen["tile"] % chosen["columns"] == 0
                if chosen["kind"] == "grid":  # all blocks must run at once, or the barrier would wait forever
                    assert chosen["blocks"] <= MULTIPROCESSORS
                else:
                    assert chosen["slices"] <= 16


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("B", [1, 16, 64, 128])
@pytest.mark.parametrize(
    ("mode", "H", "units"), [("lstm", 640, 40), ("lstm", 520, 40), ("gru", 768, 48), ("gru", 520, 48)]
)
def test_wide_slices_let_larger_layers_use_clusters(mode: str, H: int, units: int, B: int, backward: bool) -> None:
    for dtype in ("bfloat16", "float16"):
        chosen = plan(mode, dtype, B, H, backward=backward)
        assert (chosen["kind"], chosen["units"], chosen["columns"]) == ("cluster", units, 8), chosen["reason"]
    assert plan(mode, "bfloat16", B, 512, backward=backward)["units"] == 32
    assert plan(mode, "bfloat16", B, H + 256, backward=backward)["kind"] == "grid"
    assert plan(mode, "float32", B, H, backward=backward)["kind"] in ("grid", "steps")


@pytest.mark.parametrize("B", [16, 24, 64])
def test_one_product_at_a_time_where_two_do_not_fit(B: int) -> None:
    """With 16 columns the partial sums and W_hh of this layer do not fit into shared memory together."""
    chosen = plan("lstm", "bfloat16", B, 2048)
    assert (chosen["kind"], chosen["columns"], chosen["tile"]) == ("grid", 8, B), chosen["reason"]
    assert plan("gru", "bfloat16", B, 2048)["columns"] == 16
    assert plan("lstm", "bfloat16", 65, 2048)["kind"] == "steps"  # more chunks than the plan allows


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("mode", ["lstm", "gru", "rnn_relu"])
def test_small_batches_in_float32_multiply_no_padding(mode: str, backward: bool) -> None:
    for H in (128, 512, 1024):
        assert plan(mode, "float32", 1, H, backward=backward)["columns"] == 1
        for B in (2, 3, 4, 5, 8, 16):
            chosen = plan(mode, "float32", B, H, backward=backward)
            # As many groups as the GPU has room for share the batch.
            if chosen["kind"] != "steps" and chosen["tile"] <= 8:
                assert chosen["columns"] == chosen["tile"] < 2 * -(-B // chosen["groups"])
    assert plan("lstm", "float32", 16, 256)["tile"] == 1  # 16 groups of 8 blocks


def test_the_docs_show_the_plans_and_the_counts() -> None:
    """After a change of the plans, or of counts.json, `python tests/cuda/predict.py --write` renews the tables."""
    text = predict.DOCS.read_text()
    assert predict.with_tables(text) == text


@pytest.mark.parametrize(("cap", "kind"), [("cluster", "cluster"), ("grid", "grid"), ("steps", "steps")])
def test_a_cap_leaves_the_later_kinds(cap: str, kind: str) -> None:
    assert extension.native is not None
    extension.native.cap_cuda_plan(cap)
    try:
        assert plan("lstm", "bfloat16", 8, 64)["kind"] == kind
        assert plan("lstm", "bfloat16", 16, 4096)["kind"] == "steps"
    finally:
        extension.native.cap_cuda_plan("cluster")
    with pytest.raises(ValueError, match="expected cluster, grid or steps"):
        extension.native.cap_cuda_plan("clusters")


class OnAnH200:
    """Stands in for the compiled module on a machine with an H200, by planning for its default device, an H200."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_compiled, name)

    def cuda_plan(self, *arguments: Any) -> Any:
        *sizes, device = arguments
        assert device == 0
        return _compiled.cuda_plan(*sizes, None)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes tensors on CUDA possible without a GPU, as fake tensors, and pretends that there are CUDA kernels."""
    monkeypatch.setattr(extension, "HAVE_CUDA_KERNELS", True)
    monkeypatch.setattr(extension, "native", OnAnH200())
    # A torch without CUDA cannot initialise a CUDA tensor, not even a fake one.
    monkeypatch.setattr(torch.nn.init, "uniform_", lambda tensor, *bounds: tensor)
    with FakeTensorMode():
        yield


@pytest.fixture
def autocast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sets the state that torch.autocast("cuda") sets, because without a GPU torch.autocast disables itself."""
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", before)
        torch.clear_autocast_cache()


@pytest.mark.parametrize("why", ["it was built without nvcc", "DLKERNELS_CUDA is 0"])
def test_a_module_without_cuda_kernels_says_so(cuda: None, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    layer, x = dlkernels.nn.GRU(3, 5, device="cuda"), torch.empty(2, 4, 3, device="cuda")
    monkeypatch.setattr(extension, "HAVE_CUDA_KERNELS", False)
    monkeypatch.setattr(extension, "why_no_cuda", why)
    monkeypatch.setattr(
        dlkernels.attention.triton, "_device_reason", lambda index: ""
    )  # a torch with CUDA would query the driver
    reason = f"the compiled module has no CUDA kernels: {why}"
    assert route(x) == no_kernel(reason)
    explained = dlkernels.explain(layer, x)
    assert (explained.kernel, explained.layers[0].reason) == ("reference", reason)
    # The CUDA kernels for attention are written in Triton and do not depend on how the module was compiled.
    assert "compiled module" not in attention_route(x, x, x).reason


def test_what_has_no_cuda_kernel(cuda: None) -> None:
    x = torch.empty(2, 4, 3, device="cuda")
    assert route(x).path == "op"
    assert route(x.double()) == no_kernel("no kernel for torch.float64 on cuda")
    assert route(x, projected=True) == no_kernel("no CUDA kernel for projections")
    projected = dlkernels.nn.LSTM(3, 5, proj_size=2, device="cuda")
    assert dlkernels.explain(projected, x).layers[0].reason == "no CUDA kernel for projections"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_explain_names_the_cuda_plans(cuda: None, dtype: torch.dtype) -> None:
    layer = dlkernels.nn.LSTM(3, 96, num_layers=2, bidirectional=True, device="cuda", dtype=dtype)
    explained = dlkernels.explain(layer, torch.empty(7, 4, 3, device="cuda", dtype=dtype))
    assert explained.native and [one.kernel for one in explained.layers] == ["cuda/cluster/lstm"] * 2
    name = str(dtype).removeprefix("torch.")
    for one in explained.layers:
        assert one.forward == plan("lstm", name, 4, 96, 2, False)
        assert one.backward == plan("lstm", name, 4, 96, 2, True)
    assert "kind cluster, blocks " in str(explained) and ", columns " in str(explained)
    cell = dlkernels.nn.GRUCell(3, 5, device="cuda", dtype=dtype)
    assert dlkernels.explain(cell, torch.empty(4, 3, device="cuda", dtype=dtype)).kernel == "cuda/cell/gru"


def test_variants_run_step_by_step(cuda: None) -> None:
    x = torch.empty(7, 4, 3, device="cuda")
    for layer, mode in (
        (dlkernels.nn.LayerNormLSTM(3, 5, num_layers=2, device="cuda"), "lstm"),
        (dlkernels.nn.GRU(3, 5, zoneout=0.1, device="cuda").eval(), "gru"),  # fake masks cannot be drawn
    ):
        explained = dlkernels.explain(layer, x)
        assert explained.native and {one.kernel for one in explained.layers} == {f"cuda/steps/{mode}"}
        assert all(one.forward["kind"] == one.backward["kind"] == "steps" for one in explained.layers)
        with torch.no_grad():  # autograd would need the CUDA device
            assert layer(x)[0].shape == (7, 4, 5)
    cell = dlkernels.nn.LayerNormGRUCell(3, 5, device="cuda")
    assert dlkernels.explain(cell, torch.empty(4, 3, device="cuda")).kernel == "cuda/steps/gru"
    resets = torch.empty(7, 4, dtype=torch.bool, device="cuda")
    layer = dlkernels.nn.LayerNormLSTM(3, 5, device="cuda")
    assert "have no kernel with layer normalisation" in str(dlkernels.explain(layer, x, resets=resets))
    wide = dlkernels.nn.LayerNormLSTM(3, 5, device="cuda", dtype=torch.float64)
    assert dlkernels.explain(wide, x.double()).layers[0].reason == "no kernel for torch.float64 on cuda"


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_autocast_on_cuda(cuda: None, autocast: None, name: str) -> None:
    layer = getattr(dlkernels.nn, name)(3, 5, num_layers=2, device="cuda")
    cell = getattr(dlkernels.nn, f"{name}Cell")(3, 5, device="cuda")
    x = torch.empty(7, 4, 3, device="cuda")
    for module, given in ((layer, x), (cell, torch.empty(4, 3, device="cuda"))):
        explained = dlkernels.explain(module, given)
        assert explained.native and explained.kernel.startswith("cuda/")
        assert "autocast bfloat16" in explained.call
        with torch.no_grad():  # autograd would need the CUDA device
            outputs = torch.utils._pytree.tree_leaves(module(given))
        assert {(out.dtype, out.device.type) for out in outputs} == {(torch.bfloat16, "cuda")}
    # Autocast does not change float64, and there is no kernel for it.
    wide = getattr(dlkernels.nn, name)(3, 5, device="cuda", dtype=torch.float64)
    doubles = torch.empty(7, 4, 3, device="cuda", dtype=torch.float64)
    assert dlkernels.explain(wide, doubles).layers[0].reason == "no kernel for torch.float64 on cuda"


def test_autocast_of_the_cpu_does_not_reach_cuda(cuda: None) -> None:
    layer, x = dlkernels.nn.GRU(3, 5, device="cuda"), torch.empty(7, 4, 3, device="cuda")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert layer(x)[0].dtype == torch.float32
