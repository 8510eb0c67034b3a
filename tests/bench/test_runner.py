"""Tests the benchmark runner, which compares results before it times them, and its reports, files and commands."""

from __future__ import annotations

import copy
import dataclasses
import io
import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import charlm, readme, result_files, targets
from benchmarks.suites import ProjectCommand
from dlkernels.bench import cases, cli, layers, machine, report
from dlkernels.bench.cli import Command, Progress
from dlkernels.bench.layers import Inputs, LayerCase, Workload, ours, theirs
from dlkernels.bench.report import geometric_mean, summarize
from dlkernels.bench.runner import Checker, Result, Runner
from dlkernels.bench.timing import Budget, Sample
from dlkernels.testing import assert_close_to_reference, error, within_rule

pytestmark = pytest.mark.o0_skip(reason="the runner is Python alone")

TINY = Budget(seconds=0.02, block_seconds=1e-3, discard_seconds=0.0, min_pairs=2, max_pairs=3)
LAYER = LayerCase("lstm", 2, 3, 4, 5)
KINDS = [
    dataclasses.replace(LAYER, mode=mode, cell=cell, T=1 if cell else 3, training=training, packed=packed)
    for mode in layers.MODES
    for cell, packed in ((True, False), (False, False), (False, True))
    for training in (False, True)
]


def shifted(case: LayerCase) -> nn.Module:
    """Returns a layer with slightly wrong results, because its parameters are scaled after they are loaded."""
    module = theirs(case)

    def scale(module: nn.Module, *_: object) -> None:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.001)

    module.register_load_state_dict_post_hook(scale)
    return module


def broken(case: LayerCase) -> nn.Module:
    raise RuntimeError("no such kernel\nsecond line")


def run(chosen: list[LayerCase], **sides: object) -> list[Result]:
    return list(Runner(TINY, **({"ours": theirs, "theirs": theirs} | sides)).run(chosen))  # type: ignore[arg-type]


def fake(case: LayerCase, ratio: float) -> Result:
    return Result(case, "ok", sample=Sample(ratio * 1e-3, 1e-3, (ratio * 0.9, ratio, ratio * 1.2), (3, 3)))


class TestTolerance:
    def test_rule(self) -> None:
        ref = torch.tensor([1.0, -4.0], dtype=torch.float64)
        torch_like = ref.float() + 1e-3
        assert within_rule(ref.float() + 1.9e-3, torch_like, ref, torch.float32).ok
        assert not within_rule(ref.float() + 2.1e-3, torch_like, ref, torch.float32).ok
        assert within_rule(ref.float() + 2.9e-3, torch_like, ref, torch.float32, grad=True).ok
        assert not within_rule(ref.float() + 3.1e-3, torch_like, ref, torch.float32, grad=True).ok

    def test_floor_where_torch_is_exact(self) -> None:
        ref = torch.tensor([1.0, -4.0], dtype=torch.float64)
        eps = torch.finfo(torch.float32).eps
        assert within_rule(ref + 3.9 * eps, ref, ref, torch.float32).ok
        assert not within_rule(ref + 4.1 * eps, ref, ref, torch.float32).ok

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_not_finite(self, bad: float) -> None:
        ref = torch.ones(3, dtype=torch.float64)
        spoiled = ref.clone()
        spoiled[1] = bad
        assert not within_rule(spoiled, ref, ref, torch.float32).ok
        assert not within_rule(spoiled, spoiled, ref, torch.float32).ok, "a peer's NaN excuses nothing"
        assert within_rule(spoiled, spoiled, spoiled, torch.float32).ok
        assert not within_rule(ref, spoiled, spoiled, torch.float32).ok

    def test_shapes_and_message(self) -> None:
        with pytest.raises(AssertionError, match=r"shape \(2,\) where the reference has \(3,\)"):
            error(torch.ones(2), torch.ones(3))
        assert error(torch.ones(0), torch.ones(0)) == 0
        with pytest.raises(AssertionError, match=r"dx .*exceeds"):
            assert_close_to_reference("dx", torch.zeros(1), torch.ones(1), torch.ones(1).double(), torch.float32)


