"""Bugs in the Triton kernels and in what launches them. The rungs of tests/gpuless notice them without a GPU."""

from __future__ import annotations

from mutant import Mutant

KERNELS = "dlkernels/attention/triton/kernels/"
HOST = "dlkernels/attention/triton/"
LENGTHS = ("gpuless launches.py -k compile_once",)
CLAIMS = ("gpuless launches.py -k claim",)
VALUES = "gpuless attention_interpreted.py -k '{}'"
CODE = "gpuless attention_offline.py -k '{}'"

TRITON: tuple[Mutant, ...] = (
    # What only the machine code shows.
    Mutant("triton-addresses", KERNELS + "elements.py", "    if base.dtype.element_ty == tl.float32:\n",
           "    if True:\n", "each wgmma waits for the one before it (C7515)",
           (CODE.format("sm_90 and 128 and plain and not float32"),)),
    Mutant("triton-narrow", HOST + "addresses.py", "    step = 16 // like.element_size()\n", "    return 1\n",
           "rows of 72 elements are loaded two bytes at a time", (CODE.format("between and 72 and sm_90"),)),
    Mutant("triton-spills", HOST + "heuristics.py",
           '"sm_90": (Tile(128, 128, 8, 3), Tile(128, 128, 8, 2), Tile(128, 64, 8, 2)),',
           '"sm_90": (Tile(128, 128, 4, 3), Tile(128, 128, 4, 2), Tile(128, 64, 4, 2)),',
           "the scores do not fit the registers of four warps",
           (CODE.format("sm_90 and not float32"),)),
    Mutant("triton-shared", HOST + "heuristics.py",
           '"sm_90": (Tile(128, 128, 8, 3), Tile(128, 128, 8, 2), Tile(128, 64, 8, 2)),',
           '"sm_90": (Tile(128, 128, 8, 3), Tile(128, 128, 8, 2), Tile(128, 128, 8, 3)),',
           "a tile needs more shared memory than a block has",
           (CODE.format("sm_90 and 256 and plain and not float32"),)),
    # Compilation for each call.
    Mutant("triton-specialized", KERNELS + "entry.py", "return triton.jit(do_not_specialize=numbers)(function)",
           "return triton.jit(function)", "other lengths compile the kernels again", LENGTHS),
    Mutant("triton-types", KERNELS + "entry.py", "        function.__annotations__[name] = kind\n", "",
           "the integer type of a seed compiles the kernels again", LENGTHS),
    # Claims about addresses.
    Mutant("triton-claim-start", HOST + "addresses.py", "        if x.data_ptr() % 16:\n            return 1\n",
           "        pass\n", "a tensor that begins anywhere is read 16 bytes at a time", CLAIMS),
    Mutant("triton-claim-strides", HOST + "addresses.py", "        if stride % step:\n            return 1\n",
           "        pass\n", "rows that begin anywhere are read 16 bytes at a time", CLAIMS),
    Mutant("triton-claim-mask", HOST + "addresses.py", "align(mask, strides[:3], mask) if strides[3] == 1 else 0",
           "align(mask, strides[:2], mask) if strides[3] == 1 else 0", "rows of a mask may begin anywhere", CLAIMS),
    # Values.
    Mutant("triton-hidden", KERNELS + "elements.py", "            seen = seen & (j <= i + shift + right)\n",
           "            seen = seen & (j <= i + right)\n", "the two causal alignments are the same",
           (VALUES.format("pairs"),)),
    Mutant("triton-dropout", KERNELS + "elements.py", "tl.philox(seed, quads, i, head, offset.to(tl.uint32))",
           "tl.philox(seed, quads, i, 0, offset.to(tl.uint32))", "all heads have the same dropout mask",
           (VALUES.format("dropout or pairs"),)),
)  # fmt: skip
