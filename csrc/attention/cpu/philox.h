// Dropout's random numbers: Philox4x32-10, a function of (seed, offset) and of the element's
// position alone, so that forward, backward and every tiling see the same mask.
#pragma once

#include "attention/cpu/scores.h"

DLK_ISA_BEGIN

// words[w][lane] for w = 0..3: word w of counter (c0, rows[lane], heads[lane], offset). `lanes` is a
// multiple of Words::size.
DLK_NOINLINE inline void philox(uint64_t seed, uint32_t offset, uint32_t c0, const uint32_t* rows,
                                const uint32_t* heads, int lanes, uint32_t* words) {
  const Words a = Words::set1(0xd2511f53u), b = Words::set1(0xcd9e8d57u);
  for (int lane = 0; lane < lanes; lane += Words::size) {
    Words x[4] = {Words::set1(c0), Words::load(rows + lane), Words::load(heads + lane), Words::set1(offset)};
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      Words high0, low0, high1, low1;
      multiply_wide(a, x[0], &high0, &low0);
      multiply_wide(b, x[2], &high1, &low1);
      x[0] = high1 ^ x[1] ^ Words::set1(key0);
      x[1] = low1;
      x[2] = high0 ^ x[3] ^ Words::set1(key1);
      x[3] = low0;
      key0 += 0x9e3779b9u;
      key1 += 0xbb67ae85u;
    }
    for (int w = 0; w < 4; ++w) x[w].store(words + w * lanes + lane);
  }
}

struct Dropout {
  bool active;
  uint64_t seed;
  uint32_t offset, threshold;
  double kept;  // the factor of kept elements; 0 if none is kept

  explicit Dropout(const AttentionInputs& in)
      : active(in.dropout_p > 0), seed(in.seed), offset(in.offset), threshold(0), kept(0) {
    if (!active || in.dropout_p >= 1) return;
    threshold = static_cast<uint32_t>(in.dropout_p * 4294967296.0);
    kept = 1 / (1 - in.dropout_p);
  }
};

// Calls apply(at, kept) for each vector of a tile of scores, which is at scores + at; `kept` holds the factors by which
// dropout multiplies it.
template <class C, class Apply>
DLK_INLINE void drop_tile(const Dropout& dropout, const Lanes<C>& lanes, const ScoreTile<C>& tile, uint32_t* words,
                          Apply apply) {
  const int64_t lane = tile.panel->lane, width = tile.width();
  const int wide = static_cast<int>((width + Words::size - 1) / Words::size * Words::size);
  const int64_t end = tile.first + tile.keys;
  for (int64_t group = tile.first / 4; group * 4 < end; ++group) {
    philox(dropout.seed, dropout.offset, static_cast<uint32_t>(group), lanes.counter_row + lane,
           lanes.counter_head + lane, wide, words);
    for (int64_t j = std::max(group * 4, tile.first); j < std::min(group * 4 + 4, end); ++j)
      for (int64_t l = 0; l < width; l += Vec<C>::size)
        apply((j - tile.first) * tile.ld + l,
              where_at_least<C>(words + (j % 4) * wide + l, dropout.threshold, static_cast<C>(dropout.kept)));
  }
}

DLK_ISA_END