class TestCases:
    def test_names_are_unique(self) -> None:
        for found in (layers.grid([1, 2], ["float32", "bfloat16"]), targets.layers()):
            assert len({case.name for case in found}) == len(found)

    def test_threads_are_innermost_so_references_are_shared(self) -> None:
        for found in (layers.grid([1, 2], ["float32"]), targets.layers()):
            names = [case.workload for case in found]
            assert sum(a != b for a, b in itertools.pairwise(names)) + 1 == len(set(names))

    def test_every_kind_is_in_the_grid(self) -> None:
        found = layers.grid([1, 2], ["float32", "bfloat16"])
        kinds = {(c.mode, c.cell, c.training, c.packed) for c in found}
        assert kinds == {(c.mode, c.cell, c.training, c.packed) for c in KINDS}
        assert {c.regime for c in found} == set(cases.REGIMES)
        assert len(layers.grid([1, 2], ["float32"], quick=True)) < 30

    def test_lengths(self) -> None:
        case = LayerCase("gru", 32, 1000, 64, 64, packed=True)
        assert case.lengths[0] == 1000 and case.lengths[-1] == 250 and case.valid_fraction == pytest.approx(0.625, 1e-2)
        assert LayerCase("gru", 1, 3, 4, 4, packed=True).lengths == [3]

    def test_targets(self) -> None:
        goals = {case.name: case.target for case in targets.layers()}
        assert goals["gru-train-f32-B1-T100-I128-H128-1t"] == 4.0
        assert goals["lstmcell-infer-f32-B1-I128-H128-2t"] == 2.0
        assert goals["rnn-train-packed-f32-B32-T1000-I64-H64-2t"] == 15.0
        assert goals["lstm-train-packed-vs-padded-f32-B32-T1000-I64-H64-1t"] == pytest.approx(1 / 1.2)

    def test_select(self) -> None:
        found = layers.grid([1], ["float32"])
        assert {c.mode for c in cases.select(found, ["gru-*", "grucell"])} == {"gru"}
        assert cases.select(found, []) == found


