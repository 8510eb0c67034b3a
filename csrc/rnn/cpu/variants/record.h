// The record that the forward of a layer with layer normalisation, zoneout or recurrent dropout saves of each row for
// the backward. First come slots of H values, which have 16 bits in a call of a 16-bit dtype for the reasons that plain
// layers have (rnn/cpu/record.h): the gates as fixed16, and in that dtype the gru's W_hn h + b_hn after normalisation,
// h', and with layer normalisation the normalised W_ih x and W_hh h, G slots each. The lstm's c' and the moments
// (kMoments of rnn/variants.h) have the compute type.
#pragma once

#include "gemm/storage_access.h"
#include "rnn/variants.h"
#include "simd/fixed16.h"

DLK_ISA_BEGIN

template <class C, class Cell>
class RowRecord {
  using V = Vec<C>;

 public:
  // The slots behind the gates. Those of the gru have the numbers of its cell.
  static constexpr int kH = Cell::kCellState ? Cell::kBounded : Cell::kStateSlot;
  static constexpr int kInput = kH + 1, kHidden = kInput + Cell::kGates;

  RowRecord(const LayerShape& shape, const Variant& variant)
      : at(variant_parts(shape, variant)),
        H_(shape.H),
        narrow_(shape.narrow),
        dtype_(narrow_ ? shape.dtype : DType::f32) {}

  const VariantParts at;

  // n values from j on, counted from the first value of a slot. j may reach into the slots of the same product behind
  // it.
  DLK_INLINE V load(const C* record, int slot, int64_t j, int n) const {
    const int64_t value = slot * H_ + j;
    if (slot >= Cell::kBounded) return load_any<C>(dtype_, record, value, n);
    if constexpr (std::is_same_v<C, float>) {
      if (narrow_) return load_fixed(static_cast<const fixed16*>(static_cast<const void*>(record)) + value, n);
    }
    return load_part(record + value, n);
  }
  DLK_INLINE void store(C* record, int slot, int64_t j, V vector, int n) const {
    const int64_t value = slot * H_ + j;
    if (slot >= Cell::kBounded) return store_any<C>(dtype_, record, value, vector, n);
    if constexpr (std::is_same_v<C, float>) {
      if (narrow_) return store_fixed(static_cast<fixed16*>(static_cast<void*>(record)) + value, vector, n);
    }
    store_part(record + value, vector, n);
  }

 private:
  const int64_t H_;
  const bool narrow_;
  const DType dtype_;  // of the slots behind the gates, if C is not double
};

DLK_ISA_END
