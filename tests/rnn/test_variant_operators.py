"""The operators of layers with layer normalisation, zoneout and recurrent dropout: fakes, refusals, torch.compile."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dlkernels._core.dtypes import DTYPES, compute_dtype
from dlkernels.rnn.kinds import KINDS
from dlkernels.rnn.operators import variants as operators
from tests.support.variant_cases import SEED, variants

pytestmark = [pytest.mark.usefixtures("native"), pytest.mark.o0_skip(reason="Python around the kernels")]
VARIANTS = variants()
T, B, I, H = 5, 3, 4, 6


def arguments(mode: str, **changed: Any) -> dict[str, Any]:
    """Those of a forward with layer normalisation and all masks."""
    G, lstm = KINDS[mode].gates, mode == "lstm"
    of_c = [torch.randn(H), torch.randn(H)] if lstm else []
    given: dict[str, Any] = {
        "x": torch.randn(T, B, I), "h0": torch.randn(1, B, H), "c0": torch.randn(1, B, H) if lstm else None,
        "weights": [torch.randn(G * H, I), torch.randn(G * H, H), torch.randn(G * H), torch.randn(G * H)],
        "gains": [torch.randn(G * H), torch.randn(G * H), *of_c],
        "dropout": torch.rand(1, B, H), "mask_c": torch.rand(1, T, B, H) < 0.5 if lstm else None,
        "mask_h": torch.rand(1, T, B, H) < 0.5, "batch_sizes": None, "lengths": None, "eps": 1e-5, "zoneout_c": 0.0,
        "zoneout_h": 0.0, "bidirectional": False, "batch_first": False, "save": True,
    }  # fmt: skip
    return given | changed


def run(mode: str, **changed: Any) -> tuple[Tensor, ...]:
    return getattr(torch.ops.dlkernels, f"{mode}_variant")(**arguments(mode, **changed))  # type: ignore[no-any-return]


def backward_arguments(mode: str, saved: Tensor, **changed: Any) -> dict[str, Any]:
    given = arguments(mode, **changed)
    del given["save"]
    return {
        "dy": torch.randn(T, B, H), "dh_n": None, "dc_n": None, **given, "saved": saved, "bptt_steps": 0,
        "need_x": True, "need_state": True, "need_weights": True,
    }  # fmt: skip


@pytest.mark.parametrize("normalised", (False, True))
@pytest.mark.parametrize("mode", operators.MODES)
def test_opcheck(mode: str, normalised: bool) -> None:
    changed: dict[str, Any] = {} if normalised else {"gains": [], "dropout": None, "mask_h": None, "zoneout_h": 0.25}
    forward = getattr(torch.ops.dlkernels, f"{mode}_variant").default
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward, (), arguments(mode, **changed), test_utils=utils)
    torch.library.opcheck(forward, (), arguments(mode, **changed, save=False), test_utils=utils)
    saved = run(mode, **changed)[-1]
    backward = getattr(torch.ops.dlkernels, f"{mode}_variant_backward").default
    torch.library.opcheck(backward, (), backward_arguments(mode, saved, **changed), test_utils=utils)
    unwanted = {"need_x": False, "need_state": False, "need_weights": False}
    given = backward_arguments(mode, saved, **changed) | unwanted
    torch.library.opcheck(backward, (), given, test_utils=utils)
    assert all(grad.numel() == 0 for grad in backward(**given))


def cast(given: Any, dtype: torch.dtype) -> Any:
    """The tensors of floating point in `dtype`, and dropout in its compute type."""
    if isinstance(given, dict):
        of_dropout = {"dropout": compute_dtype(dtype)}
        return {key: cast(value, of_dropout.get(key, dtype)) for key, value in given.items()}
    if isinstance(given, list):
        return [cast(each, dtype) for each in given]
    return given.to(dtype) if isinstance(given, Tensor) and given.is_floating_point() else given


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32, torch.float64))
@pytest.mark.parametrize("changes_c", (False, True))
@pytest.mark.parametrize("normalised", (False, True))
@pytest.mark.parametrize("mode", operators.MODES)
def test_size_of_a_record(mode: str, normalised: bool, changes_c: bool, dtype: torch.dtype) -> None:
    """In a call of a 16-bit type all but c' and the moments has 16 bits, and c' is there once if zoneout leaves it
    alone."""
    lstm = mode == "lstm"
    gains = {} if normalised else {"gains": []}
    given = cast(arguments(mode, mask_c=None, zoneout_c=0.25 if changes_c and lstm else 0.0, **gains), dtype)
    forward = getattr(torch.ops.dlkernels, f"{mode}_variant").default
    torch.library.opcheck(forward, (), given, test_utils=("test_schema", "test_faketensor"))
    saved = forward(**given)[-1]
    assert saved.dtype == compute_dtype(dtype)
    of_c, moments = (1 + changes_c) * lstm, 8 * normalised
    others = (5 + (8 if lstm else 6) * normalised) * H
    assert saved.shape[-1] == (others // 2 if dtype.itemsize == 2 else others) + of_c * H + moments
    on_cuda = operators.record_size(KINDS[mode], H, normalised, changes_c, dtype, torch.device("cuda"))
    assert on_cuda == others + (2 * H if lstm else 0) + moments


@pytest.mark.parametrize("mode", operators.MODES)
def test_the_type_of_products_decides(mode: str) -> None:
    """As under autocast."""
    sizes = []
    for product in (torch.float32, torch.bfloat16):
        given = arguments(mode) | {"product_dtype": DTYPES.index(product)}
        given["weights"] = [weight.to(product) for weight in given["weights"]]
        saved = run(mode, **given)[-1]
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert run(mode, **given)[-1].shape == saved.shape
        sizes.append(saved.shape[-1])
    assert sizes[1] < 0.7 * sizes[0]


@pytest.mark.parametrize(
    "changed, message",
    (
        ({"gains": [torch.ones(24)]}, "gains must hold norm_ih, norm_hh, norm_c, bias_c for each of 1 directions"),
        (
            {"gains": [torch.ones(24), torch.ones(23), torch.ones(6), torch.ones(6)]},
            r"gains\[1\] \(norm_hh\) must have shape",
        ),
        (
            {"gains": [torch.ones(24).double(), *[torch.ones(n) for n in (24, 6, 6)]]},
            r"gains\[0\] \(norm_ih\) must be float32",
        ),
        ({"dropout": torch.ones(1, B, H + 1)}, "dropout must have shape"),
        ({"dropout": torch.ones(1, B, H).double()}, "dropout must be float32"),
        ({"mask_h": torch.ones(1, T, B, H)}, "mask_h must be bool"),
        ({"mask_c": torch.ones(1, T, H, dtype=torch.bool)}, "mask_c must have shape"),
        ({"eps": -1.0}, "eps must not be negative"),
        ({"zoneout_h": 1.5}, r"zoneout_h must lie in 0\.\.1, got 1\.5"),
        ({"zoneout_c": -0.5}, r"zoneout_c must lie in 0\.\.1, got -0\.5"),
        ({"x": torch.randn(T, B, I + 1)}, "w_ih must have shape"),
        ({"weights": [torch.ones(24, I), torch.ones(24, 2), torch.ones(2, H)]}, "has no projection"),
    ),
)
def test_refusals(changed: dict[str, Any], message: str) -> None:
    if "weights" in changed:
        changed = changed | {"h0": None, "c0": None, "gains": []}
    with pytest.raises((RuntimeError, ValueError), match=message):
        run("lstm", **changed)


def test_the_gru_has_no_c() -> None:
    with pytest.raises(ValueError, match=r"zoneout_c must be 0 for a gru, which has no cell state, got 0\.5"):
        run("gru", zoneout_c=0.5)
    with pytest.raises(RuntimeError, match="mask_c must be None: gru has no cell state"):
        run("gru", mask_c=torch.ones(1, T, B, H, dtype=torch.bool))


def test_saved_of_another_variant_is_refused() -> None:
    saved = run("lstm", gains=[])[-1]
    with pytest.raises(RuntimeError, match="saved must have shape"):
        torch.ops.dlkernels.lstm_variant_backward(**backward_arguments("lstm", saved))


@pytest.mark.parametrize("mode", operators.MODES)
def test_without_inputs(mode: str) -> None:
    """torch's layers refuse it; the operators do not."""
    given = arguments(mode)
    weights = [given["weights"][0][:, :0], *given["weights"][1:]]
    y, *_ = run(mode, **given | {"x": torch.randn(T, B, 0), "weights": weights})
    zero, *_ = run(mode, **given | {"x": torch.zeros(T, B, I)})
    assert torch.equal(y, zero)


