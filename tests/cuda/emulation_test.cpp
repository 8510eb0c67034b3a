// The emulation's own test: kernels in which bugs can be planted. `emulation_test NAME` runs them with the bug NAME and
// prints whether the results are right. emulated.py lists which build must notice which bug. Without a bug ("none") no
// build may report anything.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "rnn/cuda/device.h"

namespace dlk {
namespace {

constexpr int kThreads = 64, kBlocks = 2, kItems = kThreads * kBlocks, kTurns = 8, kBuffers = 2;

enum class Bug {
  none,
  missing_block_barrier,
  missing_cluster_barrier,
  unwaited_receipt,
  unannounced_bytes,
  too_few_bytes,
  unordered_flag,
  unordered_wait,
  lost_signal,
  unerased_piece,
  unsignalled_piece,
  unawaited_erasure,
  divergent_barrier,
  outside_shuffle_mask,
  absent_lane,
  shared_overrun,
  shared_neighbour,
  global_overrun,
  uninitialised_shared,
  misaligned_vector,
  absent_block,
  wrong_fragment,
};

const char* const kNames[] = {
    "none",
    "missing_block_barrier",
    "missing_cluster_barrier",
    "unwaited_receipt",
    "unannounced_bytes",
    "too_few_bytes",
    "unordered_flag",
    "unordered_wait",
    "lost_signal",
    "unerased_piece",
    "unsignalled_piece",
    "unawaited_erasure",
    "divergent_barrier",
    "outside_shuffle_mask",
    "absent_lane",
    "shared_overrun",
    "shared_neighbour",
    "global_overrun",
    "uninitialised_shared",
    "misaligned_vector",
    "absent_block",
    "wrong_fragment",
};

struct Params {
  Bug bug;
  const float* in;    // [kItems]
  float* out;         // [kItems]
  float* scratch;     // [kItems]
  unsigned* counter;  // zero
  uint4* pieces;      // [kBuffers][kItems], absent
};

// out[i] = in of thread kThreads - 1 - i of the block, passed through shared memory, plus zeros summed over lanes by a
// shuffle.
__global__ void within_block(const Params p) {
  float* items = reinterpret_cast<float*>(dynamic_shared());  // [kThreads], a gap, [kThreads] more
  float* more = items + kThreads + kSharedGap / 4;
  forbid_gap(reinterpret_cast<char*>(items + kThreads));
  const int i = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x) * kThreads;
  if (p.bug != Bug::uninitialised_shared || i != 3) items[i] = p.in[block + i];
  more[i] = 0.0f;
  if (p.bug == Bug::shared_overrun) more[kThreads + i] = 0.0f;
  if (p.bug == Bug::shared_neighbour) items[kThreads + i % 2] = 0.0f;
  if (p.bug == Bug::divergent_barrier && i < 32) __syncthreads();
  if (p.bug == Bug::divergent_barrier && i == 40) return;
  if (p.bug != Bug::missing_block_barrier) __syncthreads();
  float zero = more[i];
  if (p.bug == Bug::misaligned_vector && i == 0) zero += reinterpret_cast<const float4*>(more + 1)->x;
  if (p.bug == Bug::outside_shuffle_mask && i < 16) zero += __shfl_xor_sync(0xffffu, zero, 16);
  if (p.bug == Bug::absent_lane && i < 31) zero += __shfl_xor_sync(~0u, zero, 1);
  zero += __shfl_xor_sync(~0u, zero, 8);
  p.out[block + i + (p.bug == Bug::global_overrun ? kThreads : 0)] = items[kThreads - 1 - i] + zero;
}

// out[i] = in of thread kThreads - 1 - i of the cluster's other block, plus the number of the last turn. In each turn
// the other block sends it to this block's shared memory, to one place in even turns and to another in odd ones.
__global__ void within_cluster(const Params p) {
  uint4* items = reinterpret_cast<uint4*>(dynamic_shared());  // [2][kThreads]
  uint64_t* receipts = reinterpret_cast<uint64_t*>(items + 2 * kThreads);
  const unsigned rank = blockIdx.x % kBlocks, other = p.bug == Bug::absent_block ? rank + 1 : (rank + 1) % kBlocks;
  const int i = static_cast<int>(threadIdx.x), at = static_cast<int>(blockIdx.x) * kThreads + i;
  if (i == 0) receipt_init(receipts), receipt_init(receipts + 1);
  if (p.bug != Bug::missing_cluster_barrier) cluster_barrier();
  for (int turn = 0; turn < kTurns; ++turn) {
    uint64_t* receipt = receipts + turn % 2;
    if (i == 0 && p.bug != Bug::unannounced_bytes) {
      receipt_expect(receipt, sizeof(uint4) * (kThreads - (p.bug == Bug::too_few_bytes && turn == 1)));
    }
    const float item = p.in[at] + static_cast<float>(turn);
    uint4 value = make_uint4(0, 0, 0, 0);
    memcpy(&value.x, &item, sizeof item);
    send_to_block(items + turn % 2 * kThreads + i, receipt, other, value);
    if (p.bug != Bug::unwaited_receipt || turn < kTurns - 1) receipt_wait(receipt, turn / 2 % 2);
    const uint4 got = items[turn % 2 * kThreads + kThreads - 1 - i];
    memcpy(&p.out[at], &got.x, sizeof(float));
  }
}

// out[i] = in of thread kItems - 1 - i of the grid, plus the number of the last turn, passed as pieces. Turns use the
// kBuffers places of a piece one after the other, and each writer makes its piece of the turn before absent again.
__global__ void by_pieces(const Params p) {
  const int thread = static_cast<int>(threadIdx.x), i = static_cast<int>(blockIdx.x) * kThreads + thread;
  const auto place = [&](int turn, int item) { return p.pieces + turn % kBuffers * kItems + item; };
  for (int turn = 0; turn < kTurns; ++turn) {
    // The pieces of this turn's place were made absent kBuffers - 1 turns ago.
    const int erased = turn + 1 - kBuffers;
    if (thread == 0 && erased >= 0 && p.bug != Bug::unawaited_erasure) {
      wait_for_arrivals(p.counter, static_cast<unsigned>((erased + 1) * kBlocks));
    }
    __syncthreads();
    const float item = p.in[i] + static_cast<float>(turn);
    uint4 value = make_uint4(0, 0, 0, 0);
    memcpy(&value.x, &item, sizeof item);
    store_piece(place(turn, i), value);
    uint4 got = load_piece(place(turn, kItems - 1 - i));
    while (is_absent(got)) got = load_absent_piece(place(turn, kItems - 1 - i));
    memcpy(&p.out[i], &got.x, sizeof(float));
    const bool late = p.bug == Bug::unsignalled_piece;
    if (thread == 0 && late) signal_arrival(p.counter);
    __syncthreads();
    if (p.bug != Bug::unerased_piece) erase_piece(place(turn + kBuffers - 1, i));
    __syncthreads();
    if (thread == 0 && !late) signal_arrival(p.counter);
  }
}

// out[i] = in of thread kItems - 1 - i of the whole grid, passed through global memory.
__global__ void within_grid(const Params p) {
  const int i = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  p.scratch[i] = p.in[i];
  __syncthreads();
  if (threadIdx.x == 0) {
    if (p.bug == Bug::unordered_flag) {
      __atomic_fetch_add(p.counter, 1u, __ATOMIC_RELAXED);
    } else if (p.bug != Bug::lost_signal || blockIdx.x > 0) {
      signal_arrival(p.counter);
    }
    wait_for_arrivals(p.counter, kBlocks);
  }
  if (p.bug != Bug::unordered_wait) __syncthreads();
  p.out[i] = p.scratch[kItems - 1 - i];
}

// out = a b, 16 x 8, where a is the identity matrix, so that element (m, n) is b's: 16 m + n.
__global__ void product(const Params p) {
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, q = lane % 4;
  const auto pair = [](float first, float second) {
    const f16_t items[2] = {from_float<f16_t>(first), from_float<f16_t>(second)};
    uint32_t word;
    memcpy(&word, items, sizeof word);
    return word;
  };
  const auto a = [&](int row, int k) { return pair(k == row, k + 1 == row); };
  const auto b = [&](int k, int n) { return pair(16.0f * k + n, 16.0f * (k + 1) + n); };
  const int k = 2 * q, upper = p.bug == Bug::wrong_fragment ? 4 : 8;
  const uint4 rows = make_uint4(a(g, k), a(g + 8, k), a(g, k + 8), a(g + 8, k + 8));
  float c[4] = {};
  mma_16x8x16<f16_t>(c, rows, b(k, g), b(k + upper, g));
  for (int i = 0; i < 4; ++i) p.out[(g + 8 * (i / 2)) * 8 + 2 * q + i % 2] = c[i];
}

bool run(Bug bug) {
  std::vector<float> in(kItems), out(kItems), scratch(kItems, NAN);
  for (int i = 0; i < kItems; ++i) in[i] = 1.0f + static_cast<float>(i);
  std::vector<uint4> pieces(kBuffers * kItems, make_uint4(kAbsentWord, kAbsentWord, kAbsentWord, kAbsentWord));
  unsigned counters[2] = {};
  Params params{bug, in.data(), out.data(), scratch.data(), counters, pieces.data()};
  const auto right = [&](auto expected) {
    for (int i = 0; i < kItems; ++i) {
      if (!(out[i] == expected(i))) return false;
    }
    out.assign(kItems, NAN);
    return true;
  };
  LaunchShape shape;
  shape.grid_x = kBlocks;
  shape.threads = kThreads;
  bool ok = true;

  shape.shared_bytes = 2 * kThreads * 4 + kSharedGap;
  launch(&within_block, shape, nullptr, params);
  ok &= right([&](int i) { return in[i / kThreads * kThreads + kThreads - 1 - i % kThreads]; });

  shape.shared_bytes = 2 * kThreads * 16 + 2 * 8;
  shape.cluster = kBlocks;
  launch(&within_cluster, shape, nullptr, params);
  ok &= right(
      [&](int i) { return in[(i / kThreads + 1) % kBlocks * kThreads + kThreads - 1 - i % kThreads] + (kTurns - 1); });

  shape.shared_bytes = 0;
  shape.cluster = 1;
  shape.cooperative = true;
  launch(&within_grid, shape, nullptr, params);
  ok &= right([&](int i) { return in[kItems - 1 - i]; });

  params.counter = counters + 1;
  launch(&by_pieces, shape, nullptr, params);
  ok &= right([&](int i) { return in[kItems - 1 - i] + (kTurns - 1); });

  shape.grid_x = 1;
  shape.threads = 32;
  launch(&product, shape, nullptr, params);
  ok &= right([&](int i) { return static_cast<float>(16 * (i / 8) + i % 8); });
  return ok;
}

}  // namespace
}  // namespace dlk

int main(int argc, char** argv) {
  for (int i = 0; i < static_cast<int>(std::size(dlk::kNames)); ++i) {
    if (argc != 2 || std::strcmp(argv[1], dlk::kNames[i]) != 0) continue;
    const bool ok = dlk::run(static_cast<dlk::Bug>(i));
    std::printf("%s: %s\n", argv[1], ok ? "right" : "WRONG");
    return ok ? 0 : 1;
  }
  for (const char* name : dlk::kNames) std::puts(name);
  return 2;
}
