// reference.h for layers with layer normalisation, zoneout and recurrent dropout: plain loops that share no code with
// the kernels. The gradients of products are results of their own.
#pragma once

#include "reference.h"

namespace reference {

struct VariantProblem {
  Problem plain;  // lstm or gru, without resets, c of every step and its gradient
  bool normalised;
  double eps, zoneout_c, zoneout_h;             // the rates count where there is no mask
  std::vector<double> g_ih, g_hh, g_c, c_bias;  // [D, G*H], [D, H]; c_bias may be empty
  std::vector<double> dropout;                  // [D, B, H] or empty
  std::vector<bool> mask_c, mask_h;             // [D, T, B, H] or empty
};

struct VariantResult {
  std::vector<double> y, h_n, c_n, operand;                       // operand: [D, T, B, H], what W_hh multiplies
  std::vector<double> of_input, of_hidden, dh0, dc0;              // [D, T, B, G*H], [D, B, H]
  std::vector<double> db_ih, db_hh, dg_ih, dg_hh, dg_c, dc_bias;  // [D, G*H], [D, H]
};

// Values around their mean, over their deviation.
template <class C>
struct Normalised {
  std::vector<C> values;
  C scale = 1;

  static Normalised of(const C* from, int count, double eps) {
    C mean = 0, variance = 0;
    for (int k = 0; k < count; ++k) mean += from[k];
    mean /= static_cast<C>(count);
    for (int k = 0; k < count; ++k) variance += (from[k] - mean) * (from[k] - mean);
    Normalised n;
    n.scale = C(1) / std::sqrt(variance / static_cast<C>(count) + static_cast<C>(eps));
    for (int k = 0; k < count; ++k) n.values.push_back((from[k] - mean) * n.scale);
    return n;
  }
  // The gradient of what was normalised, from that of the values.
  std::vector<C> gradient(const std::vector<C>& of_values) const {
    const size_t count = values.size();
    C sum = 0, along = 0;
    for (size_t k = 0; k < count; ++k) sum += of_values[k], along += of_values[k] * values[k];
    std::vector<C> result;
    for (size_t k = 0; k < count; ++k) {
      result.push_back(scale *
                       (of_values[k] - sum / static_cast<C>(count) - values[k] * (along / static_cast<C>(count))));
    }
    return result;
  }
};

template <class C, class Round>
VariantResult run_variant(const VariantProblem& v, const Round& round) {
  const Problem& p = v.plain;
  const int H = p.H, G = dlk::gate_count(p.cell), GH = G * H;
  const bool lstm = p.cell == CellKind::lstm;
  // The parts of the products that are normalised together.
  const std::vector<std::pair<int, int>> parts =
      lstm ? std::vector<std::pair<int, int>>{{0, GH}} : std::vector<std::pair<int, int>>{{0, 2 * H}, {2 * H, H}};
  const auto sigmoid = [](C x) { return C(1) / (C(1) + std::exp(-x)); };
  const auto at = [](const std::vector<double>& from, size_t i) {
    return from.empty() ? C(0) : static_cast<C>(from[i]);
  };
  const size_t states = static_cast<size_t>(p.D) * p.B * H, rows = static_cast<size_t>(p.D) * p.T * p.B;
  VariantResult r;
  r.y.assign(static_cast<size_t>(p.T) * p.B * p.D * H, 0.0);
  r.h_n.assign(states, 0.0);
  r.c_n = r.dh0 = r.dc0 = r.h_n;
  r.operand.assign(rows * H, 0.0);
  r.of_input.assign(rows * GH, 0.0);
  r.of_hidden = r.of_input;
  std::vector<C> db_ih(static_cast<size_t>(p.D) * GH, C(0)), dg_c(static_cast<size_t>(p.D) * H, C(0));
  std::vector<C> db_hh = db_ih, dg_ih = db_ih, dg_hh = db_ih, dc_bias = dg_c;

  struct Step {
    std::vector<C> gate[4], own_c, c, h;  // gru: r, z, n, and what r multiplies; own_c: before zoneout
    std::vector<C> operand, seen_c;
    std::vector<Normalised<C>> x, hidden;  // by part
    Normalised<C> of_c;
  };
  for (int d = 0; d < p.D; ++d) {
    const double* w = p.w_hh.data() + static_cast<size_t>(d) * GH * H;
    const size_t of_gates = static_cast<size_t>(d) * GH, of_units = static_cast<size_t>(d) * H;
    for (int b = 0; b < p.B; ++b) {
      const int length = p.lengths[b];
      const size_t state = (static_cast<size_t>(d) * p.B + b) * H;
      const auto row_at = [&](int s) { return (static_cast<size_t>(d) * p.T + (d ? length - 1 - s : s)) * p.B + b; };
      const auto y_at = [&](int s) {
        return (static_cast<size_t>(d ? length - 1 - s : s) * p.B + b) * p.D * H + static_cast<size_t>(d) * H;
      };
      // How much of its old value a unit keeps.
      const auto kept = [&](const std::vector<bool>& mask, double rate, size_t row, int j) {
        return mask.empty() ? static_cast<C>(rate) : mask[row * H + j] ? C(1) : C(0);
      };
      std::vector<Step> steps(static_cast<size_t>(length) + 1);
      for (int j = 0; j < H; ++j) {
        steps[0].h.push_back(at(p.h0, state + j));
        steps[0].c.push_back(at(p.c0, state + j));
      }
      for (int s = 0; s < length; ++s) {
        const Step& before = steps[s];
        Step& now = steps[s + 1];
        const size_t row = row_at(s);
        for (int j = 0; j < H; ++j) {
          now.operand.push_back(
              static_cast<C>(round(before.h[j] * (v.dropout.empty() ? C(1) : at(v.dropout, state + j)))));
          r.operand[row * H + j] = now.operand[j];
        }
        std::vector<C> x(GH), hidden(GH, C(0));
        for (int i = 0; i < GH; ++i) {
          x[i] = static_cast<C>(p.gates[row * GH + i]);
          for (int k = 0; k < H; ++k) hidden[i] += static_cast<C>(w[static_cast<size_t>(i) * H + k]) * now.operand[k];
        }
        for (const auto& [first, count] : parts) {
          if (!v.normalised) break;
          now.x.push_back(Normalised<C>::of(&x[first], count, v.eps));
          now.hidden.push_back(Normalised<C>::of(&hidden[first], count, v.eps));
          for (int k = 0; k < count; ++k) {
            x[first + k] = now.x.back().values[k] * at(v.g_ih, of_gates + first + k);
            hidden[first + k] = now.hidden.back().values[k] * at(v.g_hh, of_gates + first + k);
          }
        }
        for (int i = 0; i < GH; ++i) x[i] += at(p.b_ih, of_gates + i), hidden[i] += at(p.b_hh, of_gates + i);
        std::vector<C> own_h;
        for (int j = 0; j < H; ++j) {
          const auto sum = [&](int g) { return x[g * H + j] + hidden[g * H + j]; };
          now.gate[0].push_back(sigmoid(sum(0)));
          now.gate[1].push_back(sigmoid(sum(1)));
          if (lstm) {
            now.gate[2].push_back(std::tanh(sum(2)));
            now.gate[3].push_back(sigmoid(sum(3)));
            now.own_c.push_back(now.gate[1][j] * before.c[j] + now.gate[0][j] * now.gate[2][j]);
          } else {
            now.gate[3].push_back(hidden[2 * H + j]);
            now.gate[2].push_back(std::tanh(x[2 * H + j] + now.gate[0][j] * now.gate[3][j]));
            own_h.push_back((C(1) - now.gate[1][j]) * now.gate[2][j] + now.gate[1][j] * before.h[j]);
          }
        }
        if (lstm) {
          now.seen_c = now.own_c;
          if (v.normalised) now.of_c = Normalised<C>::of(now.own_c.data(), H, v.eps);
          for (int j = 0; j < H; ++j) {
            if (v.normalised) now.seen_c[j] = now.of_c.values[j] * at(v.g_c, of_units + j) + at(v.c_bias, of_units + j);
            own_h.push_back(now.gate[3][j] * std::tanh(now.seen_c[j]));
            const C keep = kept(v.mask_c, v.zoneout_c, row, j);
            now.c.push_back(keep * before.c[j] + (C(1) - keep) * now.own_c[j]);
          }
        } else {
          now.c.assign(H, C(0));
        }
        for (int j = 0; j < H; ++j) {
          const C keep = kept(v.mask_h, v.zoneout_h, row, j);
          now.h.push_back(keep * before.h[j] + (C(1) - keep) * own_h[j]);
          r.y[y_at(s) + j] = now.h[j];
        }
      }
      for (int j = 0; j < H; ++j)
        r.h_n[state + j] = steps[length].h[j], r.c_n[state + j] = lstm ? steps[length].c[j] : C(0);

      std::vector<C> dh(H), dc(H);
      for (int j = 0; j < H; ++j) dh[j] = at(p.dh_n, state + j), dc[j] = at(p.dc_n, state + j);
      for (int s = length - 1; s >= 0; --s) {
        const Step &before = steps[s], &now = steps[s + 1];
        const size_t row = row_at(s);
        std::vector<C> next_h(H), next_c(H, C(0)), of_x(GH), of_h(GH), of_own(H), of_seen(H);
        for (int j = 0; j < H; ++j) {
          const C keep = kept(v.mask_h, v.zoneout_h, row, j), grad = dh[j] + at(p.dy, y_at(s) + j);
          next_h[j] = keep * grad;
          of_own[j] = (C(1) - keep) * grad;
        }
        if (lstm) {
          for (int j = 0; j < H; ++j) {
            const C o = now.gate[3][j], seen = std::tanh(now.seen_c[j]);
            of_x[3 * H + j] = of_own[j] * seen * o * (C(1) - o);
            of_seen[j] = of_own[j] * o * (C(1) - seen * seen);
          }
          std::vector<C> of_c = of_seen;
          if (v.normalised) {
            for (int j = 0; j < H; ++j) {
              dg_c[of_units + j] += of_seen[j] * now.of_c.values[j];
              dc_bias[of_units + j] += of_seen[j];
              of_c[j] *= at(v.g_c, of_units + j);
            }
            of_c = now.of_c.gradient(of_c);
          }
          for (int j = 0; j < H; ++j) {
            const C keep = kept(v.mask_c, v.zoneout_c, row, j), i = now.gate[0][j], f = now.gate[1][j],
                    g = now.gate[2][j];
            of_c[j] += (C(1) - keep) * dc[j];
            next_c[j] = keep * dc[j] + of_c[j] * f;
            of_x[j] = of_c[j] * g * i * (C(1) - i);
            of_x[H + j] = of_c[j] * before.c[j] * f * (C(1) - f);
            of_x[2 * H + j] = of_c[j] * i * (C(1) - g * g);
          }
          of_h = of_x;
        } else {
          for (int j = 0; j < H; ++j) {
            const C reset = now.gate[0][j], z = now.gate[1][j], n = now.gate[2][j];
            const C dn = of_own[j] * (C(1) - z) * (C(1) - n * n);
            of_x[j] = of_h[j] = dn * now.gate[3][j] * reset * (C(1) - reset);
            of_x[H + j] = of_h[H + j] = of_own[j] * (before.h[j] - n) * z * (C(1) - z);
            of_x[2 * H + j] = dn;
            of_h[2 * H + j] = dn * reset;
            next_h[j] += of_own[j] * z;
          }
        }
        for (int i = 0; i < GH; ++i) db_ih[of_gates + i] += of_x[i], db_hh[of_gates + i] += of_h[i];
        for (size_t k = 0; k < parts.size() && v.normalised; ++k) {
          const auto back = [&](std::vector<C>* grad, const Normalised<C>& n, const std::vector<double>& gain,
                                std::vector<C>* of_gain) {
            std::vector<C> of_values;
            for (int m = 0; m < parts[k].second; ++m) {
              const size_t i = static_cast<size_t>(parts[k].first + m);
              (*of_gain)[of_gates + i] += (*grad)[i] * n.values[m];
              of_values.push_back((*grad)[i] * at(gain, of_gates + i));
            }
            const std::vector<C> through = n.gradient(of_values);
            for (int m = 0; m < parts[k].second; ++m) (*grad)[parts[k].first + m] = through[m];
          };
          back(&of_x, now.x[k], v.g_ih, &dg_ih);
          back(&of_h, now.hidden[k], v.g_hh, &dg_hh);
        }
        // Where the two sides differ, the gradients of products with an h_0 of zeros are left out.
        const bool left_out = s == 0 && p.h0.empty() && !(lstm && !v.normalised);
        for (int i = 0; i < GH; ++i) {
          r.of_input[row * GH + i] = of_x[i];
          r.of_hidden[row * GH + i] = left_out ? C(0) : of_h[i];
        }
        if (p.bptt_steps > 0 && s > 0 && s % p.bptt_steps == 0) {
          dh.assign(H, C(0));
          dc.assign(H, C(0));
          continue;
        }
        for (int k = 0; k < H; ++k) {
          C sum = 0;
          for (int i = 0; i < GH; ++i)
            sum += static_cast<C>(w[static_cast<size_t>(i) * H + k]) * static_cast<C>(round(of_h[i]));
          next_h[k] += sum * (v.dropout.empty() ? C(1) : at(v.dropout, state + k));
        }
        dh = next_h;
        dc = next_c;
      }
      for (int j = 0; j < H; ++j) r.dh0[state + j] = dh[j], r.dc0[state + j] = lstm ? dc[j] : C(0);
    }
  }
  r.db_ih.assign(db_ih.begin(), db_ih.end()), r.db_hh.assign(db_hh.begin(), db_hh.end());
  r.dg_ih.assign(dg_ih.begin(), dg_ih.end()), r.dg_hh.assign(dg_hh.begin(), dg_hh.end());
  r.dg_c.assign(dg_c.begin(), dg_c.end()), r.dc_bias.assign(dc_bias.begin(), dc_bias.end());
  return r;
}

}  // namespace reference
