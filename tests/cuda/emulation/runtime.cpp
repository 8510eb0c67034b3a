// Runs the fibers of a block and implements barriers and collectives. This file is compiled without sanitizers; calls
// of their interfaces (sanitizers.h) tell them of each switch of stacks and of the order that a barrier gives. Nothing
// here may take a lock, since ThreadSanitizer would derive from it an order between threads that does not exist on a
// GPU.
#include "emulation.h"

#include "sanitizers.h"
#include "weak_memory.h"
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim
#include <sched.h>
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

extern "C" {
// Pushes the callee-saved registers of x86-64, switches to the stack `to` and pops the registers saved there.
void emulation_switch(void** save, void* to);
}
asm(R"(.text
.globl emulation_switch
emulation_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");

namespace emulation {

thread_local const Position* here;

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kPage = 4096;
// How many times, 50 microseconds apart, a block checks whether it can go on before it fails. EMULATION_PATIENCE
// overrides it. A time limit would also count the time in which the process was stopped or had no processor.
constexpr long kPatience = 1000000;
constexpr long kEagerLooks = 50;

struct Fiber : Position {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  enum { ready, waiting, polling, done } state = ready;
  const char* where = "at its start";
  const std::function<bool()>* condition = nullptr;
  void *tsan = nullptr, *asan = nullptr;
};

// A collective of the lanes of `mask`.
struct WarpMeeting {
  uint32_t mask, arrived = 0;
  char slots[32][16];
  Moment moment;
};

struct Cluster {
  std::atomic<unsigned> arrived{0}, phase{0};
  unsigned threads = 0;
  Moment moments[2];
  std::vector<char*> shared;
  std::unique_ptr<std::atomic<bool>[]> exited;
};

struct Grid {
  const std::function<void()>* kernel;
  Moment finished;
  // Destroying a fiber joins it, which would order the next block after it. So all fibers are destroyed at the end.
  std::vector<void*> fibers;
  std::atomic<bool> fibers_locked{false};
};

struct Block {
  Grid* grid;
  Cluster* cluster;
  char* shared;
  std::vector<Fiber> fibers;
  unsigned live = 0;
  unsigned at_barrier = 0, barrier_phase = 0;
  Moment barrier_moments[2];
  WeakMemory weak_memory;
  std::vector<std::vector<std::unique_ptr<WarpMeeting>>> meetings;  // of each warp
  std::vector<uint64_t*> receipts;
  void *stack_pointer = nullptr, *tsan = nullptr, *asan = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
};

thread_local Block* block;

Fiber* self() { return const_cast<Fiber*>(static_cast<const Fiber*>(here)); }

void back_to_scheduler() {
  Fiber* fiber = self();
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(fiber->state == Fiber::done ? nullptr : &fiber->asan, block->stack_bottom,
                                   block->stack_size);
  }
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(block->tsan, 1);
  emulation_switch(&fiber->stack_pointer, block->stack_pointer);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(fiber->asan, nullptr, nullptr);
}

void sleep_until_woken(const char* where) {
  self()->state = Fiber::waiting;
  self()->where = where;
  back_to_scheduler();
}

void fiber_main() {
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(nullptr, &block->stack_bottom, &block->stack_size);
  }
  (*block->grid->kernel)();
  block->grid->finished.release();
  self()->state = Fiber::done;
  self()->where = "returned";
  --block->live;
  back_to_scheduler();
}

void switch_to(Fiber* fiber) {
  here = fiber;
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&block->asan, fiber->stack, kStackBytes);
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(fiber->tsan, 1);
  emulation_switch(&block->stack_pointer, fiber->stack_pointer);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(block->asan, nullptr, nullptr);
}

