// Reads and writes of a layer's tensors, each in its own dtype: rows as products take them, and states.

// Whether products take values of this dtype as they lie.
template <class C>
DLK_INLINE bool is_operand_type(DType dtype) {
  return kPairs ? dtype == DType::bf16 : is_compute_type<C>(dtype);
}

// A row of n values as products take it; out must hold whole vectors of items.
template <class C>
DLK_INLINE void load_operands(DType dtype, const void* p, int64_t n, C* out) {
  constexpr int kSize = Vec<C>::size;
  if constexpr (kPairs) {
    if (dtype == DType::bf16) return load_row<C>(DType::f32, p, item_count(n), out);
    bf16* to = reinterpret_cast<bf16*>(out);
    for (int64_t j = 0; j < n; j += kSize)
      Unit<C>::round(load_any<C>(dtype, p, j, static_cast<int>(n - j < kSize ? n - j : kSize)), to + j);
  } else {
    load_row<C>(dtype, p, n, out);
  }
}

// States, which may be absent: read as zeros, and not written.
template <class C>
DLK_INLINE Vec<C> load_state(const StateTensor<const void*>& state, int64_t at, int n) {
  return state.data ? load_any<C>(state.dtype, state.data, at, n) : Vec<C>::zero();
}

template <class C>
DLK_INLINE void store_state(const StateTensor<void*>& state, int64_t at, Vec<C> value, int n) {
  if (state.data) store_any<C>(state.dtype, state.data, at, value, n);
}
