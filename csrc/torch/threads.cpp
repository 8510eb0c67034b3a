#include "threads.h"

#include <pthread.h>

#include <atomic>

#include "tensor.h"
#include "core/isa.h"

namespace dlk {
namespace {

std::atomic<bool> g_forked{false};

// Registered at load time, because a fork before the first op must be noticed too.
[[maybe_unused]] const int g_registered =
    pthread_atfork(nullptr, nullptr, [] { g_forked.store(true, std::memory_order_relaxed); });

struct Task {
  void (*fn)(void* ctx, int64_t begin, int64_t end);
  void* ctx;
};

void run_task(int64_t begin, int64_t end, void* task) {
  const Task& t = *static_cast<const Task*>(task);
  t.fn(t.ctx, begin, end);
}

void parallel(int64_t n, void (*fn)(void* ctx, int64_t begin, int64_t end), void* ctx) {
  if (n <= 0) return;
  if (n == 1 || g_forked.load(std::memory_order_relaxed)) {
    fn(ctx, 0, n);
    return;
  }
  Task task{fn, ctx};
  DLK_TORCH(torch_parallel_for, 0, n, /*grain_size=*/1, run_task, &task);
}

}  // namespace

int thread_count() {
  if (g_forked.load(std::memory_order_relaxed)) return 1;
  uint32_t count = 1;
  DLK_TORCH(torch_get_num_threads, &count);
  return count > 0 ? static_cast<int>(count) : 1;
}

Runtime current_runtime() { return {current_isa(), thread_count(), parallel}; }

}  // namespace dlk
