"""`make gpu-check` without a GPU: its rehearsal, and parts with faults (tests/support/faulty_gpu_check.py), which must
not pass for results, nor keep other parts and cases from running."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.fresh_python import ROOT

pytestmark = pytest.mark.o0_skip(reason="it is about processes and files")

CHECK = ROOT / "tests" / "gpu" / "check.py"
FAULTY = ROOT / "tests" / "support" / "faulty_gpu_check.py"


def run(script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "DLKERNELS_DEVICE": "", **environment}
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT, env=settings)


def read(out: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / f"{name}.json").read_text())
    return found


@pytest.fixture
def faulty(tmp_path: Path) -> Any:
    def call(*arguments: str, **more: str) -> tuple[subprocess.CompletedProcess[str], Path]:
        return run(FAULTY, *arguments, FAULTY_FOLDER=str(tmp_path), **more), tmp_path / "out"

    return call


@pytest.mark.heavy
def test_rehearsal(tmp_path: Path) -> None:
    """All parts run and pass on the CPU, and a second call has nothing left to do."""
    out = tmp_path / "out"
    done = run(CHECK, "--rehearse", "--out", str(out))
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-3000:]
    assert "NOTHING RAN ON A GPU" in done.stdout
    summary = read(out, "summary")
    names = ["build", "smoke", "recurrent", "attention", "tests", "memcheck", "racecheck", "synccheck", "ncu"]
    assert sorted(summary["parts"]) == sorted(names)
    assert {part["status"] for part in summary["parts"].values()} == {"passed"}
    assert summary["rehearsal"] is True and summary["environment"]["torch"]
    for what in ("forward", "training"):
        row = next(row for row in summary["recurrent"].values() if what in row)
        assert row[what]["us_per_step"] > 0 and row["cudnn"][what]["us_per_step"] > 0
    assert all(row["forward"]["predicted"] > 0 for row in summary["recurrent"].values()
               if row.get("form") == "padded" and row["dtype"] == "bfloat16")  # fmt: skip
    assert {tile["kernel"] for tile in summary["tiles"]} == {"forward", "backward_query", "backward_key"}
    assert all(tile["shipped"] and tile["fastest"] for tile in summary["tiles"])
    again = run(CHECK, "--rehearse", "--out", str(out), "--resume")
    assert again.returncode == 0, again.stdout
    assert again.stdout.count("passed before") == len(names) - 1


def test_a_hanging_case_costs_only_itself(faulty: Any) -> None:
    done, out = faulty("--part", "hanging", "--part", "crashing", "--part", "wrong")
    assert done.returncode == 1
    for name, case, said in (
        ("hanging", "hangs", "hung: no end"), ("crashing", "crashes", "ended with status -6"),
        ("wrong", "wrong", "ValueError: a wrong result"),
    ):  # fmt: skip
        found = read(out, name)
        assert found["status"] == "failed" and found["failed"] == [case], found
        assert said in found["cases"][case]["failed"] and "failed" not in found["cases"]["after"]
    # Where it hung, and the traceback of the failure.
    assert "in hanging_case" in (out / "logs" / "hanging" / "hanging.log").read_text()
    assert ", in wrong\n" in (out / "logs" / "wrong" / "wrong.log").read_text()
    assert sorted(path.name for path in out.glob("*.json")) == sorted(
        f"{name}.json" for name in ("build", "hanging", "crashing", "wrong", "summary", "environment")
    )


def test_a_broken_context_is_left(faulty: Any) -> None:
    done, out = faulty("--part", "broken")
    found = read(out, "broken")
    assert done.returncode == 1 and found["failed"] == ["wrong"]
    assert set(found["cases"]) == {"wrong", "after"} and found["problems"] == []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dying", "ended with status 3"),
        ("silent", "wrote no list of cases"),
        ("forgetful", "ended without ending a case"),
    ],
)
def test_no_results_are_no_pass(faulty: Any, name: str, said: str) -> None:
    done, out = faulty("--part", name)
    found = read(out, name)
    assert done.returncode == 1 and found["status"] == "failed"
    assert said in found["problems"][0] and said in done.stdout
    assert read(out, "summary")["parts"][name]["status"] == "failed"


def test_time_limit_and_resume(faulty: Any, tmp_path: Path) -> None:
    done, out = faulty("--part", "late", "--limit", "late=2")
    found = read(out, "late")
    assert done.returncode == 1 and found["status"] == "incomplete"
    assert found["not_run"] == ["slow", "last"] and "in slow" in found["problems"][0]
    child = int((tmp_path / "child").read_text())
    assert not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]
    (tmp_path / "fast").touch()
    done, _ = faulty("--part", "late", "--resume")
    found = read(out, "late")
    assert done.returncode == 0 and found["status"] == "passed", done.stdout
    assert set(found["cases"]) == {"quick", "slow", "last"}
    assert (tmp_path / "ran").read_text().split().count("quick") == 1


def test_nothing_runs_without_the_module(faulty: Any) -> None:
    done, out = faulty("--part", "hanging", BUILD_FAILS="1")
    assert done.returncode == 1 and read(out, "build")["status"] == "failed"
    found = read(out, "hanging")
    assert found["status"] == "not run" and found["problems"] == ["the module was not built"]


def test_a_stage_without_time_is_no_pass(faulty: Any) -> None:
    done, out = faulty("--part", "staged", "--limit", "staged=2")
    found = read(out, "staged")
    assert done.returncode == 1 and found["status"] == "incomplete" and len(found["problems"]) == 2, found


def test_no_time_is_no_pass(faulty: Any) -> None:
    done, out = faulty("--part", "hanging", "--within", "1")
    assert done.returncode == 1
    assert read(out, "hanging")["status"] == "not run"


def test_a_shard_that_is_killed(faulty: Any) -> None:
    """The traceback of a failure before is in the log and on the screen, and the tests that did not run are named."""
    done, out = faulty("--part", "shard", "--limit", "shard=20")
    found = read(out, "shard")
    assert done.returncode == 1 and found["status"] == "failed", done.stdout
    names = {key.split("::")[-1]: result for key, result in found["cases"].items()}
    assert set(names) == {"test_wrong", "test_right"} and "failed" not in names["test_right"]
    assert "what was found" in names["test_wrong"]["failed"]
    assert [key.split("::")[-1] for key in found["not_run"]] == ["test_that_hangs", "test_after"]
    assert "test_that_hangs" in found["problems"][0]
    for text in (done.stdout, (out / "logs" / "shard" / "shard.log").read_text()):
        assert 'assert "what was found" == "what was expected"' in text
        assert "in test_that_hangs" in text


def test_results_of_other_sources_are_not_mixed(faulty: Any) -> None:
    _, out = faulty("--part", "build")
    environment = read(out, "environment")
    (out / "environment.json").write_text(json.dumps(environment | {"sources": "others"}))
    done, _ = faulty("--part", "build")
    assert done.returncode == 2 and "choose another --out" in done.stdout
