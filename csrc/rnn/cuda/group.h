// How the blocks of a group exchange the vectors of a step. There is no barrier: a block goes on when the vectors have
// arrived, since what it waits for is the data itself.
//
// A block sends its part of the vectors of step s + 1 while it works on step s, and only those of the sequences that
// step s + 1 reads. It has all vectors of step s by then, and each block sent its part of these after it had read those
// of step s - 1 (the block's threads meet between reading and sending). So no block of the group still reads the
// vectors of step s - 1, and their memory may be used again.
//
// In a cluster every block has two copies of the vectors in its shared memory, for even and for odd steps, and a
// receipt for each (device.h). The blocks write to all copies of the next step by asynchronous stores, which the
// receipts count. The stores are released by the count and acquired by the wait, and a chain of sending and waiting
// lies between the last reading of a copy and the next writing to it.
//
// In a grid each group has kGridBuffers copies in global memory, which steps use in turn. Blocks read until no word is
// the absent one (pieces, device.h), and each block makes its part of step s - 1 absent again in step s. Neither is
// ordered by a barrier, and need not be: what a reader takes for present is the value of its step, which the writer
// computed from all values of the step before, as long as the value from kGridBuffers steps ago is gone. To ensure that
// it is, each block signals once in kRound steps that the others can see what it has made absent, and waits for the
// signal of the others. Both are done by one thread, some steps before the memory is used again.
#pragma once

#include "real.h"
#include "sequence.h"

