// The product of a block's resident rows of W_hh with the vectors of a few sequences.
//
// The terms are divided into steps, and the steps among `splits` parts: part p takes steps p, p + splits, ... The
// weights of its first `register_steps` steps stay in registers, those of the others in shared memory, in the order in
// which they are read. Every part writes its own sums to shared memory, [split][sequence][rows + 4], and the code that
// uses a result adds them up.
//
// 16-bit numbers are multiplied by the tensor cores. A step is 32 terms in two tensor-core products. Lane 4 g + q loads
// the eight terms 8 q to 8 q + 7 of the vector of sequence g with one load of 16 bytes. This permutes the terms of the
// two products, so those of the weights are permuted alike. float32 is multiplied in float32: a lane has up to four
// rows, and a step is four terms.
#pragma once

#include "real.h"
#include "sequence.h"

namespace dlk {
namespace gpu {

// Loads from the vectors of a step: from shared memory in a cluster, in a grid from global memory, where the value may
// be absent at first.
template <bool kPieces, class S>
DLK_DEVICE uint4 load_vector(const S* base, int index) {
  if constexpr (kPieces) {
    return load_piece(base, index * static_cast<int>(sizeof(S)));
  } else {
    return *reinterpret_cast<const uint4*>(base + index);
  }
}

// In load(), `weight(row, term)` returns an element of the block's W_hh as a float, and 0 for padding.
template <class S, int kRows, int kRowGroups, int kSplits, int kRegisterSteps, int kColumnTiles, bool kPieces>
class TensorProduct {
  static constexpr int kAllRowTiles = kRows / 16;
  // Of a warp. If they cannot be divided equally, the last group of warps has fewer.
  static constexpr int kRowTiles = (kAllRowTiles + kRowGroups - 1) / kRowGroups;
  // Steps whose vectors are loaded before the first of them is used. From then on each used one is followed by the load
  // of the one this many steps later. A load from L2 takes as long as dozens of products, one from shared memory as
  // long as a few. Two products at a time and many weights leave few registers for vectors.
  static constexpr bool kManyWeights = kRegisterSteps * kRowTiles * 8 > 128;
  static constexpr int kAhead = kPieces ? 8 / kColumnTiles : kColumnTiles == 2 ? 1 : kManyWeights ? 2 : 4;
  static constexpr int kUnroll = kPieces ? kAhead : 1;  // of the loop over the weights in shared memory

 public:
  DLK_DEVICE TensorProduct(const SharedLayout& layout, char* shared)
      : warp_(warp_index()), lane_(threadIdx.x % 32), layout_(layout) {
    weights_ = reinterpret_cast<uint4*>(shared + layout.weights) + lane_ +
               (split() * layout.shared_steps * kAllRowTiles + row_group() * kRowTiles) * 64;
    // In a cluster the compiler would compute these addresses again in every step; in a grid it has no registers to
    // keep them in while it waits for vectors.
    if (!kPieces) weights_ = keep_shared(weights_);
    steps_ = (layout.terms / 32 - split() + kSplits - 1) / kSplits;
    first_item_ = lane_ / 4 * layout.stride + split() * 32 + 8 * (lane_ % 4);
    first_item_ = keep_in_register(first_item_);
  }

  template <class Weight>
  DLK_DEVICE void load(const Weight& weight) {
    const auto pair = [&](int row, int term) {
      const S items[2] = {from_float<S>(weight(row, term)), from_float<S>(weight(row, term + 1))};
      uint32_t word;
      memcpy(&word, items, sizeof word);
      return word;
    };
    const int g = lane_ / 4, q = lane_ % 4;
    // The fragment of row tile m in one of the two products of step i: rows g and g + 8 by two pairs of terms.
    const auto fragment = [&](int i, int m, int product) {
      const int row = (row_group() * kRowTiles + m) * 16 + g;
      const int step = i * kSplits + split();
      const int term = step * 32 + 8 * q + 4 * product;
      if (i >= steps_ || !has_row_tile(m)) return make_uint4(0, 0, 0, 0);
      return make_uint4(pair(row, term), pair(row + 8, term), pair(row, term + 2), pair(row + 8, term + 2));
    };
    DLK_UNROLL
    for (int i = 0; i < kRegisterSteps; ++i) {
      DLK_UNROLL
      for (int m = 0; m < kRowTiles; ++m) {
        DLK_UNROLL
        for (int product = 0; product < 2; ++product) {
          registers_[i][m][product] = fragment(i, m, product);
        }
      }
    }
    for (int i = 0; i < layout_.shared_steps; ++i) {
      for (int m = 0; m < kRowTiles && has_row_tile(m); ++m) {
        for (int product = 0; product < 2; ++product) *stored(i, m, product) = fragment(kRegisterSteps + i, m, product);
      }
    }
  }

