// Compares the attention kernels with attention_naive.h over random calls, without torch:
//   attention_test [cases] [seed]
// Buffers have exactly the size that the kernels may use and are filled with NaN until they are written, scratch memory
// included. In half of the cases inputs that no result may depend on are NaN. Meant to run under sanitizers.
#include <cstdlib>
#include <cstring>
#include <map>

#include "core/runtime_flags.h"
#include "attention_naive.h"
#include "cases.h"
#include "check.h"
#include "pool.h"

namespace dlk {
namespace {

// A tensor [B, H, rows, width]. With packed sequences its memory is [all rows, H, width]; with rows_first it is
// [B, rows, H, width].
struct Heads {
  Buffer buffer;
  int64_t b = 0, h = 0, row = 0;

  Heads() = default;
  Heads(int64_t B, int64_t H, int64_t rows, int64_t width, DType dtype, bool packed, bool rows_first) {
    buffer = Buffer(B * H * rows * width, dtype);
    b = packed ? 0 : H * rows * width;
    h = rows_first || packed ? width : rows * width;
    row = rows_first || packed ? H * width : width;
  }
  void fill(Random& random) { buffer = Buffer::random(buffer.count(), buffer.dtype(), random, 1.5); }
  HeadTensor<const void*> read() const { return {buffer.get(), b, h, row}; }
  HeadTensor<void*> write() const { return {buffer.get(), b, h, row}; }
};

// The softmax statistics of a call.
struct Statistics {
  Heads top, weight;
  SoftmaxStatistics<void*> write() const { return {top.write(), weight.write()}; }
  SoftmaxStatistics<const void*> read() const { return {top.read(), weight.read()}; }
};

struct AttentionCase {
  AttentionInputs in{};
  Isa isa = Isa::scalar;
  int threads = 1;
  bool grad_lse = true, need_q = true, need_kv = true;
  int64_t map_rows = 1, map_cols = 1;
  std::vector<int32_t> cu_q, cu_k;
  std::vector<double> slopes, sinks;
  Heads q, k, v, grad_o, dlse;
  Buffer mask;

  bool packed() const { return in.cu_q != nullptr; }
  int64_t batch() const { return packed() ? 1 : in.shape.B; }
  DType compute() const { return naive::compute_dtype(in.shape.dtype); }
  Heads lse_like() const {
    const AttentionShape& s = in.shape;
    Heads lse(batch(), s.H, s.M, 1, compute(), false, false);
    return lse;
  }
  Statistics statistics() const { return {lse_like(), lse_like()}; }
  Heads like_q(int64_t width) const {
    return Heads(batch(), in.shape.H, in.shape.M, width, in.shape.dtype, packed(), true);
  }
  Heads like_k(int64_t width) const {
    return Heads(batch(), in.shape.Hkv, in.shape.N, width, in.shape.dtype, packed(), true);
  }

