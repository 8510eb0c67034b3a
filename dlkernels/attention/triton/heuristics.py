"""Chooses the tiles of the Triton kernels, and when the keys are split, by tables and named rules. Nothing is tuned at
the first use.

The numbers were chosen from the architectures' shared memory and register files. `make gpuless` compiles each for its
architecture and checks that nothing spills and everything fits. `make gpu-check` measures them.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "FAMILIES",
    "TABLES",
    "Plan",
    "Tile",
    "candidates",
    "decode_split",
    "family",
    "forward_plan",
    "padded",
    "tile",
]


class Tile(NamedTuple):
    """Queries (block_m) by keys (block_n), warps of a block, and tiles in flight (stages; 1: no pipelining)."""

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


# Shared memory that one block may use on each family of architectures, in bytes.
FAMILIES = {"sm_80": 166912, "sm_86": 101376, "sm_90": 232448, "sm_100": 232448}

# kernel -> family -> the tiles for a width (the larger of D and Dv, padded) of up to 64, 128 and 256.
# With 16-bit operands the accumulators limit the tile: 128 x 128 floats over 8 warps take 64 of a thread's 255
# registers.
_HALF: dict[str, dict[str, tuple[Tile, Tile, Tile]]] = {
    "forward": {
        # ptxas cannot allocate registers for 128 x 64 at a width of 128 under a causal mask: it gives up with 32.
        "sm_80": (Tile(128, 64, 8, 3), Tile(128, 32, 8, 3), Tile(64, 64, 8, 2)),
        "sm_86": (Tile(128, 64, 4, 2), Tile(128, 32, 8, 2), Tile(64, 32, 8, 2)),
        "sm_90": (Tile(128, 128, 8, 3), Tile(128, 128, 8, 2), Tile(128, 64, 8, 2)),
        # Tensor memory has 512 columns, and each loop over tiles takes its own: 128 x 128 under a causal mask would
        # need 576. At a width of 256 no tile fits: with 32 rows the products accumulate in registers instead.
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
# Other tiles on 9.0 if nothing but scale, bounds and ALiBi is applied to the scores and no tile of a mask takes shared
# memory: (kernel, 0 for a width of up to 64, 1 for 128, 2 for 256). In the forward pass two blocks of width 64 with 4
# warps fit a multiprocessor, and 3 stages of width 128 its shared memory.
_LEAN = {
    ("forward", 0): Tile(128, 64, 4, 3),
    ("forward", 1): Tile(128, 128, 8, 3),
    ("backward_query", 1): Tile(128, 128, 8, 2),
}
# float32 without tf32 runs on the FMA units, whose operands come from shared memory, so tiles are small everywhere.
_SINGLE: dict[str, tuple[Tile, Tile, Tile]] = {
    "forward": (Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 16, 8, 1)),
    "backward_query": (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 16, 4, 1)),
    "backward_key": (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 16, 4, 1)),
}
TABLES = {"half": _HALF, "single": {name: dict.fromkeys(FAMILIES, tiles) for name, tiles in _SINGLE.items()}}


# What else compiles cleanly on 9.0 with 16-bit operands, for a sweep on a GPU: neither spills in a loop over tiles nor
# advisories of ptxas, plain and causal. `make gpuless ARGS=--all` compiles them.
_CANDIDATES: dict[tuple[str, int], tuple[Tile, ...]] = {
    ("forward", 0): (
        Tile(128, 64, 4, 4), Tile(128, 64, 8, 3), Tile(128, 128, 8, 2), Tile(128, 128, 8, 3), Tile(128, 128, 8, 4),
        Tile(64, 64, 4, 3), Tile(64, 128, 4, 3),
    ),
    ("forward", 1): (
        Tile(128, 128, 8, 2), Tile(128, 64, 8, 3), Tile(128, 64, 8, 4), Tile(64, 64, 4, 2), Tile(64, 64, 4, 3),
        Tile(64, 128, 4, 2),
    ),
    ("backward_query", 0): (Tile(128, 128, 8, 2), Tile(128, 64, 8, 3), Tile(64, 64, 4, 2), Tile(64, 128, 4, 2)),
    ("backward_query", 1): (Tile(128, 64, 8, 2), Tile(128, 64, 8, 3), Tile(64, 64, 4, 2)),
}  # fmt: skip


def candidates(kernel: str, width: int, dtype: str) -> list[Tile]:
    """The tiles worth measuring on 9.0 for a kernel with products, the head size `width` and "bfloat16", "float16" or
    "float32", for calls without mask, dropout or softcap. The first is the one that ships."""
    half = dtype != "float32"
    shipped = tile(kernel, "sm_90", half, padded(width), False)
    others = _CANDIDATES.get((kernel, _size(width)), ()) if half else ()
    return [shipped, *(other for other in others if other != shipped)]


def _size(width: int) -> int:
    """The place of a width in the tables."""
    return 0 if width <= 64 else 1 if width <= 128 else 2


def padded(width: int) -> int:
    """A tile's inner size: the next power of two, and at least 16, the least that the matrix units take."""
    return max(16, 1 << (width - 1).bit_length()) if width > 0 else 16


