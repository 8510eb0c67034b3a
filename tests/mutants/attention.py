"""Bugs in the attention kernels on the CPU, their plans, their tasks and their boundary."""

from __future__ import annotations

from mutant import Mutant

GENERIC, CPU = "csrc/cpu/generic/", "csrc/cpu/"
VALUES = ("tests/test_attention_cpu.py", "tests/test_attention_interactions.py", "tests/test_attention_fuzz.py")
PAIRS = ("tests/test_attention_interactions.py", "tests/test_attention_cpu.py")
BITS = ("tests/test_attention_interactions.py", "tests/test_attention_cpu.py -k same_bits")

ATTENTION: tuple[Mutant, ...] = (
    # Tasks: who sees what.
    Mutant("bottom-right", CPU + "attention_tasks.h", "? i + N - M : i;", "? i + N - M + 1 : i;", "off by one", VALUES),
    Mutant("window-left", CPU + "attention_tasks.h", "std::max(range.begin, p - in.left)",
           "std::max(range.begin, p - in.left + 1)", "the window is a key too narrow", VALUES),
    Mutant("window-one-query", CPU + "attention_tasks.h", "if (in.left >= 0 && in.left < N + M) range.begin",
           "if (in.left >= 0 && in.left < N && M > 1) range.begin", "a single query ignores its window", PAIRS),
    Mutant("row-grain", CPU + "attention_tasks.h", "end = part_begin(rows, kRowGrain, blocks, i + 1);",
           "end = std::min(rows, begin + rows / blocks);", "rows between blocks are nobody's", VALUES),
    Mutant("mask-groups", CPU + "attention_tasks.h", "over_b = elements && in.mask.b == 0,", "over_b = false,",
           "two threads add to the same element of a mask's gradient",
           ("tests/test_attention_threads.py", *PAIRS, "native tsan")),
    # Lanes.
    Mutant("slopes-batch", GENERIC + "attention_lanes.h", "inputs.slopes[batch * inputs.slopes_b + h]",
           "inputs.slopes[h]", "all sequences take the slopes of the first", PAIRS),
    Mutant("slopes-batch-later", GENERIC + "attention_lanes.h", "inputs.slopes[batch * inputs.slopes_b + h]",
           "inputs.slopes[(sequence.N >= 512 ? 0 : batch) * inputs.slopes_b + h]", "the same, for long keys alone",
           PAIRS),
    Mutant("panel-last-end", GENERIC + "attention_lanes.h", "to.last_end = std::max(to.last_end, end[l]);",
           "to.last_end = end[l];", "what some lane sees beyond the last one", VALUES),
    Mutant("panel-first-end", GENERIC + "attention_lanes.h", "to.first_end = std::min(to.first_end, end[l]);",
           "to.first_end = end[l];", "a tile that is partly hidden counts as whole", VALUES),
    Mutant("gqa-position", GENERIC + "attention_lanes.h", "if (l + 1 < n && ++i == sequence.M) i = 0, ++h;",
           "if (l + 1 < n && ++i == sequence.M) i = sequence.M > 1 ? 0 : 1, ++h;",
           "with one query the heads of a group move along the keys", PAIRS),
    Mutant("dropout-batch", GENERIC + "attention_lanes.h", "static_cast<uint32_t>(batch * s.H + h)",
           "static_cast<uint32_t>(h)", "all sequences drop the same", VALUES),
    # Scores.
    Mutant("mask-nan", GENERIC + "attention_scores.h", "return !in_.mask.boolean && has_nan(*tile, ld);",
           "return false;", "NaN where all else is hidden", PAIRS),
    Mutant("mask-nan-rows", GENERIC + "attention_scores.h", "for (int64_t i = 0; i < tile.keys * ld; ++i)",
           "for (int64_t i = 0; i < ld; ++i)", "NaN is looked for at the first key alone", PAIRS),
    Mutant("mask-head", GENERIC + "attention_scores.h", "in_.mask.h == 0 || lanes.head[panel.lane] ==",
           "in_.mask.h != 0 || lanes.head[panel.lane] ==", "a mask row per head that heads of a group share", VALUES),
    Mutant("softcap-damping", GENERIC + "attention_scores.h", "fnma(t, t, V::set1(C(1))).store(damping)",
           "fnma(t, V::set1(C(1)), V::set1(C(1))).store(damping)", "1 - t where it is 1 - t t", VALUES),
    Mutant("alibi-position", GENERIC + "attention_scores.h",
           "s = fnma(slope, abs(position - V::set1(static_cast<C>(tile.first + j))), s);",
           "s = fnma(slope, abs(position - V::set1(static_cast<C>(tile.first % 512 + j))), s);",
           "ALiBi counts from the part of the keys", PAIRS),
    # State of the rows, parts of the keys.
    Mutant("split-sink", GENERIC + "attention_forward.h", "task.split == 0 ? in_.sinks : nullptr", "in_.sinks",
           "every part of the keys counts the sink", PAIRS),
    Mutant("split-decay", GENERIC + "attention_state.h",
           "fma(V::load(l + at), a, V::load(other.l + at) * b).store(l + at);",
           "fma(V::load(l + at), a, V::load(other.l + at)).store(l + at);", "parts with other maxima are just added",
           PAIRS),
    Mutant("split-part-lost", GENERIC + "attention_forward.h", "for (int64_t split = 1; split < plan_.splits; ++split)",
           "for (int64_t split = 2; split < plan_.splits; ++split)", "the second part of the keys", PAIRS),
    Mutant("split-order", GENERIC + "attention_forward.h", "const State whole = state_of(w, task, 0);",
           "const State whole = state_of(w, task, task.split);", "who comes last decides the order of sums, or worse",
           BITS),
    Mutant("headroom", GENERIC + "attention_state.h", "static constexpr C kHeadroom = 8;",
           "static constexpr C kHeadroom = 200;", "exponentials overflow", VALUES),
    # Backward.
    Mutant("slope-parts", GENERIC + "attention_backward.h",
           "slope_parts_[(lanes.b * s_.H + lanes.head[l]) * plan_.splits + split] -=",
           "slope_parts_[(lanes.b * s_.H + lanes.head[l]) * plan_.splits] -=",
           "two threads add to one slope's gradient", (*BITS, "native tsan")),
    Mutant("slope-sum-batch", GENERIC + "attention_backward.h", "p_.dslopes[b * in_.slopes_b + h] += slope_parts_",
           "p_.dslopes[b * (plan_.splits > 1 ? 0 : in_.slopes_b) + h] += slope_parts_",
           "slopes per batch, with split keys alone", PAIRS),
    Mutant("dq-part-lost", GENERIC + "attention_backward.h", "for (int64_t other = 1; other < plan_.splits; ++other) {",
           "for (int64_t other = 2; other < plan_.splits; ++other) {", "dq of the second part of the keys", PAIRS),
    Mutant("dk-scale", GENERIC + "attention_backward.h",
           "key_offset(in_, sequence, p_.dk, b, kv_head, first), keys, in_.scale);",
           "key_offset(in_, sequence, p_.dk, b, kv_head, first), keys, 1);", "the scale of dk", VALUES),
    Mutant("slope-gradient", GENERIC + "attention_gradients.h",
           "(V::load(rows.slope_sums + lane) + sum).store(rows.slope_sums + lane);",
           "sum.store(rows.slope_sums + lane);", "only the last tile counts for a slope", VALUES),
    Mutant("dropout-gradient", GENERIC + "attention_gradients.h", "(V::load(ds + at) * kept).store(ds + at);", "",
           "dP of what was dropped", VALUES),
    # Plan, boundary.
    Mutant("plan-kernel", CPU + "attention_plan.cpp", "rows <= kDotRows ? AttentionPlan::dot",
           "M <= kDotRows ? AttentionPlan::dot", "groups of heads are not counted", ("tests/test_attention_cpu.py",)),
    Mutant("plan-splits-threads", CPU + "attention_plan.cpp", "std::min((wanted + tasks - 1) / tasks, most)",
           "std::min((wanted + tasks - 1) / tasks * plan.threads, most)", "bits then depend on the threads", BITS),
    Mutant("cu-falling", CPU + "attention_boundary.cpp", "values[b] >= values[b - 1] && values[b] <= rows",
           "values[b] <= rows", "cu_seqlens that fall", ("tests/test_attention_cpu_refusals.py",)),
    Mutant("rng-offset", CPU + "attention_boundary.cpp", "in.offset = static_cast<uint32_t>(seed[1]);",
           "in.offset = 0;", "the second number of the seed", VALUES),
    Mutant("uncovered-lse", CPU + "attention.cpp", "for (int64_t i = call.in.cu_q[s.B]; i < s.M; ++i)",
           "for (int64_t i = call.in.cu_q[s.B] + 1; i < s.M; ++i)", "the first row that no sequence covers",
           ("tests/test_attention_cpu.py", "tests/test_attention_function.py")),
)  # fmt: skip
