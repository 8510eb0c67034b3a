"""Every shipped tile of the Triton attention kernels, compiled for the architectures it is shipped for, with no GPU.

The host code itself makes the launches, so what is compiled is what would run: `make gpuless`.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import offline
import pytest
import torch

from dlkernels.triton import attention as host
from dlkernels.triton import heuristics

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
KERNELS = ("forward", "combine", "preprocess", "backward_query", "backward_key", "mask_gradient", "map_kernel")
# Both of a kernel's products run on matrix units in these.
PRODUCTS = ("forward", "backward_query", "backward_key", "mask_gradient")
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": 1},
    "masked": {"mask": torch.bool, "alibi_slopes": True, "window_right": 100},
    "everything": {
        "causal": 2, "window_left": 300, "softcap": 20.0, "dropout_p": 0.1, "mask": torch.float32,
        "alibi_slopes": True, "sinks": True,
    },
}  # fmt: skip
# A loop over tiles that goes to local memory in each turn. "everything" is the worst case of seven features at once,
# whose price is paid in registers; what must not spill is what people run.
SPILLS_PER_LOOP = {"plain": 4, "causal": 4}


class Compiled(NamedTuple):
    name: str
    binary: offline.Binary
    loops: list[offline.Loop]


class Recorder:
    """Stands for a kernel: compiles each launch instead of running it."""

    def __init__(self, name: str, kernel: Any, found: list[Compiled]) -> None:
        self.name, self.kernel, self.found = name, kernel, found

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            compiled = self.kernel.warmup(*args, grid=grid, **options)
            self.found.append(Compiled(self.name, offline.inspect(compiled), offline.matrix_loops(compiled)))

        return launch


def compile_call(
    monkeypatch: pytest.MonkeyPatch, arch: str, dtype: torch.dtype, width: int, features: dict[str, Any]
) -> list[Compiled]:
    found: list[Compiled] = []
    for name in KERNELS:
        monkeypatch.setattr(host, name, Recorder(name, getattr(host, name), found))
    monkeypatch.setattr(host, "_machine", lambda q: (arch, 1))
    q, k = torch.empty(2, 4, 512, width, dtype=dtype), torch.empty(2, 2, 512, width, dtype=dtype)
    mask_dtype = features.get("mask")
    additive = mask_dtype == torch.float32
    features = {
        "mask": None if mask_dtype is None else torch.empty(2, 4, 512, 512, dtype=mask_dtype),
        "alibi_slopes": torch.empty(4) if features.get("alibi_slopes") else None,
        "sinks": torch.empty(4, dtype=dtype) if features.get("sinks") else None, "cu_seqlens_q": None,
        "cu_seqlens_k": None, "rng": torch.tensor([1, 2]), "max_seqlen_q": 0, "max_seqlen_k": 0,
        "softmax_scale": 0.125, "causal": features.get("causal", 0), "window_left": features.get("window_left", -1),
        "window_right": features.get("window_right", -1), "softcap": features.get("softcap", 0.0), "dropout_p": features.get("dropout_p", 0.0),
    }  # fmt: skip
    with offline.architecture(arch):
        o, lse = host.attention_forward(q, k, k, **features)
        host.attention_backward(
            o, None, q, k, k, o, lse, **features, need_q=True, need_kv=True, need_mask=additive,
            need_slopes=features["alibi_slopes"] is not None, need_sinks=features["sinks"] is not None,
        )  # fmt: skip
    return found


def check(found: list[Compiled], arch: str, half: bool, kind: str) -> None:
    for name, binary, loops in found:
        where = f"{name}, {kind}, {arch}: {binary}, {loops}"
        print(where)
        assert binary.shared <= heuristics.FAMILIES[arch], f"too much shared memory: {where}"
        assert binary.registers <= 255, where
        if name not in PRODUCTS:
            assert binary.stack == 0 and binary.spill_stores == 0, f"spills: {where}"
            continue
        if half:
            units = {"sm_80": binary.mma, "sm_90": binary.wgmma, "sm_100": binary.tcgen05 or binary.mma}[arch]
            assert units > 0, f"no matrix instructions: {where}"
        if kind in SPILLS_PER_LOOP:
            assert loops, f"no loop found: {where}"
            # The repair of hidden NaN runs on no finite data: its loops, the last ones, may spill.
            worst = max(loop.spills for loop in loops[: len(loops) - _repairs(name, kind)])
            assert worst <= SPILLS_PER_LOOP[kind], f"spills in a loop: {where}"


def _repairs(name: str, kind: str) -> int:
    return 0 if kind == "plain" else 2 if name == "backward_key" else 1


HALF = list(itertools.product(ARCHITECTURES, (64, 128, 256), FEATURES))


@pytest.mark.parametrize("arch, width, kind", HALF)
def test_sixteen_bits(arch: str, width: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(compile_call(monkeypatch, arch, torch.bfloat16, width, FEATURES[kind]), arch, True, kind)


@pytest.mark.parametrize("arch, width", list(itertools.product(ARCHITECTURES, (64, 128, 256))))
def test_float32(arch: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(compile_call(monkeypatch, arch, torch.float32, width, FEATURES["causal"]), arch, False, "causal")


def test_small_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """8.6, 8.9 and 12.x: 99 KiB. Compiled as 8.6."""
    for width in (64, 128, 256):
        found = compile_call(monkeypatch, "sm_86", torch.float16, width, FEATURES["causal"])
        for name, binary, _ in found:
            assert binary.shared <= heuristics.FAMILIES["sm_86"], (name, width, binary)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_decode_map_and_odd_sizes(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Compiled] = []
    for name in KERNELS:
        monkeypatch.setattr(host, name, Recorder(name, getattr(host, name), found))
    monkeypatch.setattr(host, "_machine", lambda q: (arch, 132))
    rest = (None, None, None, None, None, None, 0, 0, 0.1, 0, -1, -1, 0.0, 0.0)
    with offline.architecture(arch):
        q, k = torch.empty(1, 32, 1, 128, dtype=torch.bfloat16), torch.empty(1, 8, 2048, 128, dtype=torch.bfloat16)
        host.attention_forward(q, k, k, *rest)
        q, k, v = (torch.empty(1, 2, 100, width, dtype=torch.float16) for width in (59, 59, 111))
        o, lse = host.attention_forward(q, k, v, *rest)
        host.attention_backward(o, lse, q, k, v, o, lse, *rest, True, True, False, False, False)
        host.attention_map(q, k, None, None, None, 0.1, 1, -1, -1, 0.0, 8, 8)
    names = [name for name, _, _ in found]
    assert {"forward", "combine", "backward_key", "backward_query", "map_kernel"} <= set(names)
    for name, binary, _ in found:
        assert binary.shared <= heuristics.FAMILIES[arch], (name, binary)


def test_shared_memory_limit_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """That the checks can fail: a tile far too large compiles without a word."""
    monkeypatch.setattr(heuristics, "tile", lambda *_: heuristics.Tile(128, 128, 8, 4))
    found = compile_call(monkeypatch, "sm_80", torch.bfloat16, 256, {})
    with pytest.raises(AssertionError, match="shared memory"):
        check(found, "sm_80", True, "plain")
