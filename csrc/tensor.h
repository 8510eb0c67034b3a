// Tensors at the torch boundary: move-only owners of the C shim's handles. A short call
// feels every reference count and every dispatcher call by name, so there are none.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <initializer_list>
#include <utility>

#include "cpu/huge_pages.h"
#include "cpu/runtime_flags.h"
#include "kernel_params.h"

namespace dlk {

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
    TORCH_ERROR_CODE_CHECK(get(handle_, &value));
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

// Uninitialised; the strides leave no gaps.
inline Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dim, int32_t dtype,
                            const Device& device = cpu_device()) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, dtype, device.type, device.index, &handle));
  Tensor tensor(handle);
  if (!tensor.on_cpu()) return tensor;
  const size_t size = tensor.byte_count();
  want_huge_pages(tensor.data(), size);
  if (poison() && size > 0) std::memset(tensor.data(), 0xff, size);
  return tensor;
}

// ... and contiguous.
inline Tensor empty(const int64_t* sizes, int64_t dim, int32_t dtype, const Device& device = cpu_device()) {
  constexpr int64_t kMaxDim = 8;
  int64_t strides[kMaxDim];
  int64_t numel = 1;
  for (int64_t d = dim; d-- > 0;) {
    strides[d] = numel;
    if (sizes[d] > 1) numel *= sizes[d];
  }
  return empty_strided(sizes, strides, dim, dtype, device);
}

inline Tensor empty(std::initializer_list<int64_t> sizes, int32_t dtype) {
  return empty(sizes.begin(), static_cast<int64_t>(sizes.size()), dtype);
}

inline Tensor empty_like(const Tensor& other) {
  return empty(other.sizes(), other.dim(), other.dtype(), other.device());
}

// Stands for an output that is not wanted or does not exist.
inline Tensor absent(int32_t dtype) { return empty({0}, dtype); }

inline void fill_with_zeros(const Tensor& tensor) { std::memset(tensor.data(), 0, tensor.byte_count()); }

inline Tensor contiguous_copy(const Tensor& tensor) {
  Tensor copy = empty_like(tensor);
  TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(copy.get(), tensor.get(), 0));
  return copy;
}

}  // namespace dlk
