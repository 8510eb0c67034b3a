// A stand-in for torch's thread pool that runs a call in any way in which that pool may run it, and the instruction
// sets of this machine that have recurrent kernels.
#pragma once

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "core/isa.h"

namespace dlk {

// one_each: a thread for each unit; two_ranges, one_range: fewer threads with longer ranges; in_turn: one unit after
// the other on the caller's thread.
enum class Pool { one_each, two_ranges, one_range, in_turn };
inline Pool g_pool = Pool::one_each;

inline void parallel(int64_t n, void (*fn)(void* ctx, int64_t begin, int64_t end), void* ctx) {
  const int64_t ranges = g_pool == Pool::one_range ? 1 : g_pool == Pool::two_ranges ? std::min<int64_t>(n, 2) : n;
  if (g_pool == Pool::in_turn) {
    for (int64_t i = 0; i < ranges; ++i) fn(ctx, i, i + 1);
    return;
  }
  // The threads of a pool are already awake when work arrives. New threads are slow to start, so all of them meet here
  // before any begins.
  std::atomic<int64_t> waiting{ranges};
  const auto member = [&](int64_t i) {
    --waiting;
    while (waiting > 0) std::this_thread::yield();
    fn(ctx, n * i / ranges, n * (i + 1) / ranges);
  };
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < ranges; ++i) threads.emplace_back(member, i);
  member(0);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace dlk
