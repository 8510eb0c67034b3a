from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from tests.support.process_group import Processes


@pytest.fixture(scope="package")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Four processes, which also form groups of two and of one."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs a torch with gloo")
    started = Processes(4, tmp_path_factory.mktemp("group"))
    try:
        yield started
    finally:
        started.end()