class TestRunner:
    @pytest.mark.parametrize("case", KINDS, ids=lambda c: c.name)
    def test_every_kind_runs(self, case: LayerCase) -> None:
        (result,) = run([case])
        assert result.status == "ok" and result.speedup and result.speedup > 0, result.message
        assert result.agreement and result.agreement.ok

    @pytest.mark.parametrize("case", KINDS, ids=lambda c: c.name)
    def test_no_speed_without_agreement(self, case: LayerCase) -> None:
        (result,) = run([case], ours=shifted)
        assert result.status == "disagree" and result.wrong
        assert result.speedup is None and "speedup" not in result.as_json()
        text = report.results_table([result])
        assert "results disagree" in text and "0x" not in text

    @pytest.mark.parametrize("case", KINDS, ids=lambda c: c.name)
    def test_our_layers_agree(self, case: LayerCase) -> None:
        case = dataclasses.replace(case, dtype="float64")
        inputs = Inputs.make(case)
        agreement = Checker(theirs)(case, inputs, Workload(case, inputs, ours))
        assert agreement.ok, agreement

    def test_check_sees_every_gradient(self) -> None:
        case = dataclasses.replace(LAYER, training=True)
        names = set(Workload(case, Inputs.make(case), theirs).results())
        weights = {"weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"}
        assert names == {"y", "h_n", "c_n", "dx"} | {"d" + w for w in weights}
        cell = dataclasses.replace(case, cell=True, T=1)
        assert {"h", "c", "dx", "dh0", "dh1"} < set(Workload(cell, Inputs.make(cell), theirs).results())

    def test_a_timed_call_leaves_no_gradient(self) -> None:
        work = Workload(case := dataclasses.replace(LAYER, training=True), Inputs.make(case), theirs)
        work()
        assert all(p.grad is None for p in work.params.values()) and work.leaf.grad is None

    def test_failures_are_told_apart(self) -> None:
        (missing,) = run([LAYER], theirs=broken)
        assert missing.status == "no peer" and not missing.wrong
        (failed,) = run([LAYER], ours=broken)
        assert failed.status == "error" and failed.wrong and failed.message == "RuntimeError: no such kernel"

    def test_against_our_own_padded_run_counts_valid_steps(self) -> None:
        case = dataclasses.replace(LAYER, B=4, T=8, packed=True, against="padded", target=0.8)
        result = fake(case, 2.0)
        assert result.speedup == pytest.approx(2 * case.valid_fraction) and result.reached
        (measured,) = run([case])
        assert measured.status == "ok"

    def test_torch_is_left_as_it_was(self) -> None:
        before = torch.get_num_threads()
        run([dataclasses.replace(LAYER, against="default")])
        assert torch.get_num_threads() == before and not torch.are_deterministic_algorithms_enabled()

    def test_target_verdicts(self) -> None:
        case = dataclasses.replace(LAYER, target=2.0)
        assert fake(case, 2.5).reached and fake(case, 1.9).reached is False
        assert fake(LAYER, 0.5).reached is None
        assert "2.00 pass" in report.results_table([fake(case, 2.5)])
        assert "2.00 MISSED" in report.results_table([fake(case, 1.9)])

    def test_summary(self) -> None:
        big = LayerCase("gru", 64, 3, 512, 512)
        found = [fake(LAYER, 2.0), fake(big, 8.0), run([LAYER], ours=shifted)[0]]
        summary = summarize(found)
        assert summary["overall"] == {"speedup": 4.0, "cases": 2}
        assert summary["regimes"]["GEMM-bound"]["speedup"] == 8.0 and summary["ops"]["lstm"]["speedup"] == 2.0
        assert summary["wrong"] == [LAYER.name]
        assert geometric_mean([]) is None


def small_job(**changes: object) -> charlm.Config:
    return charlm.Config(steps=4, block=2, batch=4, length=8, hidden=8, layers=1, corpus_bytes=200_000, **changes)  # type: ignore[arg-type]


class TestCharLM:
    @pytest.mark.parametrize("mode", ["lstm", "gru"])
    def test_same_model_same_curve(self, mode: str) -> None:
        job = charlm.train_both(small_job(mode=mode), convert=lambda model: model)
        assert job["agree"] and job["losses"]["torch"] == job["losses"]["dlkernels"] and job["steps"] == 4
        assert "agree" in charlm.text(job) and job["speedup"] > 0

    @pytest.mark.parametrize("mode", ["lstm", "gru"])
    def test_patched(self, mode: str) -> None:
        assert charlm.train_both(small_job(mode=mode))["agree"]

    def test_other_curves_are_told(self) -> None:
        def spoil(model: nn.Module) -> nn.Module:
            with torch.no_grad():
                model.head.bias += torch.arange(charlm.VOCABULARY) % 3
            return model

        job = charlm.train_both(small_job(), convert=spoil)
        assert not job["agree"] and "speedup" not in job and "DISAGREE" in charlm.text(job)
        assert not charlm.compare([1.0, 1.0], [1.0, float("nan")])[0]

    def test_corpus(self, tmp_path: Path) -> None:
        data = charlm.corpus(150_000)
        assert len(data) == 150_000 and torch.equal(data, charlm.corpus(150_000))
        assert data.min() >= 0 and data.max() < charlm.VOCABULARY and len(data.unique()) > 60
        with pytest.raises(RuntimeError, match="too little"):
            charlm.corpus(1000, tmp_path)


@pytest.fixture(scope="module")
def document() -> dict[str, object]:
    found = [fake(LAYER, 2.0), fake(dataclasses.replace(LAYER, training=True, threads=2, target=3.0), 2.0)]
    found += run([dataclasses.replace(LAYER, mode="gru")], ours=shifted)
    job = charlm.train_both(small_job(), convert=lambda model: model)
    return report.document("main", found, [job], machine.describe())


