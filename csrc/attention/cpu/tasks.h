// Divides a call of attention into tasks: each has a block of query rows, of all heads that share keys,
// and a part of these keys. The tasks depend on the sizes alone, and any thread may run any of them.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <utility>
#include <vector>

#include "attention/params.h"

namespace dlk {

// One sequence: its lengths and its first rows.
struct AttentionSequence {
  int64_t M = 0, N = 0, q0 = 0, k0 = 0;

  AttentionSequence() = default;
  AttentionSequence(const AttentionInputs& in, int64_t b) : M(in.shape.M), N(in.shape.N) {
    if (!in.cu_q) return;
    q0 = in.cu_q[b], k0 = in.cu_k[b];
    M = in.cu_q[b + 1] - q0, N = in.cu_k[b + 1] - k0;
  }

  // Keys [begin, end) that query i may see by causal and window.
  struct Range {
    int64_t begin, end;
  };
  int64_t position(const AttentionInputs& in, int64_t i) const {
    return in.causal == Causal::bottom_right ? i + N - M : i;
  }
  Range keys(const AttentionInputs& in, int64_t i) const {
    const int64_t p = position(in, i);
    Range range{0, N};
    if (in.left >= 0 && in.left < N + M) range.begin = std::max(range.begin, p - in.left);
    if (in.right >= 0 && in.right < N + M) range.end = std::min(range.end, p + in.right + 1);
    if (in.causal != Causal::none) range.end = std::min(range.end, p + 1);
    range.begin = std::min(range.begin, N);
    range.end = std::max(range.end, range.begin);
    return range;
  }
};

// The rows that share the keys of one head are those of a group of query heads: row r is query r % M of head r / M of
// the group.
struct AttentionTask {
  int64_t b, kv_head;
  int64_t row, rows;
  int64_t split;  // which part of the keys
  int64_t block;  // number of this (b, kv_head, row) among all
};

// Where part i begins, if n things are divided into `count` parts in units of `grain`.
inline int64_t part_begin(int64_t n, int64_t grain, int64_t count, int64_t i) {
  return std::min(n, (n + grain - 1) / grain * i / count * grain);
}

struct AttentionTasks {
  std::vector<AttentionTask> tasks;
  int64_t blocks = 0;

  // The last rows come first: under causal masks they have the most work.
  static AttentionTasks of_rows(const AttentionInputs& in, const AttentionPlan& plan) {
    AttentionTasks all;
    const AttentionShape& s = in.shape;
    for (int64_t b = 0; b < s.B; ++b) {
      const int64_t rows = AttentionSequence(in, b).M * s.group();
      const int64_t blocks = (rows + plan.block_m - 1) / plan.block_m;
      for (int64_t h = 0; h < s.Hkv; ++h)
        for (int64_t i = blocks; i-- > 0; ++all.blocks) {
          const int64_t begin = part_begin(rows, kRowGrain, blocks, i),
                        end = part_begin(rows, kRowGrain, blocks, i + 1);
          for (int64_t split = 0; split < plan.splits; ++split)
            all.tasks.push_back({b, h, begin, end - begin, split, all.blocks});
        }
    }
    return all;
  }

  // In the backward a task has a group of key heads and a part of their keys. A group is one key head,
  // or all key heads that add to the same elements of a mask's gradient.
  std::vector<std::pair<int64_t, int64_t>> heads;  // (b, kv_head), group by group
  std::vector<int64_t> group_begin;
  int64_t groups() const { return static_cast<int64_t>(group_begin.size()) - 1; }

  static AttentionTasks of_keys(const AttentionInputs& in, bool mask_gradient) {
    AttentionTasks all;
    const AttentionShape& s = in.shape;
    const bool elements = mask_gradient && in.mask.i && in.mask.j;
    const bool over_b = elements && in.mask.b == 0, over_h = elements && in.mask.h == 0;
    for (int64_t outer = 0; outer < (over_b ? 1 : s.B); ++outer)
      for (int64_t h0 = 0; h0 < (over_h ? 1 : s.Hkv); ++h0) {
        all.group_begin.push_back(static_cast<int64_t>(all.heads.size()));
        for (int64_t b = outer; b < (over_b ? s.B : outer + 1); ++b)
          for (int64_t h = h0; h < (over_h ? s.Hkv : h0 + 1); ++h) all.heads.emplace_back(b, h);
      }
    all.group_begin.push_back(static_cast<int64_t>(all.heads.size()));
    return all;
  }

  static constexpr int64_t kRowGrain = 48;  // three of the widest vectors, so that panels are full
};

// Runs fn(worker, task) for every task, on the threads that the runtime provides, each with a Session. Returns how many
// threads took part.
template <class Session, class F>
int run_tasks(const Runtime& runtime, int threads, int64_t count, F& fn) {
  struct Context {
    F* fn;
    int64_t count;
    std::atomic<int64_t> next{0};
    std::atomic<int> workers{0};
  } context{&fn, count};
  const auto body = [](void* self, int64_t, int64_t) {
    Context& c = *static_cast<Context*>(self);
    const Session session;
    const int worker = c.workers.fetch_add(1, std::memory_order_relaxed);
    for (int64_t task; (task = c.next.fetch_add(1, std::memory_order_relaxed)) < c.count;) (*c.fn)(worker, task);
  };
  if (threads <= 1) {
    body(&context, 0, 1);
  } else {
    runtime.parallel(threads, body, &context);
  }
  return context.workers.load(std::memory_order_relaxed);
}

}  // namespace dlk
