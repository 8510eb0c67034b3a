"""What programs do with ring attention besides calling it, and its exceptions."""

from __future__ import annotations

import pytest
import torch

from dlkernels import functional
from dlkernels.distributed import ring_attention, shard
from tests.support import ring_calls
from tests.support.process_group import Processes

pytestmark = pytest.mark.usefixtures("native")


def alone(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """o of causal attention in one process, and the gradients of the sum of its squares."""
    leaves = [x.to(dtype).requires_grad_() for x in ring_calls.whole()]
    o = functional.attention(*leaves, causal=True)
    return o.detach(), list(torch.autograd.grad(o.square().sum(), leaves))


@pytest.mark.parametrize("names", ["q", "k", "v", "qv", "kv"])
def test_some_inputs_need_no_gradient(processes: Processes, names: str) -> None:
    for found in processes.run(ring_calls.frozen, names):
        for name, grad, expected in zip("qkv", found, alone()[1], strict=True):
            assert (grad is not None) == (name in names)
            if grad is not None:
                torch.testing.assert_close(grad, expected)


def test_messages_are_under_way_while_blocks_are_computed(processes: Processes) -> None:
    step = ["pass on", "block", "wait"]
    for layout, causal in (("contiguous", False), ("zigzag", True)):
        for events in processes.run(ring_calls.order_of_events, layout, causal):
            assert events == step * 3 + ["block"]
    for rank, events in enumerate(processes.run(ring_calls.order_of_events, "contiguous", True)):
        assert events.count("block") == rank + 1  # keys of later ranks are skipped


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_scores_of_minus_infinity(processes: Processes, layout: str) -> None:
    o, lse = functional.attention(*ring_calls.infinite_keys(), causal=True, return_lse=True)
    assert lse[..., :10].max() == -torch.inf and not o[:, :, :10].any()
    for found_o, found_lse in processes.run(ring_calls.of_infinite_keys, layout):
        torch.testing.assert_close(found_o, o)
        torch.testing.assert_close(found_lse, lse)


def test_second_derivatives_are_refused(processes: Processes) -> None:
    for error in processes.run(ring_calls.twice):
        assert "twice" in error and "once_differentiable" in error, error


def test_autocast(processes: Processes) -> None:
    o, (dq, *_) = alone(torch.bfloat16)
    for rank, (found_o, found_dq) in enumerate(processes.run(ring_calls.under_autocast)):
        assert found_o.dtype == torch.bfloat16 and found_dq.dtype == torch.float32
        torch.testing.assert_close(found_o, o.tensor_split(4, 2)[rank], rtol=0.02, atol=0.02)
        torch.testing.assert_close(found_dq, dq.float().tensor_split(4, 2)[rank], rtol=0.05, atol=0.1)


def test_a_compiled_program(processes: Processes) -> None:
    leaves = [x.requires_grad_() for x in ring_calls.whole()]
    o = functional.attention(leaves[0] * 2, *leaves[1:], causal=True) + 1
    (dq,) = torch.autograd.grad(o.square().sum(), leaves[:1])
    for found_o, found_dq in processes.run(ring_calls.compiled):
        torch.testing.assert_close(found_o, o)
        torch.testing.assert_close(found_dq, dq)


@pytest.mark.parametrize("name", ring_calls.MISTAKES)
def test_mistakes(processes: Processes, name: str) -> None:
    for error in processes.run(ring_calls.refusal, name):
        assert error.startswith(ring_calls.MISTAKES[name][1]), error


def test_transforms_are_refused(processes: Processes) -> None:
    for error in processes.run(ring_calls.refused_transform):
        assert error == "NotImplementedError: ring_attention: torch.func transforms are not supported"


def test_mistakes_about_layouts(processes: Processes) -> None:
    for of_zigzag, no_tensor, dim, rows in processes.run(ring_calls.refused_layouts):
        assert of_zigzag.startswith("ValueError: x: expected a multiple of 8 rows (2 * world) in dimension 0"), (
            of_zigzag
        )
        assert no_tensor == "TypeError: shard(): argument 'x' must be Tensor, not int"
        assert dim.startswith("IndexError"), dim
        assert rows.startswith("RuntimeError: x: expected the same even number of rows on every rank for layout"), rows


def test_without_a_process_group() -> None:
    q, k, v = ring_calls.whole()
    with pytest.raises(RuntimeError, match=r"group: expected a process group \(torch.distributed.init_process_group"):
        ring_attention(q, k, v)
    with pytest.raises(RuntimeError, match="group: expected a process group"):
        shard(q)
