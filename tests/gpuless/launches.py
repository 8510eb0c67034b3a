"""Tests what the host code of the Triton attention kernels passes to a launch, without compiling or running one: how
often a kernel would be compiled, and what is claimed of addresses."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import offline
import pytest
import torch
import triton
from torch import Tensor
from triton import knobs

from dlkernels.attention.triton import host, launch

KERNELS = ("forward", "combine", "preprocess", "backward_query", "backward_key", "mask_gradient", "map_kernel")


def forward(q: Tensor, k: Tensor, v: Tensor, **features: Any) -> tuple[Tensor, Tensor, Tensor]:
    return host.attention_forward(q, k, v, **_arguments(features), contiguous=False)


def backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, results: tuple[Tensor, ...], **features: Any) -> None:
    o, _, stats = results
    host.attention_backward(
        do, None, q, k, v, o, stats, **_arguments(features), need_q=True, need_kv=True, need_mask=False,
        need_slopes=False, need_sinks=False,
    )  # fmt: skip


def _arguments(features: dict[str, Any]) -> dict[str, Any]:
    plain = {
        "mask": None, "alibi_slopes": None, "sinks": None, "cu_seqlens_q": None, "cu_seqlens_k": None, "rng": None,
        "max_seqlen_q": 0, "max_seqlen_k": 0, "softmax_scale": 0.125, "causal": 0, "window_left": -1,
        "window_right": -1, "softcap": 0.0, "dropout_p": 0.0,
    }  # fmt: skip
    return plain | features


class Forgetful(dict[Any, Any]):
    """Asks Triton about each launch anew."""

    def get(self, key: Any, default: Any = None) -> Any:
        return None


class Nothing:
    """A compiled kernel that is never run."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *_: None


@contextmanager
def compilations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """(kernel, Triton's key) of each launch within it, in their order. Triton compiles once for each key."""
    keys: list[tuple[str, str]] = []
    warmup = triton.JITFunction.warmup

    def instead(key: str, fn: Any, **_: Any) -> bool:
        keys.append((fn.name.split(".")[-1], key))
        return True  # it need not be compiled

    monkeypatch.setattr(host, "_machine", lambda q: ("sm_90", 132))
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", instead)
    monkeypatch.setattr(triton.JITFunction, "warmup", lambda *args, **rest: warmup(*args, **rest) or Nothing())
    monkeypatch.setattr(launch, "_compiled", Forgetful())
    with offline.architecture("sm_90"):
        yield keys


def names(keys: list[tuple[str, str]]) -> list[str]:
    return sorted(name for name, _ in set(keys))


def test_ten_lengths_compile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths that make strides 1, multiples of 16 or neither, seeds of all sizes, one or more sequences."""
    lengths = (256, 257, 272, 300, 512, 777, 1000, 1024, 1040, 2049)
    seeds = (0, 1, 16, 7, -1, 2**31, 2**40, -(2**62), 42, 2**31 - 1)
    with compilations(monkeypatch) as compiled:
        for at, (M, seed) in enumerate(zip(lengths, seeds, strict=True)):
            N, B = lengths[-1 - at], 1 + at % 3
            q = torch.empty(B, 40, M, 64, dtype=torch.bfloat16)
            k = torch.empty(B, 40, N, 64, dtype=torch.bfloat16)
            features = {"causal": 1, "dropout_p": 0.1, "rng": torch.tensor([seed, seed % 2**33])}
            backward(q, q, k, k, forward(q, k, k, **features), **features)
    assert names(compiled) == ["backward_key", "backward_query", "forward", "preprocess"]


def test_decoding_compiles_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with compilations(monkeypatch) as compiled:
        for N in (1025, 1100, 1111, 1500, 2000, 2048, 2049, 3000, 4000, 4096):
            q, k = (torch.empty(1, heads, rows, 128, dtype=torch.bfloat16) for heads, rows in ((32, 1), (8, N)))
            forward(q, k, k)
    assert names(compiled) == ["combine", "forward"]


def test_kernels_are_told_apart_as_triton_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that differ in everything that Triton distinguishes: where our key is the same, so must be Triton's."""
    found: dict[tuple[Any, ...], set[str]] = {}
    key_of = launch.compiled_key

    def noted(*args: Any) -> tuple[Any, ...]:
        key = key_of(*args)
        noted.last = key  # type: ignore[attr-defined]
        return key

    slopes, sinks = torch.empty(9), torch.empty(9, dtype=HALF)
    with compilations(monkeypatch) as compiled:
        monkeypatch.setattr(launch, "compiled_key", noted)
        for dtype, width, offset, at, B, M, causal, dropout in itertools.product(
            (HALF, SINGLE), (40, 64), (0, 1), (None, 0, 1), (1, 2), (1, 16, 133), (0, 1), (0.0, 0.1)
        ):
            q = rows(width, dtype, width, offset)[:B, :, :M]
            features = {
                "causal": causal, "dropout_p": dropout, "rng": torch.tensor([M << 30, M]),
                "alibi_slopes": None if at is None else slopes[at : at + 4],
                "sinks": None if at is None else sinks[2 * at : 2 * at + 4], "softcap": 1.0 if M == 16 else 0.0,
                "mask": torch.empty(1, 1, M, M + 1, dtype=dtype)[..., B - 1 : M] if M == 16 else None,
            }  # fmt: skip
            before = len(compiled)
            forward(q, q, q, **features)
            for name, key in compiled[before:]:
                if name == noted.last[0].__name__:  # type: ignore[attr-defined]
                    found.setdefault(noted.last, set()).add(key)  # type: ignore[attr-defined]
    assert len(found) > 30 and all(len(keys) == 1 for keys in found.values())


