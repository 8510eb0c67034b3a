// A team of threads that runs one call together, with barriers.
//
// Each range that the runtime's `parallel` passes to its callback is one member (one
// thread) of the team, however many units the range covers: thread limits, dynamic
// adjustment and nesting all lead to fewer and longer ranges than were asked for. The
// first member to arrive waits a bounded time for the others and then closes the team;
// a thread that arrives later returns without doing any work. So the size is known only
// inside the call, and results must not depend on it.
#pragma once

#include <atomic>
#include <cstdint>

#include "core/types.h"

namespace dlk {

// A reusable barrier. Waiting threads spin briefly, because the others usually have cores of their own, then yield.
class Barrier {
 public:
  void wait(int size);

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
};

struct Member {
  int rank;
  int size;
  Barrier* barrier;
  void sync() const {
    if (size > 1) barrier->wait(size);
  }
  // This member's share [begin, end) of n things, in whole multiples of `grain`.
  void share(int64_t n, int64_t grain, int64_t* begin, int64_t* end) const {
    const int64_t units = (n + grain - 1) / grain;
    *begin = units * rank / size * grain;
    *end = units * (rank + 1) / size * grain;
    if (*begin > n) *begin = n;
    if (*end > n) *end = n;
  }
};

// Runs fn(ctx, rank, size) on up to `wanted` members; returns how many took part.
// `patience_us` bounds how long the first member waits for the others.
int run_team(const Runtime& runtime, int wanted, int64_t patience_us, void (*fn)(void* ctx, int rank, int size),
             void* ctx);

template <class F>
int run_team(const Runtime& runtime, int wanted, int64_t patience_us, F& f) {
  return run_team(
      runtime, wanted, patience_us, [](void* ctx, int rank, int size) { (*static_cast<F*>(ctx))(rank, size); }, &f);
}

}  // namespace dlk