  // `vectors` points to the vector of the chunk's first sequence; the others follow at distances of `stride`.
  DLK_DEVICE void multiply(const S* vectors, float* partials) {
    float sums[kRowTiles][kColumnTiles][4] = {};
    uint4 window[kAhead][kColumnTiles];
    const int g = lane_ / 4, q = lane_ % 4;
    const S* base[kColumnTiles];
    DLK_UNROLL
    for (int n = 0; n < kColumnTiles; ++n) {
      base[n] = vectors + first_item_ + n * kMmaColumns * layout_.stride;
    }
    constexpr int kDistance = kSplits * 32;  // from step to step of a part
    DLK_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      DLK_UNROLL
      for (int n = 0; n < kColumnTiles; ++n) {
        if (kPieces) window[i][n] = make_uint4(0, 0, 0, 0);  // is present
        if (i < steps_) window[i][n] = load_vector<kPieces>(base[n], i * kDistance);
      }
    }
    // All that are absent are loaded again at once.
    for (bool complete = !kPieces; !complete;) {
      complete = true;
      DLK_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        DLK_UNROLL
        for (int n = 0; n < kColumnTiles; ++n) {
          if (!is_absent(window[i][n])) continue;
          window[i][n] = load_absent_piece(base[n], i * kDistance * static_cast<int>(sizeof(S)));
          complete = false;
        }
      }
    }
    // `weight(m, product)` is the fragment of a row tile.
    const auto use = [&](const uint4(&v)[kColumnTiles], const auto& weight) {
      DLK_UNROLL
      for (int m = 0; m < kRowTiles; ++m) {
        if (!has_row_tile(m)) continue;
        const uint4 low = weight(m, 0), high = weight(m, 1);
        DLK_UNROLL
        for (int n = 0; n < kColumnTiles; ++n) {
          mma_16x8x16<S>(sums[m][n], low, v[n].x, v[n].y);
          mma_16x8x16<S>(sums[m][n], high, v[n].z, v[n].w);
        }
      }
    };
    // Step i's vectors are in window[slot]; those of a later step take their place.
    const auto use_and_replace = [&](int i, int slot, const auto& weight) {
      if (kPieces && i >= kAhead) {
        DLK_UNROLL
        for (int n = 0; n < kColumnTiles; ++n) {
          while (is_absent(window[slot][n]))
            window[slot][n] = load_absent_piece(base[n], i * kDistance * static_cast<int>(sizeof(S)));
        }
      }
      use(window[slot], weight);
      if (i + kAhead >= steps_) return;
      DLK_UNROLL
      for (int n = 0; n < kColumnTiles; ++n) window[slot][n] = load_vector<kPieces>(base[n], (i + kAhead) * kDistance);
    };
    DLK_UNROLL
    for (int i = 0; i < kRegisterSteps; ++i) {
      if (i < steps_) use_and_replace(i, i % kAhead, [&](int m, int product) { return registers_[i][m][product]; });
    }
    DLK_NO_UNROLL
    for (int first = kRegisterSteps; first < steps_; first += kUnroll) {
      DLK_UNROLL
      for (int k = 0; k < kUnroll; ++k) {
        const int i = first + k;
        if (i >= steps_) break;
        const auto weight = [&](int m, int product) { return *stored(i - kRegisterSteps, m, product); };
        if constexpr (kPieces) {
          use_and_replace(i, (kRegisterSteps + k) % kAhead, weight);
        } else {
          uint4 v[kColumnTiles];
          DLK_UNROLL
          for (int n = 0; n < kColumnTiles; ++n) v[n] = load_vector<kPieces>(base[n], i * kDistance);
          use(v, weight);
        }
      }
    }
    DLK_UNROLL
    for (int n = 0; n < kColumnTiles; ++n) {
      DLK_UNROLL
      for (int m = 0; m < kRowTiles; ++m) {
        if (!has_row_tile(m)) continue;
        DLK_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int row = (row_group() * kRowTiles + m) * 16 + g + 8 * (i / 2), column = n * 8 + 2 * q + i % 2;
          partials[(split() * kColumnTiles * kMmaColumns + column) * (kRows + 4) + row] = sums[m][n][i];
        }
      }
    }
  }

 private:
  DLK_DEVICE int split() const { return warp_ % kSplits; }
  DLK_DEVICE int row_group() const { return warp_ / kSplits; }
  // The same for all lanes of a warp.
  DLK_DEVICE bool has_row_tile(int m) const {
    return kAllRowTiles % kRowGroups == 0 || row_group() * kRowTiles + m < kAllRowTiles;
  }
  DLK_DEVICE uint4* stored(int i, int m, int product) const {
    return weights_ + ((i * kAllRowTiles + m) * 2 + product) * 32;
  }

  const int warp_, lane_;
  const SharedLayout& layout_;
  int steps_;       // of this warp's part
  int first_item_;  // of the lane's sequence, in the vectors of a chunk
  uint4* weights_;
  uint4 registers_[kRegisterSteps][kRowTiles][2];
};

