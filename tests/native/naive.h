// An oracle for the recurrent layers, as slow and plain as possible: it computes one sequence after the other and one
// time step after the other, and every number is a double. It takes the same structs as the kernels and shares no code
// with them. With `pairs` the operands of matrix products and the terms of bias gradients are rounded to bf16, as the
// kernels that multiply pairs of bf16 do.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "rnn/params.h"
#include "naive_storage.h"

namespace dlk {
namespace naive {

// Row-major [rows, columns].
struct Matrix {
  int64_t rows = 0, columns = 0;
  Vector values;
  Matrix(int64_t r, int64_t c) : rows(r), columns(c), values(static_cast<size_t>(r * c), 0.0) {}
  Matrix(const void* data, int64_t r, int64_t c, DType dtype)
      : rows(r), columns(c), values(load_vector(data, 0, r * c, dtype)) {}

  void add_product(const Vector& x, Vector* y) const {  // y += M x
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) (*y)[r] += values[r * columns + c] * x[c];
    }
  }
  void add_transposed_product(const Vector& y, Vector* x) const {  // x += M' y
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) (*x)[c] += values[r * columns + c] * y[r];
    }
  }
  void add_outer(const Vector& y, const Vector& x) {  // M += y x'
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) values[r * columns + c] += y[r] * x[c];
    }
  }
};

inline Vector operand(Vector values, bool pairs) {
  for (double& value : values)
    if (pairs) value = bits_to_float(static_cast<uint32_t>(double_to_bfloat(value)) << 16);
  return values;
}

inline double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

inline void add(const Vector& from, Vector* to) {
  for (size_t i = 0; i < from.size(); ++i) (*to)[i] += from[i];
}

struct Weights {
  Matrix w_ih, w_hh, w_hr;
  Vector b_ih, b_hh;
  Weights(const DirectionWeights& w, const LayerShape& s, bool pairs)
      : w_ih(w.w_ih, gate_count(s.cell) * s.H, s.I, w.dtype),
        w_hh(w.w_hh, gate_count(s.cell) * s.H, s.outputs(), w.dtype),
        w_hr(w.w_hr, s.P, s.H, w.dtype),
        b_ih(load_vector(w.b_ih, 0, gate_count(s.cell) * s.H, w.dtype)),
        b_hh(load_vector(w.b_hh, 0, gate_count(s.cell) * s.H, w.dtype)) {
    w_ih.values = operand(w_ih.values, pairs);
    w_hh.values = operand(w_hh.values, pairs);
    w_hr.values = operand(w_hr.values, pairs);
  }
};

// A saved record has S * H + P values, or H fewer without the state slot (the last one). In a narrow record the slots
// of 16 bits come first: the bounded ones, whose values are multiples of 1/32767, then the narrow ones in the layer's
// dtype.
struct RecordPart {
  int64_t at, begin, end;  // the values [begin, end) lie `at` bytes behind the start of the record
  DType dtype;
  bool fixed;
};

inline std::vector<RecordPart> record_parts(const LayerShape& s) {
  const CellTraits traits = cell_traits(s.cell);
  const int64_t all = traits.saved * s.H, state = all - s.H, kept = s.keeps_state() ? all : state;
  const DType compute = compute_dtype(s.dtype);
  const int64_t bytes = compute == DType::f64 ? 8 : 4;
  if (!s.narrow) return {{0, 0, kept, compute, false}, {kept * bytes, all, all + s.P, compute, false}};
  const int64_t bounded = traits.bounded * s.H, narrow = all - traits.narrow * s.H;
  const int64_t in_whole = std::min(kept, narrow) - bounded, in_narrow = kept - std::min(kept, narrow);
  const int64_t whole_at = (2 * (bounded + in_narrow) + 3) / 4 * 4;
  return {{0, 0, bounded, DType::f16, true},
          {2 * bounded, narrow, narrow + in_narrow, s.dtype, false},
          {whole_at, bounded, bounded + in_whole, compute, false},
          {whole_at + 4 * in_whole, all, all + s.P, compute, false}};
}

inline double load_part(const void* record, const RecordPart& part, int64_t i) {
  const char* from = static_cast<const char*>(record) + part.at;
  if (!part.fixed) return load(from, i - part.begin, part.dtype);
  int16_t steps;
  std::memcpy(&steps, from + 2 * (i - part.begin), sizeof steps);
  return steps == -32768 ? NAN : steps / 32767.0;
}

