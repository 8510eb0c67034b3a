// Packed right-hand sides for tile.h. A matrix of K rows and N columns is stored as panels of
// up to four vectors of columns, zero padded to whole vectors; a panel is one or two strips
// (strip_vectors), each [K][vectors * Vec::size]. Gate panels take one vector per gate for the same hidden units, so
// that the tile of a panel holds all that the cell equation of those units needs.
#pragma once

#include "gemm/operands.h"

DLK_ISA_BEGIN

struct PanelShape {
  int64_t K;        // length of the products, in items (tile.h)
  int64_t segment;  // values of one segment: K is one or more segments, each filled up with zeros to whole items
  int64_t N;        // columns; of one gate for gate panels
  int gates;        // 0: plain columns, else vector v of a panel belongs to gate v
  int lanes;        // Vec::size
  int vectors;      // per full panel

  // In products of `values` values, or of `segments` times as many.
  static PanelShape plain(int64_t values, int64_t N, int lanes, int segments = 1) {
    return {item_count(values) * segments, values, N, 0, lanes, kMaxVectors};
  }
  static PanelShape gated(int64_t values, int64_t H, int gates, int lanes) {
    return gates == 1 ? plain(values, H, lanes) : PanelShape{item_count(values), values, H, gates, lanes, gates};
  }
  int64_t units_per_panel() const { return gates ? lanes : static_cast<int64_t>(lanes) * vectors; }
  int64_t count() const { return (N + units_per_panel() - 1) / units_per_panel(); }
  // Vectors in panel p: the last plain panel may be narrower.
  int vectors_in(int64_t p) const {
    if (gates) return vectors;
    const int64_t left = (N - p * units_per_panel() + lanes - 1) / lanes;
    return left < vectors ? static_cast<int>(left) : vectors;
  }
  int64_t offset(int64_t p) const { return p * K * lanes * vectors; }
  int64_t largest() const { return K * lanes * vectors; }
  // Panel p, which is stored at `data`.
  template <class C>
  Panel<C> panel(const Stored<C>* data, int64_t p) const {
    const int count = vectors_in(p);
    return {data, K * strip_vectors(count) * lanes, count};
  }
  // Panels [begin, end) as far as they exist, to be prefetched while `rows` rows are multiplied with as many other
  // panels. It is empty if the prefetch would displace the rows from L2.
  template <class C>
  Ahead<C> ahead(const Stored<C>* base, int64_t begin, int64_t end, int64_t rows) const {
    if (begin < 0) begin = 0;
    if (end > count()) end = count();
    const int64_t item = sizeof(C), stored = sizeof(Stored<C>);
    if (2 * (offset(end) - offset(begin)) * stored + rows * K * item > (int64_t{768} << 10)) return {};
    return {base + offset(begin), base + offset(end)};
  }
  // Vector v of row k within a packed panel of `count` vectors.
  int64_t element(int count, int64_t k, int v) const {
    const int width = strip_vectors(count);
    return ((v / width * K + k) * width + v % width) * lanes;
  }
  int64_t elements() const { return (N + lanes - 1) / lanes * lanes * (gates ? gates : 1) * K; }
  // The column of the matrix at which vector v of panel p begins, and how many columns it has without the padding.
  int64_t column(int64_t p, int v) const { return gates ? v * N + p * lanes : (p * vectors + v) * int64_t{lanes}; }
  int valid(int64_t p, int v) const {
    const int64_t left = N - (gates ? p * lanes : column(p, v));
    return left < lanes ? static_cast<int>(left < 0 ? 0 : left) : lanes;
  }
};

// Packs panel p from w [columns][values], of one segment, by transposing blocks. A pair of bf16 values is moved as one
// float.
template <class C>
DLK_NOINLINE void pack_panel_transposed(const PanelShape& shape, int64_t p, DType dtype, const void* w, C* panel) {
  constexpr int kLanes = Vec<C>::size;
  const int vectors = shape.vectors_in(p);
  const int64_t K = shape.K, values = shape.segment, width = int64_t{strip_vectors(vectors)} * kLanes;
  alignas(64) C block[kLanes * kLanes];
  for (int v = 0; v < vectors; ++v) {
    const int64_t first = shape.column(p, v) * values;
    const int rows = shape.valid(p, v);
    for (int64_t k = 0; k < K; k += kLanes) {
      const int columns = static_cast<int>(K - k < kLanes ? K - k : kLanes);
      const int64_t at = k * kItemValues, left = std::min<int64_t>(values - at, columns * kItemValues);
      C* to = panel + shape.element(vectors, k, v);
      if (is_operand_type<C>(dtype) && values % kItemValues == 0 && left == columns * kItemValues) {
        transpose_block(static_cast<const C*>(advance(w, dtype, first + at)), values / kItemValues, rows, columns, to,
                        width);
      } else {
        for (int r = 0; r < rows && left > 0; ++r)
          load_operands<C>(dtype, advance(w, dtype, first + r * values + at), left, block + r * kLanes);
        transpose_block(block, kLanes, left > 0 ? rows : 0, columns, to, width);
      }
    }
  }
}

// Calls act(k, row, n) for each item k along K: it consists of the n values from `row` on, 0 to kItemValues.
template <class Act>
DLK_INLINE void each_item(const PanelShape& shape, Act act) {
  const int64_t items = item_count(shape.segment);
  for (int64_t k = 0, row = 0; k < shape.K; k += items, row += shape.segment)
    for (int64_t i = 0; i < items; ++i)
      act(k + i, row + i * kItemValues, std::min<int64_t>(shape.segment - i * kItemValues, kItemValues));
}

