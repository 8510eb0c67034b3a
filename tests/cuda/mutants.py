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
    # A step begins before the other blocks have sent their h.
    Mutant("sequence_forward.h", "if (chunk == 0) group.wait(s);", "if (chunk == 0 && s > 1) group.wait(s);", "tsan"),
    Mutant("group.h", "if (step > 0) receipt_wait(", "if (step > 1) receipt_wait(", "plain"),
    Mutant("group.h", "while (is_absent(piece)) piece", "if (false) piece", "plain"),
    Mutant("product.h", "bool complete = !kPieces;", "bool complete = true;", "plain"),
    # Blocks send to others that are not ready yet, or count other bytes than are sent.
    Mutant("group.h", "    cluster_barrier();\n", "", "plain"),
    Mutant("group.h", "    __syncthreads();\n    if (threadIdx.x == 0) signal_arrival(counter_), wait_for_signals();\n",
           "    if (threadIdx.x == 0) signal_arrival(counter_), wait_for_signals();\n", "tsan"),
    Mutant("group.h", "wait_for_signals();\n    __syncthreads();\n", "wait_for_signals();\n", "tsan"),
    Mutant("group.h", "count * bytes_);", "count * bytes_ - 16);", "plain"),
    Mutant("sequence_forward.h", "count += reads(next_t, chunk)", "count += reads(t, chunk)", "plain"),
    Mutant("sequence_backward.h", "count += reads(next_t, chunk)", "count += reads(t, chunk)", "plain"),
    # The h that a block sends overwrites an h that another block still reads.
    Mutant("group.h", "vectors_ + ((step + 1) & 1) * half_ + b * stride_ + term - lane",
           "vectors_ + (step & 1) * half_ + b * stride_ + term - lane", "plain"),
    # A value of some steps ago is taken for that of this step, because it is not made absent, because the others need
    # not see that it is, or because this block need not see it.
    Mutant("sequence_forward.h", "if (any_live) group.template retire<1>(s, b, j);", "", "plain"),
    Mutant("group.h", "step % kRound == 1) signal_arrival(counter_);", "step < 0) signal_arrival(counter_);", "plain"),
    Mutant("group.h", "step % kRound == 3) wait_for_signals();", "step < 0) wait_for_signals();", "plain"),
    Mutant("group.h", "erase_piece(buffer(step + kGridBuffers - 1)", "erase_piece(buffer(step)", "plain"),
    # An h with the bits of an absent value, in the first step and later.
    Mutant("group.h", "first = present(value(b, term))", "first = bits_of(value(b, term))", "plain"),
    Mutant("group.h", "gather_piece<S, true>(items)", "gather_piece<S, false>(items)", "plain"),
    # A sequence of the second direction, or a gradient, arrives when the sequence begins.
    Mutant("sequence_forward.h", "!now.live[i] ? idle[i] :", "!now.live[i] ? 0.0f :", "plain"),
    # The inputs of the next chunk are those of another step.
    Mutant("sequence_forward.h", "fetch(last_chunk ? next_t : t,", "fetch(t,", "plain"),
    Mutant("sequence_backward.h", "fetch(s + 1, next_t, 0, &next)", "fetch(s + 1, t, 0, &next)", "plain"),
    # The lanes of a piece put their items into it in another order.
    Mutant("group.h", "first + i * kLanes / 4", "first + i % kLanes", "plain"),
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
    Mutant("sequence_backward.h", "if (now.cut[i]) carry[i] = dc[i] = 0.0f;", "if (now.cut[i]) carry[i] = 0.0f;",
           "plain"),
    Mutant("sequence_backward.h", "          carry[i] += add_parts", "          carry[i] = add_parts", "plain"),
    # Resets at a sequence's first step, between its steps, of the second direction, and in the padding.
    Mutant("sequence_forward.h", "return d == 0 && is_reset(", "return d > 1 && is_reset(", "plain"),
    Mutant("sequence_forward.h", "passes = exists && !(now.resets >> i & 1);", "passes = exists;", "plain"),
    Mutant("sequence_forward.h", "now.resets >> i & 1 ? 0.0f : out", "out", "plain"),
    Mutant("walk.h", "flagged = d == 0 ? t : t + 1;", "flagged = t;", "plain"),
    Mutant("walk.h", "resets && flagged < length &&", "resets &&", "plain"),
    Mutant("sequence_backward.h", "reset || (p.bptt_steps > 0", "(p.bptt_steps > 0", "plain"),
    Mutant("sequence_backward.h", "if (kIsRnn<Cell> || reset) continue;", "if (kIsRnn<Cell>) continue;", "plain"),
    Mutant("rows.cu", "t < length && !reset && before", "t < length && before", "plain"),
    Mutant("rows.cu", "t < length && !reset && p.h0", "t < length && p.h0", "plain"),
    Mutant("steps.cpp", "  if (p.resets) {", "  if (false) {", "plain"),
    Mutant("cell_kernels.h", "next_h[i] = ends ? 0.0f : h[i];", "next_h[i] = h[i];", "plain"),
    Mutant("cell_kernels.h", "ends = next >= 0 && ", "ends = ", "plain"),
    Mutant("cell_kernels.h", "cut = reset || ", "cut = ", "plain"),
    Mutant("cell_kernels.h", "if (!reset) load_state", "load_state", "plain"),
    # c of every step and its gradient.
    Mutant("sequence_forward.h", "c = now.live[i] ? out[i][Cell::kStateSlot] : 0.0f;", "c = out[i][Cell::kStateSlot];",
           "plain"),
    Mutant("sequence_backward.h", "kCellState && kFetchAhead) dc[i] += now.dcells[i];", "kCellState) {}", "plain"),
    Mutant("cell_kernels.h", "        dc[i] += dcells[i];\n", "", "plain"),
    Mutant("sequence_forward.h", "return u < p.H && term < p.H ?", "return u < p.H ?", "asan"),
    # Layer normalisation, zoneout and recurrent dropout: sums of a block, moments, masks, cuts, lengths, padding.
    Mutant("variant_rows.h", "    __syncthreads();\n", "", "tsan"),
    Mutant("variant_rows.h", "    turn_ ^= 1;\n", "", "tsan"),
    Mutant("variant_rows.h", "*of_new = (1.0f - rate) * gradient;", "*of_new = gradient;", "plain"),
    Mutant("variant_forward.h", "of_h = hidden[at] - mean[kSide + part_of<Cell>(g)]",
           "of_h = hidden[at] - mean[part_of<Cell>(g)]", "plain"),
    Mutant("variant_forward.h", "next = zone_c.mix(j, before, c);", "next = c;", "plain"),
    Mutant("variant_backward.h", "v.dropout ? v.dropout[row + j] : 1.0f", "1.0f", "plain"),
    Mutant("variant_backward.h", "cut ? 0.0f : through.v + kept;", "through.v + kept;", "plain"),
    Mutant("variant_backward.h", "from_float<S>(cut ? 0.0f : right[0])", "from_float<S>(right[0])", "plain"),
    Mutant("variant_backward.h", "p.rows.reverse ? length - 1 - p.rows.t : p.rows.t", "p.rows.t", "plain"),
    Mutant("variant_backward.h", "p.dh[row + j] = from_next(j);", "{}", "plain"),
    Mutant("variant_backward.h", "sequence_length(nullptr, p.lengths, p.T, p.B, b)) continue;",
           "sequence_length(nullptr, p.lengths, p.T, p.B, b)) {}", "plain"),
    Mutant("variant_backward.h", "    if (no_state) right[0] = 0.0f;\n", "", "plain"),
    Mutant("real.h", "kGates) return Cell::kPartedGate;", "kGates) return 0;", "plain"),
    Mutant("variant_steps.cpp", "layer.variants[d].dropout};", "nullptr};", "plain"),
    Mutant("variant_steps.cpp", "(d * layer.rows + first_row)", "first_row", "plain"),
    Mutant("rows.cu", "dropout ? h * dropout[j] : h", "h", "plain"),
)  # fmt: skip
