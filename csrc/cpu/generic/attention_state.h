// What the keys so far have made of a task's rows: m, about the maximum of each row's scores, the sum
// l of their exponentials from there, and the sum o of the values (online softmax).

template <class C>
struct RowState {
  using V = Vec<C>;
  C* o;           // panels [width][lanes]; or [lane][ld] where few rows go by dot products
  C *m, *l;       // [lanes]; m in units of the scores
  int64_t width;  // Dv
  bool by_rows;

  // m follows the maximum only when that has grown by so many powers of 2: bringing o to another m
  // costs, and exponentials somewhat above 1 are as exact.
  static constexpr C kHeadroom = 8;

  static int64_t elements(int64_t lanes, int64_t width) { return lanes * (lanes_rounded<C>(width) + 2); }

  RowState() = default;
  RowState(C* memory, int64_t lanes, int64_t values, bool rows)
      : o(memory + 2 * lanes), m(memory), l(memory + lanes), width(values), by_rows(rows) {}

  int64_t ld() const { return lanes_rounded<C>(width); }
  C* of(const LanePanel& panel) const { return o + panel.lane * (by_rows ? ld() : width); }

  // -inf minus itself is NaN: rows that have seen nothing count from 0.
  static V finite(V m) { return select_gt(m, V::set1(-std::numeric_limits<C>::infinity()), m, V::zero()); }
  // What was made with the maximum `from` counts this much with `to`.
  static V decay(V from, V to, C to_base2) { return exp2_down((from - finite(to)) * V::set1(to_base2)); }

  // A sink is a key of probability but without value.
  void begin(const Lanes<C>& lanes, const double* sinks, double from_natural) const {
    constexpr C kNone = -std::numeric_limits<C>::infinity();
    for (int64_t i = 0; i < lanes.count; ++i) {
      m[i] = sinks ? static_cast<C>(sinks[lanes.head[i]] * from_natural) : kNone;
      l[i] = m[i] == kNone ? C(0) : C(1);
    }
    std::fill_n(o, lanes.count * (by_rows ? ld() : width), C(0));
  }

  // From scores to exponentials; what there is of the rows so far is brought to the new maximum.
  void softmax(const ScoreTile<C>& tile, C to_base2) const {
    const V factor = V::set1(to_base2);
    for (int64_t lane = 0; lane < tile.width(); lane += V::size) {
      C* scores = tile.scores + lane;
      const int64_t at = tile.panel->lane + lane;
      const V before = V::load(m + at);
      V largest[4] = {before, before, before, before};
      int64_t j = 0;
      for (; j + 4 <= tile.keys; j += 4)
        for (int i = 0; i < 4; ++i) largest[i] = max(V::load(scores + (j + i) * tile.ld), largest[i]);
      for (; j < tile.keys; ++j) largest[0] = max(V::load(scores + j * tile.ld), largest[0]);
      const V highest = max(max(largest[0], largest[1]), max(largest[2], largest[3]));
      const V now = select_gt((highest - before) * factor, V::set1(kHeadroom), highest, before);
      const V shift = finite(now);
      V sum = V::zero();
      for (j = 0; j < tile.keys; ++j) {
        const V e = exp2_down((V::load(scores + j * tile.ld) - shift) * factor);
        e.store(scores + j * tile.ld);
        sum = sum + e;
      }
      const V rest = decay(before, now, to_base2);
      fma(V::load(l + at), rest, sum).store(l + at);
      now.store(m + at);
      if (hsum(abs(rest - V::set1(C(1)))) != 0) add_values(*tile.panel, lane, rest, nullptr, V::zero());
    }
  }

  // Takes in the state of other keys.
  void add(const Lanes<C>& lanes, const RowState& other, C to_base2) const {
    for (int64_t p = 0; p < lanes.panels; ++p) {
      const LanePanel& panel = lanes.panel[p];
      for (int64_t lane = 0; lane < int64_t{panel.vectors} * V::size; lane += V::size) {
        const int64_t at = panel.lane + lane;
        const V ours = V::load(m + at), theirs = V::load(other.m + at), largest = max(ours, theirs);
        const V a = decay(ours, largest, to_base2), b = decay(theirs, largest, to_base2);
        largest.store(m + at);
        fma(V::load(l + at), a, V::load(other.l + at) * b).store(l + at);
        add_values(panel, lane, a, other.of(panel), b);
      }
    }
  }

 private:
  // o = o a + other b for a vector of lanes; other may be null.
  void add_values(const LanePanel& panel, int64_t lane, V a, const C* other, V b) const {
    C* ours = of(panel);
    if (!by_rows) {
      const int64_t lanes = int64_t{panel.vectors} * V::size;
      for (int64_t at = lane; at < width * lanes + lane; at += lanes) {
        const V value = other ? V::load(other + at) * b : V::zero();
        fma(V::load(ours + at), a, value).store(ours + at);
      }
      return;
    }
    alignas(64) C times[2][V::size];
    a.store(times[0]), b.store(times[1]);
    for (int64_t r = 0; r < std::min<int64_t>(V::size, panel.rows - lane); ++r)
      for (int64_t at = (lane + r) * ld(); at < (lane + r + 1) * ld(); at += V::size) {
        const V value = other ? V::load(other + at) * V::set1(times[1][r]) : V::zero();
        fma(V::load(ours + at), V::set1(times[0][r]), value).store(ours + at);
      }
  }
};