// Runs the fibers until all have returned. The condition of a polling fiber is evaluated only when no fiber is ready.
void schedule(unsigned seed) {
  std::mt19937 random(seed * 7919 + here->block.x);
  const unsigned count = static_cast<unsigned>(block->fibers.size());
  const char* patience_text = std::getenv("EMULATION_PATIENCE");
  const long patience = patience_text ? std::atol(patience_text) : kPatience;
  unsigned next = 0;
  long looks = 0;
  while (block->live > 0) {
    const unsigned first = seed ? static_cast<unsigned>(random() % count) : next;
    Fiber* chosen = nullptr;
    bool polling = false;
    for (unsigned i = 0; i < count && !chosen; ++i) {
      Fiber& fiber = block->fibers[(first + i) % count];
      polling |= fiber.state == Fiber::polling;
      if (fiber.state == Fiber::ready) chosen = &fiber;
    }
    for (unsigned i = 0; i < count && !chosen; ++i) {
      Fiber& fiber = block->fibers[(first + i) % count];
      if (fiber.state == Fiber::polling && (*fiber.condition)()) chosen = &fiber;
    }
    if (!chosen) {
      if (!polling) fail("deadlock or divergent barrier");
      if (++looks > patience) fail("waited in vain for another block");
      const timespec pause{0, looks > kEagerLooks ? 50000 : 0};
      nanosleep(&pause, nullptr);
      continue;
    }
    looks = 0;
    chosen->state = Fiber::ready;
    next = static_cast<unsigned>(chosen - block->fibers.data() + 1) % count;
    switch_to(chosen);
  }
}

void check_receipts(const Block& own) {
  for (uint64_t* receipt : own.receipts) {
    if (static_cast<int32_t>(__atomic_load_n(receipt, __ATOMIC_RELAXED)) != 0) {
      fail("the bytes that a receipt counted are not those that were announced");
    }
  }
}

void run_block(const Launch& launch, Grid* grid, Cluster* cluster, uint3 index, unsigned rank, unsigned seed) {
  const Unseen unseen;
  Block own;
  block = &own;
  const unsigned count = launch.block.x * launch.block.y * launch.block.z;
  own.grid = grid;
  own.cluster = cluster;
  own.shared = cluster->shared[rank];
  own.fibers.resize(count);
  own.meetings.resize((count + 31) / 32);
  own.live = count;
  if (__tsan_get_current_fiber) own.tsan = __tsan_get_current_fiber();
  for (unsigned i = 0; i < count; ++i) {
    Fiber& fiber = own.fibers[i];
    const dim3& size = launch.block;
    fiber.thread = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    fiber.block = index;
    fiber.threads = size;
    fiber.blocks = launch.grid;
    fiber.lane = i % 32;
    fiber.warp = i / 32;
    fiber.cluster_rank = rank;
    fiber.cluster_size = launch.cluster;
    fiber.stack = static_cast<char*>(
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    // A page without access at the end of each stack makes two mappings of memory of it. The thread sanitizer takes
    // five more for each fiber, and Linux gives a process 65530.
    if (!__tsan_create_fiber) mprotect(fiber.stack, kPage, PROT_NONE);
    // The initial stack is that of a switch away from the start of fiber_main: its address, and below it six registers.
    void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes) - 2;
    *top = reinterpret_cast<void*>(fiber_main);
    fiber.stack_pointer = top - 6;
    if (__tsan_create_fiber) fiber.tsan = __tsan_create_fiber(0);
  }
  here = own.fibers.data();
  schedule(seed);
  check_receipts(own);
  cluster->exited[rank].store(true);
  while (grid->fibers_locked.exchange(true)) sched_yield();
  for (Fiber& fiber : own.fibers) {
    munmap(fiber.stack, kStackBytes);
    if (fiber.tsan) grid->fibers.push_back(fiber.tsan);
  }
  grid->fibers_locked.store(false);
}

}  // namespace

void fail(const char* message) {
  const Position& at = *here;
  std::fprintf(stderr, "emulation: %s, in block (%u, %u, %u):\n", message, at.block.x, at.block.y, at.block.z);
  std::map<std::string, int> places;
  for (const Fiber& fiber : block->fibers) places[fiber.state == Fiber::ready ? "running" : fiber.where]++;
  for (const auto& [where, threads] : places) std::fprintf(stderr, "  %d threads %s\n", threads, where.c_str());
  std::abort();
}

