// The record that the forward saves of each row for the backward: slots of H values of the compute type. In a call of a
// 16-bit dtype, slots of 16 bits come first: the bounded ones (gates) as fixed16, and the narrow ones in that dtype, so
// that h' takes no more memory than y does. bf16 would be too coarse for gates: a forget gate of 0.998 would become 1,
// its gradient 0, and over many steps the gradient of c wrong by several percent.
#pragma once

#include "gemm/storage_access.h"
#include "rnn/params.h"
#include "simd/fixed16.h"

DLK_ISA_BEGIN

template <class C, class Cell>
class Record {
  using V = Vec<C>;
  static constexpr int kFirstNarrow = Cell::kSaved - Cell::kNarrow;

 public:
  explicit Record(const LayerShape& shape)
      : size(shape.record()),
        projected(size - shape.P),
        keeps_state(shape.keeps_state()),
        narrow(shape.narrow),
        H_(shape.H),
        whole_(narrow ? (shape.half_slots() * H_ + 1) / 2 : Cell::kBounded * H_),
        dtype_(shape.dtype) {}

  const int64_t size;       // of a record in values of C
  const int64_t projected;  // where the projected h begins
  const bool keeps_state;   // whether there is a state slot
  const bool narrow;        // whether there are slots of 16 bits; the products of the gates do not fit into them

  // Loads n values of a slot from j on.
  DLK_INLINE V load(const C* record, int slot, int64_t j, int n) const {
    if constexpr (std::is_same_v<C, float>) {
      if (narrow && slot < Cell::kBounded) return load_fixed(fixed(record) + slot * H_ + j, n);
      if (narrow && slot >= kFirstNarrow) return load_any<C>(dtype_, record, half(slot, j), n);
    }
    return load_part(record + whole(slot, j), n);
  }
  DLK_INLINE void store(C* record, int slot, int64_t j, V value, int n) const {
    if constexpr (std::is_same_v<C, float>) {
      if (narrow && slot < Cell::kBounded) return store_fixed(fixed(record) + slot * H_ + j, value, n);
      if (narrow && slot >= kFirstNarrow) return store_any<C>(dtype_, record, half(slot, j), value, n);
    }
    store_part(record + whole(slot, j), value, n);
  }
  DLK_INLINE void fetch(const C* record, int slot, int64_t j) const {
    if (narrow && slot < Cell::kBounded) {
      __builtin_prefetch(fixed(record) + slot * H_ + j);
    } else if (narrow && slot >= kFirstNarrow) {
      __builtin_prefetch(advance(record, dtype_, half(slot, j)));
    } else {
      __builtin_prefetch(record + whole(slot, j));
    }
  }

 private:
  static DLK_INLINE const fixed16* fixed(const C* record) {
    return static_cast<const fixed16*>(static_cast<const void*>(record));
  }
  static DLK_INLINE fixed16* fixed(C* record) { return static_cast<fixed16*>(static_cast<void*>(record)); }
  // Where value j of a slot is: of a narrow one in values of 16 bits, of another one in values of C.
  DLK_INLINE int64_t half(int slot, int64_t j) const { return (slot - kFirstNarrow + Cell::kBounded) * H_ + j; }
  DLK_INLINE int64_t whole(int slot, int64_t j) const { return whole_ + (slot - Cell::kBounded) * H_ + j; }

  const int64_t H_, whole_;
  const DType dtype_;
};

DLK_ISA_END
