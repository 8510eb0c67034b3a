// Shared by the CUDA operators: tensors on a device, the device's stream, products by torch, checks.
#pragma once

#include "rnn/cuda/gpu_limits.h"
#include "rnn/torch/checks.h"

// Null if torch was built without CUDA; current_stream() checks that.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream) __attribute__((weak));

namespace dlk {

inline void* current_stream(int32_t device) {
  void* stream = nullptr;
  DLK_CHECK(aoti_torch_get_current_cuda_stream, "this torch has no CUDA");
  DLK_TORCH(aoti_torch_get_current_cuda_stream, device, &stream);
  return stream;
}

// Makes the device of a call's tensors the current one while it exists, and holds the device's current stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& like) : device_(like.device()) {
    DLK_TORCH(aoti_torch_create_device_guard, device_.index, &guard_);
    stream_ = current_stream(device_.index);
  }
  ~OnDevice() { aoti_torch_delete_device_guard(guard_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  const Device& device() const { return device_; }
  void* stream() const { return stream_; }
  Tensor empty(std::initializer_list<int64_t> sizes, int32_t dtype) const {
    return dlk::empty(sizes.begin(), static_cast<int64_t>(sizes.size()), dtype, device_);
  }
  Tensor floats(std::initializer_list<int64_t> sizes) const { return empty(sizes, aoti_torch_dtype_float32()); }
  Tensor absent(int32_t dtype) const { return empty({0}, dtype); }

 private:
  Device device_;
  DeviceGuardHandle guard_ = nullptr;
  void* stream_ = nullptr;
};

inline void check_launch(int error) {
  DLK_CHECK(error == 0, "dlkernels: a CUDA kernel could not be launched: ", gpu_error_text(error));
}

// A view [rows, columns] of `tensor` from element `offset` on.
inline Tensor matrix(const Tensor& tensor, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride,
                     int64_t offset = 0) {
  const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
  AtenTensorHandle handle = nullptr;
  DLK_TORCH(aoti_torch__reinterpret_tensor, tensor.get(), 2, sizes, strides, offset, &handle);
  return Tensor(handle);
}
inline Tensor matrix(const Tensor& tensor, int64_t rows, int64_t columns) {
  return matrix(tensor, rows, columns, columns, 1);
}
inline Tensor transposed(const Tensor& tensor) {
  return matrix(tensor, tensor.size(1), tensor.size(0), tensor.strides()[1], tensor.strides()[0]);
}

inline void copy(const Tensor& to, const Tensor& from) { DLK_TORCH(aoti_torch_copy_, to.get(), from.get(), 1); }
inline void zero(const Tensor& tensor) { DLK_TORCH(aoti_torch_zero_, tensor.get()); }

// Copies `from` to `to`, which may have another dtype; writes zeros if `from` is absent.
inline void copy_or_zero(const Tensor& to, const OptionalTensor& from) { from ? copy(to, from) : zero(to); }

inline Tensor another_handle(const Tensor& tensor) {
  AtenTensorHandle handle = nullptr;
  DLK_TORCH(aoti_torch_new_tensor_handle, tensor.get(), &handle);
  return Tensor(handle);
}

// Another handle of the tensor if it is contiguous and has this dtype, else a contiguous copy in this dtype.
inline Tensor contiguous_as(const Tensor& tensor, int32_t dtype) {
  if (tensor.contiguous() && tensor.dtype() == dtype) return another_handle(tensor);
  Tensor made = empty(tensor.sizes(), tensor.dim(), dtype, tensor.device(), "the copy of an argument");
  copy(made, tensor);
  return made;
}

// A result of a kernel, converted to the dtype in which the operator returns it.
inline Tensor returned_as(Tensor result, int32_t dtype) {
  if (result.dtype() == dtype) return result;
  Tensor made = empty_strided(result.sizes(), result.strides(), result.dim(), dtype, result.device());
  copy(made, result);
  return made;
}

// out = a b; a and b have the same dtype. If that has 16 bits, `out` may be float32. For any other dtype of `out` the
// product is computed in float32 and copied.
inline void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  const int32_t f32 = aoti_torch_dtype_float32();
  if (out.dtype() != a.dtype() && out.dtype() != f32) {
    const Tensor product = empty(out.sizes(), 2, f32, out.device(), "a product");
    multiply(a, b, product);
    copy(out, product);
    return;
  }
  const auto handle = [](const Tensor& t) {
    AtenTensorHandle copy = nullptr;
    DLK_TORCH(aoti_torch_new_tensor_handle, t.get(), &copy);
    return torch::stable::detail::from(copy);
  };
  StableIValue stack[4] = {handle(a), handle(b), 0, 0};
  if (a.dtype() == out.dtype()) {
    stack[2] = handle(out);
    DLK_TORCH(torch_call_dispatcher, "aten::mm", "out", stack, TORCH_ABI_VERSION);
  } else {
    stack[2] = torch::stable::detail::from(torch::headeronly::ScalarType::Float);
    stack[3] = handle(out);
    DLK_TORCH(torch_call_dispatcher, "aten::mm", "dtype_out", stack, TORCH_ABI_VERSION);
  }
  Tensor result(torch::stable::detail::to<AtenTensorHandle>(stack[0]));
}

inline void* offset_by(const Tensor& tensor, int64_t items, int64_t item_bytes) {
  return static_cast<char*>(tensor.data()) + items * item_bytes;
}

inline const void* pointer(const OptionalTensor& tensor) { return tensor ? tensor.data() : nullptr; }

inline int64_t item_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

inline DType check_gpu_float(const Tensor& x) {
  const int32_t found = x.dtype();
  for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    if (found == torch_dtype(dtype)) return dtype;
  }
  throw std::runtime_error(concat("x must be float32, bfloat16 or float16 on CUDA, got ", dtype_text(found)));
}

// The base of a call of an operator: its shape, device and dtypes. Kernels and products run in one dtype; arguments of
// other dtypes are copied to it for the duration of the call.
class Call {
 public:
  Call(CellKind cell, const Tensor& x, int64_t product_dtype) : on(x), dtypes(check_gpu_float(x), product_dtype) {
    shape.cell = cell;
    shape.dtype = dtypes.product();
    dtype = torch_dtype(shape.dtype);
  }

  Tensor operand(const Tensor& tensor) const { return contiguous_as(tensor, dtype); }
  OptionalTensor operand_or_absent(const OptionalTensor& tensor) const {
    return tensor ? OptionalTensor(operand(tensor).release()) : OptionalTensor();
  }
  int32_t result_dtype(int64_t number, const char* what) const { return torch_dtype(dtypes.result(number, what)); }
  int64_t gates() const { return gate_count(shape.cell) * shape.H; }
  int64_t slots() const { return gate_grad_slots(shape.cell) * shape.H; }
  bool lstm() const { return cell_traits(shape.cell).cell_state; }
  bool f32() const { return shape.dtype == DType::f32; }

  LayerShape shape{};
  OnDevice on;
  Dtypes dtypes;
  int32_t dtype;  // of kernels and products
};

}  // namespace dlk
