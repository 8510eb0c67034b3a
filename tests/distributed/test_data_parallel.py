"""Our layers under DistributedDataParallel and FSDP2 against one process that has the whole batch."""

from __future__ import annotations

import pytest
import torch

from tests.support.data_parallel import LAYERS, alone, among_processes
from tests.support.process_group import Processes

pytestmark = pytest.mark.usefixtures("native")


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
@pytest.mark.parametrize("name", LAYERS)
def test_training_is_that_of_one_process(processes: Processes, name: str, kind: str) -> None:
    expected, expected_losses = alone(name)
    for parameters, losses in processes.run(among_processes, name, kind):
        assert losses == pytest.approx(expected_losses, rel=1e-5)
        assert parameters.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(
                parameters[key], value, rtol=1e-4, atol=2e-6, msg=lambda m, key=key: f"{key}: {m}"
            )