inline char* record_at(const LayerShape& s, const void* saved, int64_t row) {
  const int64_t bytes = compute_dtype(s.dtype) == DType::f64 ? 8 : 4;
  return static_cast<char*>(const_cast<void*>(saved)) + row * s.record() * bytes;
}

inline void store_record(const LayerShape& s, void* saved, int64_t row, const Vector& values) {
  if (!saved) return;
  for (const RecordPart& part : record_parts(s)) {
    char* to = record_at(s, saved, row) + part.at;
    for (int64_t i = part.begin; i < part.end; ++i) {
      const double value = values[static_cast<size_t>(i)];
      if (part.fixed) {
        const auto steps = static_cast<int16_t>(std::isnan(value) ? -32768 : std::nearbyint(value * 32767.0));
        std::memcpy(to + 2 * (i - part.begin), &steps, sizeof steps);
      } else {
        store(to, i - part.begin, part.dtype, value);
      }
    }
  }
}

// All S * H + P values; c' of a record without it is computed from the gates and the c before, and h' is 0.
inline Vector load_record(const LayerShape& s, const void* saved, int64_t row, const Vector& c_before) {
  Vector values(static_cast<size_t>(saved_slots(s.cell) * s.H + s.P), 0.0);
  for (const RecordPart& part : record_parts(s)) {
    for (int64_t i = part.begin; i < part.end; ++i) values[i] = load_part(record_at(s, saved, row), part, i);
  }
  if (s.cell == CellKind::lstm && !s.keeps_state()) {
    const auto slot = [&](int64_t k, int64_t j) { return values[k * s.H + j]; };
    for (int64_t j = 0; j < s.H; ++j) values[4 * s.H + j] = slot(1, j) * c_before[j] + slot(0, j) * slot(2, j);
  }
  return values;
}

// h' of a saved record: the projection if the layer has one, otherwise the cell's own output.
inline Vector saved_h(const LayerShape& s, const Vector& record) {
  const auto slot = [&](int64_t k, int64_t j) { return record[k * s.H + j]; };
  if (s.P) return Vector(record.begin() + saved_slots(s.cell) * s.H, record.end());
  Vector h(static_cast<size_t>(s.H));
  for (int64_t j = 0; j < s.H; ++j) {
    switch (s.cell) {
      case CellKind::lstm:
        h[j] = slot(3, j) * std::tanh(slot(4, j));
        break;
      case CellKind::gru:
        h[j] = slot(4, j);
        break;
      case CellKind::rnn_tanh:
      case CellKind::rnn_relu:
        h[j] = slot(0, j);
        break;
    }
  }
  return h;
}

// Finds the row of a time step of a sequence, for padded, packed and `lengths` input.
struct Walk {
  const LayerShape& shape;
  const int64_t *batch_sizes, *lengths;
  const uint8_t* resets = nullptr;

  // Whether the state is zero before step s of direction d: a flag at t stands between the steps t - 1 and t.
  bool is_reset(int d, int64_t s, int64_t length, int64_t b) const {
    const int64_t later = d == 0 ? time(d, s, length) : time(d, s, length) + 1;
    return resets && later < length && resets[row(later, b)];
  }
  int64_t length(int64_t b) const {
    if (lengths) return lengths[b];
    if (!batch_sizes) return shape.T;
    int64_t n = 0;
    while (n < shape.T && batch_sizes[n] > b) ++n;
    return n;
  }
  // The time index of step s of direction d, which runs backwards in direction 1.
  int64_t time(int d, int64_t s, int64_t length) const { return d == 0 ? s : length - 1 - s; }
  int64_t row(int64_t t, int64_t b) const {
    if (!batch_sizes) return t * shape.B + b;
    int64_t first = 0;
    for (int64_t i = 0; i < t; ++i) first += batch_sizes[i];
    return first + b;
  }
  template <class Pointer>
  int64_t offset(const RowTensor<Pointer>& tensor, int64_t t, int64_t b) const {
    return batch_sizes ? row(t, b) * tensor.t : t * tensor.t + b * tensor.b;
  }
  // Visits every padding row, that is, every time index past the end of a sequence.
  template <class Visit>
  void padding(Visit visit) const {
    if (batch_sizes) return;
    for (int64_t b = 0; b < shape.B; ++b) {
      for (int64_t t = length(b); t < shape.T; ++t) visit(t, b);
    }
  }
};