template <int kRows, int kSplits, int kRegisterSteps, int kColumns>
class FloatProduct {
  static constexpr int kLaneRows = (kRows + 31) / 32;

 public:
  DLK_DEVICE FloatProduct(const SharedLayout& layout, char* shared) : layout_(layout) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // With 16 rows each half of a warp computes a part of its own.
    split_ = kRows < 32 ? 2 * warp + lane / 16 : warp;
    row_ = kRows < 32 ? lane % 16 : lane;
    weights_ = reinterpret_cast<float4*>(shared + layout.weights);
    steps_ = layout.terms / 4;
  }

  template <class Weight>
  DLK_DEVICE void load(const Weight& weight) {
    const auto four = [&](int i, int r) {
      const int term = (i * kSplits + split_) * 4;
      if (term >= layout_.terms) return make_float4(0, 0, 0, 0);
      return make_float4(weight(row(r), term), weight(row(r), term + 1), weight(row(r), term + 2),
                         weight(row(r), term + 3));
    };
    DLK_UNROLL
    for (int i = 0; i < kRegisterSteps; ++i) {
      DLK_UNROLL
      for (int r = 0; r < kLaneRows; ++r) registers_[i][r] = four(i, r);
    }
    for (int i = 0; i < layout_.shared_steps; ++i) {
      DLK_UNROLL
      for (int r = 0; r < kLaneRows; ++r) {
        if (has_row(r)) *stored(i, r) = four(kRegisterSteps + i, r);
      }
    }
  }

  DLK_DEVICE void multiply(const float* vectors, float* partials) {
    float sums[kLaneRows][kColumns] = {};
    const auto use = [&](int i, const float4(&w)[kLaneRows]) {
      const float* terms = vectors + (i * kSplits + split_) * 4;
      DLK_UNROLL
      for (int b = 0; b < kColumns; ++b) {
        const float4 v = *reinterpret_cast<const float4*>(terms + b * layout_.stride);
        DLK_UNROLL
        for (int r = 0; r < kLaneRows; ++r) {
          sums[r][b] = fmaf(w[r].x, v.x, sums[r][b]);
          sums[r][b] = fmaf(w[r].y, v.y, sums[r][b]);
          sums[r][b] = fmaf(w[r].z, v.z, sums[r][b]);
          sums[r][b] = fmaf(w[r].w, v.w, sums[r][b]);
        }
      }
    };
    DLK_UNROLL
    for (int i = 0; i < kRegisterSteps; ++i) {
      if (i * kSplits + split_ < steps_) use(i, registers_[i]);
    }
    for (int i = 0; i < layout_.shared_steps; ++i) {
      if ((kRegisterSteps + i) * kSplits + split_ >= steps_) break;
      float4 w[kLaneRows];
      DLK_UNROLL
      for (int r = 0; r < kLaneRows; ++r) w[r] = *stored(i, has_row(r) ? r : 0);
      use(kRegisterSteps + i, w);
    }
    DLK_UNROLL
    for (int r = 0; r < kLaneRows; ++r) {
      DLK_UNROLL
      for (int b = 0; b < kColumns; ++b) {
        if (has_row(r)) partials[(split_ * kColumns + b) * (kRows + 4) + row(r)] = sums[r][b];
      }
    }
  }

 private:
  DLK_DEVICE bool has_row(int r) const { return r * 32 + row_ < kRows; }
  DLK_DEVICE int row(int r) const { return has_row(r) ? r * 32 + row_ : 0; }
  DLK_DEVICE float4* stored(int i, int r) const { return weights_ + (i * kSplits + split_) * kRows + r * 32 + row_; }

  const SharedLayout& layout_;
  int split_, row_, steps_;
  float4* weights_;
  float4 registers_[kRegisterSteps][kLaneRows];
};

template <class S, int kGates, bool kCluster, bool kBackward, int kUnits, int kColumns>
struct ChooseProduct {
  static constexpr SliceShape shape = slice_shape(kGates, sizeof(S) == 2, kUnits, kBackward);
  using type = std::conditional_t<sizeof(S) == 2,
                                  TensorProduct<S, shape.rows, shape.row_groups, shape.splits, shape.register_steps,
                                                kColumns / kMmaColumns, !kCluster>,
                                  FloatProduct<shape.rows, shape.splits, shape.register_steps, kColumns>>;
};

}  // namespace gpu
}  // namespace dlk
