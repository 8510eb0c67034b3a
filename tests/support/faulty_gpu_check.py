"""tests/gpu/check.py with other parts, whose workers have faults: faulty_gpu_check.py ARGUMENTS. The workers need no
torch, so they take no time."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
GPU = TESTS / "gpu"
sys.path.insert(0, str(GPU))

import check  # noqa: E402
import machine  # noqa: E402
import parts  # noqa: E402
import supervise  # noqa: E402
from parts import Part  # noqa: E402
from supervise import Worker  # noqa: E402

SCRIPT = """
import os, pathlib, subprocess, sys, time
sys.path.insert(0, GPU)
from journal import run_cases
here = pathlib.Path(os.environ["HERE"])
def module():
    assert not os.environ.get("BUILD_FAILS")
    return fine("build")
def fine(name="fine"):
    with (here / "ran").open("a") as file:
        file.write(name + chr(10))
    return {"layer": "a stub", "D": 1}
def wrong():
    spoilt.append(True)
    raise ValueError("a wrong result")
spoilt = []
def in_a_new_process():
    assert not spoilt
    return {}
def hanging_case():
    time.sleep(1000)
def slow_case():
    if (here / "fast").exists():
        return {}
    child = subprocess.Popen(["sleep", "1000"])
    (here / "child").write_text(str(child.pid))
    child.wait()
"""
WORKERS = {
    # Without it nothing else runs.
    "build": "sys.exit(run_cases([('module', module)]))",
    # Its second case hangs.
    "hanging": "sys.exit(run_cases([('before', fine), ('hangs', hanging_case), ('after', fine)]))",
    # The part's time limit ends it, and a child of its own.
    "late": "sys.exit(run_cases([('quick', lambda: fine('quick')), ('slow', slow_case), ('last', fine)]))",
    "crashing": "sys.exit(run_cases([('before', fine), ('crashes', os.abort), ('after', fine)]))",
    "wrong": "sys.exit(run_cases([('wrong', wrong), ('after', fine)]))",
    # After its failure nothing more can run in this process, as after an error of CUDA.
    "broken": "sys.exit(run_cases([('wrong', wrong), ('after', in_a_new_process)], lambda: True))",
    "dying": "print('no torch here'); sys.exit(3)",
    # It ends well and writes no result.
    "silent": "print('done')",
    # Its first stage takes all the time; a second one follows.
    "staged": "sys.exit(run_cases([('slow', hanging_case)]))",
    # It forgets a case.
    "forgetful": "from journal import of_this_process as j; j().plan(['a', 'b']); j().begin('a'); j().end('a', {})",
}
SHARD = """
import time

def test_wrong():
    assert "what was found" == "what was expected"

def test_right():
    pass

def test_that_hangs():
    time.sleep(1000)

def test_after():
    pass
"""


def part(name: str, folder: Path) -> Part:
    def stages(run: Any) -> list[list[Worker]]:
        settings = {"HERE": str(folder)}
        command = [sys.executable, "-c", f"GPU = {str(GPU)!r}\n{SCRIPT}\n{WORKERS.get(name, '')}"]
        if name == "shard":
            (folder / "shard_cuda.py").write_text(SHARD)
            settings |= {"PYTHONPATH": str(GPU), "DLKERNELS_DEVICE": "cpu"}
            options = ["-q", "-p", "no:cacheprovider", "--noconftest", "-p", "conftest"]  # that of tests/gpu
            command = [sys.executable, "-m", "pytest", str(folder / "shard_cuda.py"), *options]
        patience = 100.0 if name in ("late", "shard", "staged") else 2.0
        worker = Worker(name, command, settings, patience, fresh=name == "build")
        return [[worker], [worker._replace(name="second")]] if name == "staged" else [[worker]]

    return Part(name, 60.0, stages)


def main(arguments: list[str]) -> int:
    folder = Path(os.environ["FAULTY_FOLDER"])
    parts.PARTS = tuple(part(name, folder) for name in (*WORKERS, "shard"))
    machine.SCRIPT = "print('{}')"
    supervise.START = 60.0
    return check.main(["--rehearse", "--out", str(folder / "out"), *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
