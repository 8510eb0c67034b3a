"""Tests that `python -m dlkernels doctor` finds the usual breakages, and nothing in an installation that works."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.fresh_python import ROOT, environment, run_python

pytestmark = pytest.mark.o0_skip(reason="Python around the compiled module")


def doctor(**env: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "dlkernels", "doctor"]
    settings = environment(**{"OMP_NUM_THREADS": "1", "DLKERNELS_CPU_ISA": "", **env})
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=settings)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.usefixtures("native")
def test_nothing_is_wrong() -> None:
    status, said = doctor()
    assert status == 0 and "nothing found" in said, said


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(
    ("env", "what", "remedy"),
    [
        (
            {"DLKERNELS_NO_NATIVE": "1", "DLKERNELS_REQUIRE_NATIVE": ""},
            "no compiled module",
            "unset DLKERNELS_NO_NATIVE",
        ),
        ({"DLKERNELS_CPU_ISA": "scalar"}, "DLKERNELS_CPU_ISA=scalar", "unset DLKERNELS_CPU_ISA"),
        ({"OMP_THREAD_LIMIT": "1", "OMP_NUM_THREADS": "2"}, "OMP_THREAD_LIMIT=1 is below", "unset OMP_THREAD_LIMIT"),
    ],
)
def test_settings(env: dict[str, str], what: str, remedy: str) -> None:
    status, said = doctor(**env)
    assert status == 1 and what in said and f"-> {remedy}" in said and "Warning" not in said, said


def test_a_second_copy(tmp_path: Path) -> None:
    (tmp_path / "dlkernels").mkdir()
    (tmp_path / "dlkernels" / "_version.py").touch()
    code = f"""
        import sys
        sys.path.append({str(tmp_path)!r})
        from dlkernels.doctor import examine
        found = [finding for finding in examine() if "copies" in finding.what]
        assert len(found) == 1 and {str(tmp_path)!r} in found[0].what, found
    """
    run_python(code, OMP_NUM_THREADS="1")


@pytest.mark.usefixtures("native")
def test_threads_a_stale_module_and_wrong_results(tmp_path: Path) -> None:
    code = f"""
        from pathlib import Path
        import torch
        from dlkernels import doctor, functional
        torch.set_num_threads(64)
        assert any("64 threads on" in finding.what for finding in doctor.examine())
        torch.set_num_threads(1)
        package = Path({str(tmp_path)!r}) / "dlkernels"
        (package.parent / "csrc").mkdir()
        (package.parent / "csrc" / "setup.cpython-311.pyc").touch()
        doctor._PACKAGE = package
        assert not any("newer than the compiled module" in finding.what for finding in doctor.examine())
        (package.parent / "csrc" / "new.h").touch()
        assert any("newer than the compiled module" in finding.what for finding in doctor.examine())
        functional.attention = lambda q, k, v: 2 * q
        assert any(finding.what.startswith("attention differs") for finding in doctor.examine())
    """
    run_python(code, OMP_NUM_THREADS="1")