  std::string text() const {
    static const char* const dtypes[] = {"f32", "f64", "bf16", "f16"};
    const AttentionShape& s = in.shape;
    char line[400];
    std::snprintf(line, sizeof line,
                  "%s %s B=%d H=%d/%d M=%d N=%d D=%d/%d threads=%d %s causal=%d window=%d,%d scale=%g softcap=%g "
                  "slopes=%d sinks=%d dropout=%g mask=%s %d%d%d%d map=%dx%d",
                  dtypes[int(s.dtype)], isa_name(isa), int(s.B), int(s.H), int(s.Hkv), int(s.M), int(s.N), int(s.D),
                  int(s.Dv), threads, packed() ? "packed" : "padded", int(in.causal), int(in.left), int(in.right),
                  in.scale, in.softcap, in.slopes != nullptr, in.sinks != nullptr, in.dropout_p,
                  !in.mask.data     ? "none"
                  : in.mask.boolean ? "bool"
                                    : dtypes[int(in.mask.dtype)],
                  in.mask.b != 0, in.mask.h != 0, in.mask.i != 0, in.mask.j != 0, int(map_rows), int(map_cols));
    return line;
  }
};

// Random lengths of B packed sequences as cumulative lengths, and the number of rows of the tensor.
void cut(Random& random, int64_t B, int64_t* rows, std::vector<int32_t>* cu) {
  cu->assign(1, 0);
  for (int64_t b = 0; b < B; ++b) cu->push_back(cu->back() + static_cast<int32_t>(random() % uint64_t(*rows + 1)));
  *rows = cu->back() + static_cast<int64_t>(random() % 3);  // up to two rows that belong to no sequence
}

MaskGradient mask_gradient(const AttentionCase& c, void* data) {
  return {data, c.mask.count(), c.in.mask.b, c.in.mask.h, c.in.mask.i, c.in.mask.j};
}

void random_mask(Random& random, AttentionCase* c) {
  const AttentionShape& s = c->in.shape;
  const int64_t full[] = {s.B, s.H, s.M, s.N};
  int64_t stride[4], count = 1;
  for (int d = 4; d-- > 0;) {
    const bool broadcast = full[d] == 1 || chance(random, 0.4);
    stride[d] = broadcast ? 0 : count;
    count *= broadcast ? 1 : full[d];
  }
  const bool boolean = chance(random, 0.5);
  const DType dtype = !boolean && chance(random, 0.3) ? DType::f32 : s.dtype;
  const double visible = pick(random, {0.1, 0.7, 0.95});
  if (boolean) {
    c->mask = Buffer((count + 1) / 2, DType::bf16);
    for (int64_t i = 0; i < count; ++i) static_cast<uint8_t*>(c->mask.get())[i] = chance(random, visible);
  } else {
    c->mask = Buffer::random(count, dtype, random, 1.5);
    if (dtype != DType::f16 && chance(random, 0.2)) {  // most scores are far from 0
      const double far = pick(random, {-1e30, 1e20, -3e38});
      for (int64_t i = 0; i < count; ++i)
        if (chance(random, 0.8)) naive::store(c->mask.get(), i, dtype, far);
    }
    for (int64_t i = 0; i < count; ++i)
      if (!chance(random, visible)) naive::store(c->mask.get(), i, dtype, -INFINITY);
  }
  c->in.mask = {c->mask.get(), boolean, dtype, stride[0], stride[1], stride[2], stride[3]};
}

// Fills with NaN all queries that see no key and all keys that no query sees.
void poison_hidden(AttentionCase* c) {
  const naive::Attention a(c->in);
  const AttentionShape& s = c->in.shape;
  const auto spoil = [&](const Heads& heads, int64_t at, int64_t width) {
    for (int64_t d = 0; d < width; ++d) naive::store(heads.buffer.get(), at + d, s.dtype, NAN);
  };
  a.each_row([&](int64_t b, int64_t h, int64_t i) {
    for (int64_t j = 0; j < a.keys(b); ++j)
      if (a.visible(b, h, i, j)) return;
    spoil(c->q, a.query_at(c->in.q, b, h, i), s.D);
    spoil(c->grad_o, a.query_at(c->grad_o.read(), b, h, i), s.Dv);
  });
  for (int64_t b = 0; b < s.B; ++b)
    for (int64_t kv = 0; kv < s.Hkv; ++kv)
      for (int64_t j = 0; j < a.keys(b); ++j) {
        bool seen = false;
        for (int64_t h = kv * s.group(); h < (kv + 1) * s.group(); ++h)
          for (int64_t i = 0; i < a.queries(b); ++i) seen = seen || a.visible(b, h, i, j);
        if (seen) continue;
        spoil(c->k, a.key_at(c->in.k, b, kv, j), s.D);
        spoil(c->v, a.key_at(c->in.v, b, kv, j), s.Dv);
      }
}

void random_case(Random& random, const std::vector<Isa>& isas, AttentionCase* c) {
  static const int64_t widths[] = {1, 3, 8, 16, 17, 33, 40}, lengths[] = {1, 2, 5, 17, 33, 50};
  AttentionInputs& in = c->in;
  AttentionShape& s = in.shape;
  s.dtype = static_cast<DType>(random() % 4);
  c->isa = isas[random() % isas.size()];
  // These instruction sets have kernels of their own for bf16 only.
  if (bf16_products(c->isa) != Bf16Products::as_float && chance(random, 0.8)) s.dtype = DType::bf16;
  s.B = 1 + int64_t(random() % 3), s.Hkv = 1 + int64_t(random() % 2), s.H = s.Hkv * (1 + int64_t(random() % 3));
  s.M = pick(random, lengths), s.N = pick(random, lengths), s.D = pick(random, widths), s.Dv = pick(random, widths);
  if (chance(random, 0.1)) s.Dv = 0;
  if (chance(random, 0.05)) s.D = 0;
  if (chance(random, 0.04)) s.M = 0;
  if (chance(random, 0.04)) s.N = 0;
  if (chance(random, 0.08)) s.M = 200 + int64_t(random() % 60), s.N = 120 + int64_t(random() % 160), s.B = 1;
  if (chance(random, 0.08)) {  // so many keys per query that the plan splits them
    s.N = 1024 + int64_t(random() % 200), s.M = 1 + int64_t(random() % 5), s.B = 1;
    s.D = std::min<int64_t>(s.D, 8), s.Dv = std::min<int64_t>(s.Dv, 8);
  }
  const bool packed = chance(random, 0.25);
  if (packed) {
    cut(random, s.B, &s.M, &c->cu_q), cut(random, s.B, &s.N, &c->cu_k);
    in.cu_q = c->cu_q.data(), in.cu_k = c->cu_k.data();
  }
  in.causal = static_cast<Causal>(random() % 3);
  in.left = pick(random, {-1, -1, 0, 3, 40}), in.right = pick(random, {-1, -1, 0, 5, 60});
  in.scale = pick(random, {0.3, 0.3, 0.25, -0.2, 0.0});
  in.softcap = pick(random, {0.0, 0.0, 2.0});
  in.dropout_p = pick(random, {0.0, 0.0, 0.2, 1.0});
  in.seed = random(), in.offset = static_cast<uint32_t>(random());
  if (chance(random, 0.3)) {
    in.slopes_b = chance(random, 0.5) ? s.H : 0;
    for (int64_t i = 0; i < s.B * s.H; ++i) c->slopes.push_back(0.05 * double(random() % 10));
    in.slopes = c->slopes.data();
  }
  if (chance(random, 0.3)) {
    for (int64_t h = 0; h < s.H; ++h) c->sinks.push_back(double(random() % 5) - 2);
    if (chance(random, 0.2)) c->sinks[0] = -INFINITY;
    const double largest = s.dtype == DType::f64 ? 0x1.fffffffffffffp1023 : 0x1.fffffep127;
    if (chance(random, 0.2)) c->sinks[0] = pick(random, {-largest, largest, -1e30, 1e30});
    in.sinks = c->sinks.data();
  }
  c->threads = 1 + int(random() % 4);
  c->grad_lse = chance(random, 0.5), c->need_q = chance(random, 0.8), c->need_kv = chance(random, 0.8);
  c->map_rows = 1 + int64_t(random() % 9), c->map_cols = 1 + int64_t(random() % 9);
  const bool rows_first = chance(random, 0.5);
  c->q = Heads(c->batch(), s.H, s.M, s.D, s.dtype, packed, rows_first);
  c->k = Heads(c->batch(), s.Hkv, s.N, s.D, s.dtype, packed, rows_first);
  c->v = Heads(c->batch(), s.Hkv, s.N, s.Dv, s.dtype, packed, rows_first);
  c->grad_o = Heads(c->batch(), s.H, s.M, s.Dv, s.dtype, packed, rows_first);
  c->dlse = c->lse_like();
  for (Heads* heads : {&c->q, &c->k, &c->v, &c->grad_o, &c->dlse}) heads->fill(random);
  in.q = c->q.read(), in.k = c->k.read(), in.v = c->v.read();
  if (!packed && chance(random, 0.5)) random_mask(random, c);
  if (chance(random, 0.5)) poison_hidden(c);
}

// The tolerance covers the rounding of the storage type and that of sums in the compute type whose terms are at most
// about `term`. With `weighted`, where the kernels round the softmax weights to bf16, it covers that rounding too.
void compare(const AttentionCase& c, const char* name, const Buffer& got, const Buffer& want, double term = 4,
             bool weighted = false) {
  const DType dtype = want.dtype();
  // Values as large as the masks and sinks of some cases are compared relative to themselves. They are left out of
  // `largest`, since otherwise they would widen the tolerance of all other values.
  const double far = 1e15;
  double largest = 0;
  for (int64_t i = 0; i < want.count(); ++i)
    if (std::fabs(want.at(i)) < far) largest = std::fmax(largest, std::fabs(want.at(i)));
  const double epsilon = c.in.shape.dtype == DType::f64 ? 0x1p-52 : 0x1p-23;
  const bool rounds_weights = weighted && bf16_products(attention_last_run().plan.isa) != Bf16Products::as_float;
  const double weights = rounds_weights ? 0x1p-9 : 0;
  const double relative = dtype == DType::bf16 ? 0x1p-7 : dtype == DType::f16 ? 0x1p-10 : 0x1p-22;
  const double absolute = (epsilon * (200 + 4 * double(c.in.shape.N + c.in.shape.M)) + weights) * (term + largest);
  for (int64_t i = 0; i < want.count(); ++i) {
    if (got.same_bits(i, want, i)) continue;  // includes the NaN of elements that neither has written
    const double a = got.at(i), b = want.at(i);
    const bool close = std::fabs(a - b) <= absolute + (std::fabs(b) < far ? relative : 0x1p-20) * std::fabs(b);
    CHECK(close, "%s[%d] = %.9g, want %.9g: %s", name, int(i), a, b, c.text().c_str());
    if (!close) return;
  }
}

void same_bits(const AttentionCase& c, const char* name, const Buffer& a, const Buffer& b) {
  for (int64_t i = 0; i < a.count(); ++i) {
    const bool same = a.same_bits(i, b, i);
    CHECK(same, "%s[%d] = %.9g with one thread, %.9g: %s", name, int(i), a.at(i), b.at(i), c.text().c_str());
    if (!same) return;
  }
}

// How often each plan ran. The test prints it as its coverage.
std::map<std::string, int> g_covered;

void remember() {
  const AttentionLastRun& run = attention_last_run();
  const bool own_products = bf16_products(run.plan.isa) != Bf16Products::as_float;
  std::string key = own_products ? isa_name(run.plan.isa) + std::string(" ") : "";
  key += run.backward ? "backward" : "forward";
  key += run.plan.kernel == AttentionPlan::dot ? " dot" : " tiles";
  if (run.plan.splits > 1) key += " split";
  if (run.members > 1) key += " shared";
  ++g_covered[key];
}

struct Gradients {
  Heads dq, dk, dv;
  Buffer dmask, dslopes, dsinks;

