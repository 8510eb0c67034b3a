"""Runs the Triton attention kernels under Triton's interpreter and compares every pair of features with float64.

This needs TRITON_INTERPRET=1 and a separate process: `make gpuless`.
"""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator
from typing import Any

import interpreter
import pytest
import torch
from cases import FACTORS, GRADIENTS, Inputs, Judge, build, label, pairwise
from oracle import keep_mask, probabilities
from torch import Tensor

from dlkernels.attention.triton import heuristics, host
from dlkernels.attention.triton.heuristics import Plan, Tile

faulthandler.enable()
interpreter.install_bfloat16()
interpreter.install_shortcuts()
CASES = pairwise(FACTORS)
# Small tiles, so that 81 rows take several.
SMALL = Tile(64, 32, 4, 1)
TILES = (SMALL, Tile(64, 64, 4, 1), Tile(128, 32, 4, 1), Tile(32, 128, 4, 1))


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Makes the host code use small tiles, and buffers of NaN that end at a protected page. Yields their shapes."""
    shapes: list[tuple[int, ...]] = []

    def new(shape: Any, like: Tensor, dtype: torch.dtype | None = None, fill_zero: bool = False) -> Tensor:
        shapes.append(tuple(shape))
        buffer = interpreter.guarded(shape, dtype or like.dtype)
        return buffer.zero_() if fill_zero else buffer

    monkeypatch.setattr(host, "_new", new)
    monkeypatch.setattr(heuristics, "tile", lambda *_: SMALL)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield shapes
    torch.set_num_threads(threads)


def ours(inputs: Inputs) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    q, k, v, features, do, dlse = inputs
    o, lse, stats = host.attention_forward(q, k, v, **features, contiguous=False)
    needs = {
        "need_mask": features["mask"] is not None and features["mask"].is_floating_point(),
        "need_slopes": features["alibi_slopes"] is not None, "need_sinks": features["sinks"] is not None,
    }  # fmt: skip
    gradients = host.attention_backward(do, dlse, q, k, v, o, stats, **features, need_q=True, need_kv=True, **needs)
    return o, lse, dict(zip(GRADIENTS, gradients, strict=True))


def compare(inputs: Inputs, dtype: torch.dtype, gradients: bool = True) -> None:
    """Checks all results of the kernels by the tolerance rule of dlkernels.testing."""
    if gradients:
        o, lse, actual = ours(inputs)
    else:
        o, lse, _ = host.attention_forward(*inputs[:3], **inputs.features, contiguous=False)
    judge = Judge(inputs, dtype)
    assert o.dtype == dtype and lse.dtype == torch.float32
    assert judge.output(o, dtype).ok, judge.output(o, dtype)
    verdict = judge.logarithm(lse)
    # With 16-bit operands scores are in base 2, which takes two or three roundings to float32 more than the peer's.
    assert verdict.ours <= verdict.limit * (1 if dtype == torch.float32 else 3), verdict
    if not gradients:
        return
    for name in GRADIENTS:
        if name not in judge.gradients:
            assert actual[name].shape == (0,), name
            continue
        source = {"dmask": "mask", "dslopes": "alibi_slopes", "dsinks": "sinks"}.get(name)
        assert actual[name].dtype == (dtype if source is None else inputs.features[source].dtype), name
        verdict = judge.gradient(name, actual[name])
        assert verdict.ok, (name, verdict)


@pytest.mark.parametrize("index", range(len(CASES)), ids=[label(case) for case in CASES])
def test_pairs_of_features(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[index]
    monkeypatch.setattr(heuristics, "tile", lambda *_: TILES[index % len(TILES)])
    compare(build(case, index, place=interpreter.guard), case["dtype"])


PLAIN: dict[str, Any] = {name: values[0] for name, values in FACTORS.items()} | {"lengths": (81, 81), "widths": (16, 8)}
SPLIT_CASES = {
    "decode": {"lengths": (1, 81), "group": 4},
    "sinks": {"lengths": (1, 81), "group": 4, "sinks": True, "alibi": "BH"},
    "causal": {"lengths": (7, 81), "group": 2, "causal": 2, "window": (40, -1)},
    "top_left": {"lengths": (7, 81), "causal": 1},
    "mask": {"lengths": (7, 81), "mask": "bool full", "group": 2},
    "dropout": {"lengths": (7, 81), "group": 4, "dropout": 0.3, "softcap": 3.0, "mask": "float HMN"},
    "varlen": {"lengths": (7, 81), "group": 4, "mask": "varlen", "causal": 2, "sinks": True},
    "several_tiles": {"lengths": (81, 81), "causal": 1},
}  # fmt: skip


@pytest.mark.parametrize("splits", [2, 3, 7])
@pytest.mark.parametrize("name", SPLIT_CASES)
def test_split_keys(name: str, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = PLAIN | SPLIT_CASES[name]
    plan = heuristics.forward_plan

    def forced(*args: Any) -> Plan:
        chosen = plan(*args)
        return chosen._replace(splits=splits, tile=chosen.tile._replace(block_n=16))

    monkeypatch.setattr(heuristics, "forward_plan", forced)
    inputs = build(case, splits, place=interpreter.guard)
    compare(inputs, torch.float32, gradients=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saturated_rows(dtype: torch.dtype) -> None:
    """With logits of about 1e4 nearly every p is 0 or 1, and an error of one ulp in the log-sum-exp changes every
    gradient."""
    inputs = build(PLAIN | {"causal": 1, "dtype": dtype, "widths": (64, 64)}, 13)
    inputs = inputs._replace(q=inputs.q * 64, k=inputs.k * 64)
    compare(inputs, dtype)


def test_a_query_that_sees_one_key_has_no_gradient() -> None:
    inputs = build(PLAIN | {"causal": 1, "widths": (64, 64)}, 14)
    o, _, gradients = ours(inputs)
    assert torch.equal(o[:, :, 0], inputs.v[:, :, 0])
    # p is 1 and ds = dp - delta, where both are sums of the same products.
    assert gradients["dq"][:, :, 0].abs().max() <= 2e-5


HIDDEN = {
    "causal": {"causal": 1},
    "bottom_right": {"causal": 2, "lengths": (33, 81)},
    "window": {"window": (20, 10)},
    "bool": {"mask": "bool full"},
    "float": {"mask": "float full"},
    "keys": {"mask": "bool keys"},
    "dropout": {"causal": 1, "dropout": 0.3, "softcap": 3.0, "alibi": "H"},
}  # fmt: skip


@pytest.mark.parametrize(
    "name, poison",
    [*((name, float("nan")) for name in HIDDEN), *((name, float("-inf")) for name in ("causal", "float", "dropout"))],
)
def test_hidden_places_do_not_leak(name: str, poison: float) -> None:
    """One key, and then one query, is filled with NaN or -inf. The results of queries that do not see the key, and the
    gradients of keys that the query does not see, must not change."""
    case = PLAIN | HIDDEN[name]
    inputs = build(case, 5, batch=1)
    clean_o, clean_lse, clean = ours(inputs)
    M, N = case["lengths"]
    _, probability, _ = probabilities(
        *(inputs.q.double(), inputs.k.double()),
        *(inputs.features[x] for x in ("mask", "alibi_slopes", "sinks", "softmax_scale", "causal", "window_left")),
        inputs.features["window_right"], inputs.features["softcap"],
    )  # fmt: skip
    sees = probability > 0  # [B, H, M, N]; one head per key head here
    # A key that some queries see and others do not; a mask over keys hides it from all. Likewise a query below.
    fewest = 0 if name == "keys" else 1
    j = next(j for j in range(N // 2, N) if fewest <= sees[..., j].sum() < sees[..., j].numel())
    k, v = inputs.k.clone(), inputs.v.clone()
    k[:, :, j] = poison
    v[:, :, j] = poison
    o, lse, gradients = ours(inputs._replace(k=k, v=v))
    apart = ~sees[..., j]
    assert apart.any() and apart.all() == (name == "keys")
    torch.testing.assert_close(o[apart], clean_o[apart], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse[apart], clean_lse[apart], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients["dq"][apart], clean["dq"][apart], rtol=1e-4, atol=1e-5)
    assert not o[sees[..., j]].isfinite().any(dim=-1).all() or name in ("dropout", "keys")

    i = next(i for i in range(M // 2, M) if 0 < sees[:, :, i].sum() < sees[:, :, i].numel())
    q, do = inputs.q.clone(), inputs.do.clone()
    q[:, :, i] = poison
    do[:, :, i] = poison
    _, _, gradients = ours(inputs._replace(q=q, do=do))
    apart = ~sees[:, :, i]
    assert apart.any() and not apart.all()
    for key in ("dk", "dv"):
        torch.testing.assert_close(gradients[key][apart], clean[key][apart], rtol=1e-4, atol=1e-5)


def test_nan_in_hidden_mask_entries() -> None:
    case = PLAIN | {"causal": 1, "mask": "float full"}
    inputs = build(case, 6, batch=1)
    expected = ours(inputs)
    above = torch.ones(81, 81, dtype=torch.bool).triu(1)
    mask = inputs.features["mask"].masked_fill(above, float("nan"))
    o, lse, gradients = ours(inputs._replace(features=inputs.features | {"mask": mask}))
    torch.testing.assert_close(o, expected[0], rtol=0, atol=0)
    torch.testing.assert_close(lse, expected[1], rtol=0, atol=0)
    for name in GRADIENTS:
        torch.testing.assert_close(gradients[name], expected[2][name], rtol=0, atol=0)


def test_queries_that_see_nothing() -> None:
    case = PLAIN | {"mask": "bool full", "alibi": "H", "sinks": False}
    inputs = build(case, 7)
    mask = inputs.features["mask"].clone()
    mask[:, :, 10:50] = False
    do = inputs.do.clone()
    do[:, :, 10:50] = float("nan")
    q = inputs.q.clone()
    q[:, :, 10:50] = float("nan")
    for sinks in (None, torch.randn(2)):
        features = inputs.features | {"mask": mask, "sinks": sinks}
        o, lse, gradients = ours(inputs._replace(q=q, do=do, features=features))
        assert (o[:, :, 10:50] == 0).all() and (gradients["dq"][:, :, 10:50] == 0).all()
        bare = torch.full((2,), float("-inf")) if sinks is None else sinks
        torch.testing.assert_close(lse[:, :, 10:50], bare[None, :, None].expand(2, 2, 40), rtol=1e-6, atol=1e-6)
        assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("block_m, block_n", [(16, 16), (64, 16), (16, 128)])
def test_results_do_not_hang_on_the_tiling(block_m: int, block_n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = PLAIN | {"dropout": 0.3, "causal": 2, "window": (50, -1), "alibi": "H", "mask": "float MN", "group": 2}
    inputs = build(case, 8, batch=1)
    expected = ours(inputs)
    monkeypatch.setattr(heuristics, "tile", lambda *_: Tile(block_m, block_n, 4, 1))
    o, lse, gradients = ours(inputs)
    torch.testing.assert_close(o, expected[0], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(lse, expected[1], rtol=1e-5, atol=2e-6)
    for name in GRADIENTS:
        torch.testing.assert_close(gradients[name], expected[2][name], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "p, seed, offset",
    [
        (0.0, 1, 0), (0.1, 0, 0), (0.5, 42, 1), (0.5, -7, 2**32 - 1), (0.5, 2**31 + 5, 2**31),
        (0.5, 2**62 + 12345, 2**40 + 3), (1 - 2**-31, 42, 1), (1.0, 42, 1),
    ],
)  # fmt: skip
def test_dropout_keeps_these_elements(p: float, seed: int, offset: int) -> None:
    """With the identity matrix for v, o shows which elements were kept; they must be exactly those of the oracle's
    generator."""
    M, N = 33, 61
    q, k, v = torch.zeros(2, 2, M, 16), torch.zeros(2, 2, N, 16), torch.eye(N)[None, None].expand(2, 2, N, N)
    rng = torch.tensor([seed, offset])
    rest = (None, None, None, None, None, rng, 0, 0, 1.0, 0, -1, -1, 0.0, p, False)
    o, _, _ = host.attention_forward(q, k, v.contiguous(), *rest)
    assert torch.equal(o != 0, keep_mask(rng, p, 2, 2, M, N) if p < 1 else torch.zeros_like(o, dtype=torch.bool))


def test_nothing_of_size_m_times_n(machine: list[tuple[int, ...]]) -> None:
    """The gradients of masks over keys, over queries and of [M, N] need no buffer of [B, H, M, N]."""
    for kind in ("none", "float keys", "float queries", "float MN"):
        machine.clear()
        case = PLAIN | {"mask": kind, "alibi": "BH", "sinks": True, "dropout": 0.3, "group": 2}
        inputs = build(case, 9)
        ours(inputs)
        mask = inputs.features["mask"]
        allowed = mask.numel() if mask is not None and mask.is_floating_point() else 0
        largest = max(torch.Size(shape).numel() for shape in machine)
        linear = 2 * 4 * 81 * 16
        assert len(machine) > 5 and largest <= max(allowed, linear), (kind, largest)


@pytest.mark.parametrize(
    "name, rows, cols", [("plain", 1, 1), ("plain", 5, 7), ("causal", 5, 7), ("all", 5, 7), ("few", 9, 16)]
)
def test_attention_map(name: str, rows: int, cols: int) -> None:
    extra: dict[str, Any] = {
        "plain": {}, "few": {"lengths": (7, 13)}, "causal": {"causal": 2, "window": (20, -1), "lengths": (81, 33)},
        "all": {
            "lengths": (7, 81), "causal": 1, "mask": "float full", "alibi": "BH", "softcap": 3.0, "sinks": True,
            "group": 2,
        },
    }[name]  # fmt: skip
    case = PLAIN | extra
    M, N = case["lengths"]
    q, k, _, features, *_ = build(case, 10, place=interpreter.guard)
    names = (
        "mask", "alibi_slopes", "sinks", "softmax_scale", "causal", "window_left", "window_right", "softcap",
    )  # fmt: skip
    picture = host.attention_map(q, k, *(features[x] for x in names), rows, cols)
    _, p, _ = probabilities(
        q.double(), k.double(), *(x.double() if isinstance(x, Tensor) else x for x in (features[n] for n in names))
    )
    row_bins = torch.nn.functional.one_hot(torch.arange(M) * rows // M, rows).double()
    col_bins = torch.nn.functional.one_hot(torch.arange(N) * cols // N, cols).double()
    expected = row_bins.T @ p @ col_bins / row_bins.sum(0).clamp(min=1)[:, None]
    torch.testing.assert_close(picture.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "sizes", [(0, 4, 4, 5, 5), (2, 4, 2, 0, 5), (2, 4, 2, 5, 0), (2, 0, 0, 5, 5)], ids=["B", "M", "N", "H"]
)
def test_empty(sizes: tuple[int, ...]) -> None:
    B, H, HKV, M, N = sizes
    q, k, v = torch.randn(B, H, M, 8), torch.randn(B, HKV, N, 8), torch.randn(B, HKV, N, 4)
    sinks, slopes, mask = torch.randn(H), torch.rand(H), torch.randn(1, 1, M, 1)
    features = (mask, slopes, sinks, None, None, None, 0, 0, 1.0, 1, -1, -1, 0.0, 0.0)
    o, lse, stats = host.attention_forward(q, k, v, *features, False)
    assert o.shape == (B, H, M, 4) and lse.shape == (B, H, M) and (o == 0).all()
    torch.testing.assert_close(lse, sinks[None, :, None].expand(B, H, M), rtol=1e-6, atol=1e-6)
    for shape in ((1, 1, M, 1), (1, 1, 1, N), (1, 1, M, N)):
        mask = torch.zeros(shape)
        gradients = host.attention_backward(
            torch.randn_like(o), None, q, k, v, o, stats, mask, *features[1:], True, True, True, True, True
        )
        for gradient, like in zip(gradients, (q, k, v, mask, slopes, sinks), strict=True):
            assert gradient.shape == like.shape and (gradient == 0).all(), shape


def test_strided_and_expanded_inputs() -> None:
    inputs = build(PLAIN | {"group": 2}, 11)
    expected = ours(inputs)
    wide = torch.zeros(*inputs.q.shape[:3], 32)
    wide[..., ::2] = inputs.q  # the last dimension is not contiguous
    k = inputs.k[:1].expand(2, -1, -1, -1)
    o, lse, gradients = ours(inputs._replace(q=wide[..., ::2]))
    assert torch.equal(o, expected[0]) and torch.equal(lse, expected[1])
    assert torch.equal(gradients["dq"], expected[2]["dq"])
    same = ours(inputs._replace(k=k))
    assert torch.equal(same[0], ours(inputs._replace(k=k.contiguous()))[0])


@pytest.mark.parametrize("width, stride, offset", [(40, 40, 0), (40, 43, 0), (40, 40, 3), (40, 48, 8), (16, 20, 4)])
def test_rows_that_begin_anywhere(width: int, stride: int, offset: int) -> None:
    """The kernels round strides that the host code claims to be multiples, so a wrong claim reads other rows."""
    inputs = build(PLAIN | {"widths": (width, width), "dtype": torch.bfloat16, "causal": 1, "mask": "float full"}, 18)
    expected = ours(inputs)

    def moved(x: Tensor, stride: int) -> Tensor:
        memory = torch.full((x.size(0), x.size(1), x.size(2) * stride + offset), float("nan"), dtype=x.dtype)
        view = memory[..., offset:].unflatten(2, (x.size(2), stride))[..., : x.size(3)]
        return view.copy_(x)

    mask = moved(inputs.features["mask"], 81 + stride - width)
    for name in ("q", "k", "v", "do"):
        found = ours(inputs._replace(**{name: moved(getattr(inputs, name), stride)}))
        assert torch.equal(found[0], expected[0]), name
        assert all(torch.equal(found[2][x], expected[2][x]) for x in GRADIENTS), name
    found = ours(inputs._replace(features=inputs.features | {"mask": mask}))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[2]["dmask"], expected[2]["dmask"])


def test_layouts_of_results() -> None:
    """o has the layout of q unless its width differs from q's. Gradients store the heads of a row side by side."""
    for order, widths in (("BHMD", (16, 16)), ("BMHD", (16, 16)), ("BMHD", (16, 8))):
        o, lse, gradients = ours(build(PLAIN | {"order": order, "widths": widths}, 12))
        assert (o.transpose(1, 2) if (order, widths[1]) == ("BMHD", 16) else o).is_contiguous()
        for x in (gradients["dq"], gradients["dk"], gradients["dv"]):
            assert x.transpose(1, 2).is_contiguous()
        assert lse.is_contiguous()


