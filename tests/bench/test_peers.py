"""Tests `bench --suite peers`: which cells it has, who counts as the best peer, and who is left out and why."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dlkernels
from benchmarks import readme, result_files
from dlkernels.bench import engines, machine, peers, peers_report, report, timing
from dlkernels.bench.cli import Command
from dlkernels.bench.layers import Inputs, Workload, theirs
from dlkernels.bench.peers import Int8Checker, PeerCase, PeerResult, PeerRunner
from dlkernels.bench.runner import Agreement, Checker
from dlkernels.bench.timing import Budget, Sample

pytestmark = [
    pytest.mark.usefixtures("native"),
    pytest.mark.o0_skip(reason="Python around kernels that other tests call as well"),
]

TINY = Budget(0.002, block_seconds=1e-4, discard_seconds=0.0, min_pairs=2, max_pairs=2)
BOTH = ("float32", "bfloat16")
CASE = PeerCase("lstm", 3, 4, 5, 6)
INT8 = dataclasses.replace(CASE, H=32, weights="int8")
GRID = peers.grid((1, 2), BOTH)


class Fake:
    """Has the results of torch's layer times `scale`."""

    def __init__(self, case: PeerCase, inputs: Inputs, scale: float = 1.0):
        plain = dataclasses.replace(case, weights="")
        self.found = {k: v * scale for k, v in Workload(plain, inputs, theirs).results().items()}

    def prepare(self) -> None:
        pass

    def __call__(self) -> None:
        pass

    def results(self) -> dict[str, Tensor]:
        return self.found


def without(reason: str) -> Any:
    raise engines.Unavailable(reason)


def runner(scales: Mapping[str, float | str]) -> PeerRunner:
    """A runner of fake sides: a number scales the results, a text is why the side cannot be made."""

    def sides(case: PeerCase, inputs: Inputs) -> dict[str, Callable[[], Any]]:
        return {
            name: (lambda how=how: without(how) if isinstance(how, str) else Fake(case, inputs, how))
            for name, how in scales.items()
        }

    return PeerRunner(TINY, sides=sides)


def measured(case: PeerCase, scales: Mapping[str, float | str]) -> PeerResult:
    (result,) = runner(scales).run([case])
    assert isinstance(result, PeerResult)
    return result