inline void forward(const ForwardParams& p, bool pairs = false) {
  const LayerShape& s = p.shape;
  const int64_t H = s.H, O = s.outputs(), S = saved_slots(s.cell), GH = gate_count(s.cell) * H;
  const Walk walk{s, p.batch_sizes, p.lengths, p.resets};

  for (int d = 0; d < s.D; ++d) {
    const Weights w(p.weights[d], s, pairs);
    for (int64_t b = 0; b < s.B; ++b) {
      const int64_t state = d * s.B + b, length = walk.length(b);
      Vector h = load_vector(p.h0.data, state * O, O, p.h0.dtype);
      Vector c = load_vector(s.cell == CellKind::lstm ? p.c0.data : nullptr, state * H, H, p.c0.dtype);
      for (int64_t step = 0; step < length; ++step) {
        const int64_t t = walk.time(d, step, length);
        if (walk.is_reset(d, step, length, b)) {
          h.assign(h.size(), 0.0);
          c.assign(c.size(), 0.0);
        }
        const Vector x = operand(load_vector(p.x.data, walk.offset(p.x, t, b), s.I, p.x.dtype), pairs);
        Vector from_x = w.b_ih, from_h = w.b_hh;
        w.w_ih.add_product(x, &from_x);
        w.w_hh.add_product(operand(h, pairs), &from_h);
        Vector a(static_cast<size_t>(GH)), saved(static_cast<size_t>(S * H)), raw(static_cast<size_t>(H));
        for (int64_t i = 0; i < GH; ++i) a[i] = from_x[i] + from_h[i];
        for (int64_t j = 0; j < H; ++j) {
          switch (s.cell) {
            case CellKind::lstm: {
              const double i = sigmoid(a[j]), f = sigmoid(a[H + j]), g = std::tanh(a[2 * H + j]);
              const double o = sigmoid(a[3 * H + j]);
              c[j] = f * c[j] + i * g;
              raw[j] = o * std::tanh(c[j]);
              saved[j] = i, saved[H + j] = f, saved[2 * H + j] = g, saved[3 * H + j] = o, saved[4 * H + j] = c[j];
              break;
            }
            case CellKind::gru: {
              const double r = sigmoid(a[j]), z = sigmoid(a[H + j]), hidden = from_h[2 * H + j];
              const double n = std::tanh(from_x[2 * H + j] + r * hidden);
              raw[j] = (1 - z) * n + z * h[j];
              saved[j] = r, saved[H + j] = z, saved[2 * H + j] = n, saved[3 * H + j] = hidden;
              saved[4 * H + j] = raw[j];
              break;
            }
            case CellKind::rnn_tanh:
              raw[j] = saved[j] = std::tanh(a[j]);
              break;
            case CellKind::rnn_relu:
              raw[j] = saved[j] = a[j] > 0 || std::isnan(a[j]) ? a[j] : 0.0;
              break;
          }
        }
        if (s.P) {
          h.assign(static_cast<size_t>(O), 0.0);
          w.w_hr.add_product(operand(raw, pairs), &h);
        } else {
          h = raw;
        }
        if (s.P) saved.insert(saved.end(), h.begin(), h.end());
        store_record(s, p.saved, d * s.rows + walk.row(t, b), saved);
        if (p.y.data) store_vector(p.y.data, walk.offset(p.y, t, b) + d * O, h, p.y.dtype);
        if (p.cells.data) store_vector(p.cells.data, walk.offset(p.cells, t, b) + d * H, c, p.cells.dtype);
      }
      store_vector(p.h_n.data, state * O, h, p.h_n.dtype);
      if (s.cell == CellKind::lstm) store_vector(p.c_n.data, state * H, c, p.c_n.dtype);
    }
  }
  const auto clear_padding = [&](const RowTensor<void*>& rows, int64_t features) {
    if (!rows.data) return;
    walk.padding([&](int64_t t, int64_t b) {
      store_vector(rows.data, walk.offset(rows, t, b), Vector(static_cast<size_t>(s.D * features), 0.0), rows.dtype);
    });
  };
  clear_padding(p.y, O);
  clear_padding(p.cells, H);
}

