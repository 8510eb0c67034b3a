"""`python -m dlkernels` with bad settings prints one line that names the mistake, exits with 2 and measures nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dlkernels.bench.cli import Command
from tests.support.instruction_sets import BEST_ISA_LAST

BAD_SETTINGS = {
    "DLKERNELS_CPU_ISA": (
        "foo",
        ("unknown instruction set 'foo'", f"{', '.join(BEST_ISA_LAST[:-1])} or {BEST_ISA_LAST[-1]}"),
    ),
    "DLKERNELS_NATIVE": ("/no/such/file.so", ("/no/such/file.so", "no such file")),
}
COMMANDS = [("-m", "dlkernels", "info"), ("-mdlkernels", "bench", "--list"), ("-m", "benchmarks", "--list")]


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("name", BAD_SETTINGS)
@pytest.mark.parametrize("arguments", COMMANDS, ids=str)
def test_a_bad_setting_is_one_line(name: str, arguments: tuple[str, ...]) -> None:
    value, expected = BAD_SETTINGS[name]
    run = python(*arguments, **{name: value})
    assert run.returncode == 2
    assert run.stdout == ""
    (line,) = run.stderr.splitlines()
    assert line.startswith(f"dlkernels: {name}")
    assert all(text in line for text in expected)


@pytest.mark.parametrize(("name", "kind"), [("DLKERNELS_CPU_ISA", "ValueError"), ("DLKERNELS_NATIVE", "ImportError")])
def test_an_import_with_a_bad_setting_raises(name: str, kind: str, tmp_path: Path) -> None:
    value, expected = BAD_SETTINGS[name]
    # A program of someone else that is started with -m gets the exception.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "__init__.py").write_text("import dlkernels")
    (tmp_path / "other" / "__main__.py").write_text("")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    for arguments in (("-c", "import dlkernels"), ("-m", "other", "dlkernels")):
        run = python(*arguments, **{name: value, "PYTHONPATH": path})
        assert run.returncode == 1
        last = run.stderr.splitlines()[-1]
        assert last.startswith(f"{kind}: {name}") and all(text in last for text in expected)


@pytest.mark.parametrize("option", [
    "--seconds=-1", "--seconds=0", "--seconds=nan", "--seconds=inf", "--seconds=soon", "--seconds=", "--threads=0",
    "--threads=-2", "--threads=1,0", "--threads=two", "--threads=1.5", "--threads=", "--threads=99999999999",
])  # fmt: skip
def test_numbers_that_are_none(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_status:
        Command().run([option, "--list"])
    assert exit_status.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {option.partition('=')[0]}" in message and "expected" in message


class NoRunner:
    def __getattr__(self, name: str) -> Any:
        raise AssertionError("nothing is to be measured")


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nothing"])
def test_a_place_for_results_is_tried_first(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    out = str(tmp_path / place)
    assert Command().run(["--quick", "--suite", "grid", "--only", "rnncell", "--out", out], NoRunner()) == 2  # type: ignore[arg-type]
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"--out: results cannot be written to {out}: ")