def test_refusals() -> None:
    q = torch.randn(1, 1, 4, 8, dtype=torch.float64)
    rest = (None, None, None, None, None, None, 0, 0, 1.0, 0, -1, -1, 0.0, 0.0, False)
    with pytest.raises(NotImplementedError, match="float64"):
        host.attention_forward(q, q, q, *rest)
    q = torch.randn(1, 1, 4, 257)
    with pytest.raises(NotImplementedError, match="257"):
        host.attention_forward(q, q, q, *rest)


FAR = {
    "rows": {"mask": "float full", "lengths": (7, 81)},
    "keys": {"mask": "float keys", "lengths": (7, 81), "causal": 2},
    "everything": {"mask": "float HMN", "lengths": (33, 81), "sinks": True, "alibi": "H", "dropout": 0.3, "group": 2},
}


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name, offset", [("rows", "least"), ("keys", -1e30), ("everything", 1e20)])
def test_a_large_offset(
    name: str, offset: str | float, dtype: torch.dtype, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most rows of a mask are one large number, beside which the logarithm of the sum is lost in rounding."""
    plan = heuristics.forward_plan
    monkeypatch.setattr(heuristics, "forward_plan", lambda *args: plan(*args)._replace(splits=splits))
    inputs = build(PLAIN | FAR[name] | {"dtype": dtype}, 15)
    mask = inputs.features["mask"]
    rows = torch.rand(*mask.shape[:3], 1, generator=torch.Generator().manual_seed(15)) < 0.7
    rows = rows & (mask != float("-inf"))

    def with_far(value: float) -> Inputs:
        return inputs._replace(features=inputs.features | {"mask": mask.masked_fill(rows, value)})

    if not isinstance(offset, str):
        compare(with_far(offset), dtype)
        return
    # The kernels store scores in base 2, where the largest float32 is 2.36e38 nats. finfo.min is beyond that, so its
    # results are compared with those of -2e38.
    compare(with_far(-2e38), dtype)
    expected, found = ours(with_far(-2e38)), ours(with_far(torch.finfo(dtype).min))
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(found[2][name], expected[2][name]) for name in GRADIENTS)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sink", [torch.finfo(torch.float32).min, torch.finfo(torch.float32).max, -1e30, 1e38])
def test_extreme_sinks(sink: float, dtype: torch.dtype, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are right for finite sinks of any size, and the log-sum-exp of rows that see no key is the sink."""
    plan = heuristics.forward_plan
    monkeypatch.setattr(heuristics, "forward_plan", lambda *args: plan(*args)._replace(splits=splits))
    inputs = build(PLAIN | {"mask": "bool queries", "lengths": (7, 81), "dlse": True, "dtype": dtype}, 16)
    inputs = inputs._replace(features=inputs.features | {"sinks": torch.tensor([sink, 0.5])})
    compare(inputs, dtype)
    _, lse, _ = ours(inputs)
    hidden = ~inputs.features["mask"].expand(2, 2, 7, 1)[:, 0, :, 0]
    assert hidden.any() and torch.equal(lse[:, 0][hidden], torch.full_like(lse[:, 0][hidden], sink))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_numbers_that_float32_does_not_hold(
    sign: int, dtype: torch.dtype, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A float64 sink beyond the range of float32 counts as the nearest float32, and so does a mask value in base 2."""
    plan = heuristics.forward_plan
    monkeypatch.setattr(heuristics, "forward_plan", lambda *args: plan(*args)._replace(splits=splits))
    inputs = build(PLAIN | {"mask": "float full", "lengths": (7, 81), "dlse": True, "dtype": dtype}, 17)
    most = torch.finfo(torch.float32).max

    def results(**features: Tensor) -> list[Tensor]:
        o, lse, grads = ours(inputs._replace(features=inputs.features | features))
        return [o, lse, *(grads[name] for name in GRADIENTS)]

    beyond = results(sinks=torch.tensor([sign * 1e39, 0.5], dtype=torch.float64))
    for found, expected in zip(beyond, results(sinks=torch.tensor([sign * most, 0.5])), strict=True):
        assert torch.equal(found, expected) and not found.isnan().any()
    mask = inputs.features["mask"].float()
    far, near = (results(mask=torch.full_like(mask, sign * value)) for value in (3e38, 2e38))
    for at, (found, expected) in enumerate(zip(far, near, strict=True)):
        assert torch.equal(found, expected) or at == 1, at  # all results except lse