// The gradients that one backward step through the cell equations gives.
struct StepGrads {
  Vector input;   // of the pre-activations W_ih x + b_ih, [G*H]
  Vector hidden;  // of the pre-activations W_hh h + b_hh, [G*H]
  Vector slots;   // in the layout of BackwardParams::gate_grads
  Vector h_prev;  // the part of the gradient of the previous h that does not pass through W_hh
};

inline StepGrads cell_step_backward(const LayerShape& s, const Vector& saved, const Vector& y, const Vector& c_prev,
                                    const Vector& h_prev, const Vector& dh, Vector* dc) {
  const int64_t H = s.H, GH = gate_count(s.cell) * H;
  StepGrads g{Vector(static_cast<size_t>(GH)),
              {},
              Vector(static_cast<size_t>(gate_grad_slots(s.cell) * H)),
              Vector(static_cast<size_t>(H), 0.0)};
  g.hidden = g.input;
  for (int64_t j = 0; j < H; ++j) {
    switch (s.cell) {
      case CellKind::lstm: {
        const double i = saved[j], f = saved[H + j], n = saved[2 * H + j], o = saved[3 * H + j];
        const double tanh_c = std::tanh(saved[4 * H + j]);
        const double dcj = (*dc)[j] + dh[j] * o * (1 - tanh_c * tanh_c);
        g.input[j] = dcj * n * i * (1 - i);
        g.input[H + j] = dcj * c_prev[j] * f * (1 - f);
        g.input[2 * H + j] = dcj * i * (1 - n * n);
        g.input[3 * H + j] = dh[j] * tanh_c * o * (1 - o);
        (*dc)[j] = dcj * f;
        break;
      }
      case CellKind::gru: {
        const double r = saved[j], z = saved[H + j], n = saved[2 * H + j], hidden = saved[3 * H + j];
        const double dn = dh[j] * (1 - z) * (1 - n * n);
        g.input[j] = dn * hidden * r * (1 - r);
        g.input[H + j] = dh[j] * (h_prev[j] - n) * z * (1 - z);
        g.input[2 * H + j] = dn;
        g.slots[3 * H + j] = dn * r;
        g.h_prev[j] = dh[j] * z;
        break;
      }
      case CellKind::rnn_tanh:
        g.input[j] = dh[j] * (1 - y[j] * y[j]);
        break;
      case CellKind::rnn_relu:
        g.input[j] = y[j] <= 0 ? 0.0 : dh[j];
        break;
    }
  }
  g.hidden = g.input;
  for (int64_t i = 0; i < GH; ++i) g.slots[i] = g.input[i];
  if (s.cell == CellKind::gru) {
    for (int64_t j = 0; j < H; ++j) g.hidden[2 * H + j] = g.slots[3 * H + j];
  }
  return g;
}

