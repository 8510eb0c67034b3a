"""What the processes of the tests of dlkernels.distributed run, and the comparison of their results with float64."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.autograd import forward_ad

from dlkernels._core import extension
from dlkernels.distributed import blocks, ring_attention, shard, unshard
from dlkernels.distributed.group import Ring, Transfer
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

    return attention_calls.check(case, other=run)


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


def whole(seed: int = 0, rows: int = 16, requires_grad: bool = False) -> list[torch.Tensor]:
    """q, k and v of a whole sequence, the same on every process."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(2, heads, rows, 8, generator=g, requires_grad=requires_grad) for heads in (4, 2, 2)]


def frozen(names: str) -> list[torch.Tensor | None]:
    """On a rank: the gathered gradients of q, k and v, of which only those in `names` require one."""
    group = groups[4]
    own = [shard(x, group=group, dim=2) for x in whole()]
    for name, x in zip("qkv", own, strict=True):
        x.requires_grad_(name in names)
    ring_attention(*own, group=group, causal=True).square().sum().backward()
    return [None if x.grad is None else unshard(x.grad, group=group, dim=2) for x in own]


def of_infinite_keys(layout: str) -> list[torch.Tensor]:
    """On a rank: gathered o and lse where `infinite_keys` are the inputs."""
    own = (shard(x, layout=layout) for x in infinite_keys())
    outputs = ring_attention(*own, causal=True, layout=layout, return_lse=True)
    return [unshard(x, dim=2, layout=layout) for x in outputs]


def infinite_keys() -> list[torch.Tensor]:
    """q, k and v. The scores of the first 10 of 16 keys are -inf, so their weights are 0."""
    q, k, v = whole()
    k[:, :, :10] = -math.inf
    return [q.abs(), k, v]


def order_of_events(layout: str, causal: bool) -> list[str]:
    """On a rank: what a forward does, in order: "pass on" (messages begin), "block" (scores are computed), "wait"."""
    events: list[str] = []

    def recorded(event: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any, **options: Any) -> Any:
            events.append(event)
            return function(*args, **options)

        return record

    places = ((Ring, "pass_on", "pass on"), (blocks, "forward", "block"), (Transfer, "wait", "wait"))
    with contextlib.ExitStack() as patches:
        for owner, name, event in places:
            patches.enter_context(mock.patch.object(owner, name, recorded(event, getattr(owner, name))))
        ring_attention(*(shard(x, layout=layout) for x in whole()), causal=causal, layout=layout)
    return events


def twice() -> str:
    """On a rank: the exception of a second derivative, as text."""
    q, k, v = (shard(x, dim=2).requires_grad_() for x in whole())
    (dq,) = torch.autograd.grad(ring_attention(q, k, v).square().sum(), q, create_graph=True)
    try:
        dq.sum().backward()
    except RuntimeError as error:
        return str(error)
    return ""


def under_autocast() -> tuple[torch.Tensor, torch.Tensor]:
    """On a rank: o of float32 tensors under autocast, and the gradient of q."""
    q, k, v = (shard(x, dim=2).requires_grad_() for x in whole())
    with torch.autocast("cpu", torch.bfloat16):
        o = ring_attention(q, k, v, causal=True)
    o.float().square().sum().backward()
    assert q.grad is not None
    return o.detach(), q.grad


