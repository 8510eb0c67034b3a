"""Compiles every shipped tile of the Triton attention kernels for its architectures, without a GPU: `make gpuless`.

The launches are made by the host code, so the compiled kernels are those that would run.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import offline
import pytest
import torch

from dlkernels.attention.triton import heuristics, host

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
KERNELS = ("forward", "combine", "preprocess", "backward_query", "backward_key", "mask_gradient", "map_kernel")
# The kernels with matrix products. With 16-bit operands these must use the matrix units.
PRODUCTS = ("forward", "backward_query", "backward_key", "mask_gradient")
# The kernels that must use wgmma, the instructions of a whole warp group, on 9.0.
WARPGROUP = ("forward", "backward_query", "backward_key")
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": 1},
    "dropout": {"dropout_p": 0.1},
    "everything": {
        "causal": 2, "window_left": 300, "softcap": 20.0, "dropout_p": 0.1, "mask": torch.float32,
        "alibi_slopes": True, "sinks": True,
    },
}  # fmt: skip
# How many spilled registers each iteration of a loop over tiles may store or load: in the loop over whole tiles, and in
# any loop. Nearly all time is spent on whole tiles, so there only a few are allowed, whose latency the products hide.
# There are few partial tiles. "everything" combines seven features, which need registers. The loop that separates
# hidden NaN does not run for finite data and is not checked. The most that was counted on whole tiles of causal calls
# is 10, of backward_key at a width of 64 by Triton 3.6.0.
SPILLS_PER_LOOP = {"plain": (8, 64), "causal": (12, 64), "dropout": (8, 64), "everything": (64, 128)}
# At a width of 256 the sums for 64 keys, the fewest that a warp group can compute, take half of the registers. The most
# that was counted is 17 in the loop over whole tiles, of backward_key with dropout by Triton 3.9.0.
SPILLS_WIDE = (20, 128)
# The most waits for wgmma in an iteration of the loop over whole tiles. ptxas serialises all wgmma of a kernel in which
# it cannot prove that two of them are independent; such a loop has a wait for each.
WAITS = 4
# For float32, where each iteration has more than a thousand multiplications.
SPILLS_FLOAT32 = (64, 160)


class Compiled(NamedTuple):
    name: str
    binary: offline.Binary
    loops: list[offline.Loop]


class Recorder:
    """Replaces a kernel and compiles each launch instead of running it, or does nothing unless `wanted`."""

    def __init__(self, name: str, kernel: Any, found: list[Compiled], wanted: bool = True) -> None:
        self.name, self.kernel, self.found, self.wanted = name, kernel, found, wanted

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            if self.wanted:
                compiled = offline.compile_launch(self.kernel, args, grid, options)
                self.found.append(Compiled(self.name, *offline.inspect(compiled)))

        return launch


def compile_call(
    monkeypatch: pytest.MonkeyPatch, arch: str, dtype: torch.dtype, width: int, features: dict[str, Any],
    backward: bool = True, only: str = "",
) -> list[Compiled]:  # fmt: skip
    """Compiles what a call launches; with `only`, of that kernel alone."""
    found: list[Compiled] = []
    for name in KERNELS:
        kernel = getattr(host, name)
        kernel = kernel.kernel if isinstance(kernel, Recorder) else kernel
        monkeypatch.setattr(host, name, Recorder(name, kernel, found, only in ("", name)))
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
        "window_right": features.get("window_right", -1), "softcap": features.get("softcap", 0.0),
        "dropout_p": features.get("dropout_p", 0.0),
    }  # fmt: skip
    with offline.architecture(arch):
        o, _, stats = host.attention_forward(q, k, k, **features, contiguous=False)
        if backward:
            host.attention_backward(
                o, None, q, k, k, o, stats, **features, need_q=True, need_kv=True, need_mask=additive,
                need_slopes=features["alibi_slopes"] is not None, need_sinks=features["sinks"] is not None,
            )  # fmt: skip
    return found


def check(found: list[Compiled], arch: str, half: bool, kind: str, width: int = 64) -> None:
    for name, binary, loops in found:
        where = f"{name}, {kind}, {arch}: {binary}, {loops}"
        print(where)
        assert not binary.advisories, f"ptxas could not schedule the code as written: {where}"
        assert binary.shared <= heuristics.FAMILIES[arch], f"too much shared memory: {where}"
        # For a kernel that needs more tensor memory Triton makes an empty kernel without an error.
        assert binary.tensor_columns <= 512, f"too much tensor memory: {where}"
        assert binary.registers <= 255, where
        if name not in PRODUCTS:
            assert binary.stack <= 8, f"spills: {where}"  # two registers, once for each program
            continue
        if half:
            units = {"sm_80": binary.mma, "sm_90": binary.wgmma + binary.mma, "sm_100": binary.tcgen05 + binary.mma}
            assert units[arch] > 0, f"no matrix instructions: {where}"
        else:
            assert binary.fma > 0 and binary.mma + binary.wgmma + binary.tcgen05 == 0, f"not float32's units: {where}"
        if arch == "sm_90" and half and name in WARPGROUP:
            assert binary.wgmma > 0, f"no wgmma: {where}"
        if not loops:
            assert binary.stack == 0, f"no loop found: {where}"
            continue
        # Code that waits for a barrier is placed after the kernel's code and jumps back into it, so it looks like a
        # small loop. The loop over whole tiles is looked for among those with at least half of `most`.
        most = max(loop.matrix for loop in loops)
        plainest = min((loop for loop in loops if 2 * loop.matrix >= most), key=lambda loop: loop.selects)
        if binary.stack > 0:
            whole, any_loop = SPILLS_FLOAT32 if not half else SPILLS_WIDE if width > 128 else SPILLS_PER_LOOP[kind]
            assert plainest.spills <= whole, f"spills in a loop: {where}"
            usual = loops[: max(1, len(loops) - _repairs(name, kind))]
            assert max(loop.spills for loop in usual) <= any_loop, f"spills in a loop: {where}"
        if binary.wgmma > 0:
            assert plainest.waits <= WAITS, f"wgmma are serialised: {where}"


def _repairs(name: str, kind: str) -> int:
    """How many of the last loops only separate hidden NaN and infinities (CAREFUL), which finite data does not need."""
    if kind in ("plain", "dropout") or name == "mask_gradient":
        return 0
    return 2 if name == "backward_key" else 1


WIDTHS = (64, 128, 256)


@pytest.mark.parametrize("kind", ["plain", "dropout"])
@pytest.mark.parametrize("arch, width", list(itertools.product(ARCHITECTURES, WIDTHS)))
def test_shipped_tiles(arch: str, width: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles each tile of the tables and each that `heuristics.tile` derives for busy kernels, in bfloat16."""
    check(compile_call(monkeypatch, arch, torch.bfloat16, width, FEATURES[kind]), arch, True, kind, width)