inline void backward(const BackwardParams& p, bool pairs = false) {
  const LayerShape& s = p.shape;
  const int64_t H = s.H, O = s.outputs(), GH = gate_count(s.cell) * H;
  const int64_t slots = gate_grad_slots(s.cell);
  const bool lstm = s.cell == CellKind::lstm;
  const Walk walk{s, p.batch_sizes, p.lengths, p.resets};
  const DType compute = compute_dtype(s.dtype);
  Matrix dx(s.rows, s.I);

  for (int d = 0; d < s.D; ++d) {
    const Weights w(p.weights[d], s, pairs);
    Matrix dw_ih(GH, s.I), dw_hh(GH, O), dw_hr(s.P, H), db_ih(GH, 1), db_hh(GH, 1);
    const Vector one(1, 1.0);
    for (int64_t b = 0; b < s.B; ++b) {
      const int64_t state = d * s.B + b, length = walk.length(b);
      Vector dh = load_vector(p.dh_n.data, state * O, O, p.dh_n.dtype);
      Vector dc = load_vector(lstm ? p.dc_n.data : nullptr, state * H, H, p.dc_n.dtype);
      for (int64_t step = length - 1; step >= 0; --step) {
        const int64_t t = walk.time(d, step, length), row = walk.row(t, b);
        const int64_t before = step > 0 ? walk.time(d, step - 1, length) : -1;
        const Vector c0 = load_vector(lstm ? p.c0.data : nullptr, state * H, H, p.c0.dtype);
        const auto record = [&](int64_t at) { return load_record(s, p.saved, d * s.rows + walk.row(at, b), c0); };
        const Vector x = operand(load_vector(p.x.data, walk.offset(p.x, t, b), s.I, p.x.dtype), pairs);
        const Vector saved = record(t), y = saved_h(s, saved);
        const Vector past = step > 0 ? record(before) : Vector();
        Vector h_prev = step > 0 ? saved_h(s, past) : load_vector(p.h0.data, state * O, O, p.h0.dtype);
        Vector c_prev;
        if (lstm) {
          c_prev = step > 0 ? Vector(past.begin() + 4 * H, past.begin() + 5 * H) : c0;
        }
        const bool reset = walk.is_reset(d, step, length, b);
        if (reset) {
          h_prev.assign(h_prev.size(), 0.0);
          c_prev.assign(c_prev.size(), 0.0);
        }

        if (p.dcells.data) add(load_vector(p.dcells.data, walk.offset(p.dcells, t, b) + d * H, H, p.dcells.dtype), &dc);
        if (p.dy.data) add(load_vector(p.dy.data, walk.offset(p.dy, t, b) + d * O, O, p.dy.dtype), &dh);
        Vector d_raw = dh;
        if (s.P) {
          store_vector(p.proj_grads, (d * s.rows + row) * s.P, dh, compute);
          Vector raw(static_cast<size_t>(H));
          for (int64_t j = 0; j < H; ++j) raw[j] = saved[3 * H + j] * std::tanh(saved[4 * H + j]);
          const Vector projected = operand(dh, pairs);
          dw_hr.add_outer(projected, operand(raw, pairs));
          d_raw.assign(static_cast<size_t>(H), 0.0);
          w.w_hr.add_transposed_product(projected, &d_raw);
        }
        const StepGrads g = cell_step_backward(s, saved, y, c_prev, h_prev, d_raw, &dc);
        store_vector(p.gate_grads, (d * s.rows + row) * slots * H, g.slots, compute);

        const Vector input = operand(g.input, pairs), hidden = operand(g.hidden, pairs);
        Vector dx_row(static_cast<size_t>(s.I), 0.0);
        w.w_ih.add_transposed_product(input, &dx_row);
        for (int64_t i = 0; i < s.I; ++i) dx.values[row * s.I + i] += dx_row[i];
        dw_ih.add_outer(input, x);
        dw_hh.add_outer(hidden, operand(h_prev, pairs));
        db_ih.add_outer(input, one);
        db_hh.add_outer(hidden, one);

        dh.assign(static_cast<size_t>(O), 0.0);
        const bool cut = reset || (p.bptt_steps > 0 && step > 0 && step % p.bptt_steps == 0);
        if (cut) {
          dc.assign(static_cast<size_t>(H), 0.0);
        } else {
          w.w_hh.add_transposed_product(hidden, &dh);
          if (!s.P) add(g.h_prev, &dh);
        }
      }
      store_vector(p.dh0.data, state * O, dh, p.dh0.dtype);
      if (lstm) store_vector(p.dc0.data, state * H, dc, p.dc0.dtype);
    }
    const DType of_weights = p.weights[d].dtype;
    store_vector(p.grads[d].w_ih, 0, dw_ih.values, of_weights);
    store_vector(p.grads[d].w_hh, 0, dw_hh.values, of_weights);
    store_vector(p.grads[d].b_ih, 0, db_ih.values, of_weights);
    store_vector(p.grads[d].b_hh, 0, db_hh.values, of_weights);
    store_vector(p.grads[d].w_hr, 0, dw_hr.values, of_weights);
    walk.padding([&](int64_t t, int64_t b) {
      const int64_t row = d * s.rows + walk.row(t, b);
      store_vector(p.gate_grads, row * slots * H, Vector(static_cast<size_t>(slots * H), 0.0), compute);
      store_vector(p.proj_grads, row * s.P, Vector(static_cast<size_t>(s.P), 0.0), compute);
    });
  }
  if (!p.dx.data) return;
  for (int64_t b = 0; b < s.B; ++b) {
    const int64_t length = p.batch_sizes ? walk.length(b) : s.T;
    for (int64_t t = 0; t < length; ++t) {
      const auto first = dx.values.begin() + walk.row(t, b) * s.I;
      store_vector(p.dx.data, walk.offset(p.dx, t, b), Vector(first, first + s.I), p.dx.dtype);
    }
  }
}

}  // namespace naive
}  // namespace dlk