def compiled() -> tuple[torch.Tensor, torch.Tensor]:
    """On a rank: gathered o and gradient of q of a compiled program that contains ring attention."""
    q, k, v = (shard(x, dim=2).requires_grad_() for x in whole())

    @torch.compile(backend="eager")
    def program(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ring_attention(q * 2, k, v, causal=True) + 1  # type: ignore[no-any-return]

    o = program(q, k, v)
    o.square().sum().backward()
    assert q.grad is not None
    return unshard(o.detach(), dim=2), unshard(q.grad, dim=2)


def _dtensor(given: dict[str, Any]) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate

    return {"q": DTensor.from_local(given["q"], init_device_mesh("cpu", (4,)), [Replicate()], run_check=False)}


def _integers(given: dict[str, Any]) -> dict[str, Any]:
    return {name: given[name].long() for name in "qkv"}


def _float8(given: dict[str, Any]) -> dict[str, Any]:
    return {name: given[name].to(torch.float8_e5m2) for name in "qkv"}


def _odd(given: dict[str, Any]) -> dict[str, Any]:
    return {**{name: given[name][:, :, 1:] for name in "qkv"}, "layout": "zigzag"}


def _another_group(_: dict[str, Any]) -> dict[str, Any]:
    others = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    return {"group": others[1 if dist.get_rank() < 2 else 0]}


def _tangent(given: dict[str, Any]) -> dict[str, Any]:
    return {"q": forward_ad.make_dual(given["q"], torch.ones_like(given["q"]))}


Mistake = tuple[Callable[[dict[str, Any]], dict[str, Any]], str]
# What a call changes of right arguments, and how its exception begins.
MISTAKES: dict[str, Mistake] = {
    "no tensor": (lambda _: {"k": 1}, "TypeError: attention(): argument 'k' must be Tensor, not int"),
    "DTensor": (_dtensor, "TypeError: q: expected this rank's rows as a plain tensor (DTensor.to_local()), got a DT"),
    "dimensions": (lambda a: {"v": a["v"][0]}, "ValueError: v: expected 4 dimensions, [B, heads, rows, width], got"),
    "heads": (lambda a: {"k": a["k"][:, :1]}, "RuntimeError: v: expected the batch, heads and rows of k, whose shap"),
    "rows": (lambda a: {"q": a["q"][:, :, 1:], "causal": True}, "RuntimeError: k: expected 15 rows like q for causal"),
    "dtypes": (lambda a: {"v": a["v"].double()}, "RuntimeError: v: expected torch.float32 like q, got torch.float64"),
    "integers": (_integers, "ValueError: q: expected a floating point dtype, got torch.int64"),
    "float8": (_float8, "ValueError: q: expected float32, float64, bfloat16 or float16, got torch.float8_e5m2"),
    "causal": (lambda _: {"causal": "top_left"}, "TypeError: causal: expected a bool, got str"),
    "scale": (lambda _: {"softmax_scale": "1"}, "TypeError: softmax_scale: expected a number, got str"),
    "softcap": (lambda _: {"softcap": -1.0}, "ValueError: softcap: expected 0 (none) or a positive number"),
    "layout": (lambda _: {"layout": "striped"}, "ValueError: layout: expected 'contiguous' or 'zigzag', got 'striped'"),
    "layout's type": (lambda _: {"layout": 1}, "TypeError: layout: expected 'contiguous' or 'zigzag', got int"),
    "odd zigzag": (_odd, "RuntimeError: q: expected an even number of rows for layout 'zigzag', got shape [2, 4, 15"),
    "return_lse": (lambda _: {"return_lse": 1}, "TypeError: return_lse: expected a bool, got int"),
    "check": (lambda _: {"check": 1}, "TypeError: check: expected a bool, got int"),
    "group": (lambda _: {"group": "ring"}, "TypeError: group: expected a ProcessGroup or None, got str"),
    "another group": (_another_group, "ValueError: group: expected a process group with this process in it, got one"),
    "tangent": (_tangent, "NotImplementedError: ring_attention: forward-mode differentiation"),
}


def refusal(name: str) -> str:
    """On a rank: the exception of a mistake, as text, empty if there is none. No message is sent before it."""
    arguments: dict[str, Any] = {**dict(zip("qkv", whole(), strict=True)), "check": False}
    with forward_ad.dual_level():
        return _exception(lambda: ring_attention(**{**arguments, **MISTAKES[name][0](arguments)}))


def refused_transform() -> str:
    q, k, v = whole()
    return _exception(lambda: torch.func.vmap(lambda one: ring_attention(one, k, v))(q[None]))


def refused_layouts() -> list[str]:
    """On a rank: the exceptions of `shard` and `unshard`, as text."""
    rows = dist.get_rank() + 1
    return [
        _exception(lambda: shard(torch.ones(12), dim=0, layout="zigzag")),
        _exception(lambda: shard(1)),  # type: ignore[arg-type]
        _exception(lambda: shard(torch.ones(12), dim=1)),
        _exception(lambda: unshard(torch.ones(rows), dim=0, layout="zigzag")),
    ]


def _exception(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
