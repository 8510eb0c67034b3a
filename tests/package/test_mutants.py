"""The source texts that `make mutants` replaces by bugs exist in the files that its lists name. Running the mutants
takes hours and is not done here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.o0_skip(reason="texts alone are compared")

PARTS = (
    "csrc/rnn/cells/", "csrc/gemm/", "csrc/rnn/cpu/", "csrc/attention/cpu/", "csrc/core/team.",
    "csrc/rnn/torch/sequence.cpp", "csrc/attention/torch/boundary.cpp", "dlkernels/_core/",
    "dlkernels/rnn/operators/", "dlkernels/rnn/checks.py", "dlkernels/rnn/layers.py", "dlkernels/rnn/dtypes.py",
    "dlkernels/attention/operators.py", "dlkernels/attention/masks.py", "dlkernels/attention/sdpa.py",
    "dlkernels/distributed/", "dlkernels/integrations/patch.py", "dlkernels/bench/", "benchmarks/",
)  # fmt: skip


def test_every_mutant_can_be_planted() -> None:
    runner = Path(__file__).parents[1] / "mutants" / "run.py"
    done = subprocess.run([sys.executable, str(runner), "--list"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    names, files = zip(*(line.split()[:2] for line in done.stdout.splitlines()), strict=True)
    assert len(names) == len(set(names)) >= 60
    assert [part for part in PARTS if not any(file.startswith(part) for file in files)] == []