void block_barrier() {
  const Unseen unseen;
  Moment& moment = block->barrier_moments[block->barrier_phase % 2];
  moment.release();
  if (++block->at_barrier == block->fibers.size()) {
    block->at_barrier = 0;
    ++block->barrier_phase;
    for (Fiber& fiber : block->fibers) {
      if (fiber.state == Fiber::waiting && fiber.where == std::string("at __syncthreads")) fiber.state = Fiber::ready;
    }
  } else {
    sleep_until_woken("at __syncthreads");
  }
  moment.acquire();
}

static void meet(WarpMeeting* meeting) {
  meeting->moment.release();
  meeting->arrived |= 1u << here->lane;
  if (meeting->arrived == meeting->mask) {
    meeting->arrived = 0;
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (meeting->mask >> lane & 1) block->fibers[here->warp * 32 + lane].state = Fiber::ready;
    }
  } else {
    sleep_until_woken("in a collective of their warp");
  }
  meeting->moment.acquire();
}

void warp_exchange(uint32_t mask, const void* in, size_t size, void* out) {
  const Unseen unseen;
  if (!(mask >> here->lane & 1)) fail("a lane takes part in a collective whose mask lacks it");
  auto& meetings = block->meetings[here->warp];
  auto found = std::find_if(meetings.begin(), meetings.end(), [=](const auto& m) { return m->mask == mask; });
  if (found == meetings.end()) {
    meetings.push_back(std::make_unique<WarpMeeting>());
    meetings.back()->mask = mask;
    found = meetings.end() - 1;
  }
  WarpMeeting* meeting = found->get();
  std::memcpy(meeting->slots[here->lane], in, size);
  meet(meeting);
  for (unsigned lane = 0; lane < 32; ++lane) {
    std::memcpy(static_cast<char*>(out) + lane * size, meeting->slots[lane], size);
  }
  meet(meeting);
}

void wait_until(const char* what, const std::function<bool()>& ready) {
  const Unseen unseen;
  Fiber* fiber = self();
  fiber->state = Fiber::polling;
  fiber->where = what;
  fiber->condition = &ready;
  back_to_scheduler();
}

void cluster_barrier() {
  const Unseen unseen;
  Cluster& cluster = *block->cluster;
  const unsigned phase = cluster.phase.load();
  cluster.moments[phase % 2].release();
  if (cluster.arrived.fetch_add(1) + 1 == cluster.threads) {
    cluster.arrived.store(0);
    cluster.phase.store(phase + 1);
  }
  wait_until("at the cluster's barrier", [&] { return cluster.phase.load() != phase; });
  cluster.moments[phase % 2].acquire();
}

// The bits of a receipt: 0 to 31 the bytes that are announced and have not arrived (negative if they arrived first), 32
// to 47 the announcements that its phase still waits for, 48 to 63 the number of the phase.
static void change_receipt(uint64_t* receipt, int64_t bytes, unsigned announcements) {
  uint64_t old = __atomic_load_n(receipt, __ATOMIC_RELAXED), changed;
  do {
    unsigned pending = old >> 32 & 0xffff, phase = static_cast<unsigned>(old >> 48);
    const int64_t missing = static_cast<int32_t>(old) + bytes;
    if (pending > 1) fail("a receipt is used that is not initialised");
    if (pending < announcements) fail("the bytes of a receipt's phase are announced twice");
    if (missing <= -(1 << 20) || missing >= 1 << 20) fail("a receipt cannot count so many bytes");
    pending -= announcements;
    if (pending == 0 && missing == 0) pending = 1, ++phase;
    changed =
        static_cast<uint32_t>(missing) | static_cast<uint64_t>(pending) << 32 | static_cast<uint64_t>(phase) << 48;
  } while (!__atomic_compare_exchange_n(receipt, &old, changed, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED));
}

void receipt_init(uint64_t* receipt) {
  const Unseen unseen;
  *receipt = uint64_t{1} << 32;  // no bytes; its first phase waits for an announcement
  block->receipts.push_back(receipt);
}

void receipt_expect(uint64_t* receipt, unsigned bytes) {
  const Unseen unseen;
  change_receipt(receipt, bytes, 1);
}

