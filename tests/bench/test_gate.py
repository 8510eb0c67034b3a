"""The benchmark prints no speed-up if anything is wrong with a result or a gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import result_files
from dlkernels.bench import attention, report
from dlkernels.bench.attention import AttentionCase
from dlkernels.bench.layers import LayerCase, theirs
from dlkernels.bench.report import summarize
from dlkernels.bench.runner import AnyCase, Result, Runner, compare
from dlkernels.bench.timing import Budget

pytestmark = pytest.mark.o0_skip(reason="the runner is Python alone")

TINY = Budget(0.002, block_seconds=1e-4, discard_seconds=0.0, min_pairs=2, max_pairs=2, max_seconds=1.0)
Spoil = Callable[[Tensor], Tensor]


def one_value(value: float) -> Spoil:
    """Changes only the last value, which a mean or a comparison of the first values would miss."""

    def spoil(t: Tensor) -> Tensor:
        t = t.clone()
        t[(-1,) * t.dim()] = value
        return t

    return spoil


VALUES: dict[str, Spoil] = {
    "nan": one_value(float("nan")),
    "inf": one_value(float("inf")),
    "minus_inf": one_value(float("-inf")),
    "1e7": one_value(1e7),
    "all_nan": lambda t: torch.full_like(t, float("nan")),
    "all_inf": lambda t: torch.full_like(t, float("inf")),
    "off_by_1e7": lambda t: t + 1e7,
    "zeros": torch.zeros_like,
    "negated": torch.neg,
}
FORMS: dict[str, Spoil] = {
    "shape": lambda t: t[..., :-1],
    "more_dimensions": lambda t: t[None],
    "float64": Tensor.double,
    "bfloat16": Tensor.bfloat16,
}


class SpoiledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, spoil: Spoil) -> Tensor:
        ctx.spoil = spoil
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.spoil(grad), None


def layer_with(output: Spoil | None = None, gradient: Spoil | None = None) -> Callable[[LayerCase], nn.Module]:
    """Returns a builder of torch's layer in which the last result or the gradient of x is spoiled."""

    def build(case: LayerCase) -> nn.Module:
        module = theirs(case)

        def after(module: nn.Module, args: Any, out: Any) -> Any:
            if output is None:
                return out
            if isinstance(out, Tensor):
                return output(out)
            first, last = out
            if isinstance(last, tuple):
                return first, (*last[:-1], output(last[-1]))
            return first, output(last)

        def before(module: nn.Module, args: tuple[Any, ...]) -> Any:
            return (SpoiledGradient.apply(args[0], gradient), *args[1:]) if gradient else args

        module.register_forward_hook(after)
        module.register_forward_pre_hook(before)
        return module

    return build


def attention_with(output: Spoil | None = None, gradient: Spoil | None = None) -> attention.Run:
    def run(case: AttentionCase, t: dict[str, Tensor]) -> Tensor:
        t = {**t, "v": SpoiledGradient.apply(t["v"], gradient)} if gradient else t
        o = attention.theirs(case, t)
        return output(o) if output else o

    return run


LAYERS = [
    LayerCase(mode, T, 3, 4, 5, cell=T == 1, training=training)
    for mode in ("lstm", "gru")
    for T in (1, 3)
    for training in (False, True)
]
ATTENTION = [
    AttentionCase(2, 2, 9, 8, training=training, mask=mask) for training in (False, True) for mask in ("", "bias")
]


def assert_nothing_claimed(result: Result) -> None:
    assert result.wrong and result.speedup is None and result.spread is None, result
    entry = result.as_json()
    assert entry["status"] in ("disagree", "error") and not {"speedup", "ours_ms", "ratio_of_all"} & entry.keys()
    text = report.results_table([result])
    assert ("results disagree" in text or "error: " in text) and "0x" not in text
    assert summarize([result])["overall"] is None and summarize([result])["wrong"] == [result.case.name]


@pytest.mark.parametrize("case", [*LAYERS, *ATTENTION], ids=lambda c: c.name + c.dtype)
def test_the_peer_itself_passes(case: AnyCase) -> None:
    """Without a spoiled value the same sides pass, so the tests below fail only because of it."""
    (result,) = Runner(TINY, ours=layer_with(), our_attention=attention_with()).run([case])
    assert result.status == "ok" and result.speedup, result.message


@pytest.mark.parametrize("what", [*VALUES, *FORMS])
@pytest.mark.parametrize("case", [*LAYERS, *ATTENTION], ids=lambda c: c.name)
def test_a_wrong_result_is_refused(case: AnyCase, what: str) -> None:
    spoil = {**VALUES, **FORMS}[what]
    (result,) = Runner(TINY, ours=layer_with(spoil), our_attention=attention_with(spoil)).run([case])
    assert_nothing_claimed(result)
    if not case.training:  # in training torch may reject the gradient first
        assert result.status == "disagree", result.message


