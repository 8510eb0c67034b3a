"""Tests the attention cases of the benchmark: the check before the timing, the committed targets and the plots."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import readme, result_files, targets
from benchmarks.suites import ProjectCommand
from dlkernels.bench import attention, cases, plots, report
from dlkernels.bench.attention import AttentionCase, AttentionWorkload
from dlkernels.bench.report import summarize
from dlkernels.bench.runner import Runner
from dlkernels.bench.timing import Budget

pytestmark = [
    pytest.mark.usefixtures("native"),
    pytest.mark.o0_skip(reason="the runner is Python alone"),
]

TINY = Budget(0.002, block_seconds=1e-4, discard_seconds=0.0, min_pairs=2, max_pairs=2, max_seconds=1.0)
SMALL = AttentionCase(2, 4, 40, 16)
KINDS = [
    dataclasses.replace(SMALL, training=training, **more)
    for training in (False, True)
    for more in (
        {}, {"causal": True}, {"mask": "bool"}, {"mask": "bias"}, {"mask": "grad"}, {"Hkv": 2}, {"Dv": 8}, {"N": 70},
        {"packed": True}, {"dropout": 0.2}, {"against": "flash"}, {"against": "math"}, {"dtype": "bfloat16"},
    )
]  # fmt: skip


def run(case: AttentionCase, **sides: Any) -> Any:
    (result,) = Runner(TINY, **sides).run([case])
    return result


def wrong(case: AttentionCase, t: dict[str, Tensor]) -> Tensor:
    return attention.ours(case, t) * 1.01


@pytest.mark.parametrize("case", KINDS, ids=lambda c: c.name)
def test_every_kind_runs(case: AttentionCase) -> None:
    result = run(case)
    assert result.status == "ok" and result.speedup > 0, result.message
    assert result.kernel["kernel"].startswith("cpu/") and result.kernel["backward"] == case.training


@pytest.mark.parametrize("case", KINDS, ids=lambda c: c.name)
def test_no_speed_without_agreement(case: AttentionCase) -> None:
    if case.dtype != "bfloat16":  # the tolerance of bfloat16 allows an error of 1%
        result = run(case, our_attention=wrong)
        assert result.status == "disagree" and result.speedup is None


def test_failures_are_told_apart() -> None:
    def broken(case: AttentionCase, t: dict[str, Tensor]) -> Tensor:
        raise RuntimeError("no such kernel")

    assert run(SMALL, their_attention=broken).status == "no peer"
    assert run(SMALL, our_attention=broken).status == "error"


def test_check_sees_every_gradient() -> None:
    case = dataclasses.replace(SMALL, mask="grad", training=True)
    work = AttentionWorkload(case, attention.make_inputs(case), attention.ours)
    assert work.results().keys() == {"o", "dq", "dk", "dv", "dmask"}
    work()
    assert all(t.grad is None for t in work.tensors.values())
    assert AttentionWorkload(SMALL, attention.make_inputs(SMALL), attention.ours).results().keys() == {"o"}


def test_both_sides_of_a_packed_case_see_the_same_rows() -> None:
    case = dataclasses.replace(SMALL, packed=True, training=True)
    inputs = attention.make_inputs(case)
    sides = (AttentionWorkload(case, inputs, attention.ours), AttentionWorkload(case, inputs, attention.theirs, True))
    ours, theirs = (side.results() for side in sides)
    for name, value in ours.items():
        assert value.shape[0] == sum(case.lengths) == 50
        torch.testing.assert_close(value, theirs[name])


def test_names_and_order() -> None:
    for found in (attention.grid([1, 2], ["float32", "bfloat16"]), targets.attention()):
        assert len({case.name for case in found}) == len(found)
        names = [case.workload for case in found]
        assert sum(a != b for a, b in itertools.pairwise(names)) + 1 == len(set(names))
    assert {c.regime for c in attention.grid([1], ["float32"])} == set(cases.REGIMES)
    assert len(attention.grid([1, 2], ["float32"], quick=True)) < 6


def test_every_feature_is_in_the_grid() -> None:
    found = attention.grid([1, 2], ["float32", "bfloat16"])
    for field, least in (("causal", {True}), ("mask", {"bool", "bias", "grad"}), ("packed", {True}), ("dropout", {0.1}),
                         ("Hkv", {2, 8}), ("Dv", {32}), ("threads", {1, 2}), ("dtype", {"float32", "bfloat16"}),
                         ("training", {True, False}), ("against", {"torch", *attention.BACKENDS}), ("M", {1, 97, 4096}),
                         ("N", {1025, 2048}), ("D", {32, 64, 80, 128})):  # fmt: skip
        assert least <= {getattr(case, field) for case in found}, field


def test_targets() -> None:
    goals = {case.name: case.target for case in targets.attention()}
    assert goals["attention-infer-f32-B1-H8-M1024-D64-1t"] == goals["attention-infer-f32-B4-H8-M512-D64-2t"] == 1.0
    assert goals["attention-infer-causal-f32-B1-H8-M1024-D64-1t"] == 1.3
    assert goals["attention-infer-bf16-B1-H8-M1024-D64-1t"] == 1.3
    assert goals["attention-infer-bf16-B1-H8-M1024-D128-2t"] == 1.1
    assert goals["attention-train-bf16-B8-H12-M197-D64-1t"] == 2.0
    assert goals["attention-train-f32-B8-H12-M197-D64-1t"] == 1.1
    assert goals["attention-train-grad-mask-f32-B1-H8-M1024-D64-1t"] == 2.0
    assert goals["attention-train-dropout0.1-f32-B1-H8-M1024-D64-1t"] == 2.0
    assert goals["attention-infer-f32-B1-H8-M1024-D64-Dv32-1t"] == 2.0
    assert goals["attention-infer-f32-B1-H32-Hkv8-M1-N2048-D128-1t"] == 2.0


def test_suites(capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for suite in ("attention", "attention-targets", "targets", "main", "charlm"):
        assert ProjectCommand().run(["--suite", suite, "--threads", "1", "--list"]) == 0
        found[suite] = capsys.readouterr().out.split()
    assert all(name.startswith("attention-") for name in found["attention"] + found["attention-targets"])
    assert len(found["attention"]) > len(found["attention-targets"]) > 15 and not found["charlm"]
    assert set(found["attention"]) < set(found["main"]) and set(found["attention-targets"]) < set(found["targets"])


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    small = [dataclasses.replace(SMALL, target=goal, against=side) for goal, side in ((1e-9, "torch"), (None, "math"))]
    monkeypatch.setattr(targets, "attention", lambda threads: small)
    monkeypatch.setattr(plots, "LENGTH", 400)
    code = ProjectCommand().run(["--suite", "targets", "--only", "attention-*", "--out", str(tmp_path)], Runner(TINY))
    out = capsys.readouterr().out
    assert code == 0 and "attention-infer-f32-B2-H4-M40-D16-1t" in out and "math backend" in out
    (path,) = tmp_path.rglob("*.json")
    doc = result_files.load(path)
    assert doc["summary"]["ops"].keys() == {"attention"} and doc["summary"]["targets"] == {"reached": 1, "of": 1}
    text = readme.render({"x.json": doc})
    assert "| (2, 4, 40, 16) | attention |" in text and "against math" in text
    pytest.importorskip("matplotlib")
    assert {p.name for p in path.parent.glob("*.png")} == {path.stem + ".png", path.stem + "-attention.png"}


def test_tables_have_a_heading_for_every_backend() -> None:
    assert attention.BACKENDS.keys() <= report._AGAINST.keys()
    assert summarize([])["overall"] is None and "attention" in plots._COLOURS


def test_the_picture_shows_what_its_titles_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "LENGTH", 960)
    titles, maps = plots.attention_maps()
    named = dict(zip(titles, maps, strict=True))
    assert all(values.shape == (plots.BINS, plots.BINS) for values in maps)
    assert (named["causal"].triu(1) == 0).all() and named["full"].triu(1).sum() > 1
    assert named["window, sink"].triu(5).sum() == 0 and (named["window, sink"].sum(-1) < 1).all()
    torch.testing.assert_close(named["full"].sum(-1), torch.ones(plots.BINS))
