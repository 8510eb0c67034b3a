"""Tests that the rung of the interpreter can fail: bfloat16 is rounded, and an access beyond a tensor's end faults."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import interpreter
import pytest
import torch
import triton
import triton.language as tl

interpreter.install_bfloat16()


@triton.jit
def _multiply(a_ptr, b_ptr, out_ptr, sum_ptr, SIZE: tl.constexpr):
    rows = tl.arange(0, SIZE)
    at = rows[:, None] * SIZE + rows[None, :]
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
    tl.store(out_ptr + at, tl.dot(a, b))
    tl.store(sum_ptr + at, a + b)


def test_bfloat16() -> None:
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    out, total = interpreter.guarded((16, 16), torch.float32), interpreter.guarded((16, 16), torch.bfloat16)
    _multiply[(1,)](a, b, out, total, 16)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-6, atol=1e-6)
    assert torch.equal(total, a + b)


SCRIPT = """
    import sys
    import torch, triton, triton.language as tl
    sys.path.insert(0, {here!r})
    import interpreter

    @triton.jit
    def copy(x, y, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.store(y + at, tl.load(x + at))

    x, y = interpreter.guarded(({x},), torch.float32), interpreter.guarded(({y},), torch.float32)
    copy[(1,)](x, y, 16)
"""


@pytest.mark.parametrize("x, y, fault", [(16, 16, False), (15, 16, True), (16, 15, True)])
def test_a_step_beyond_the_end_is_a_fault(x: int, y: int, fault: bool, tmp_path: Path) -> None:
    file = tmp_path / "script.py"
    file.write_text(textwrap.dedent(SCRIPT.format(here=str(Path(__file__).parent), x=x, y=y)))
    status = subprocess.run([sys.executable, str(file)], capture_output=True).returncode
    assert status == (-signal.SIGSEGV if fault else 0)
