"""What the processes of the tests of dlkernels.distributed run, and the comparison of their results with float64."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from dlkernels._core import extension
from dlkernels.distributed import ring_attention, shard, unshard
from tests.support import attention_calls
from tests.support import attention_oracle as oracle
from tests.support.attention_oracle import Case, Data, Results
from tests.support.process_group import Processes, groups

# Of each result the dimension of the sequence.
_SEQUENCE = {"o": 2, "lse": 2, "dq": 2, "dk": 2, "dv": 2}


@dataclass(frozen=True)
class Way:
    """How a case is computed by `world` processes."""

    world: int
    layout: str = "contiguous"
    check: bool = True
    isa: str | None = None
    reference: bool = False  # without the kernels


def attend(case: Case, data: Data, way: Way) -> Results | None:
    """On a rank: the results of the whole sequence, gathered; None on the ranks that the first group does not have."""
    extension.choose_isa(way.isa)
    native = extension.HAVE_NATIVE
    extension.native.set_poison(True)
    extension.HAVE_NATIVE = native and not way.reference
    try:
        found = _attend(case, data, way)
    finally:
        extension.HAVE_NATIVE = native
        extension.choose_isa(None)
    return found if dist.get_rank() == 0 else None


def _attend(case: Case, data: Data, way: Way) -> Results:
    group = groups[way.world]
    (q, k, v), _ = oracle.op_arguments(case, data)

    def own(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return shard(tensor.to(dtype), group=group, dim=2, layout=way.layout)

    leaves = [own(tensor, case.dtype).detach().requires_grad_() for tensor in (q, k, v)]
    options: dict[str, Any] = {"causal": bool(case.causal), "softmax_scale": case.scale, "softcap": case.softcap}
    options |= {"layout": way.layout, "check": way.check, "group": group}
    o, lse = ring_attention(*leaves, **options, return_lse=True)
    cotangents = [own(data.do, case.dtype)] + ([] if data.dlse is None else [own(data.dlse, lse.dtype)])
    grads = torch.autograd.grad((o, lse)[: len(cotangents)], leaves, cotangents)
    parts = dict(zip(("o", "lse", "dq", "dk", "dv"), (o.detach(), lse.detach(), *grads), strict=True))
    return {name: unshard(part, group=group, dim=2, layout=way.layout) for name, part in parts.items()}


def check(processes: Processes, case: Case, way: Way) -> Results:
    """Asserts that the processes' results keep the tolerance rule, and returns them."""

    def run(case: Case, data: Data) -> Results:
        return processes.run(attend, case, data, way)[0]  # type: ignore[no-any-return]

    return attention_calls.check(case, run=run)


# A call of `disagree`, and how ranks change it.
_CALL: dict[str, Any] = {
    "batch": 2, "heads": 4, "kv_heads": 2, "rows": 8, "width": 8, "value_width": 8, "dtype": torch.float32,
    "grads": "qkv", "options": {},
}  # fmt: skip


def disagree(changes: dict[int, dict[str, Any]]) -> str:
    """On a rank: the exception of a call in which each rank of `changes` has other arguments than the others, as text;
    empty if there is none. A call that all agree about follows."""
    rank = dist.get_rank()
    found = ""
    try:
        _call(**{**_CALL, **changes.get(rank, {})})
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    assert _call(**_CALL).shape == (2, 4, 8, 8)
    return found


def _call(
    batch: int, heads: int, kv_heads: int, rows: int, width: int, value_width: int, dtype: torch.dtype, grads: str,
    options: dict[str, Any],
) -> torch.Tensor:  # fmt: skip
    sizes = {"q": (heads, width), "k": (kv_heads, width), "v": (kv_heads, value_width)}
    tensors = [
        torch.ones(batch, of, rows, wide, dtype=dtype, requires_grad=name in grads)
        for name, (of, wide) in sizes.items()
    ]
    return ring_attention(*tensors, **options)  # type: ignore[no-any-return]


def fall_out(world: int, victim: int, signal_name: str) -> tuple[str, float]:
    """On a rank: a forward and a backward, between which the rank `victim` of all sends itself a signal. Returns the
    exception of the backward as text, empty if there is none, and the seconds that it took."""
    x = torch.ones(1, 2, 64, 16, requires_grad=True)
    o = ring_attention(x, x, x, group=groups[world])
    if dist.get_rank() == victim:
        os.kill(os.getpid(), getattr(signal, signal_name))
    begin = time.monotonic()
    try:
        o.sum().backward()
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - begin
    return "", time.monotonic() - begin
