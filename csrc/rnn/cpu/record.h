// The record that the forward saves of each row for the backward: slots of H values of the compute type. In a call of a
// 16-bit dtype the last Cell::kNarrow slots have that dtype, so that h' takes no more memory than y does.
#pragma once

#include "gemm/storage_access.h"
#include "rnn/params.h"

DLK_ISA_BEGIN

template <class C, class Cell>
class Record {
  using V = Vec<C>;
  static constexpr int kWide = Cell::kSaved - Cell::kNarrow;

 public:
  explicit Record(const LayerShape& shape)
      : size(shape.record()), H_(shape.H), narrow_(shape.narrow), dtype_(shape.dtype) {}

  const int64_t size;  // of a record in values of C, including a projected h

  // Whether the products of all gates fit into wide slots.
  bool holds_products() const { return !narrow_ || Cell::kGates <= kWide; }

  // Loads n values of a slot from j on.
  DLK_INLINE V load(const C* record, int slot, int64_t j, int n) const {
    if (is_narrow(slot)) return load_any<C>(dtype_, record + kWide * H_, (slot - kWide) * H_ + j, n);
    return load_part(record + slot * H_ + j, n);
  }
  DLK_INLINE void store(C* record, int slot, int64_t j, V value, int n) const {
    if (is_narrow(slot)) {
      store_any<C>(dtype_, record + kWide * H_, (slot - kWide) * H_ + j, value, n);
    } else {
      store_part(record + slot * H_ + j, value, n);
    }
  }
  DLK_INLINE void fetch(const C* record, int slot, int64_t j) const {
    if (is_narrow(slot)) {
      __builtin_prefetch(advance(record + kWide * H_, dtype_, (slot - kWide) * H_ + j));
    } else {
      __builtin_prefetch(record + slot * H_ + j);
    }
  }

 private:
  DLK_INLINE bool is_narrow(int slot) const { return slot >= kWide && narrow_; }

  const int64_t H_;
  const bool narrow_;
  const DType dtype_;
};

DLK_ISA_END
