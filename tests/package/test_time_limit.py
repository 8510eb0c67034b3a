"""A test that hangs is ended and named, also if it hangs in C code, which a Python signal handler cannot interrupt."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import conftest
from tests.support.fresh_python import ROOT

pytestmark = pytest.mark.o0_skip(reason="it is about pytest alone")

HANGING = """
import ctypes
import pytest

def test_before():
    pass

def test_kernel():  # ctypes, like torch for its operators, gives the interpreter's lock away
    ctypes.CDLL(None).pause()

def test_kernel_with_the_lock():
    ctypes.PyDLL(None).pause()

@pytest.mark.timeout(3600)
def test_of_its_own(request):
    assert request.node.get_closest_marker("timeout").args == (3600,)

@pytest.mark.heavy
def test_heavy(request):
    print("limit", request.node.get_closest_marker("timeout").args)

def test_usual(request):
    print("limit", request.node.get_closest_marker("timeout").args)
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_hanging.py").write_text(HANGING)
    command = ["pytest", "-v", "-p", "no:cacheprovider", "-p", "tests.conftest", "test_hanging.py"]
    script = f"import sys, runpy; sys.path.insert(0, {str(ROOT)!r}); sys.argv = {command!r} + sys.argv[1:]; "
    script += "runpy.run_module('pytest', run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=folder, capture_output=True, text=True, timeout=100
    )


@pytest.mark.parametrize("name", ["kernel", "kernel_with_the_lock"])
def test_a_hanging_test_is_ended(name: str, tmp_path: Path) -> None:
    begin = time.monotonic()
    done = run(tmp_path, "--timeout=2", "-k", f"test_before or (test_{name} and not {name}_with)")
    output = done.stdout + done.stderr
    assert done.returncode == 1 and time.monotonic() - begin < 60, output
    assert "test_before PASSED" in output and f"in test_{name}" in output and "Timeout" in output


def test_limits(tmp_path: Path) -> None:
    done = run(tmp_path, "-s", "-k", "of_its_own or heavy or usual")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"limit ({conftest.HEAVY_LIMIT},)" in done.stdout and f"limit ({conftest.LIMIT},)" in done.stdout


def test_every_test_has_a_limit(request: pytest.FixtureRequest) -> None:
    for item in request.session.items:
        marker = item.get_closest_marker("timeout")
        assert marker is not None and marker.args[0] > 0, item.nodeid


def test_values_come_before_opcheck(request: pytest.FixtureRequest) -> None:
    names = ["opcheck" in item.name for item in request.session.items]
    assert names == sorted(names)