def family(capability: tuple[int, int]) -> str:
    """The table of a compute capability. 8.6, 8.9 and 12.x have 8.0's instructions and 99 KiB of shared memory."""
    major, minor = capability
    if major in (9, 10):
        return f"sm_{major}0"
    return "sm_80" if (major, minor) in ((8, 0), (8, 7)) else "sm_86"


def tile(
    kernel: str, arch: str, half: bool, width: int, busy: bool, mask_bytes: int = 0, dropout: bool = False
) -> Tile:  # fmt: skip
    """The tile of a kernel, from the tables. `busy`: each score needs registers beyond those of the two products
    (dropout's generator, an additive mask, the softcap), so the tile has half as many keys, but no fewer than fill the
    matrix units: 64 if the keys are the rows of a warp group's products, else 32. `mask_bytes`: the size of a mask's
    elements, 0 if there is none."""
    size = _size(width)
    choice = TABLES["half" if half else "single"][kernel][arch][size]
    if not half:
        return choice
    if arch == "sm_90" and not busy and not mask_bytes:
        choice = _LEAN.get((kernel, size), choice)
    if not busy:
        return choice
    warp_groups = arch in ("sm_90", "sm_100")
    fewest = min(choice.block_n, 64 if kernel == "backward_key" and warp_groups else 32)
    choice = choice._replace(block_n=max(fewest, choice.block_n // 2))
    if arch == "sm_90" and kernel == "forward" and size == 0 and (mask_bytes > 2 or (mask_bytes == 2 and dropout)):
        # Tiles of the mask are copied ahead as those of k and v are. With more tiles in flight, or larger ones, Triton
        # 3.6 waits for each wgmma before the next one.
        choice = choice._replace(block_n=32, stages=2)
    if kernel == "backward_key" and choice.block_m * choice.block_n > 2048:
        # With 64 x 64 each iteration moves some 200 spilled registers (8.0 with dropout, 9.0 with all features), with
        # 32 x 64 few.
        choice = choice._replace(block_m=choice.block_m // 2)
    return choice


def short_tile(choice: Tile, queries: int) -> Tile:
    """The tile for few queries: it has fewer rows, because the matrix units would multiply zeros in the others, and
    fewer warps."""
    rows = max(16, padded(queries))
    if rows >= choice.block_m:
        return choice
    return choice._replace(block_m=rows, warps=min(choice.warps, 4))


def pack_heads(group: int, queries: int) -> bool:
    """Whether the query heads that share a key head become rows of one tile, which they do if they fit. Keys are then
    read once for the whole group, and decoding, with one query per head, does not leave 15 of 16 rows idle."""
    return group > 1 and group * queries <= 64


def decode_split(blocks: int, keys: int, block_n: int, processors: int) -> int:
    """The number of parts into which the keys are split. It is 1 if the blocks occupy more than half of the
    multiprocessors, else enough to occupy each of them twice, but with at least four key tiles per part, so that the
    extra pass over the partial results stays small."""
    if blocks * 2 > processors:
        return 1
    return max(1, min(-(-2 * processors // max(blocks, 1)), keys // (4 * block_n), 128))


def forward_plan(
    arch: str, processors: int, half: bool, width: int, busy: bool, mask_bytes: int, dropout: bool, batch: int,
    heads: int, group: int, queries: int, keys: int,
) -> Plan:  # fmt: skip
    """The plan of a forward call. `queries` and `keys` are those of the longest sequence."""
    packed = pack_heads(group, queries)
    rows = queries * group if packed else queries
    choice = short_tile(tile("forward", arch, half, width, busy, mask_bytes, dropout), rows)
    blocks = -(-rows // choice.block_m) * batch * (heads // group if packed else heads)
    splits = decode_split(blocks, keys, choice.block_n, processors)
    if splits > 1:
        reason = f"{blocks} blocks for {processors} multiprocessors: the keys in {splits} parts"
    else:
        reason = f"{blocks} blocks for {processors} multiprocessors: each walks all its keys"
    if packed:
        reason += f"; {group} query heads share a tile"
    return Plan("triton/forward_split" if splits > 1 else "triton/forward", choice, packed, splits, reason)