namespace dlk {
namespace gpu {

// Number of adjacent lanes whose items are 16 consecutive bytes of one sequence's vector: a piece. A lane has 1 or 4.
template <class S, int kItems>
constexpr int kPieceLanes = 16 / (kItems * static_cast<int>(sizeof(S)));

template <class S>
using Bits = std::conditional_t<sizeof(S) == 4, uint32_t, uint16_t>;

template <class S>
DLK_DEVICE Bits<S> bits_of(S item) {
  Bits<S> bits;
  memcpy(&bits, &item, sizeof bits);
  return bits;
}

// Returns the word, or if it is the absent one, which consists of NaN, other NaN.
DLK_DEVICE uint32_t present_word(uint32_t word) { return word == kAbsentWord ? kAbsentWord >> 1 : word; }

// Gathers the items of the lanes of a piece and returns all 16 bytes to each of them. With `kPresent` no word is the
// absent one. All lanes of the warp must call.
template <class S, bool kPresent, int kItems>
DLK_DEVICE uint4 gather_piece(const float (&items)[kItems]) {
  constexpr int kLanes = kPieceLanes<S, kItems>;
  constexpr int kWords = kLanes <= 4 ? 4 / kLanes : 1;  // of a lane; two lanes with 16 bits each have the same word
  uint32_t own[kWords], words[4];
  if constexpr (kLanes == 8) {
    const uint32_t mine = pack<S>(items[0], 0.0f), neighbour = __shfl_xor_sync(~0u, mine, 1);
    own[0] = __byte_perm(mine, neighbour, threadIdx.x % 2 ? 0x1054 : 0x5410);  // both lower halves
  } else if constexpr (sizeof(S) == 2) {
    DLK_UNROLL
    for (int i = 0; i < kWords; ++i) own[i] = pack<S>(items[2 * i], items[2 * i + 1]);
  } else {
    memcpy(own, items, sizeof own);
  }
  DLK_UNROLL
  for (int i = 0; i < kWords; ++i) own[i] = kPresent ? present_word(own[i]) : own[i];
  if constexpr (kLanes == 1) return make_uint4(own[0], own[1], own[2], own[3]);
  const int first = threadIdx.x % 32 / kLanes * kLanes;
  DLK_UNROLL
  for (int i = 0; i < 4; ++i) words[i] = __shfl_sync(~0u, own[i % kWords], first + i * kLanes / 4);
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// The functions of a group, in the order of their calls:
//   begin    fills the vectors of the first step with `value(b, term)`. `reads(b)` is whether that step reads them.
//   prepare  at the start of a step; `sequences()` is the number of those whose vectors the next step reads
//   wait     before the step's first product
//   send     rounds this lane's items of sequence b, which begin at `term`, and passes them to the next step, if
//   `send`.
//            All lanes of the warp must call; those of a piece must pass the same b and `send`.
//   retire   after the product of b's chunk: nothing reads the items of the step before any more
//   finish   at the end of a step in which the block has called __syncthreads()
template <class S>
class ClusterGroup {
 public:
  // `terms` is the number of elements of a vector that one block sends.
  DLK_DEVICE ClusterGroup(S* vectors, uint64_t* receipts, int tile, int stride, int terms)
      : vectors_(vectors),
        receipts_(receipts),
        half_(tile * stride),
        stride_(stride),
        bytes_(gridDim.x * static_cast<unsigned>(terms) * sizeof(S)) {}

  DLK_DEVICE const S* vectors(int step) const { return vectors_ + (step & 1) * half_; }

  template <class Value, class Reads>
  DLK_DEVICE void begin(const Value& value, const Reads&) {
    for (int i = static_cast<int>(threadIdx.x); i < half_; i += kSequenceThreads) {
      const S v = value(i / stride_, i % stride_);
      vectors_[i] = v;
      vectors_[half_ + i] = v;  // for the padding; the rest is sent before it is read
    }
#if DLK_HAS_CLUSTERS
    if (threadIdx.x == 0) receipt_init(receipts_), receipt_init(receipts_ + 1);
    cluster_barrier();
#endif
  }

  template <class Sequences>
  DLK_DEVICE void prepare(int step, const Sequences& sequences) {
#if DLK_HAS_CLUSTERS
    if (threadIdx.x != 0) return;
    const unsigned count = static_cast<unsigned>(sequences());
    if (count > 0) receipt_expect(receipts_ + ((step + 1) & 1), count * bytes_);
#endif
  }

  // No thread is two phases late: the phase of step s ends after this block has sent in step s - 1, and before it sends
  // all of its threads meet, having waited for the one before.
  DLK_DEVICE void wait(int step) {
#if DLK_HAS_CLUSTERS
    if (step > 0) receipt_wait(receipts_ + (step & 1), static_cast<unsigned>(step - 1) / 2 & 1);
#endif
  }

  template <int kItems>
  DLK_DEVICE void send(int step, int b, int term, const float (&items)[kItems], bool send) {
    const uint4 piece = gather_piece<S, false>(items);
    if (!send) return;
#if DLK_HAS_CLUSTERS
    constexpr int kLanes = kPieceLanes<S, kItems>;
    const int lane = static_cast<int>(threadIdx.x % kLanes);
    // Otherwise the compiler computes both addresses again for every rank.
    S* to = keep_shared(vectors_ + ((step + 1) & 1) * half_ + b * stride_ + term - lane * kItems);
    uint64_t* receipt = keep_shared(receipts_ + ((step + 1) & 1));
    constexpr int kStores = kMaxCluster / kLanes;
    DLK_UNROLL
    for (int i = 0; i < kStores; ++i) {
      const unsigned rank = static_cast<unsigned>(lane + i * kLanes);
      // Ranks ascend. One jump behind the last store saves 11 instructions if there are eight stores; if there are two,
      // the lstm's forward has no register for it (sm_100a).
      if (kStores > 2 && rank >= gridDim.x) return;
      if (rank < gridDim.x) send_to_block(to, receipt, rank, piece);
    }
#endif
  }

  template <int kItems>
  DLK_DEVICE void retire(int, int, int) {}
  DLK_DEVICE void finish(int) {}

 private:
  S* vectors_;
  uint64_t* receipts_;
  int half_, stride_;
  unsigned bytes_;
};

template <class S>
class GridGroup {
  static constexpr int kRound = kGridBuffers / 2;

 public:
  DLK_DEVICE GridGroup(S* exchange, unsigned* counters, int tile, int stride, int terms)
      : size_(tile * stride), stride_(stride), terms_(static_cast<int>(gridDim.x) * terms) {
    const unsigned group = blockIdx.z * gridDim.y + blockIdx.y;
    buffers_ = exchange + static_cast<int64_t>(group) * kGridBuffers * size_;
    counter_ = counters + group;
  }

  DLK_DEVICE const S* vectors(int step) const { return buffer(step); }

  template <class Value, class Reads>
  DLK_DEVICE void begin(const Value& value, const Reads& reads) {
    const int begin = static_cast<int>(blockIdx.x) * kSequenceThreads + static_cast<int>(threadIdx.x);
    for (int i = begin; i < size_; i += static_cast<int>(gridDim.x) * kSequenceThreads) {
      const int b = i / stride_, term = i % stride_;
      const Bits<S> first = present(value(b, term)), absent = term < terms_ ? kAbsent : Bits<S>{0};
      for (int k = 0; k < kGridBuffers; ++k) {
        const Bits<S> bits = k == 0 && reads(b) ? first : absent;
        memcpy(static_cast<void*>(buffer(k) + i), &bits, sizeof bits);
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) signal_arrival(counter_), wait_for_signals();
    __syncthreads();
  }

  // The signals of step 4 n + 1 say that the others see what was made absent up to step 4 n: the values of steps up to
  // 4 n - 1. Waiting for them in step 4 n + 3 allows the steps 4 n + 4 to 4 n + 7 to read, whose memory these had.
  template <class Sequences>
  DLK_DEVICE void prepare(int step, const Sequences&) {
    static_assert(kRound == 4 && kGridBuffers == 8);
    if (threadIdx.x == 0 && step % kRound == 3) wait_for_signals();
  }
  DLK_DEVICE void wait(int) {}

  template <int kItems>
  DLK_DEVICE void send(int step, int b, int term, const float (&items)[kItems], bool send) {
    const uint4 piece = gather_piece<S, true>(items);
    if (send && threadIdx.x % kPieceLanes<S, kItems> == 0) store_piece(buffer(step + 1) + b * stride_ + term, piece);
  }

  template <int kItems>
  DLK_DEVICE void retire(int step, int b, int term) {
    if (threadIdx.x % kPieceLanes<S, kItems> == 0) erase_piece(buffer(step + kGridBuffers - 1) + b * stride_ + term);
  }

  DLK_DEVICE void finish(int step) {
    if (threadIdx.x == 0 && step % kRound == 1) signal_arrival(counter_);
  }

 private:
  static constexpr Bits<S> kAbsent = static_cast<Bits<S>>(kAbsentWord);

  DLK_DEVICE S* buffer(int step) const { return buffers_ + (step & (kGridBuffers - 1)) * size_; }
  // An item with the bits of an absent one is a NaN, and another NaN takes its place.
  static DLK_DEVICE Bits<S> present(S item) {
    const Bits<S> bits = bits_of(item);
    return bits == kAbsent ? static_cast<Bits<S>>(kAbsent >> 1) : bits;
  }
  DLK_DEVICE void wait_for_signals() {
    goal_ += gridDim.x;
    wait_for_arrivals(counter_, goal_);
  }

  S* buffers_;
  unsigned* counter_;
  unsigned goal_ = 0;
  int size_, stride_, terms_;
};

// `terms` is the number of elements of a vector that one block sends.
template <class S, bool kCluster, class Params>
DLK_DEVICE auto make_group(const Params& p, char* shared, int terms) {
  const SharedLayout& layout = p.layout;
  if constexpr (kCluster) {
    return ClusterGroup<S>(reinterpret_cast<S*>(shared + layout.exchange),
                           reinterpret_cast<uint64_t*>(shared + layout.receipts), p.tile, layout.stride, terms);
  } else {
    return GridGroup<S>(static_cast<S*>(p.exchange), p.counters, p.tile, layout.stride, terms);
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
      uint4 piece = load_piece(vectors + i);
      while (is_absent(piece)) piece = load_absent_piece(vectors + i);
      *reinterpret_cast<uint4*>(shared + i) = piece;
    }
    __syncthreads();
    return shared;
  }
}

}  // namespace gpu
}  // namespace dlk