def test_an_empty_batch() -> None:
    y, h_n, c_n, saved = run(
        "lstm", x=torch.randn(T, 0, I), h0=None, c0=None, dropout=None, mask_c=None, mask_h=None
    )  # fmt: skip
    assert y.shape == (T, 0, H)
    assert h_n.shape == c_n.shape == (1, 0, H)
    given = backward_arguments("lstm", saved, x=torch.randn(T, 0, I), h0=None, c0=None, dropout=None, mask_c=None,
                               mask_h=None)  # fmt: skip
    grads = torch.ops.dlkernels.lstm_variant_backward(**(given | {"dy": None}))
    assert all(grad.eq(0).all() for grad in grads)


@pytest.mark.parametrize("variant", ("LayerNormLSTM-all", "LayerNormGRU-all", "LSTM-zoneout-rates"))
def test_compiled_in_one_graph(variant: str) -> None:
    case = replace(VARIANTS[variant], layers=2)
    module = case.module(torch.float32)
    x, states, _ = case.arguments(torch.float32)
    assert states is not None
    hx: Any = states if case.lstm else states[0]
    compiled = torch.compile(lambda x, hx: module(x, hx)[0], backend="aot_eager", fullgraph=True)
    found = []
    for call in (compiled, lambda x, hx: module(x, hx)[0]):
        torch.manual_seed(SEED)
        y = call(x, hx)
        found.append((y, *torch.autograd.grad(y.square().sum(), list(module.parameters()))))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
