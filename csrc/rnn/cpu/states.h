// Loads and stores of states (h0, c0, h_n, c_n and their gradients), each in its own dtype. An absent state is read as
// zeros and is not written.
#pragma once

#include "gemm/storage_access.h"
#include "rnn/params.h"

DLK_ISA_BEGIN

template <class C>
DLK_INLINE Vec<C> load_state(const StateTensor<const void*>& state, int64_t at, int n) {
  return state.data ? load_any<C>(state.dtype, state.data, at, n) : Vec<C>::zero();
}

template <class C>
DLK_INLINE void store_state(const StateTensor<void*>& state, int64_t at, Vec<C> value, int n) {
  if (state.data) store_any<C>(state.dtype, state.data, at, value, n);
}

DLK_ISA_END
