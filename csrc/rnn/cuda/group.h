// How the blocks of a group exchange the vectors of a step, and the barrier at which they synchronise once per step.
//
// The vectors of a tile are stored in two halves, [2][tile][stride]: a block at step s reads half s % 2 and writes the
// other. No block can write a half that another block still reads, because it would have to be two steps ahead. In a
// cluster every block has a copy of both halves in its shared memory, and all blocks write to all copies. In a grid
// each group has one copy in global memory.
#pragma once

#include "real.h"
#include "sequence.h"

namespace dlk {
namespace gpu {

// Number of adjacent lanes whose items are 16 consecutive bytes of one sequence's vector: a piece.
template <class S>
constexpr int kPieceLanes = 16 / static_cast<int>(sizeof(S));

// Gathers the items of the lanes of a piece and returns all 16 bytes to each of them. All lanes of the warp must call.
template <class S>
DLK_DEVICE uint4 gather_piece(S item) {
  const int first = threadIdx.x % 32 / kPieceLanes<S> * kPieceLanes<S>;
  uint32_t words[4];
  if constexpr (sizeof(S) == 4) {
    uint32_t word;
    memcpy(&word, &item, sizeof word);
    DLK_UNROLL
    for (int i = 0; i < 4; ++i) words[i] = __shfl_sync(~0u, word, first + i);
  } else {
    uint16_t bits;
    memcpy(&bits, &item, sizeof bits);
    const uint32_t neighbour = __shfl_xor_sync(~0u, static_cast<uint32_t>(bits), 1);
    const uint32_t word = threadIdx.x % 2 ? neighbour | static_cast<uint32_t>(bits) << 16 : bits | neighbour << 16;
    DLK_UNROLL
    for (int i = 0; i < 4; ++i) words[i] = __shfl_sync(~0u, word, first + 2 * i);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

template <class S>
class ClusterGroup {
 public:
  DLK_DEVICE ClusterGroup(S* shared, int tile, int stride) : vectors_(shared), half_(tile * stride), stride_(stride) {}

  DLK_DEVICE const S* vectors(int step) const { return vectors_ + step % 2 * half_; }

  // Fills the vector of each sequence b with `value(b, term)` for the first step, and arrives at the barrier before it.
  template <class Value>
  DLK_DEVICE void begin(const Value& value) {
    for (int i = static_cast<int>(threadIdx.x); i < half_; i += kSequenceThreads) {
      const S v = value(i / stride_, i % stride_);
      vectors_[i] = v;
      vectors_[half_ + i] = v;
    }
    arrive();
  }

  // Sends this lane's item of sequence b at `term`, which the step after `step` reads. The lanes of a piece must pass
  // the same b and `send`.
  DLK_DEVICE void send(int step, int b, int term, S item, bool send) {
    const uint4 piece = gather_piece(item);
    const int lane = threadIdx.x % kPieceLanes<S>;
    S* to = vectors_ + (step + 1) % 2 * half_ + b * stride_ + term - lane;
    if (!send) return;
#if DLK_HAS_CLUSTERS
    for (unsigned rank = static_cast<unsigned>(lane); rank < gridDim.x; rank += kPieceLanes<S>) {
      store_remote(to, rank, piece);
    }
#endif
  }

  DLK_DEVICE void arrive() {
#if DLK_HAS_CLUSTERS
    cluster_arrive();
#endif
  }
  DLK_DEVICE void wait() {
#if DLK_HAS_CLUSTERS
    cluster_wait();
#endif
  }
  // No block may exit while another may still write to its shared memory.
  DLK_DEVICE void end() { wait(); }

 private:
  S* vectors_;
  int half_, stride_;
};

template <class S>
class GridGroup {
 public:
  DLK_DEVICE GridGroup(S* exchange, unsigned* counters, int tile, int stride) : stride_(stride) {
    const unsigned group = blockIdx.z * gridDim.y + blockIdx.y;
    half_ = tile * stride;
    vectors_ = exchange + static_cast<int64_t>(group) * 2 * half_;
    counter_ = counters + group;
  }

  DLK_DEVICE const S* vectors(int step) const { return vectors_ + step % 2 * half_; }

  template <class Value>
  DLK_DEVICE void begin(const Value& value) {
    const int begin = static_cast<int>(blockIdx.x) * kSequenceThreads + static_cast<int>(threadIdx.x);
    for (int i = begin; i < half_; i += static_cast<int>(gridDim.x) * kSequenceThreads) {
      const S v = value(i / stride_, i % stride_);
      vectors_[i] = v;
      vectors_[half_ + i] = v;
    }
    arrive();
  }

  DLK_DEVICE void send(int step, int b, int term, S item, bool send) {
    const uint4 piece = gather_piece(item);
    if (!send || threadIdx.x % kPieceLanes<S> != 0) return;
    *reinterpret_cast<uint4*>(vectors_ + (step + 1) % 2 * half_ + b * stride_ + term) = piece;
  }

  DLK_DEVICE void arrive() {
    __syncthreads();
    if (threadIdx.x == 0) signal_arrival(counter_);
  }
  DLK_DEVICE void wait() {
    goal_ += gridDim.x;
    if (threadIdx.x == 0) wait_for_arrivals(counter_, goal_);
    __syncthreads();
  }
  DLK_DEVICE void end() {}

 private:
  S* vectors_;
  unsigned* counter_;
  unsigned goal_ = 0;
  int half_, stride_;
};

template <class S, bool kCluster, class Params>
DLK_DEVICE auto make_group(const Params& p, S* shared) {
  if constexpr (kCluster) {
    return ClusterGroup<S>(shared, p.tile, p.layout.stride);
  } else {
    return GridGroup<S>(static_cast<S*>(p.exchange), p.counters, p.tile, p.layout.stride);
  }
}

// Returns the chunk's vectors where the product can read them. float32 vectors of a grid are copied to shared memory,
// because in their product every lane reads all of them.
template <bool kCluster, int kColumns, class S>
DLK_DEVICE const S* near_vectors(const S* vectors, S* shared, const SharedLayout& layout) {
  if constexpr (kCluster || sizeof(S) == 2) {
    return vectors;
  } else {
    for (int i = 4 * static_cast<int>(threadIdx.x); i < kColumns * layout.stride; i += 4 * kSequenceThreads) {
      *reinterpret_cast<uint4*>(shared + i) = load_through_l2(vectors + i);
    }
    __syncthreads();
    return shared;
  }
}

}  // namespace gpu
}  // namespace dlk