@pytest.mark.parametrize("what", VALUES)
@pytest.mark.parametrize("case", [c for c in (*LAYERS, *ATTENTION) if c.training], ids=lambda c: c.name)
def test_a_wrong_gradient_is_refused(case: AnyCase, what: str) -> None:
    spoil = VALUES[what]
    sides = {"ours": layer_with(gradient=spoil), "our_attention": attention_with(gradient=spoil)}
    (result,) = Runner(TINY, **sides).run([case])  # type: ignore[arg-type]
    assert_nothing_claimed(result)
    assert result.status == "disagree", result.message


@pytest.mark.parametrize("what", VALUES)
@pytest.mark.parametrize("case", [LAYERS[0], ATTENTION[0]], ids=lambda c: c.name)
def test_a_peer_as_wrong_as_we_are_excuses_nothing(case: AnyCase, what: str) -> None:
    """torch's error is the measure of ours, so a wrong torch must not excuse a wrong result. Here torch's float64
    results, the reference, are right."""
    spoil = VALUES[what]

    def wrong_layer(case: LayerCase) -> nn.Module:
        module = theirs(case)
        module.register_forward_hook(
            lambda m, args, out: out if m.weight_hh.dtype == torch.float64 else (spoil(out[0]), spoil(out[1]))
        )
        return module

    sides = {"ours": wrong_layer, "theirs": wrong_layer}
    sides |= {"our_attention": attention_with(spoil), "their_attention": attention_with(spoil)}
    (result,) = Runner(TINY, **sides).run([case])  # type: ignore[arg-type]
    assert_nothing_claimed(result)
    assert result.status == "disagree", result.message


class TestCompare:
    REF = torch.tensor([1.0, -4.0, 0.5], dtype=torch.float64)

    def agree(self, ours: Tensor, theirs: Tensor | None = None, ref: Tensor = REF) -> bool:
        theirs = ref.float() if theirs is None else theirs
        return compare({"y": ours}, {"y": theirs}, {"y": ref}, torch.float32).ok

    def test_good(self) -> None:
        assert self.agree(self.REF.float())
        assert self.agree(torch.empty(0), ref=torch.empty(0, dtype=torch.float64))
        assert self.agree(torch.zeros(3), ref=torch.zeros(3, dtype=torch.float64))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e7, -1e30])
    @pytest.mark.parametrize("at", [0, 2])
    def test_bad_value(self, bad: float, at: int) -> None:
        ours = self.REF.float()
        ours[at] = bad
        assert not self.agree(ours) and not self.agree(ours, ours)
        if not math.isfinite(bad):
            assert not self.agree(ours, ours, ours.double()), "a reference without numbers is none"

    def test_the_worst_tensor_decides_wherever_it_stands(self) -> None:
        good, bad = self.REF.float(), self.REF.float() + 1
        for order in (("a", "b", "c"), ("b", "a", "c"), ("c", "b", "a")):
            ours = {name: bad if name == "b" else good for name in order}
            every = dict.fromkeys(order, good)
            found = compare(ours, every, dict.fromkeys(order, self.REF), torch.float32)
            assert not found.ok and found.worst == "b"

    def test_form(self) -> None:
        assert not self.agree(self.REF) and not self.agree(self.REF.bfloat16())
        assert not self.agree(self.REF.float()[:2]) and not self.agree(self.REF.float()[None])
        assert not compare({}, {"y": self.REF.float()}, {"y": self.REF}, torch.float32).ok
        two = {"y": self.REF.float(), "z": self.REF.float()}
        assert not compare(two, two, {"y": self.REF}, torch.float32).ok


def test_a_result_file_claims_nothing_for_a_case_that_failed() -> None:
    (result,) = Runner(TINY, ours=layer_with(VALUES["nan"])).run([LAYERS[0]])
    doc = report.document("main", [result], [], {})
    assert result_files.problems(doc) == []
    for claim in ("speedup", "ours_ms", "ratio_of_all", "spread"):
        spoiled = {**doc, "results": [{**doc["results"][0], claim: 2.0}]}
        assert result_files.problems(spoiled), claim


def test_the_gate_looks_at_the_side_that_is_timed() -> None:
    """Only one module is built for our side, so the checked module is the timed one."""
    built: list[nn.Module] = []

    def build(case: LayerCase) -> nn.Module:
        built.append(theirs(case))
        return built[-1]

    (result,) = Runner(TINY, ours=build).run([LAYERS[0]])
    assert result.status == "ok" and len(built) == 1
