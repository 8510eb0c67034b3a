// Tensors at the boundary to torch: move-only owners of the C shim's handles. In a short call
// the time of reference counts and of dispatcher calls by name matters, so there are none.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

#include "core/huge_pages.h"
#include "core/memory.h"
#include "core/runtime_flags.h"
#include "core/types.h"

// The message of the error that the last function of the shim caught. torch has it from 2.13 on; before, it is null.
extern "C" const char* torch_exception_get_what_without_backtrace() __attribute__((weak));

namespace dlk {

[[noreturn]] inline void throw_torch_error(const char* function) {
  const char* said =
      torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace() : nullptr;
  throw std::runtime_error(said && *said ? std::string(said) : std::string(function) + " failed in torch");
}

// Calls a function of torch's shim and throws if it fails, a RuntimeError in Python. The message of torch's own macro
// would contain the path of the source file.
#define DLK_TORCH(function, ...)                                         \
  do {                                                                   \
    if (function(__VA_ARGS__) != 0) ::dlk::throw_torch_error(#function); \
  } while (false)

struct Device {
  int32_t type, index;
  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
};
inline Device cpu_device() { return {aoti_torch_device_type_cpu(), 0}; }

class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {}
  Tensor(Tensor&& other) noexcept : handle_(other.release()) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }

  AtenTensorHandle get() const { return handle_; }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }

  int64_t dim() const { return read<int64_t>(aoti_torch_get_dim); }
  int64_t numel() const { return read<int64_t>(aoti_torch_get_numel); }
  const int64_t* sizes() const { return read<int64_t*>(aoti_torch_get_sizes); }
  const int64_t* strides() const { return read<int64_t*>(aoti_torch_get_strides); }
  int64_t size(int64_t d) const { return sizes()[d]; }
  int32_t dtype() const { return read<int32_t>(aoti_torch_get_dtype); }
  bool on_cpu() const { return read<int32_t>(aoti_torch_get_device_type) == aoti_torch_device_type_cpu(); }
  Device device() const {
    return {read<int32_t>(aoti_torch_get_device_type), on_cpu() ? 0 : read<int32_t>(aoti_torch_get_device_index)};
  }
  bool contiguous() const { return read<bool>(aoti_torch_is_contiguous); }
  size_t byte_count() const { return static_cast<size_t>(numel()) * aoti_torch_dtype_element_size(dtype()); }

  // Never null: in the kernels' structs null means "absent", which an empty tensor is not.
  void* data() const {
    alignas(64) static char nothing[64];
    void* pointer = read<void*>(aoti_torch_get_data_ptr);
    return pointer ? pointer : nothing;
  }

 private:
  template <class T>
  T read(AOTITorchError (*get)(AtenTensorHandle, T*)) const {
    T value{};
    if (get(handle_, &value) != 0) throw_torch_error("reading a tensor");
    return value;
  }

  AtenTensorHandle handle_ = nullptr;
};

// A `Tensor?` of a schema.
class OptionalTensor : public Tensor {
 public:
  using Tensor::Tensor;
  explicit operator bool() const { return get() != nullptr; }
};

inline int32_t torch_dtype(DType dtype) {
  static const int32_t types[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_float64(), aoti_torch_dtype_bfloat16(),
                                  aoti_torch_dtype_float16()};
  return types[static_cast<int>(dtype)];
}

inline DType compute_type(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

// "<what> of shape [2, 3]".
inline std::string shaped(const char* what, const int64_t* sizes, int64_t dim) {
  std::string text = std::string(what) + " of shape [";
  for (int64_t d = 0; d < dim; ++d) text += (d ? ", " : "") + std::to_string(sizes[d]);
  return text + "]";
}

inline size_t byte_count(const int64_t* sizes, int64_t dim, int32_t dtype, const char* what) {
  size_t bytes = aoti_torch_dtype_element_size(dtype);
  bool empty = false, overflow = false;
  for (int64_t d = 0; d < dim; ++d) {
    empty |= sizes[d] == 0;
    overflow |= __builtin_mul_overflow(bytes, static_cast<size_t>(sizes[d]), &bytes);
  }
  if (empty) return 0;
  if (overflow || bytes > static_cast<size_t>(INT64_MAX)) throw_too_large(shaped(what, sizes, dim));
  return bytes;
}

// An uninitialised tensor, whose strides must leave no gaps. `what` names it in the message if there is no memory.
inline Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dim, int32_t dtype,
                            const Device& device = cpu_device(), const char* what = "a result") {
  const size_t size = byte_count(sizes, dim, dtype, what);
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(dim, sizes, strides, dtype, device.type, device.index, &handle) != 0) {
    if (device == cpu_device()) throw_out_of_memory(size, shaped(what, sizes, dim));
    throw_torch_error("aoti_torch_empty_strided");
  }
  Tensor tensor(handle);
  if (!tensor.on_cpu()) return tensor;
  want_huge_pages(tensor.data(), size);
  if (poison() && size > 0) std::memset(tensor.data(), 0xff, size);
  return tensor;
}

// An uninitialised contiguous tensor.
inline Tensor empty(const int64_t* sizes, int64_t dim, int32_t dtype, const Device& device = cpu_device(),
                    const char* what = "a result") {
  constexpr int64_t kMaxDim = 8;
  int64_t strides[kMaxDim];
  int64_t numel = 1;
  for (int64_t d = dim; d-- > 0;) {
    strides[d] = numel;
    // Like torch, strides count a dimension of size 0 as 1. If a product overflows, empty_strided throws.
    if (sizes[d] > 1 && __builtin_mul_overflow(numel, sizes[d], &numel)) numel = 0;
  }
  return empty_strided(sizes, strides, dim, dtype, device, what);
}

inline Tensor empty(std::initializer_list<int64_t> sizes, int32_t dtype) {
  return empty(sizes.begin(), static_cast<int64_t>(sizes.size()), dtype);
}

inline Tensor empty_like(const Tensor& other, const char* what = "a result") {
  return empty(other.sizes(), other.dim(), other.dtype(), other.device(), what);
}

// Stands for an output that is not wanted or does not exist.
inline Tensor absent(int32_t dtype) { return empty({0}, dtype); }

// Where a kernel writes a result, null if it is not wanted.
inline void* data_if(bool wanted, const Tensor& tensor) { return wanted ? tensor.data() : nullptr; }

inline void fill_with_zeros(const Tensor& tensor) { std::memset(tensor.data(), 0, tensor.byte_count()); }

inline Tensor contiguous_copy(const Tensor& tensor) {
  Tensor copy = empty_like(tensor, "the contiguous copy of an argument");
  DLK_TORCH(aoti_torch_copy_, copy.get(), tensor.get(), 0);
  return copy;
}

}  // namespace dlk
