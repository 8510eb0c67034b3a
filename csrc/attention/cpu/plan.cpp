// Decides before anything runs how a call of attention is carried out. The kernels follow this plan.
#include <algorithm>

#include "tasks.h"

namespace dlk {
namespace {

// Below this many multiply-adds in all, waking a thread takes more time than it saves.
constexpr double kSerialWork = 200e3;
// Rows of a task: enough to use keys and values many times once they are in the cache.
constexpr int64_t kBlockRows = 192;
// The forward takes more rows if each task converts keys and values to float, or packs them.
constexpr int64_t kConvertedBlockRows = 336;
// Keys multiplied at once: a panel's scores stay in L1, and no sum over keys has more products.
constexpr int64_t kBlockKeys = 128;
// Up to this many rows, of all heads that share keys, are multiplied by dot products instead of tiles.
constexpr int64_t kDotRows = 8;
// If there are fewer tasks than this, the keys are split too, unless the parts become shorter than kSplitKeys.
constexpr int64_t kTasks = 32, kBackwardTasks = 16, kSplitKeys = 512, kBackwardSplitKeys = 256;
// In the backward each part has a dq of its own. So all parts have at most kPartElements elements of dq together, but
// kParts parts are always allowed.
constexpr int64_t kPartElements = 8 << 20, kParts = 8;

}  // namespace

AttentionPlan attention_plan(const AttentionInputs& in, Isa isa, int threads, bool backward, bool mask_gradient) {
  const AttentionShape& s = in.shape;
  int64_t M = 0, N = 0;  // of the longest sequence
  double pairs = 0;
  for (int64_t b = 0; b < (in.cu_q ? s.B : std::min<int64_t>(1, s.B)); ++b) {
    const AttentionSequence sequence(in, b);
    M = std::max(M, sequence.M), N = std::max(N, sequence.N);
    pairs +=
        static_cast<double>(sequence.M) * static_cast<double>(sequence.N) * (in.cu_q ? 1 : static_cast<double>(s.B));
  }
  const int64_t rows = std::max<int64_t>(1, M * s.group());
  const double work = pairs * static_cast<double>(s.H) * static_cast<double>(s.D + s.Dv) * (backward ? 2.5 : 1);

  AttentionPlan plan{};
  plan.threads = work < kSerialWork ? 1 : std::min(std::max(threads, 1), kMaxMembers);
  plan.kernel = rows <= kDotRows ? AttentionPlan::dot : AttentionPlan::tiles;
  // Units that multiply bf16 are only for tiles: products of few rows wait for the memory anyway.
  const bool units = s.dtype == DType::bf16 && plan.kernel == AttentionPlan::tiles;
  plan.isa = units ? isa : vector_isa(isa);
  const bool converted = !backward && (s.dtype == DType::bf16 || s.dtype == DType::f16);
  plan.block_m = std::min(converted ? kConvertedBlockRows : kBlockRows, (rows + 15) / 16 * 16);
  plan.block_n = kBlockKeys;
  const int64_t wanted = backward ? kBackwardTasks : kTasks;
  int64_t tasks, most;
  if (backward) {
    const int64_t dq = std::max<int64_t>(1, in.cu_q ? s.H * s.M * s.D : s.B * s.H * s.M * s.D);
    tasks = AttentionTasks::of_keys(in, mask_gradient).groups();
    most = std::min(N / kBackwardSplitKeys, std::max(kParts, kPartElements / dq));
  } else {
    tasks = s.B * s.Hkv * ((rows + plan.block_m - 1) / plan.block_m);
    most = N / kSplitKeys;
  }
  tasks = std::max<int64_t>(1, tasks);
  plan.splits = std::max<int64_t>(1, std::min((wanted + tasks - 1) / tasks, most));
  return plan;
}

}  // namespace dlk
