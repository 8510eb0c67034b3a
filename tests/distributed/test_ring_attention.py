"""Ring attention of one, two and four processes against attention of the whole sequence in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dlkernels import functional
from tests.support import attention_oracle as oracle
from tests.support.attention_oracle import Case
from tests.support.process_group import Processes
from tests.support.ring_calls import Way, attend, check, disagree

pytestmark = pytest.mark.usefixtures("native")

WAYS = {"all": (0, "contiguous"), "causal": (1, "contiguous"), "zigzag": (1, "zigzag")}
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_results_and_gradients(processes: Processes, world: int, way: str, dtype: torch.dtype) -> None:
    causal, layout = WAYS[way]
    case = Case(H=4, Hkv=2, M=40, N=40, D=16, Dv=16, causal=causal, dtype=dtype)
    check(processes, case, Way(world, layout))


@pytest.mark.parametrize("way", WAYS)
def test_every_instruction_set(processes: Processes, isa: str, way: str) -> None:
    causal, layout = WAYS[way]
    check(processes, Case(M=72, N=72, D=24, Dv=24, causal=causal, seed=1), Way(4, layout, isa=isa))


CASES = {
    "one head of keys": Case(H=6, Hkv=1, M=16, N=16, causal=1),
    "other width of v": Case(M=16, N=16, D=8, Dv=24, causal=1),
    "scale and softcap": Case(M=16, N=16, causal=1, scale=1.7, softcap=0.7),
    "large scores": Case(M=32, N=32, D=32, Dv=32, causal=1, scale=4.0),
    "no gradient of lse": Case(M=16, N=16, causal=1, dlse=False),
    "rows before heads": Case(M=16, N=16, causal=1, layout="bmhd"),
    "strided": Case(M=16, N=16, causal=1, layout="strided"),
}


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_options(processes: Processes, case: Case, layout: str) -> None:
    check(processes, case, Way(2, layout))


@pytest.mark.parametrize(
    "case",
    [
        Case(M=10, N=10, causal=1),
        Case(M=3, N=3, causal=1),  # one rank has no row
        Case(M=11, N=6),
        Case(M=2, N=13),
        Case(M=5, N=1),
    ],
    ids=str,
)
def test_shards_of_different_lengths(processes: Processes, case: Case) -> None:
    check(processes, case, Way(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_without_kernels(processes: Processes, way: str, dtype: torch.dtype) -> None:
    causal, layout = WAYS[way]
    case = Case(H=4, Hkv=2, M=24, N=24, causal=causal, softcap=2.0, dtype=dtype)
    check(processes, case, Way(4, layout, reference=True))
    if causal:
        check(processes, Case(M=3, N=3, causal=1), Way(4, reference=True))


def test_without_the_check(processes: Processes) -> None:
    case = Case(M=16, N=16, causal=1)
    data = oracle.make_data(case)
    checked, unchecked = (processes.run(attend, case, data, Way(4, check=which))[0] for which in (True, False))
    for name, value in checked.items():
        torch.testing.assert_close(unchecked[name], value, rtol=0, atol=0)


def test_one_rank_is_attention(processes: Processes) -> None:
    case = Case(M=9, N=9, causal=1)
    data = oracle.make_data(case)
    found = processes.run(attend, case, data, Way(1))[0]
    o, lse = functional.attention(*(x.float() for x in (data.q, data.k, data.v)), causal=True, return_lse=True)
    assert torch.equal(found["o"], o) and torch.equal(found["lse"], lse)


DISAGREEMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "batch": ({"batch": 3}, "q: expected the same batch size on all ranks of the group, got 2 on rank 0 and 3 on rank"),
    "heads": ({"heads": 6}, "q: expected the same number of heads on all ranks of the group, got 4 on rank 0 and 6"),
    "keys' heads": ({"kv_heads": 4}, "k: expected the same number of heads on all ranks"),
    "width": ({"width": 16}, "q: expected the same width on all ranks of the group, got 8 on rank 0 and 16 on rank"),
    "width of v": ({"value_width": 16}, "v: expected the same width on all ranks"),
    "dtype": ({"dtype": torch.float64}, "q: expected the same dtype on all ranks of the group, got torch.float32 on"),
    "causal": ({"options": {"causal": True}}, "causal: expected the same value on all ranks of the group, got False"),
    "layout": ({"options": {"layout": "zigzag"}}, "layout: expected the same value on all ranks of the group, got con"),
    "scale": ({"options": {"softmax_scale": 0.1}}, "softmax_scale: expected the same value on all ranks of the group"),
    "softcap": ({"options": {"softcap": 2.5}}, "softcap: expected the same value on all ranks of the group, got 0.0 "),
    "gradient of q": ({"grads": "kv"}, "q: expected the same requires_grad on all ranks of the group, got True on"),
    "gradient of k": ({"grads": "q"}, "k and v: expected the same requires_grad on all ranks of the group"),
}


@pytest.mark.parametrize("changed, message", DISAGREEMENTS.values(), ids=DISAGREEMENTS.keys())
def test_ranks_that_disagree(processes: Processes, changed: dict[str, Any], message: str) -> None:
    for error in processes.run(disagree, {2: changed}):
        assert error.startswith(f"RuntimeError: {message}"), error


def test_zigzag_shards_of_different_lengths(processes: Processes) -> None:
    zigzag = {"options": {"layout": "zigzag", "causal": True}}
    changes = dict.fromkeys((0, 1, 3), zigzag) | {2: {"rows": 6, **zigzag}}
    for error in processes.run(disagree, changes):
        assert "k: expected the same number of rows (layout 'zigzag') on all ranks of the group, got 8 on r" in error


def test_a_rank_that_refuses_its_arguments(processes: Processes) -> None:
    own, *others = processes.run(disagree, {0: {"options": {"softcap": -1.0}}})
    assert own.startswith("ValueError: softcap: expected"), own
    for error in others:
        assert error.startswith("RuntimeError: ring_attention: rank 0 refused its arguments"), error
