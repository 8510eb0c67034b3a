"""A rank that ends or stops in the middle of a call: the others get an exception within the group's timeout."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.support.process_group import Failed, Processes
from tests.support.ring_calls import fall_out

pytestmark = pytest.mark.usefixtures("native")
TIMEOUT = 5.0


def test_the_others_get_an_exception(tmp_path: Path) -> None:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs a torch with gloo")
    processes = Processes(4, tmp_path, timeout=TIMEOUT)
    try:
        # Rank 1 is killed between forward and backward. Rank 3 is no neighbour of it, so only the timeout reaches it.
        processes.begin(fall_out, 4, 1, "SIGKILL")
        for rank in (0, 2, 3):
            error, seconds = processes.result(rank)
            assert error.startswith("RuntimeError") and seconds < 3 * TIMEOUT, (rank, error, seconds)
        with pytest.raises(Failed, match="rank 1 ended with status -9"):
            processes.result(1)
        # Rank 3 stops answering, but its connections stay open.
        processes.begin(fall_out, 2, 3, "SIGSTOP", ranks=(2, 3))
        error, seconds = processes.result(2)
        assert error.startswith("RuntimeError") and TIMEOUT / 2 < seconds < 3 * TIMEOUT, (error, seconds)
    finally:
        begin = time.monotonic()
        processes.end()
        assert time.monotonic() - begin < 30
