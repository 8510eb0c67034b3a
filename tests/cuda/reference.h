// A plain implementation of a layer's recurrence, one sequence after the other, which shares no code with the kernels.
// With C = double and no rounding it gives the exact results. With C = float, and with h and the gate gradients rounded
// to the layer's dtype where they are operands of a product, its error is the one that this dtype causes in any
// implementation, and is the measure of the tolerance.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "rnn/params.h"

namespace reference {

using dlk::CellKind;

struct Problem {
  CellKind cell;
  int T, B, H, D;
  int64_t bptt_steps;
  std::vector<int> lengths;                     // [B]
  std::vector<double> gates, w_hh, b_ih, b_hh;  // [D, T, B, G*H], [D, G*H, H], [D, G*H] or empty
  std::vector<double> h0, c0;                   // [D, B, H] or empty
  std::vector<double> dy, dcells, dh_n, dc_n;   // [T, B, D*H], [D, B, H]; or empty
  std::vector<bool> resets;                     // [T, B] or empty

  // Whether direction d takes step t with a state of zeros: the flag lies between it and the step that it took before.
  bool is_reset(int d, int t, int b) const {
    if (resets.empty()) return false;
    if (d == 0) return resets[static_cast<size_t>(t) * B + b];
    return t + 1 < lengths[b] && resets[static_cast<size_t>(t + 1) * B + b];
  }
};

struct Result {
  std::vector<double> y, cells, h_n, c_n;              // [T, B, D*H], [D, B, H]
  std::vector<double> dgates, dh0, dc0, db_ih, db_hh;  // [D, T, B, slots, H], [D, B, H], [D, G*H]
};

template <class C, class Round>
Result run(const Problem& p, const Round& round) {
  const int H = p.H, G = dlk::gate_count(p.cell), slots = dlk::gate_grad_slots(p.cell);
  const auto sigmoid = [](C x) { return C(1) / (C(1) + std::exp(-x)); };
  const auto at = [](const std::vector<double>& v, size_t i) { return v.empty() ? C(0) : static_cast<C>(v[i]); };
  Result r;
  r.y.assign(static_cast<size_t>(p.T) * p.B * p.D * H, 0.0);
  r.cells = r.y;
  r.h_n.assign(static_cast<size_t>(p.D) * p.B * H, 0.0);
  r.c_n = r.dh0 = r.dc0 = r.h_n;
  r.dgates.assign(static_cast<size_t>(p.D) * p.T * p.B * slots * H, 0.0);
  std::vector<C> db_ih(static_cast<size_t>(p.D) * G * H, C(0)), db_hh = db_ih;

  struct Step {
    std::vector<C> i, f, g, o, c, h;  // of the lstm; gru stores r, z, n and W_hn h + b_hn in i, f, g, o; rnn only h
  };
  Step none;  // the state before a step that is reset
  none.h.assign(H, C(0)), none.c = none.h;
  for (int d = 0; d < p.D; ++d) {
    const double* w = p.w_hh.data() + static_cast<size_t>(d) * G * H * H;
    for (int b = 0; b < p.B; ++b) {
      const int length = p.lengths[b];
      const size_t state = (static_cast<size_t>(d) * p.B + b) * H;
      const auto time = [&](int step) { return d == 0 ? step : length - 1 - step; };
      std::vector<Step> steps(static_cast<size_t>(length) + 1);
      Step& zero = steps[0];  // the state before step s is steps[s]
      for (int j = 0; j < H; ++j) {
        zero.h.push_back(at(p.h0, state + j));
        zero.c.push_back(at(p.c0, state + j));
      }
      for (int s = 0; s < length; ++s) {
        const Step& before = p.is_reset(d, time(s), b) ? none : steps[s];
        Step& now = steps[s + 1];
        const size_t row = (static_cast<size_t>(d) * p.T + time(s)) * p.B + b;
        std::vector<C> operand(H);
        for (int j = 0; j < H; ++j) operand[j] = static_cast<C>(round(before.h[j]));
        for (int j = 0; j < H; ++j) {
          C x[4], hidden[4];
          for (int g = 0; g < G; ++g) {
            C sum = 0;
            for (int k = 0; k < H; ++k) sum += static_cast<C>(w[(static_cast<size_t>(g) * H + j) * H + k]) * operand[k];
            x[g] =
                static_cast<C>(p.gates[row * G * H + g * H + j]) + at(p.b_ih, (static_cast<size_t>(d) * G + g) * H + j);
            hidden[g] = sum + at(p.b_hh, (static_cast<size_t>(d) * G + g) * H + j);
          }
          C h;
          if (p.cell == CellKind::lstm) {
            now.i.push_back(sigmoid(x[0] + hidden[0]));
            now.f.push_back(sigmoid(x[1] + hidden[1]));
            now.g.push_back(std::tanh(x[2] + hidden[2]));
            now.o.push_back(sigmoid(x[3] + hidden[3]));
            now.c.push_back(now.f[j] * before.c[j] + now.i[j] * now.g[j]);
            h = now.o[j] * std::tanh(now.c[j]);
          } else if (p.cell == CellKind::gru) {
            now.i.push_back(sigmoid(x[0] + hidden[0]));
            now.f.push_back(sigmoid(x[1] + hidden[1]));
            now.g.push_back(std::tanh(x[2] + now.i[j] * hidden[2]));
            now.o.push_back(hidden[2]);
            h = (C(1) - now.f[j]) * now.g[j] + now.f[j] * before.h[j];
          } else {
            const C sum = x[0] + hidden[0];
            h = p.cell == CellKind::rnn_tanh ? std::tanh(sum) : sum < C(0) ? C(0) : sum;
          }
          now.h.push_back(h);
          const size_t feature = (static_cast<size_t>(time(s)) * p.B + b) * p.D * H + static_cast<size_t>(d) * H + j;
          r.y[feature] = h;
          if (p.cell == CellKind::lstm) r.cells[feature] = now.c[j];
        }
      }
      for (int j = 0; j < H; ++j) {
        r.h_n[state + j] = steps[length].h[j];
        r.c_n[state + j] = p.cell == CellKind::lstm ? steps[length].c[j] : C(0);
      }

      std::vector<C> dh(H), dc(H);
      for (int j = 0; j < H; ++j) dh[j] = at(p.dh_n, state + j), dc[j] = at(p.dc_n, state + j);
      for (int s = length - 1; s >= 0; --s) {
        const bool reset = p.is_reset(d, time(s), b);
        const Step &before = reset ? none : steps[s], &now = steps[s + 1];
        const size_t row = (static_cast<size_t>(d) * p.T + time(s)) * p.B + b;
        std::vector<C> hidden(static_cast<size_t>(G) * H), next(H, C(0));
        for (int j = 0; j < H; ++j) {
          const size_t feature = (static_cast<size_t>(time(s)) * p.B + b) * p.D * H + static_cast<size_t>(d) * H + j;
          const C grad = dh[j] + at(p.dy, feature);
          dc[j] += at(p.dcells, feature);
          C out[4];
          if (p.cell == CellKind::lstm) {
            const C tanh_c = std::tanh(now.c[j]), sum = dc[j] + grad * now.o[j] * (C(1) - tanh_c * tanh_c);
            out[0] = sum * now.g[j] * now.i[j] * (C(1) - now.i[j]);
            out[1] = sum * before.c[j] * now.f[j] * (C(1) - now.f[j]);
            out[2] = sum * now.i[j] * (C(1) - now.g[j] * now.g[j]);
            out[3] = grad * tanh_c * now.o[j] * (C(1) - now.o[j]);
            dc[j] = sum * now.f[j];
          } else if (p.cell == CellKind::gru) {
            const C dn = grad * (C(1) - now.f[j]) * (C(1) - now.g[j] * now.g[j]);
            out[0] = dn * now.o[j] * now.i[j] * (C(1) - now.i[j]);
            out[1] = grad * (before.h[j] - now.g[j]) * now.f[j] * (C(1) - now.f[j]);
            out[2] = dn;
            out[3] = dn * now.i[j];
            next[j] = grad * now.f[j];
          } else if (p.cell == CellKind::rnn_tanh) {
            out[0] = grad * (C(1) - now.h[j] * now.h[j]);
          } else {
            out[0] = now.h[j] <= C(0) ? C(0) : grad;
          }
          for (int k = 0; k < slots; ++k) r.dgates[(row * slots + k) * H + j] = out[k];
          for (int g = 0; g < G; ++g) {
            const C to_hidden = p.cell == CellKind::gru && g == 2 ? out[3] : out[g];
            db_ih[(static_cast<size_t>(d) * G + g) * H + j] += out[g];
            db_hh[(static_cast<size_t>(d) * G + g) * H + j] += to_hidden;
            hidden[static_cast<size_t>(g) * H + j] = static_cast<C>(round(to_hidden));
          }
        }
        if (reset || (p.bptt_steps > 0 && s > 0 && s % p.bptt_steps == 0)) {
          dh.assign(H, C(0));
          dc.assign(H, C(0));
          continue;
        }
        for (int gj = 0; gj < G * H; ++gj) {
          for (int k = 0; k < H; ++k) next[k] += static_cast<C>(w[static_cast<size_t>(gj) * H + k]) * hidden[gj];
        }
        dh = next;
      }
      for (int j = 0; j < H; ++j) r.dh0[state + j] = dh[j], r.dc0[state + j] = p.cell == CellKind::lstm ? dc[j] : C(0);
    }
  }
  r.db_ih.assign(db_ih.begin(), db_ih.end());
  r.db_hh.assign(db_hh.begin(), db_hh.end());
  return r;
}

}  // namespace reference