void receipt_complete(uint64_t* receipt, unsigned bytes) {
  const Unseen unseen;
  if (__tsan_release) __tsan_release(receipt);
  change_receipt(receipt, -static_cast<int64_t>(bytes), 0);
}

void receipt_wait(uint64_t* receipt, unsigned parity) {
  const Unseen unseen;
  wait_until("for the bytes of a receipt",
             [=] { return (__atomic_load_n(receipt, __ATOMIC_ACQUIRE) >> 48 & 1) != parity; });
  if (__tsan_acquire) __tsan_acquire(receipt);
}

void load_piece(const void* piece, uint4* value) {
  const Unseen unseen;
  block->weak_memory.load(piece, value);
}

void store_piece(void* piece) {
  const Unseen unseen;
  block->weak_memory.store(piece);
}

void erase_piece(void* piece) {
  const Unseen unseen;
  block->weak_memory.erase(piece, here->thread.x, block->barrier_phase);
}

void release_pieces() {
  const Unseen unseen;
  block->weak_memory.release(here->thread.x, block->barrier_phase);
}

void acquire_pieces() {
  const Unseen unseen;
  block->weak_memory.acquire();
}

char* shared_memory() { return block->shared; }

void* shared_memory_of(unsigned rank, void* local) {
  if (rank >= block->cluster->shared.size()) fail("there is no such block in the cluster");
  if (block->cluster->exited[rank].load()) fail("the block whose memory is accessed has exited");
  return block->cluster->shared[rank] + (static_cast<char*>(local) - block->shared);
}

void forbid(char* gap) {
  if (__asan_poison_memory_region) __asan_poison_memory_region(gap, 16);
}

void run(const Launch& launch, const std::function<void()>& kernel) {
  const char* text = std::getenv("EMULATION_SEED");
  const unsigned seed = text ? static_cast<unsigned>(std::atoi(text)) : 0;
  const dim3& size = launch.grid;
  const unsigned blocks = size.x * size.y * size.z, clusters = blocks / launch.cluster;
  const unsigned threads = launch.block.x * launch.block.y * launch.block.z;
  Grid grid;
  grid.kernel = &kernel;
  std::vector<Cluster> all(clusters);
  // The shared memory of a cluster is allocated when the cluster starts: that of hundreds of blocks would be gigabytes.
  const auto open = [&](Cluster* cluster) {
    cluster->threads = threads * launch.cluster;
    cluster->exited.reset(new std::atomic<bool>[launch.cluster]());
    for (unsigned rank = 0; rank < launch.cluster; ++rank) {
      // Exactly the requested number of bytes may be accessed, at the alignment that the hardware gives.
      char* memory = static_cast<char*>(std::aligned_alloc(128, (launch.shared_bytes + 127) / 128 * 128 + 128));
      std::memset(memory, 0xff, launch.shared_bytes);
      if (__asan_poison_memory_region) __asan_poison_memory_region(memory + launch.shared_bytes, 16);
      cluster->shared.push_back(memory);
    }
  };
  const auto close = [&](Cluster* cluster) {
    const Unseen unseen;
    for (char* memory : cluster->shared) {
      if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(memory, launch.shared_bytes + 16);
      std::free(memory);
    }
  };
  const auto run_one = [&](unsigned i) {
    run_block(launch, &grid, &all[i / launch.cluster], {i % size.x, i / size.x % size.y, i / size.x / size.y},
              i % launch.cluster, seed);
  };
  const unsigned at_once = launch.cooperative ? clusters : 1;
  for (unsigned first = 0; first < clusters; first += at_once) {
    const unsigned begin = seed % 2 ? clusters - first - at_once : first;
    std::vector<std::thread> workers;
    for (unsigned c = begin; c < begin + at_once; ++c) open(&all[c]);
    for (unsigned i = begin * launch.cluster; i < (begin + at_once) * launch.cluster; ++i) {
      workers.emplace_back(run_one, i);
    }
    for (std::thread& worker : workers) worker.join();
    for (unsigned c = begin; c < begin + at_once; ++c) close(&all[c]);
  }
  grid.finished.acquire();
  for (void* fiber : grid.fibers) __tsan_destroy_fiber(fiber);
}

}  // namespace emulation