@pytest.fixture
def milliseconds(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets how long a call of each side takes, in the order of the sides that are timed."""

    def choose(*each: float) -> None:
        def rotate(sides: Any, budget: Budget, settle: Any) -> list[list[list[float]]]:
            assert len(sides) == len(each)
            return [[[ms * 1e-3] * 2] * 3 for ms in each]

        monkeypatch.setattr(timing, "rotate", rotate)

    return choose


class TestGrid:
    def test_at_most_150_different_cells(self) -> None:
        assert len(GRID) <= 150
        assert len({case.name for case in GRID}) == len(GRID)

    def test_each_kind_covers_the_sizes(self) -> None:
        for dtype, training in peers.WALKS:
            found = [c for c in GRID if (c.dtype, c.training, c.weights) == (dtype, training, "") and c.threads == 1]
            assert {c.mode for c in found} == {"lstm", "gru", "rnn"}
            assert {c.B for c in found} == set(peers.BATCHES)
            assert {c.T for c in found} == set(peers.STEPS)
            assert {c.H for c in found} == set(peers.HIDDEN)
            assert {(c.I > c.H) - (c.I < c.H) for c in found} == {-1, 0, 1}

    @pytest.mark.parametrize("start", [0, 9, 18, 36, 45])
    def test_nine_steps_have_each_pair(self, start: int) -> None:
        steps = [(mode, T, I / H) for mode, _, T, I, H in map(peers.at, range(start, start + 9))]
        for a, b in itertools.combinations(range(3), 2):
            assert len({(step[a], step[b]) for step in steps}) == 9

    def test_27_steps_have_more_pairs(self) -> None:
        steps = [peers.at(step) for step in range(27)]
        assert len({(B, H) for _, B, _, _, H in steps}) == 27
        for a, b, count in ((0, 1, 21), (0, 4, 18), (2, 1, 21), (2, 4, 18)):
            assert len({(step[a], step[b]) for step in steps}) == count

    def test_int8(self) -> None:
        found = [c for c in GRID if c.weights and c.threads == 2]
        assert {(c.B, c.H) for c in found} == set(itertools.product((1, 8, 32), (256, 512, 1024)))
        assert {c.mode for c in found} == {"lstm", "gru"} and not any(c.training for c in found)

    def test_options(self) -> None:
        assert {c.dtype for c in peers.grid((1,), ["bfloat16"])} == {"bfloat16"}
        assert {c.threads for c in peers.grid((3, 4), BOTH)} == {3, 4}
        quick = peers.grid((1, 2), BOTH, quick=True)
        assert len(quick) == 10 and {c.threads for c in quick} == {2}

    def test_every_class_has_a_target(self) -> None:
        assert {(c.precision, c.training) for c in GRID} == set(peers_report.GOALS)


class TestTurns:
    @pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
    def test_every_side_once_a_round(self, count: int) -> None:
        for order in timing.orders(count):
            assert sorted(order) == list(range(count))

    def test_each_of_five_follows_each_other(self) -> None:
        pairs = [pair for order in timing.orders(5) for pair in zip(order, order[1:] + order[:1], strict=True)]
        assert sorted(pairs) == sorted(itertools.permutations(range(5), 2))

    def test_two_alternate(self) -> None:
        assert timing.orders(2) == [[0, 1]]

    def test_rounds(self) -> None:
        now, calls, settled = [0.0], [], []

        class Side:
            def __init__(self, name: int, cost: float):
                self.name, self.cost = name, cost

            def prepare(self) -> None:
                calls.append(self.name)

            def __call__(self) -> None:
                now[0] += self.cost

        sides = [Side(0, 1e-3), Side(1, 2e-3), Side(2, 3e-3)]
        budget = Budget(0.1, 0.01, 0.0, min_pairs=4, max_pairs=4)
        blocks = timing.rotate(sides, budget, lambda: now[0], lambda: settled.append(1))
        assert calls[-12:] == [0, 1, 2, 0, 2, 1] * 2 and len(settled) == 12
        assert [len(side) for side in blocks] == [4, 4, 4]
        assert [side[0][0] for side in blocks] == pytest.approx([1e-3, 2e-3, 3e-3])

    def test_waiting_ends(self) -> None:
        timing.until_quiet(limit=0.01)


class TestRunner:
    def test_the_best_peer(self, milliseconds: Callable[..., None]) -> None:
        milliseconds(2.0, 1.0, 4.0, 1.5, 3.0)
        sides = dict.fromkeys(("plain", "prepacked", "torch", "ONNX Runtime", "OpenVINO"), 1.0)
        result = measured(CASE, sides)
        assert result.status == "ok" and result.best == "ONNX Runtime"
        assert result.speedup == pytest.approx(1.5) and result.plain == pytest.approx(0.75)
        assert result.sides["torch"].ratio == pytest.approx(4) and result.sides["plain"].ratio == pytest.approx(2)
        entry = json.loads(json.dumps(result.as_json()))
        assert entry["best"] == "ONNX Runtime" and entry["theirs_ms"] == 1.5 and entry["ours_ms"] == 1.0
        assert entry["sides"]["OpenVINO"]["ms"] == 3.0
        row = next(line for line in peers_report.table([result]).splitlines() if CASE.name in line)
        assert "ONNX Runtime" in row and "0.75x" in row and "1.50x" in row

    def test_in_training_ours_is_plain(self, milliseconds: Callable[..., None]) -> None:
        milliseconds(2.0, 5.0)
        result = measured(dataclasses.replace(CASE, training=True), {"plain": 1.0, "torch": 1.0})
        assert result.best == "torch" and result.speedup == pytest.approx(2.5)

    def test_a_wrong_peer_is_never_the_best(self, milliseconds: Callable[..., None]) -> None:
        milliseconds(2.0, 1.0, 4.0)
        result = measured(CASE, {"plain": 1.0, "prepacked": 1.0, "torch": 1.0, "OpenVINO": 1.001})
        assert result.best == "torch" and result.status == "ok"
        outcome = result.sides["OpenVINO"]
        assert outcome.status == "disagree" and "limit" in outcome.reason and outcome.seconds is None
        assert "ms" not in outcome.as_json()
        (left_out,) = peers_report.summary([result])["left_out"]
        assert left_out["side"] == "OpenVINO" and left_out["cells"] == [CASE.name]
        assert "disagrees" in peers_report.table([result])

    def test_a_peer_that_rounds_otherwise_agrees(self, milliseconds: Callable[..., None]) -> None:
        milliseconds(1.0, 1.0, 1.0)
        result = measured(CASE, {"plain": 1.0, "prepacked": 1.0, "torch": 1.0 + 2e-7})
        assert result.sides["torch"].status == "ok"

    def test_a_missing_peer_is_named(self, milliseconds: Callable[..., None]) -> None:
        milliseconds(2.0, 1.0, 4.0)
        found = measured(CASE, {"plain": 1.0, "prepacked": 1.0, "torch": 1.0, "OpenVINO": "not installed: why"})
        assert found.best == "torch" and found.sides["OpenVINO"].status == "not available"
        text = peers_report.summary_text(peers_report.summary([found]))
        assert "OpenVINO" in text and "not installed: why" in text

    def test_without_any_peer(self, milliseconds: Callable[..., None]) -> None:
        milliseconds(2.0, 1.0)
        result = measured(CASE, {"plain": 1.0, "prepacked": 1.0, "torch": "why"})
        assert result.status == "no peer" and not result.wrong and result.speedup is None
        assert result.message == "torch: why" and result_files.problems(document([result])) == []

    @pytest.mark.parametrize("wrong", ["plain", "prepacked"])
    def test_ours_is_wrong(self, wrong: str) -> None:
        result = measured(CASE, {"plain": 1.0, "prepacked": 1.0, "torch": 1.0} | {wrong: 1.001})
        assert result.status == "disagree" and result.wrong and result.message.startswith(wrong)
        assert all(outcome.seconds is None for outcome in result.sides.values())
        assert peers_report.summary([result])["classes"][0]["verdict"] == "missed"

    def test_ours_is_not_available(self, milliseconds: Callable[..., None]) -> None:
        milliseconds(4.0)
        result = measured(INT8, {"prepacked": "later", "torch": 1.0})
        assert result.status == "not available" and not result.wrong and result.message == "later"
        entry = result.as_json()
        assert entry["sides"]["prepacked"].keys() == {"status", "reason"} and entry["sides"]["torch"]["ms"] == 4.0
        assert not {"ours_ms", "speedup", "best"} & entry.keys()
        assert result_files.problems(document([result])) == []
        assert "not available: later" in peers_report.table([result])


class TestInt8:
    def test_error_is_that_against_float32(self, milliseconds: Callable[..., None]) -> None:
        milliseconds(1.0, 2.0)
        result = measured(INT8, {"prepacked": 1.0, "torch": 1.0})
        assert result.status == "ok" and result.agreement is not None
        assert result.agreement.ours == 0 and result.agreement.theirs == result.agreement.limit > 1e-4
        row = next(line for line in peers_report.table([result]).splitlines() if INT8.name in line)
        assert f"{result.agreement.theirs:.1e}" in row

    def test_a_larger_error_than_torch(self) -> None:
        result = measured(INT8, {"prepacked": 1.5, "torch": 1.0})
        assert result.status == "disagree" and result.message.startswith("prepacked: outputs")

    @pytest.mark.parametrize("mode", peers.INT8_MODES)
    def test_torch(self, mode: str) -> None:
        case = dataclasses.replace(INT8, mode=mode)
        inputs = Inputs.make(case)
        side = peers.torch_int8(case, inputs)
        assert "quantized.dynamic" in type(side.module).__module__
        agreement = Int8Checker(case, inputs)(side)
        assert agreement.ok and agreement.ours == agreement.limit

    def test_a_missing_output_disagrees(self) -> None:
        inputs = Inputs.make(INT8)
        fake = Fake(INT8, inputs)
        del fake.found["c_n"]
        assert not Int8Checker(INT8, inputs)(fake).ok

    def test_prepack_without_weights(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Older(nn.LSTM):
            def prepack(self) -> None:
                raise AssertionError

        monkeypatch.setattr(peers.layers, "ours", lambda case: Older(case.I, case.H))
        with pytest.raises(engines.Unavailable, match="no weights="):
            peers.int8(INT8, Inputs.make(INT8))

    @pytest.mark.parametrize("mode", peers.INT8_MODES)
    def test_ours(self, mode: str) -> None:
        if "weights" not in inspect.signature(dlkernels.nn.LSTM.prepack).parameters:
            pytest.skip("prepack() has no weights=")
        case = dataclasses.replace(INT8, mode=mode, I=256, H=256)
        inputs = Inputs.make(case)
        agreement = Int8Checker(case, inputs)(peers.int8(case, inputs))
        assert agreement.ok, agreement


ENGINES = {"onnxruntime": engines.OnnxRuntime, "openvino": engines.OpenVino}


class TestEngines:
    @pytest.mark.parametrize("shape", [(1, 1, 8, 16), (5, 7, 16, 16), (3, 4, 40, 10)], ids=str)
    @pytest.mark.parametrize("mode", ["lstm", "gru", "rnn"])
    @pytest.mark.parametrize("name", ENGINES)
    def test_agrees_with_torch(self, name: str, mode: str, shape: tuple[int, int, int, int]) -> None:
        for module in ("onnx", name):
            pytest.importorskip(module, reason=f"{module} is not installed: {engines.INSTALL}")
        case = PeerCase(mode, *shape)
        inputs = Inputs.make(case)
        side = ENGINES[name](case, inputs)
        agreement = Checker(theirs)(case, inputs, side, peers.loosely)
        assert agreement.ok, agreement
        # The buffers are used again, and what was returned before stays.
        first = side.results()
        side.x.zero_()
        assert not torch.equal(first["y"], side.results()["y"])

    @pytest.mark.parametrize("name", ENGINES)
    def test_bfloat16(self, name: str) -> None:
        for module in ("onnx", name):
            pytest.importorskip(module, reason=f"{module} is not installed: {engines.INSTALL}")
        case = PeerCase("lstm", 3, 4, 16, 16, dtype="bfloat16")
        inputs = Inputs.make(case)
        try:
            side = ENGINES[name](case, inputs)
        except engines.Unavailable as reason:
            pytest.skip(f"{name}: {reason}")
        agreement = Checker(theirs)(case, inputs, side, peers.loosely)
        assert agreement.ok, agreement

    @pytest.mark.parametrize("missing", ["onnx", "onnxruntime", "openvino"])
    def test_not_installed(self, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, missing, None)
        with pytest.raises(
            engines.Unavailable, match=rf"^{missing} is not installed: pip install 'dlkernels\[peers\]'"
        ):
            engines.library(missing)
        assert engines.versions()[missing].startswith("none: ")


def rated(case: PeerCase, ratio: float, **status: str) -> PeerResult:
    """A result in which the best peer and torch take `ratio` times as long as ours. status: that of a side."""
    agreement = Agreement(True, "y", 1e-7, 1e-7, 2e-7)
    outcome = peers.Outcome("ok", "", agreement, ratio * 1e-3, ratio)
    found = dict.fromkeys(("torch",) if case.training or case.weights else peers_report.PEERS, outcome)
    found |= {name: peers.Outcome(how, "why") for name, how in status.items()}
    ours = peers.Outcome("ok", "", agreement, 1e-3, 1.0)
    sample = Sample(ratio * 1e-3, 1e-3, (ratio, ratio), (3, 3))
    return PeerResult(case, "ok", "", sample, agreement, {}, {case.ours: ours} | found, "torch", ratio)


def document(found: list[PeerResult]) -> dict[str, Any]:
    doc = report.document("peers", found, [], machine.describe())
    doc["summary"] |= peers_report.summary(found)
    return json.loads(json.dumps(doc))  # type: ignore[no-any-return]


class TestTargets:
    def verdict(self, of: tuple[str, bool], make: Callable[[PeerCase], PeerResult | None]) -> dict[str, Any]:
        found = [make(case) for case in GRID if (case.precision, case.training) == of and case.threads == 1]
        (entry,) = peers_report.summary([result for result in found if result])["classes"]
        return entry

    @pytest.mark.parametrize("of", peers_report.GOALS, ids=str)
    def test_met_and_missed(self, of: tuple[str, bool]) -> None:
        goal = peers_report.GOALS[of]
        met = self.verdict(of, lambda case: rated(case, goal.mean + 0.01))
        assert met["verdict"] == "met" and met["timed"] == met["cells"]
        assert self.verdict(of, lambda case: rated(case, goal.mean - 0.01))["verdict"] == "missed"

    def test_one_slow_cell(self) -> None:
        slow = next(case for case in GRID if case.precision == "f32").name
        found = self.verdict(("f32", False), lambda case: rated(case, 0.96 if case.name == slow else 2.0))
        assert found["verdict"] == "missed" and found["worst"] == 0.96 and found["worst_cell"] == slow
        assert found["mean"] > 1.25

    def test_some_cells_are_no_whole(self) -> None:
        found = self.verdict(("f32", False), lambda case: rated(case, 2.0) if case.B == 1 else None)
        assert found["verdict"] == "open: cells missing"

    def test_a_peer_that_is_missing(self) -> None:
        found = self.verdict(("f32", False), lambda case: rated(case, 2.0, OpenVINO="not available"))
        assert found["verdict"] == "open: OpenVINO missing"
        found = self.verdict(("bf16", False), lambda case: rated(case, 9.0, OpenVINO="not available"))
        assert found["verdict"] == "met", "the target of bfloat16 is over torch"

    def test_cells_that_torch_gets_wrong_are_no_gap(self) -> None:
        def make(case: PeerCase) -> PeerResult:
            return rated(case, 9.0, torch="disagree") if case.B == 1 else rated(case, 9.0)

        found = self.verdict(("bf16", True), make)
        assert found["verdict"] == "met" and found["timed"] < found["cells"]

    def test_int8_before_it_exists(self) -> None:
        def make(case: PeerCase) -> PeerResult:
            return PeerResult(case, "not available", "later", sides={"prepacked": peers.Outcome("not available")})

        assert self.verdict(("int8", False), make)["verdict"] == "not measured"


class TestFiles:
    def test_claims_need_agreement(self) -> None:
        doc = document([rated(CASE, 2.0, OpenVINO="disagree")])
        assert result_files.problems(doc) == []
        doc["results"][0]["sides"]["OpenVINO"]["ms"] = 1.0
        assert result_files.problems(doc) == [f"{CASE.name}, OpenVINO: a time without agreement"]

    def test_peers_and_models_lead_the_readme(self) -> None:
        targets = report.document("targets", [], [], machine.describe())
        model = report.document("models", [], [], machine.describe())
        entry = {"case": {"model": "tiny", "dtype": "bfloat16", "threads": 2, "target": 1.0}, "speedup": 1.5}
        model["results"] = [entry | {"status": "ok", "reached": True}]
        cells = [rated(case, 1.0 + at / 10) for at, case in enumerate(GRID[:20])]
        text = readme.render({"t.json": targets, "m.json": model, "p.json": document(cells)})
        assert text.startswith("<!-- from: t.json m.json p.json -->")
        assert text.index("f32 inference, 1 thread") < text.index("| tiny | 1.50x |") < text.rindex(machine.isa())
        assert text.count("| `") == 8 and cells[0].case.name in text and cells[19].case.name in text
        assert cells[10].case.name not in text
        assert "| tiny |" in readme.render({"m.json": model}), "without a file of peers"

    def test_the_readme_names_who_is_left_out(self) -> None:
        text = readme.render({"p.json": document([rated(CASE, 2.0, OpenVINO="not available")])})
        assert "- OpenVINO, 1 cell: why" in text


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One real cell, with the peers that are installed here."""
    arguments = ["--suite", "peers", "--only", "rnn-infer-f32-B16-T1-*", "--threads", "1", "--no-plot"]
    assert Command().run([*arguments, "--out", str(tmp_path)], PeerRunner(TINY)) in (0, 2)
    out = capsys.readouterr().out
    assert "rnn-infer-f32-B16-T1-I64-H64-1t" in out and "best peer" in out and "verdict" in out
    (path,) = tmp_path.rglob("*-peers.json")
    doc = result_files.load(path)
    (entry,) = doc["results"]
    assert (
        entry["status"] == "ok" and entry["best"] and set(entry["sides"]) == {"plain", "prepacked", *peers_report.PEERS}
    )
