"""Bugs to plant in the kernels of csrc/rnn/cuda: for each the file, the text to replace, its replacement, and the build
that must notice it."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    file: str
    old: str
    new: str
    noticed_by: str


MUTANTS = (
    # The partial sums are added up before all warps have stored theirs, or are overwritten while they are added up.
    Mutant("sequence_forward.h", "__syncthreads();\n        turn_parity ^= 1;", "turn_parity ^= 1;", "tsan"),
    Mutant("sequence_forward.h", "        turn_parity ^= 1;\n", "", "tsan"),
    Mutant("sequence_backward.h", "        turn_parity ^= 1;\n", "", "tsan"),
    # Values that other threads of the block write are sent before all of them are written.
    Mutant("sequence_backward.h", "  __syncthreads();\n  for (int i = thread; exists", "  for (int i = thread; exists",
           "tsan"),
    # A step begins before the other blocks have sent their h, or a block signals before it has sent all of its h.
    Mutant("sequence_forward.h", "if (chunk == 0) group.wait();", "if (chunk == 0 && s == 0) group.wait();", "tsan"),
    Mutant("sequence_forward.h", "if (last_chunk) group.arrive();", "if (chunk == 0) group.arrive();", "tsan"),
    Mutant("group.h", "__syncthreads();\n    if (threadIdx.x == 0) signal", "if (threadIdx.x == 0) signal", "tsan"),
    Mutant("group.h", "goal_);\n    __syncthreads();", "goal_);", "tsan"),
    # The h that a block sends overwrites an h that another block still reads.
    Mutant("group.h", "vectors_ + (step + 1) % 2 * half_ + b * stride_ + term - lane",
           "vectors_ + step % 2 * half_ + b * stride_ + term - lane", "plain"),
    # Lanes without a cell leave before those with one exchange their items, or compute a cell that they do not have.
    Mutant("sequence_forward.h", "!Turns::warp_has_cells(thread, i)", "!Turns::has_cell(thread, i)", "plain"),
    Mutant("sequence_backward.h", "!Turns::warp_has_cells(thread, i)", "!Turns::has_cell(thread, i)", "plain"),
    Mutant("sequence_forward.h", "busy = Turns::kWholeWarps || Turns::has_cell(thread, i);", "busy = true;", "plain"),
    Mutant("sequence_backward.h", "busy = Turns::kWholeWarps || Turns::has_cell(thread, i);", "busy = true;",
           "plain"),
    # The state before a step is taken from the step's own record.
    Mutant("sequence_backward.h", "saved[(before * Cell::kSaved", "saved[(row * Cell::kSaved", "plain"),
    # Errors that only uneven lengths, truncated backward passes or padding show.
    Mutant("sequence_forward.h", "t == (d == 0 ? lengths[b] - 1 : 0)", "t == lengths[b] - 1", "plain"),
    Mutant("sequence_backward.h", "if (cut) *dc = 0.0f;", "", "plain"),
    Mutant("sequence_backward.h", "*carry = arrived;", "*carry = 0.0f;", "plain"),
    Mutant("sequence_forward.h", "return u < p.H && term < p.H ?", "return u < p.H ?", "asan"),
)  # fmt: skip
