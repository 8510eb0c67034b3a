"""Bugs of ring attention."""

from __future__ import annotations

from mutant import Mutant

FOLDER = "dlkernels/distributed/"
VALUES = ("tests/distributed/test_ring_attention.py",)
USE = ("tests/distributed/test_use.py",)

DISTRIBUTED: tuple[Mutant, ...] = (
    Mutant("ring-joined-largest", FOLDER + "blocks.py", "        largest.copy_(after)\n", "",
           "partial results are weighted by the lse of the first block", VALUES),
    Mutant("ring-joined-weight", FOLDER + "blocks.py", "(self._top, self._weight / divisor)",
           "(self._top, self._weight)", "the backward has the probabilities of one block, not of all", VALUES),
    Mutant("ring-joined-nothing", FOLDER + "blocks.py", "after.masked_fill(after == -math.inf, 0.0)", "after",
           "rows that have seen nothing but scores of -inf are NaN", USE),
    Mutant("ring-reference-share", FOLDER + "blocks.py", "of_lse * share)", "of_lse)",
           "without kernels the gradient of a block's lse is not weighted", VALUES),
    Mutant("ring-zigzag-halves", FOLDER + "layout.py", "keys=slice(0, keys // 2)", "keys=slice(keys // 2, keys)",
           "zigzag computes the half of the keys that no query sees", VALUES),
    Mutant("ring-gradients-way", FOLDER + "ring.py", "shards.empty(ring.source(step + 1), dtype), _GRADIENTS",
           "shards.empty(source, dtype), _GRADIENTS",
           "gradients are received in a buffer of another rank's size", VALUES),
    Mutant("ring-gradients-home", FOLDER + "ring.py",
           "    if following is not None:\n        gradients = following.wait()\n    return", "    return",
           "a rank returns the gradients of its neighbour's keys", VALUES),
    Mutant("ring-agree", FOLDER + "agreement.py", "if row[at] != table[0][at]:", "if False:",
           "ranks that disagree exchange messages of different sizes", VALUES),
    Mutant("ring-refuse", FOLDER + "functional.py", "        if checking:\n            refuse(",
           "        if False:\n            refuse(", "the other ranks wait for one that refused its arguments", VALUES),
    Mutant("ring-gradients-agreed", FOLDER + "functional.py", "need_kv=needs[1] or needs[2]", "need_kv=needs[1]",
           "v has no gradient if k needs none", USE),
)  # fmt: skip