@pytest.mark.any_architecture
@pytest.mark.parametrize("arch, width", list(itertools.product(ARCHITECTURES, WIDTHS)))
def test_shipped_tiles_float32(arch: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(compile_call(monkeypatch, arch, torch.float32, width, {}), arch, False, "plain")


@pytest.mark.parametrize("arch, width", list(itertools.product(ARCHITECTURES, (40, 72))))
def test_widths_between_powers_of_two(arch: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their rows are multiples of 16 bytes but not of 16 numbers, which is what Triton looks for by itself."""
    found = compile_call(monkeypatch, arch, torch.bfloat16, width, {})
    check(found, arch, True, "plain", width)
    for name, binary, _ in found:
        assert binary.narrow_loads == 0, f"loads of one number at a time: {name}, {arch}: {binary}"
        assert binary.async_copies > 0 or name not in PRODUCTS or name == "mask_gradient", f"{name}, {arch}: {binary}"


# To save time only these of the combinations of an architecture with (128, causal), (256, causal) and (64, everything)
# are compiled. Architecture 8.0 has as many registers per thread as 9.0, so its cost of "everything" is assumed to be
# that of 9.0. On 10.0 both widths are compiled, since their sums are in different places: at 128 in tensor memory, of
# which each loop over tiles takes its own part, and at 256 in registers (heuristics.py).
CUT = [
    ("sm_80", 128, "causal"), ("sm_90", 128, "causal"), ("sm_90", 256, "causal"), ("sm_90", 64, "everything"),
    ("sm_100", 128, "causal"), ("sm_100", 256, "causal"),
]  # fmt: skip


@pytest.mark.parametrize("arch, width, kind", CUT)
def test_loops_over_cut_tiles(arch: str, width: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(compile_call(monkeypatch, arch, torch.bfloat16, width, FEATURES[kind]), arch, True, kind, width)


@pytest.mark.everything
@pytest.mark.parametrize(
    "arch, width, kernel, tile",
    [
        ("sm_90", width, kernel, tile)
        for kernel in WARPGROUP for width in WIDTHS for tile in heuristics.candidates(kernel, width, "bfloat16")
    ],
)  # fmt: skip
def test_candidates(
    arch: str, width: int, kernel: str, tile: heuristics.Tile, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """The tiles that a sweep on a GPU tries."""
    monkeypatch.setattr(heuristics, "tile", lambda *_: tile)
    for kind in ("plain", "causal"):
        found = compile_call(monkeypatch, arch, torch.bfloat16, width, FEATURES[kind], kernel != "forward", kernel)
        assert [name for name, *_ in found] == [kernel]
        check(found, arch, True, kind, width)


@pytest.mark.parametrize("arch, width", [("sm_86", width) for width in WIDTHS])
def test_small_shared_memory(arch: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """8.6, 8.9 and 12.x have 99 KiB of shared memory. They are compiled as 8.6."""
    for name, binary, _ in compile_call(monkeypatch, arch, torch.float16, width, {}):
        assert binary.shared <= heuristics.FAMILIES[arch], (name, width, binary)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_decode_map_and_odd_sizes(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Compiled] = []
    for name in KERNELS:
        monkeypatch.setattr(host, name, Recorder(name, getattr(host, name), found))
    monkeypatch.setattr(host, "_machine", lambda q: (arch, 132))
    rest = (None, None, None, None, None, None, 0, 0, 0.1, 0, -1, -1, 0.0, 0.0)
    with offline.architecture(arch):
        q, k = torch.empty(1, 32, 1, 128, dtype=torch.bfloat16), torch.empty(1, 8, 2048, 128, dtype=torch.bfloat16)
        host.attention_forward(q, k, k, *rest, False)
        q, k, v = (torch.empty(1, 2, 100, width, dtype=torch.float16) for width in (59, 59, 111))
        o, lse, stats = host.attention_forward(q, k, v, *rest, False)
        if arch == "sm_90":
            host.attention_backward(o, lse, q, k, v, o, stats, *rest, True, True, False, False, False)
        host.attention_map(q, k, None, None, None, 0.1, 1, -1, -1, 0.0, 8, 8)
    names = [name for name, _, _ in found]
    assert {"forward", "combine", "map_kernel"} <= set(names)
    for name, binary, _ in found:
        assert binary.shared <= heuristics.FAMILIES[arch] and binary.tensor_columns <= 512, (name, binary)
