// The kernels of rows.h and their launchers. Kernels over rows use one warp per row.
#include "rows.h"

#include "types.h"
#include "walk.h"

namespace dlk {
namespace gpu {
namespace {

constexpr int kThreads = 256;

template <class Item>
__global__ void __launch_bounds__(kThreads) copy_rows(const __grid_constant__ CopyRows p) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (row >= static_cast<int64_t>(p.T) * p.B) return;
  const int t = static_cast<int>(row / p.B), b = static_cast<int>(row % p.B);
  const bool live = t < sequence_length(nullptr, p.lengths, p.T, p.B, b);

  // Strides count the caller's items, of which an Item may hold several.
  const int64_t size = static_cast<int64_t>(sizeof(Item)) / p.item_bytes;
  const Item* from = static_cast<const Item*>(p.from.data) + row_offset(p.from, nullptr, t, b) / size;
  Item* to = static_cast<Item*>(p.to.data) + row_offset(p.to, nullptr, t, b) / size;
  for (int64_t i = threadIdx.x % 32; i < p.features / size; i += 32) to[i] = live ? from[i] : Item{};
}

template <class Cell, class S>
__global__ void __launch_bounds__(kThreads) hidden_before(const __grid_constant__ HiddenBefore p) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (row >= static_cast<int64_t>(p.T) * p.B) return;
  const int t = static_cast<int>(row / p.B), b = static_cast<int>(row % p.B);
  const int length = sequence_length(p.offsets, p.lengths, p.T, p.B, b);
  if (p.offsets && t >= length) return;

  const int before = p.reverse ? t + 1 : t - 1;
  const float* record = nullptr;
  const S* first = nullptr;
  const bool reset = is_reset(p.resets, p.offsets, p.B, p.reverse, t, b, length);
  if (t < length && !reset && before >= 0 && before < length) {
    record = p.saved + row_number(p.offsets, p.B, before, b) * (p.record ? p.record : Cell::kSaved * int64_t{p.H});
  } else if (t < length && !reset && p.h0) {
    first = static_cast<const S*>(p.h0) + static_cast<int64_t>(b) * p.H;
  }
  S* to = static_cast<S*>(p.to.data) + row_offset(p.to, p.offsets, t, b);
  const float* dropout = p.dropout ? p.dropout + static_cast<int64_t>(b) * p.H : nullptr;
  for (int j = static_cast<int>(threadIdx.x) % 32; j < p.H; j += 32) {
    float h = first ? to_float(first[j]) : 0.0f;
    if (record) h = p.record ? record[p.h + j] : hidden_of<Cell, S>(record + j, p.H);
    to[j] = from_float<S>(dropout ? h * dropout[j] : h);
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads) add_states(const __grid_constant__ AddStates p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.count) return;
  static_cast<S*>(p.to)[i] =
      from_float<S>((p.a ? p.a[i] : 0.0f) + (p.b ? p.b[i] * (p.times ? p.times[i] : 1.0f) : 0.0f));
}

struct Offsets {
  int* to;
  int count;
  int values[512];
};

__global__ void __launch_bounds__(kThreads) write_offsets(const __grid_constant__ Offsets p) {
  for (int i = static_cast<int>(threadIdx.x); i < p.count; i += kThreads) p.to[i] = p.values[i];
}

unsigned blocks(int64_t n) { return static_cast<unsigned>((n + kThreads - 1) / kThreads); }

// Whether the address and the length of every row are multiples of `bytes`.
bool in_pieces(const CopyRows& p, int64_t bytes) {
  for (const void* data : {p.from.data, static_cast<const void*>(p.to.data)}) {
    if (reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(bytes)) return false;
  }
  for (int64_t n : {p.features, p.from.t, p.from.b, p.to.t, p.to.b}) {
    if (n * p.item_bytes % bytes) return false;
  }
  return true;
}

}  // namespace
}  // namespace gpu

int launch_copy_rows(const CopyRows& params, void* stream) {
  LaunchShape shape;
  shape.grid_x = gpu::blocks(static_cast<int64_t>(params.T) * params.B * 32);
  shape.threads = gpu::kThreads;
  if (gpu::in_pieces(params, 16)) return launch(&gpu::copy_rows<uint4>, shape, stream, params);
  if (params.item_bytes == 4) return launch(&gpu::copy_rows<uint32_t>, shape, stream, params);
  return launch(&gpu::copy_rows<uint16_t>, shape, stream, params);
}

int launch_hidden_before(const HiddenBefore& params, DType dtype, void* stream) {
  LaunchShape shape;
  shape.grid_x = gpu::blocks(static_cast<int64_t>(params.T) * params.B * 32);
  shape.threads = gpu::kThreads;
  return gpu::with_cell(params.cell, [&](auto cell) {
    return gpu::with_item(dtype, [&](auto item) {
      return launch(&gpu::hidden_before<decltype(cell), decltype(item)>, shape, stream, params);
    });
  });
}

int launch_add_states(const AddStates& params, DType dtype, void* stream) {
  LaunchShape shape;
  shape.grid_x = gpu::blocks(params.count);
  shape.threads = gpu::kThreads;
  return gpu::with_item(dtype,
                        [&](auto item) { return launch(&gpu::add_states<decltype(item)>, shape, stream, params); });
}

int launch_offsets(const int64_t* batch_sizes, int64_t T, int* offsets, void* stream) {
  LaunchShape shape;
  shape.threads = gpu::kThreads;
  int64_t row = 0;
  for (int64_t t = 0; t <= T;) {
    gpu::Offsets part{offsets + t, 0, {}};
    for (; t <= T && part.count < 512; ++t) {
      part.values[part.count++] = static_cast<int>(row);
      if (t < T) row += batch_sizes[t];
    }
    const int error = launch(&gpu::write_offsets, shape, stream, part);
    if (error) return error;
  }
  return 0;
}

}  // namespace dlk