// Packs panel p from rows of N columns, one for each value along K; row(k) returns the address of row k. Plain panels
// only.
template <class C, class RowAt>
DLK_INLINE void pack_panel_rows(const PanelShape& shape, int64_t p, DType dtype, RowAt row, C* panel) {
  const int vectors = shape.vectors_in(p);
  const int64_t width = int64_t{strip_vectors(vectors)} * Vec<C>::size;
  C* to[kMaxVectors];
  int64_t column[kMaxVectors];
  int valid[kMaxVectors];
  for (int v = 0; v < vectors; ++v) {
    to[v] = panel + shape.element(vectors, 0, v);
    column[v] = shape.column(p, v);
    valid[v] = shape.valid(p, v);
  }
  each_item(shape, [&](int64_t k, int64_t at, int64_t count) __attribute__((always_inline)) {
    if constexpr (kPairs) {
      const void* even = row(count > 0 ? at : 0);
      const void* odd = count > 1 ? row(at + 1) : even;
      for (int v = 0; v < vectors; ++v) {
        const int n = count > 0 ? valid[v] : 0, m = count > 1 ? valid[v] : 0;
        if (dtype == DType::bf16) {
          Unit<C>::pairs(static_cast<const bf16*>(even) + column[v], n, static_cast<const bf16*>(odd) + column[v], m)
              .store(to[v] + k * width);
        } else {
          Unit<C>::pairs(load_any<C>(dtype, even, column[v], n), load_any<C>(dtype, odd, column[v], m))
              .store(to[v] + k * width);
        }
      }
    } else {
      const void* from = row(at);
      for (int v = 0; v < vectors; ++v) load_any<C>(dtype, from, column[v], valid[v]).store(to[v] + k * width);
    }
  });
}

// The same from rows that are computed: value(k, column, n) returns n values of row k.
template <class C, class Value>
DLK_INLINE void pack_panel_values(const PanelShape& shape, int64_t p, Value value, C* panel) {
  const int vectors = shape.vectors_in(p);
  const int64_t width = int64_t{strip_vectors(vectors)} * Vec<C>::size;
  for (int v = 0; v < vectors; ++v) {
    C* const to = panel + shape.element(vectors, 0, v);
    const int64_t column = shape.column(p, v);
    const int n = shape.valid(p, v);
    each_item(shape, [&](int64_t k, int64_t at, int64_t count) __attribute__((always_inline)) {
      if constexpr (kPairs) {
        const Vec<C> even = count > 0 ? value(at, column, n) : Vec<C>::zero();
        const Vec<C> odd = count > 1 ? value(at + 1, column, n) : Vec<C>::zero();
        Unit<C>::pairs(even, odd).store(to + k * width);
      } else {
        value(at, column, n).store(to + k * width);
      }
    });
  }
}

// Packs panel p from w [values][N], n contiguous.
template <class C>
DLK_NOINLINE void pack_panel_matrix(const PanelShape& shape, int64_t p, DType dtype, const void* w, C* panel) {
  constexpr int64_t kAhead = 8;  // the hardware's prefetchers do not follow rows that are far apart
  const int64_t row = shape.N * item_size(dtype), width = shape.vectors_in(p) * shape.lanes * item_size(dtype);
  const char* columns = static_cast<const char*>(advance(w, dtype, shape.column(p, 0)));
  const auto at = [&](int64_t k) {
    for (int64_t x = 0; x < width; x += 64) __builtin_prefetch(columns + (k + kAhead) * row + x);
    return advance(w, dtype, k * shape.N);
  };
  pack_panel_rows<C>(shape, p, dtype, at, panel);
}

// The panels of a right-hand side. Weights that serve many products are packed beforehand. For a single product each
// panel is packed on the fly and used while it is in the cache: packing beforehand would move the whole matrix through
// memory twice more.
template <class C>
class Panels {
 public:
  using Pack = void (*)(const PanelShape& shape, int64_t p, DType dtype, const void* w, Stored<C>* panel);

  Panels(const PanelShape& shape, const Stored<C>* packed) : shape_(shape), packed_(packed) {}
  Panels(const PanelShape& shape, Pack pack, DType dtype, const void* w, Stored<C>* buffer)
      : shape_(shape), pack_(pack), dtype_(dtype), weights_(w), buffer_(buffer) {}

  const PanelShape& shape() const { return shape_; }
  // Valid until the next panel is packed into the same buffer.
  Panel<C> at(int64_t p) const {
    if (packed_) return shape_.panel<C>(packed_ + shape_.offset(p), p);
    pack_(shape_, p, dtype_, weights_, buffer_);
    return shape_.panel<C>(buffer_, p);
  }
  Ahead<C> ahead(int64_t begin, int64_t end, int64_t rows) const {
    return packed_ ? shape_.ahead<C>(packed_, begin, end, rows) : Ahead<C>{};
  }

 private:
  const PanelShape& shape_;
  const Stored<C>* packed_ = nullptr;
  Pack pack_ = nullptr;
  DType dtype_ = DType::f32;
  const void* weights_ = nullptr;
  Stored<C>* buffer_ = nullptr;
};

DLK_ISA_END