@pytest.fixture
def doc(document: dict[str, object]) -> dict[str, object]:
    return copy.deepcopy(document)


class TestResults:
    def test_written_file_is_valid(self, doc: dict[str, object], tmp_path: Path) -> None:
        path = report.write(doc, tmp_path)
        assert path.parent.parent == tmp_path and path.name.endswith("-main.json")
        assert result_files.load(path) == json.loads(json.dumps(doc))

    def test_problems(self, doc: dict[str, object]) -> None:
        assert result_files.problems(doc) == []
        entries: list[dict[str, object]] = doc["results"]  # type: ignore[assignment]
        entries[2]["speedup"] = 9.0
        assert result_files.problems(doc) == ["gru-infer-f32-B2-T3-I4-H5-1t: a speed-up without agreement"]
        del entries[0]["ours_ms"]
        assert "lstm-infer-f32-B2-T3-I4-H5-1t: ours_ms should be float" in result_files.problems(doc)
        assert result_files.problems({"schema": 1})

    def test_slug(self) -> None:
        assert machine.slug("Intel(R) Xeon(R) CPU @ 2.50GHz", "avx512") == "intel-xeon-cpu-2.50ghz-avx512"

    def test_no_host_name(self, doc: dict[str, object]) -> None:
        import platform

        assert platform.node() not in json.dumps(doc["machine"]) or len(platform.node()) < 4

    def test_pictures(self, doc: dict[str, object], tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        made = ProjectCommand().draw(doc, tmp_path / "x.json")
        assert [p.name for p in made] == ["x.png", "x-charlm.png"]
        assert all(p.read_bytes().startswith(b"\x89PNG") for p in made)


class TestReadme:
    def test_rewrite_then_check(self, doc: dict[str, object], tmp_path: Path) -> None:
        path = report.write(doc, tmp_path / "results").relative_to(tmp_path)
        page = tmp_path / "README.md"
        page.write_text(f"# Title\n\n{readme.BEGIN}\nold\n{readme.END}\n\nrest\n")
        arguments = ["--readme", str(page)]
        assert readme.main([*arguments, str(path)]) == 0
        text = page.read_text()
        assert text.startswith("# Title\n\n") and text.endswith("\n\nrest\n") and "old" not in text
        assert "| LSTM inference |" in text and "2.00x" in text and "bits per character" in text
        assert "GRU inference" not in text, "a case that disagrees gives no row"
        assert readme.main([*arguments, "--check"]) == 0
        page.write_text(text.replace("2.00x", "9.00x"))
        assert readme.main([*arguments, "--check"]) == 1
        assert readme.main(arguments) == 0 and page.read_text() == text

    def test_targets(self, doc: dict[str, object]) -> None:
        doc["suite"] = "targets"
        text = readme.render({"x.json": doc})
        assert "training, 2 threads" in text and "2.00x (target 3.00)" in text and "disagree" in text

    def test_without_markers(self, tmp_path: Path) -> None:
        page = tmp_path / "README.md"
        page.write_text("nothing")
        with pytest.raises(ValueError, match="bench:begin"):
            readme.main(["--readme", str(page), "x.json"])

    def test_the_project_page_is_up_to_date(self) -> None:
        page = Path(__file__).resolve().parents[2] / "README.md"
        if not page.is_file() or not readme.sources(readme.split(page.read_text())[1]):
            pytest.skip("no benchmark block yet")
        assert readme.main(["--readme", str(page), "--check"]) == 0


class TestCommand:
    def command(self, tmp_path: Path, *arguments: str, **sides: object) -> int:
        runner = Runner(TINY, **({"ours": theirs, "theirs": theirs} | sides))  # type: ignore[arg-type]
        return ProjectCommand().run([*arguments, "--out", str(tmp_path)], runner)

    def test_runs(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        code = self.command(tmp_path, "--quick", "--only", "rnncell", "--threads", "1", "--no-plot")
        out, err = capsys.readouterr()
        assert code == 0 and "rnncell-train-f32-B1-I128-H128-1t" in out and "geometric mean" in out
        assert "cases: 2 of 2" in err and not list(tmp_path.rglob("*.png"))
        (path,) = tmp_path.rglob("*.json")
        assert result_files.load(path)["suite"] == "quick-main"

    def test_wrong_results_fail(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.command(tmp_path, "--quick", "--only", "rnncell-infer*", "--no-plot", ours=shifted) == 1
        assert "results disagree" in capsys.readouterr().out

    def test_ctrl_c_writes_what_there_is(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        made = itertools.count()

        def impatient(case: LayerCase) -> nn.Module:
            if next(made) == 1:
                raise KeyboardInterrupt
            return theirs(case)

        assert self.command(tmp_path, "--suite", "grid", "--only", "rnncell*", "--no-plot", ours=impatient) == 130
        assert "interrupted" in capsys.readouterr().out
        (path,) = tmp_path.rglob("*.json")
        assert len(result_files.load(path)["results"]) == 1

    def test_missed_target(self, tmp_path: Path) -> None:
        pattern = "rnncell-infer-f32-B1-I128-H128-1t"
        assert self.command(tmp_path, "--suite", "targets", "--only", pattern, "--no-plot") == 2

    def test_list(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.command(tmp_path, "--suite", "targets", "--list") == 0
        assert len(capsys.readouterr().out.split()) == len(targets.layers()) + len(targets.attention())

    @pytest.mark.parametrize("command", [Command, ProjectCommand])
    @pytest.mark.parametrize("bad", [("--threads", "0"), ("--dtypes", "int8"), ("--suite", "x")])
    def test_bad_arguments(self, bad: tuple[str, str], command: type[Command]) -> None:
        with pytest.raises(SystemExit):
            command().run(list(bad))

    @pytest.mark.parametrize("command", [Command, ProjectCommand])
    @pytest.mark.parametrize("suite", ["peers", "models"])
    def test_slow_bfloat16_is_left_out(
        self, suite: str, command: type[Command], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if suite not in command.suites:
            return
        for fast, given, measured in (
            (False, [], False), (True, [], True), (False, ["--dtypes", "float32,bfloat16"], True)
        ):  # fmt: skip
            monkeypatch.setattr(cli, "onednn_takes_bf16", lambda fast=fast: fast)
            assert command().run(["--suite", suite, "--list", *given]) == 0
            printed = capsys.readouterr()
            assert ("bf16" in printed.out) == measured
            assert printed.err.startswith("bfloat16 is left out") == (not measured)

    def test_the_command_of_the_wheel(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """The command in the wheel measures the grid of the main suite and trains no model."""
        for more in ([], ["--quick"], ["--suite", "attention"]):
            assert Command().run(["--list", *more]) == 0
            mine = capsys.readouterr().out
            assert ProjectCommand().run(["--list", *more]) == 0
            assert mine == capsys.readouterr().out and len(mine.split()) > 4
        assert Command().jobs(Command().parser().parse_args([])) == []
        assert len(ProjectCommand().jobs(ProjectCommand().parser().parse_args([]))) == 2
        arguments = ["--quick", "--only", "rnncell", "--threads", "1", "--no-plot", "--out", str(tmp_path)]
        assert Command().run(arguments, Runner(TINY, ours=theirs, theirs=theirs)) == 0
        (path,) = tmp_path.rglob("*.json")
        doc = result_files.load(path)
        assert doc["suite"] == "quick-grid" and doc["charlm"] == [] and len(doc["results"]) == 2

    def test_no_case(self, tmp_path: Path) -> None:
        assert self.command(tmp_path, "--only", "nothing") == 2


def test_progress_off_a_terminal_is_sparse() -> None:
    stream = io.StringIO()
    bar = Progress(100, "cases", stream)
    for _ in range(100):
        bar.show("x")
        bar.advance()
    bar.finish()
    assert len(stream.getvalue().splitlines()) == 11