class Launches:
    """Takes the place of a kernel and remembers its arguments by name."""

    def __init__(self, kernel: Any, made: list[dict[str, Any]]) -> None:
        self.kernel, self.made = kernel, made

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **_: Any) -> None:
            self.made.append(dict(zip(self.kernel.arg_names, args, strict=True)))

        return launch


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    launches: list[dict[str, Any]] = []
    for name in KERNELS:
        monkeypatch.setattr(host, name, Launches(getattr(host, name), launches))
    return launches


def rows(width: int, dtype: torch.dtype, stride: int, offset: int = 0) -> Tensor:
    """[2, 4, 128, width] whose rows are `stride` apart and which begins `offset` numbers after a multiple of 16
    bytes."""
    memory = torch.empty(2 * 4 * 128 * stride + offset + 64, dtype=dtype)
    shift = (-memory.data_ptr() % 16) // memory.element_size() + offset
    return memory[shift:].as_strided((2, 4, 128, width), (4 * 128 * stride, 128 * stride, stride, 1))


HALF, SINGLE = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    "width, dtype, stride, offset, align",
    [
        (64, HALF, 64, 0, 8), (72, HALF, 72, 0, 8), (40, HALF, 40, 8, 8), (40, HALF, 104, 0, 8), (64, SINGLE, 64, 0, 4),
        (36, SINGLE, 36, 0, 4), (36, HALF, 36, 0, 1), (59, HALF, 59, 0, 1), (64, HALF, 68, 0, 1), (64, HALF, 64, 4, 1),
        (72, HALF, 72, 1, 1), (64, SINGLE, 66, 0, 1), (64, SINGLE, 64, 2, 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("which", ["q", "k", "v", "do"])
def test_the_claim_about_addresses(
    which: str, width: int, dtype: torch.dtype, stride: int, offset: int, align: int, made: list[dict[str, Any]]
) -> None:
    """A wrong claim is a fault or a wrong result. It must be true of every tensor for which it is made."""
    usual = rows(64 if align == 1 else width, dtype, 64 if align == 1 else width)
    if align == 1:
        usual = rows(width, dtype, -(-width // 8) * 8)
    x = dict.fromkeys(("q", "k", "v", "do"), usual) | {which: rows(width, dtype, stride, offset)}
    results = forward(x["q"], x["k"], x["v"])
    backward(x["do"], x["q"], x["k"], x["v"], results)
    assert all("ALIGN" in arguments for arguments in made) and len(made) == 4
    for arguments in made:
        step = arguments["ALIGN"]
        tensors = [x for x in arguments.values() if isinstance(x, Tensor) and x.dtype == dtype]
        # Nothing is claimed of the strides of statistics, stride_l.. and stride_s...
        strides = [x for name, x in arguments.items() if name.startswith("stride_") and name[7] not in "ls"]
        assert step in (1, 16 // usual.element_size())
        if step > 1:
            assert all(x.data_ptr() % 16 == 0 for x in tensors) and all(x % step == 0 for x in strides)
    reads = {"q": (0, 2, 3), "k": (0, 2, 3), "v": (0, 2, 3), "do": (1, 2, 3)}[which]
    assert all(made[at]["ALIGN"] == align for at in reads)


@pytest.mark.parametrize(
    "make, align",
    [
        (lambda: torch.empty(2, 4, 128, 96, dtype=HALF), 8), (lambda: torch.empty(1, 1, 128, 96), 4),
        (lambda: torch.empty(2, 1, 1, 96, dtype=torch.bool), 16),
        (lambda: torch.empty(1, 1, 128, 97, dtype=HALF)[..., 1:], 1),
        (lambda: torch.empty(1, 1, 128, 104, dtype=HALF)[..., 1:97], 1),
        (lambda: torch.empty(1, 1, 128, 1, dtype=HALF), 0),
        (lambda: torch.empty(1, 1, 96, 128, dtype=HALF).transpose(2, 3), 0),
        (lambda: torch.empty(1, 1, 128, 192, dtype=HALF)[..., ::2], 0),
        (lambda: torch.empty(2, 4, 128, 100, dtype=HALF)[..., :96], 1),
    ],
)  # fmt: skip
def test_the_claim_about_a_mask(make: Any, align: int, made: list[dict[str, Any]]) -> None:
    q, k = torch.empty(2, 4, 128, 64, dtype=HALF), torch.empty(2, 4, 96, 64, dtype=HALF)
    mask = make()
    forward(q, k, k, mask=mask)
    (arguments,) = made
    assert arguments["MASK_ALIGN"] == align
    if align:
        assert arguments["stride_mask_n"] == 1
        others = [arguments[f"stride_mask_{dim}"] for dim in "bhm"]
        assert align == 1 or (mask.data_ptr() % 16 == 0 and all(stride % align == 0 for stride in others))
