"""TFLOP/s of the attention kernels: a sweep over tiles, and both passes beside SDPA's flash and cuDNN backends.
check.py runs this file.

    bench_attention.py measure
    bench_attention.py compile 2/8    makes every eighth call once, so that Triton's cache has its kernels

A compilation takes seconds of one core, so several processes compile before one measures.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
from journal import Result, Story, of_this_process, run_cases, why
from tiles import candidates, forced
from timing import DEVICE, REHEARSAL, context_broken, host_microseconds, microseconds
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from dlkernels.attention.triton.heuristics import Tile

BACKENDS = {"sdpa_flash": SDPBackend.FLASH_ATTENTION, "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION}
# float32, which the two do not take, and the backends that do.
BACKENDS_FLOAT32 = {"sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION, "sdpa_math": SDPBackend.MATH}
TOKENS = 128 if REHEARSAL else 16384
HIDDEN = 128 if REHEARSAL else 2048
LENGTHS = (64,) if REHEARSAL else (4096, 1024, 16384, 2048, 8192)
DECODE_LENGTHS = (256,) if REHEARSAL else (2048, 32768)
# (B, H, length) of the sweep, and of the attention tutorial in Triton's documentation, whose published figures are for
# this batch and number of heads.
SWEEP = (1, 2, 64) if REHEARSAL else (4, 16, 4096)
TUTORIAL = (1, 2) if REHEARSAL else (4, 32)
TUTORIAL_LENGTHS = (64,) if REHEARSAL else (1024, 4096, 16384)
WIDTHS = (64,) if REHEARSAL else (128, 64)
KERNELS = ("forward", "backward_query", "backward_key")
# Products of a kernel in units of those of a forward, which has two. backward_query has three and backward_key four; a
# backward is counted as five, which is what one without recomputation needs.
WORK = {"forward": 1.0, "backward_query": 1.5, "backward_key": 2.0, "backward": 2.5}
Calls = tuple[Callable[[], Any], Callable[[], Any]]


def draw(batch: int, heads: int, length: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, heads, length, width, device=DEVICE, dtype=dtype) for _ in range(4)]


def rest(width: int, causal: bool) -> tuple[Any, ...]:
    return (None, None, None, None, None, None, 0, 0, width**-0.5, int(causal), -1, -1, 0.0, 0.0)


def ours(q: Any, k: Any, v: Any, do: Any, causal: bool, query: bool = True, key: bool = True) -> Calls:
    more = rest(q.size(-1), causal)
    o, _, stats = torch.ops.dlkernels.attention(q, k, v, *more, False)
    backward = torch.ops.dlkernels.attention_backward
    return (
        lambda: torch.ops.dlkernels.attention(q, k, v, *more, False),
        lambda: backward(do, None, q, k, v, o, stats, *more, query, key, False, False, False),
    )


def theirs(q: Any, k: Any, v: Any, do: Any, causal: bool) -> Calls:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = scaled_dot_product_attention(*leaves, is_causal=causal)
    return (
        lambda: scaled_dot_product_attention(q, k, v, is_causal=causal),
        lambda: torch.autograd.grad(o, leaves, do, retain_graph=True),
    )


def operations(batch: int, heads: int, length: int, width: int, causal: bool) -> float:
    return 4.0 * batch * heads * length * length * width * (0.5 if causal else 1.0)


def speed(call: Callable[[], Any], flops: float) -> Result:
    one = microseconds(call)
    return one | {"tflops": flops / one["us"] / 1e6}


def case(dtype: torch.dtype, batch: int, heads: int, length: int, width: int, causal: bool) -> Result:
    q, k, v, do = draw(batch, heads, length, width, dtype)
    flops = operations(batch, heads, length, width, causal)
    row: Result = {"dtype": str(dtype)[6:], "B": batch, "H": heads, "M": length, "N": length, "D": width,
                   "causal": causal}  # fmt: skip
    calls = ours(q, k, v, do, causal)
    expected = calls[0]()[0]
    passes = (("forward", 0), ("backward", 1))
    row["dlkernels"] = {name: speed(calls[i], flops * WORK[name]) for name, i in passes}
    best: dict[str, float] = {}
    for peer, backend in (BACKENDS if dtype != torch.float32 else BACKENDS_FLOAT32).items():
        try:
            with sdpa_kernel(SDPBackend.MATH if REHEARSAL else backend):
                calls = theirs(q, k, v, do, causal)
                row[peer] = {name: speed(calls[i], flops * WORK[name]) for name, i in passes}
                row[peer]["largest_difference"] = (calls[0]().float() - expected.float()).abs().max().item()
        except Exception as error:  # a backend may refuse the call or run out of memory; the others are still measured
            if context_broken():
                raise
            row[peer] = {"not_run": why(error)}
            continue
        best = {name: min(best.get(name, float("inf")), row[peer][name]["us"]) for name, _ in passes}
    for name in best:
        row[f"{name}_speedup"] = best[name] / row["dlkernels"][name]["us"]
    return row


def sweep_call(kernel: str, width: int, causal: bool) -> Callable[[], Any]:
    q, k, v, do = draw(*SWEEP, width, torch.bfloat16)
    calls = ours(q, k, v, do, causal, kernel == "backward_query", kernel == "backward_key")
    return calls[0] if kernel == "forward" else calls[1]


def swept(kernel: str, width: int, causal: bool, tile: Tile | None) -> Result:
    """The time of one kernel, or of its half of the backward, with a tile; of the shipped one without."""
    row: Result = {"kernel": kernel, "D": width, "causal": causal, "tile": None if tile is None else list(tile)}
    flops = operations(*SWEEP, width, causal) * WORK[kernel]
    call = sweep_call(kernel, width, causal)
    if tile is None:
        return row | speed(call, flops)
    with forced(kernel, tile) as asked:
        try:
            call()
        except Exception as error:  # Triton refuses tiles that need more than the GPU has
            if context_broken():
                raise
            return row | {"refused": why(error)}
        if not asked.yes and not REHEARSAL:
            raise AssertionError("the host code did not ask for this tile")
        return row | speed(call, flops)


def called(dtype: torch.dtype, batch: int, heads: int, length: int, width: int, causal: bool) -> Result:
    for call in ours(*draw(batch, heads, length, width, dtype), causal):
        call()
    return {}


def compiled(kernel: str, width: int, causal: bool, tile: Tile) -> Result:
    call = sweep_call(kernel, width, causal)
    with forced(kernel, tile):
        try:
            call()
        except Exception as error:
            if context_broken():
                raise
            return {"refused": why(error)}
    return {}


def decode(length: int) -> Result:
    q = torch.randn(1, 32, 1, 128, device=DEVICE, dtype=torch.bfloat16)
    k, v = (torch.randn(1, 8, length, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    call = functools.partial(torch.ops.dlkernels.attention, q, k, v, *rest(128, False), False)
    peer = functools.partial(scaled_dot_product_attention, q, k, v, enable_gqa=True)  # SDPA chooses its backend
    row: Result = {"dtype": "bfloat16", "H": 32, "HKV": 8, "M": 1, "N": length, "D": 128}
    for name, one in (("dlkernels", call), ("sdpa", peer)):
        row[name] = {"forward": microseconds(one), "host_us": host_microseconds(one)}
    return row


def sweep() -> list[tuple[str, tuple[str, int, bool], Tile]]:
    """(key, (kernel, width, causal), tile), the widths and kernels in turn, so that a sweep that is cut short has tried
    some tiles of each."""
    columns = []
    for width in WIDTHS:
        for causal in (False, True):
            for kernel in KERNELS:
                tiles = candidates(kernel, width, torch.bfloat16)[: 2 if REHEARSAL else None]
                columns.append([(kernel, width, causal, tile) for tile in tiles])
    found = []
    for turn in range(max(map(len, columns))):
        for column in columns:
            if turn < len(column):
                kernel, width, causal, tile = column[turn]
                key = f"{kernel} D{width} {'causal ' if causal else ''}{'x'.join(map(str, tile))}"
                found.append((key, (kernel, width, causal), tile))
    return found


def calls() -> list[tuple[str, tuple[torch.dtype, int, int, int, int, bool]]]:
    """(key, arguments of `case`), those first that are wanted most."""
    half = torch.bfloat16
    square = [(half, max(1, TOKENS // length), HIDDEN // width, length, width, causal)
              for length in LENGTHS for width in WIDTHS for causal in (False, True)]  # fmt: skip
    tutorial = [(half, *TUTORIAL, length, width, causal)
                for length in TUTORIAL_LENGTHS for width in WIDTHS for causal in (False, True)]  # fmt: skip
    length = min(1024, LENGTHS[0])
    single = [(torch.float32, max(1, TOKENS // length), HIDDEN // 64, length, 64, True)]
    first = 2 * len(WIDTHS)
    return [
        (f"{prefix} {str(dtype)[6:]} {batch}x{heads}x{length}x{width}{' causal' if causal else ''}",
         (dtype, batch, heads, length, width, causal))
        for prefix, some in (("attention", square[:first]), ("tutorial", tutorial),
                             ("attention", square[first:] + single))
        for dtype, batch, heads, length, width, causal in some
    ]  # fmt: skip


def cases() -> list[tuple[str, Callable[[], Result]]]:
    listed = [(key, functools.partial(case, *given)) for key, given in calls()]
    first = 2 * len(WIDTHS)
    found: list[tuple[str, Callable[[], Result]]] = listed[:first]
    found += [(f"decode {length}", functools.partial(decode, length)) for length in DECODE_LENGTHS]
    for width, causal, kernel in itertools.product(WIDTHS, (False, True), KERNELS):
        name = f"shipped {kernel} D{width}{' causal' if causal else ''}"
        found.append((name, functools.partial(swept, kernel, width, causal, None)))
    found += [(f"tile {key}", functools.partial(swept, *where, tile)) for key, where, tile in sweep()]
    return found + listed[first:]


def main(arguments: list[str]) -> int:
    if arguments[0] == "measure":
        return run_cases(cases(), context_broken)
    index, _, count = arguments[1].partition("/")
    journal = of_this_process()
    assert journal is not None
    measured = Story(journal.path.with_name("attention.journal")).ended  # before, if this run is a continued one
    wanted: list[tuple[str, Callable[[], Result]]] = [
        *((key, functools.partial(called, *given)) for key, given in calls()),
        *((f"tile {key}", functools.partial(compiled, *where, tile)) for key, where, tile in sweep()),
    ]
    left = [(f"compile {key}", call) for key, call in wanted if key not in measured]
    return run_cases(left[int(index) :: int(count)], context_broken)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
