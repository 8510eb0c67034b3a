"""Which tiles the Triton kernels use, and when the keys are split: tables and named rules, no tuning at first use.

The numbers were chosen from the architectures' shared memory and register files and are checked by compiling each for
its architecture (`make gpuless`): nothing spills and everything fits. `make gpu-check` is what measures them.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["FAMILIES", "TABLES", "Plan", "Tile", "decode_split", "family", "forward_plan", "padded", "tile"]


class Tile(NamedTuple):
    """Queries by keys; warps of a block; tiles in flight (1: no pipelining)."""

    block_m: int
    block_n: int
    warps: int
    stages: int


class Plan(NamedTuple):
    kernel: str
    tile: Tile
    packed: bool
    splits: int
    reason: str


# Shared memory that one block may have, in bytes.
FAMILIES = {"sm_80": 166912, "sm_86": 101376, "sm_90": 232448, "sm_100": 232448}

# kernel -> family -> the tiles for a width (the larger of D and Dv, padded) of up to 64, 128 and 256.
# 16-bit operands: the accumulators are the budget. 128 x 128 floats over 8 warps are 64 registers of a thread's 255.
_HALF: dict[str, dict[str, tuple[Tile, Tile, Tile]]] = {
    "forward": {
        # 128 x 64 at a width of 128 is beyond what ptxas can place under a causal mask: it gives up, with 32 registers.
        "sm_80": (Tile(128, 64, 8, 3), Tile(128, 32, 8, 3), Tile(64, 64, 8, 2)),
        "sm_86": (Tile(128, 64, 4, 2), Tile(128, 32, 8, 2), Tile(64, 32, 8, 2)),
        "sm_90": (Tile(128, 128, 8, 3), Tile(128, 128, 8, 2), Tile(128, 64, 8, 2)),
        # Tensor memory has 512 columns, and each loop over tiles takes its own: 128 x 128 under a causal mask would
        # need 576. A width of 256 fits none: 32 rows keep it on the units that have their sums in registers.
        "sm_100": (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(32, 64, 8, 2)),
    },
    "backward_query": {
        "sm_80": (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 32, 8, 2)),
        "sm_86": (Tile(64, 64, 4, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 1)),
        "sm_90": (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
        "sm_100": (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(32, 64, 8, 2)),
    },
    "backward_key": {
        "sm_80": (Tile(64, 128, 8, 2), Tile(64, 64, 8, 2), Tile(32, 64, 8, 1)),
        "sm_86": (Tile(64, 64, 4, 2), Tile(32, 64, 8, 2), Tile(32, 32, 8, 1)),
        "sm_90": (Tile(64, 128, 8, 2), Tile(32, 128, 8, 2), Tile(16, 64, 8, 2)),
        "sm_100": (Tile(64, 128, 8, 2), Tile(32, 64, 8, 2), Tile(32, 32, 8, 1)),
    },
}
# float32 without tf32 runs on the plain FMA units, whose operands come from shared memory: small tiles, everywhere.
_SINGLE: dict[str, tuple[Tile, Tile, Tile]] = {
    "forward": (Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 16, 8, 1)),
    "backward_query": (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 16, 4, 1)),
    "backward_key": (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 16, 4, 1)),
}
TABLES = {"half": _HALF, "single": {name: dict.fromkeys(FAMILIES, tiles) for name, tiles in _SINGLE.items()}}


def padded(width: int) -> int:
    """A tile's inner size: the next power of two, 16 at least, which is what matrix units take."""
    return max(16, 1 << (width - 1).bit_length()) if width > 0 else 16


def family(capability: tuple[int, int]) -> str:
    """The table of a compute capability. 8.6, 8.9 and 12.x have 8.0's instructions and 99 KiB of shared memory."""
    major, minor = capability
    if major in (9, 10):
        return f"sm_{major}0"
    return "sm_80" if (major, minor) in ((8, 0), (8, 7)) else "sm_86"


def tile(kernel: str, arch: str, half: bool, width: int, busy: bool) -> Tile:
    """The shipped tile for a kernel. `busy`: each score costs registers beyond the two products (dropout's generator,
    an additive mask, the softcap), paid for with half as many keys in a tile. Not below what fills the matrix units:
    64 where keys are the rows of a warp group's products."""
    choice = TABLES["half" if half else "single"][kernel][arch][0 if width <= 64 else 1 if width <= 128 else 2]
    if not (busy and half):
        return choice
    warp_groups = arch in ("sm_90", "sm_100")
    fewest = min(choice.block_n, 64 if kernel == "backward_key" and warp_groups else 32)
    choice = choice._replace(block_n=max(fewest, choice.block_n // 2))
    if kernel == "backward_key" and choice.block_m * choice.block_n > 2048:
        # With 64 x 64 each turn moves some 200 spilled registers (8.0: dropout; 9.0: all features), with 32 x 64 few.
        choice = choice._replace(block_m=choice.block_m // 2)
    return choice


def short_tile(choice: Tile, queries: int) -> Tile:
    """Few queries: a lower tile, since the matrix units would only multiply zeros; fewer warps for fewer rows."""
    rows = max(16, padded(queries))
    if rows >= choice.block_m:
        return choice
    return choice._replace(block_m=rows, warps=min(choice.warps, 4))


def pack_heads(group: int, queries: int) -> bool:
    """Query heads that share a key head become rows of one tile while these fit one: keys are then read once for the
    whole group, and decoding, with one query a head, does not leave 15 of 16 rows idle."""
    return group > 1 and group * queries <= 64


def decode_split(blocks: int, keys: int, block_n: int, processors: int) -> int:
    """Into how many parts the keys go. One while the blocks fill the machine; else enough to fill it twice, with at
    least four key tiles a part, so that the extra pass over the partial results stays small."""
    if blocks * 2 > processors:
        return 1
    return max(1, min(-(-2 * processors // max(blocks, 1)), keys // (4 * block_n), 128))


def forward_plan(
    arch: str, processors: int, half: bool, width: int, busy: bool, batch: int, heads: int, group: int, queries: int,
    keys: int,
) -> Plan:  # fmt: skip
    """How a forward call runs. `queries` and `keys` are the longest sequence's."""
    packed = pack_heads(group, queries)
    rows = queries * group if packed else queries
    choice = short_tile(tile("forward", arch, half, width, busy), rows)
    blocks = -(-rows // choice.block_m) * batch * (heads // group if packed else heads)
    splits = decode_split(blocks, keys, choice.block_n, processors)
    if splits > 1:
        reason = f"{blocks} blocks for {processors} multiprocessors: the keys in {splits} parts"
    else:
        reason = f"{blocks} blocks for {processors} multiprocessors: each walks all its keys"
    if packed:
        reason += f"; {group} query heads share a tile"
    return Plan("triton/forward_split" if splits > 1 else "triton/forward", choice, packed, splits, reason)
