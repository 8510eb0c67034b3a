#include "team.h"

#include <sched.h>

#include <algorithm>
#include <chrono>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#include "patience.h"

namespace dlk {
namespace {

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#endif
}

std::atomic<int64_t> g_least_patience_us{0};

constexpr int kSpins = 2000;  // about ten microseconds; then the core is left to the threads that are waited for

template <class Ready>
void spin_then_yield(Ready ready) {
  for (int spins = 0; !ready(); ++spins) {
    if (spins < kSpins) {
      relax();
    } else {
      sched_yield();
    }
  }
}

struct Assembly {
  static constexpr uint32_t kClosed = 0x80000000u;
  std::atomic<uint32_t> tickets{0};  // members so far; the top bit says that the team is closed
  std::atomic<int64_t> units{0};     // how many of [0, wanted) the members so far cover
  std::atomic<int> size{0};          // 0 until the team is closed
  int64_t wanted;
  std::chrono::microseconds patience;
  void (*fn)(void*, int, int);
  void* ctx;

  void arrive(int64_t count) {
    uint32_t ticket = tickets.load(std::memory_order_relaxed);
    do {
      if (ticket & kClosed) return;
    } while (!tickets.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel));
    const int rank = static_cast<int>(ticket);
    units.fetch_add(count, std::memory_order_acq_rel);
    if (rank == 0) {
      wait_for_the_others();
      size.store(static_cast<int>(tickets.fetch_or(kClosed, std::memory_order_acq_rel)), std::memory_order_release);
    } else {
      spin_then_yield([this] { return size.load(std::memory_order_acquire) != 0; });
    }
    fn(ctx, rank, size.load(std::memory_order_acquire));
  }

  void wait_for_the_others() {
    if (units.load(std::memory_order_acquire) >= wanted) return;
    const auto deadline = std::chrono::steady_clock::now() + patience;
    for (int spins = 0; units.load(std::memory_order_acquire) < wanted; ++spins) {
      relax();
      if (spins % 32 == 31 && std::chrono::steady_clock::now() > deadline) return;
    }
  }
};

}  // namespace

void Barrier::wait(int size) {
  const uint32_t generation = generation_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
    return;
  }
  spin_then_yield([&] { return generation_.load(std::memory_order_acquire) != generation; });
}

void set_least_patience(int64_t us) { g_least_patience_us.store(us, std::memory_order_relaxed); }

int run_team(const Runtime& runtime, int wanted, int64_t patience_us, void (*fn)(void*, int, int), void* ctx) {
  if (wanted <= 1) {
    fn(ctx, 0, 1);
    return 1;
  }
  Assembly assembly;
  assembly.wanted = wanted;
  assembly.patience =
      std::chrono::microseconds(std::max(patience_us, g_least_patience_us.load(std::memory_order_relaxed)));
  assembly.fn = fn;
  assembly.ctx = ctx;
  runtime.parallel(
      wanted, [](void* self, int64_t begin, int64_t end) { static_cast<Assembly*>(self)->arrive(end - begin); },
      &assembly);
  return assembly.size.load(std::memory_order_acquire);
}

}  // namespace dlk