  explicit Gradients(const AttentionCase& c) {
    const AttentionShape& s = c.in.shape;
    if (c.need_q) dq = c.like_q(s.D);
    if (c.need_kv) dk = c.like_k(s.D), dv = c.like_k(s.Dv);
    if (c.in.mask.data && !c.in.mask.boolean) {
      dmask = Buffer(c.mask.count(), c.in.mask.dtype);
      for (int64_t i = 0; i < dmask.count(); ++i) naive::store(dmask.get(), i, dmask.dtype(), 0);
    }
    if (c.in.slopes) dslopes = Buffer(c.in.slopes_b ? s.B * s.H : s.H, DType::f64);
    if (c.in.sinks) dsinks = Buffer(s.H, DType::f64);
  }
};

AttentionBackwardParams backward_params(const AttentionCase& c, const Heads& o, const Statistics& stats,
                                        const Gradients& g) {
  AttentionBackwardParams p{};
  p.in = c.in;
  p.grad_o = c.grad_o.read();
  if (c.grad_lse) p.grad_lse = c.dlse.read();
  p.o = o.read(), p.stats = stats.read();
  if (c.need_q) p.dq = g.dq.write();
  if (c.need_kv) p.dk = g.dk.write(), p.dv = g.dv.write();
  if (g.dmask.get()) p.dmask = mask_gradient(c, g.dmask.get());
  p.dslopes = static_cast<double*>(g.dslopes.get());
  p.dsinks = static_cast<double*>(g.dsinks.get());
  return p;
}

template <class Compare>
void each_gradient(const Gradients& a, const Gradients& b, Compare check) {
  check("dq", a.dq.buffer, b.dq.buffer);
  check("dk", a.dk.buffer, b.dk.buffer);
  check("dv", a.dv.buffer, b.dv.buffer);
  check("dmask", a.dmask, b.dmask);
  check("dslopes", a.dslopes, b.dslopes);
  check("dsinks", a.dsinks, b.dsinks);
}

void run_case(const AttentionCase& c) {
  const AttentionShape& s = c.in.shape;
  const auto forward = [&](int threads, const Heads& o, const Heads& lse, const Statistics& stats) {
    attention_forward({c.in, o.write(), lse.write(), stats.write()}, Runtime{c.isa, threads, parallel});
    remember();
  };
  const auto close = [&](const char* name, const Buffer& a, const Buffer& b) { compare(c, name, a, b); };
  const auto equal = [&](const char* name, const Buffer& a, const Buffer& b) { same_bits(c, name, a, b); };
  const Heads o = c.like_q(s.Dv), lse = c.lse_like(), want_o = c.like_q(s.Dv), want_lse = c.lse_like();
  const Statistics stats = c.statistics(), want_stats = c.statistics();
  forward(c.threads, o, lse, stats);
  naive::attention_forward({c.in, want_o.write(), want_lse.write(), want_stats.write()});
  compare(c, "o", o.buffer, want_o.buffer, 4, true);
  close("lse", lse.buffer, want_lse.buffer);
  const naive::Attention attention(c.in);
  attention.each_row([&](int64_t b, int64_t h, int64_t i) {
    const naive::Attention::Row row(attention, stats.read(), b, h, i);
    const double want = naive::load(want_lse.buffer.get(), attention.query_at(want_lse.read(), b, h, i), c.compute());
    if (!(std::fabs(want) < 1e15)) return;  // beside so large a maximum the logarithm of the sum is lost in rounding
    const double bound = c.in.shape.dtype == DType::f64 ? 1e-9 : 1e-3;
    CHECK(std::fabs(row.top - std::log(row.weight) - want) <= bound * (1 + std::fabs(want)), "statistics: %s",
          c.text().c_str());
  });

  // The backward gets the oracle's forward results, so that only its own error is measured.
  const Gradients grads(c), want(c);
  const auto backward = [&](int threads, const Gradients& into) {
    attention_backward(backward_params(c, want_o, want_stats, into), Runtime{c.isa, threads, parallel});
    remember();
  };
  backward(c.threads, grads);
  naive::attention_backward(backward_params(c, want_o, want_stats, want));
  each_gradient(grads, want, [&](const char* name, const Buffer& a, const Buffer& b) {
    const bool times_distance = std::strcmp(name, "dslopes") == 0;
    const bool weighted = std::strchr("qkv", name[1]) != nullptr;
    compare(c, name, a, b, times_distance ? 4 + static_cast<double>(s.M + s.N) : 4, weighted);
  });

  if (c.threads > 1) {
    const Heads again_o = c.like_q(s.Dv), again_lse = c.lse_like();
    const Statistics again_stats = c.statistics();
    const Gradients again(c);
    forward(1, again_o, again_lse, again_stats);
    backward(1, again);
    equal("o", again_o.buffer, o.buffer);
    equal("lse", again_lse.buffer, lse.buffer);
    equal("top", again_stats.top.buffer, stats.top.buffer);
    equal("weight", again_stats.weight.buffer, stats.weight.buffer);
    each_gradient(again, grads, equal);
  }

  if (c.packed() || c.in.dropout_p != 0 || s.M == 0 || s.N == 0) return;
  const Buffer map(s.B * s.H * c.map_rows * c.map_cols, c.compute());
  const Buffer want_map(map.count(), c.compute());
  attention_map({c.in, want_stats.read(), map.get(), c.map_rows, c.map_cols}, Runtime{c.isa, c.threads, parallel});
  naive::attention_map({c.in, want_stats.read(), want_map.get(), c.map_rows, c.map_cols});
  close("map", map, want_map);
}

}  // namespace
}  // namespace dlk

int main(int argc, char** argv) {
  using namespace dlk;
  const int cases = argc > 1 ? std::atoi(argv[1]) : 400;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  for (int i = 0; i < cases; ++i) {
    Random random(seed * 1000003 + static_cast<uint64_t>(i));
    AttentionCase c;
    random_case(random, available_isas(), &c);
    g_pool = pick(random, {Pool::one_each, Pool::one_each, Pool::two_ranges, Pool::one_range, Pool::in_turn});
    set_poison(chance(random, 0.7));
    const int before = failures();
    run_case(c);
    if (failures() > before) std::printf("  case %d\n", i);
  }
  for (const auto& [plan, count] : g_covered) std::printf("%6d %s\n", count, plan.c_str());
  return report("attention_test");
}
