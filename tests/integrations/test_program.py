"""`python -m dlkernels run` runs a program as Python does, with `enable()` on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.fresh_python import environment

pytestmark = [
    pytest.mark.usefixtures("native"),
    pytest.mark.o0_skip(reason="Python around the compiled module"),
]

PROGRAM = """
import multiprocessing, pickle, sys
from beside import layer
import torch

class Own:
    pass

def of_child(queue):
    queue.put(__name__)

if __name__ == "__main__":
    layer(torch.randn(5, 3, 4))
    assert type(pickle.loads(pickle.dumps(Own()))) is Own
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    child = spawn.Process(target=of_child, args=(queue,))
    child.start()
    print(sys.argv[1:], queue.get(timeout=100), "dlkernels" in globals())
    child.join()
    sys.exit(3)
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "programs").mkdir()
    (folder / "programs" / "beside.py").write_text("import torch\nlayer = torch.nn.GRU(4, 6)\n")
    (folder / "programs" / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "dlkernels", "run", *arguments]
    env = environment(OMP_NUM_THREADS="1")
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder, env=env)


def test_a_file(tmp_path: Path) -> None:
    done = run(tmp_path, "programs/program.py", "--quick", "-m")
    assert done.returncode == 3, done.stderr
    assert done.stdout == "['--quick', '-m'] __mp_main__ False\n"
    operator, calls, kernel = done.stderr.splitlines()[1].split()
    assert (operator, calls) == ("gru.input", "1") and kernel.endswith("/gru")


def test_a_module(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("import torch\nlayer = torch.nn.GRU(4, 6)\n")
    done = run(tmp_path, "-m", "programs.program", "one")
    assert done.returncode == 3 and done.stdout == "['one'] __mp_main__ False\n", done.stderr
    assert "gru.input" in done.stderr


def test_an_exception_passes_through(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise ValueError('from the program')\n")
    done = run(tmp_path, "broken.py")
    assert done.returncode == 1 and done.stderr.endswith("ValueError: from the program\n"), done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"), [((), "usage"), (("-m",), "usage"), (("--help",), "usage"), (("no.py",), "no file 'no.py'")]
)
def test_without_a_program(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    done = run(tmp_path, *arguments)
    assert done.returncode == 2 and said in done.stderr, done.stderr
