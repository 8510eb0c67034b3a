// Argument checks of the operators. The Python layer has checks of its own, which raise
// torch's exception types. These ensure that no call of an operator can crash the process.
#pragma once

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "tensor.h"

namespace dlk {

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// Throws a RuntimeError in Python; DLK_CHECK_VALUE throws a ValueError.
#define DLK_CHECK(condition, ...)                                           \
  do {                                                                      \
    if (!(condition)) throw std::runtime_error(::dlk::concat(__VA_ARGS__)); \
  } while (false)
#define DLK_CHECK_VALUE(condition, ...)                                        \
  do {                                                                         \
    if (!(condition)) throw std::invalid_argument(::dlk::concat(__VA_ARGS__)); \
  } while (false)

template <class Sizes>
std::string shape_text(const Sizes* sizes, int64_t dim) {
  std::ostringstream text;
  for (int64_t d = 0; d < dim; ++d) text << (d ? ", " : "[") << sizes[d];
  text << (dim ? "]" : "[]");
  return text.str();
}

inline std::string shape_text(const Tensor& tensor) { return shape_text(tensor.sizes(), tensor.dim()); }

inline std::string dtype_text(int32_t dtype) {
  if (dtype == aoti_torch_dtype_float32()) return "float32";
  if (dtype == aoti_torch_dtype_float64()) return "float64";
  if (dtype == aoti_torch_dtype_bfloat16()) return "bfloat16";
  if (dtype == aoti_torch_dtype_float16()) return "float16";
  if (dtype == aoti_torch_dtype_int64()) return "int64";
  if (dtype == aoti_torch_dtype_int32()) return "int32";
  if (dtype == aoti_torch_dtype_uint8()) return "uint8";
  if (dtype == aoti_torch_dtype_bool()) return "bool";
  return concat("another type (number ", dtype, ")");
}

inline void check_kind(const Tensor& tensor, const char* what, int32_t dtype, const Device* device) {
  DLK_CHECK(device ? tensor.device() == *device : tensor.on_cpu(), what, " must be on the device of x");
  const int32_t found = tensor.dtype();
  DLK_CHECK(found == dtype, what, " must be ", dtype_text(dtype), ", got ", dtype_text(found));
}

// `what` names the argument in messages, e.g. "h0"; `device` is null for the CPU.
inline void check_tensor(const Tensor& tensor, const char* what, int32_t dtype, std::initializer_list<int64_t> shape,
                         const Device* device = nullptr) {
  check_kind(tensor, what, dtype, device);
  const int64_t dim = static_cast<int64_t>(shape.size());
  DLK_CHECK(tensor.dim() == dim && std::equal(shape.begin(), shape.end(), tensor.sizes()), what, " must have shape ",
            shape_text(shape.begin(), dim), ", got ", shape_text(tensor));
}

// Checks that the tensor has one dimension, of any size.
inline void check_vector(const Tensor& tensor, const char* what, int32_t dtype, const Device* device = nullptr) {
  DLK_CHECK(tensor.dim() == 1, what, " must be one-dimensional, got shape ", shape_text(tensor));
  check_kind(tensor, what, dtype, device);
}

// Copies the elements of a vector on the CPU. Each is read once, so the values that are checked are the values that are
// used, even if another thread writes to the tensor.
template <class T>
std::vector<T> copy_values(const Tensor& tensor) {
  std::vector<T> values(static_cast<size_t>(tensor.numel()));
  const T* from = static_cast<const T*>(tensor.data());
  const int64_t stride = tensor.strides()[0];
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = __atomic_load_n(from + static_cast<int64_t>(i) * stride, __ATOMIC_RELAXED);
  }
  return values;
}

inline DType check_float(const Tensor& tensor, const char* what) {
  DLK_CHECK(tensor.on_cpu(), what, " must be on the CPU");
  const int32_t found = tensor.dtype();
  for (DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16}) {
    if (found == torch_dtype(dtype)) return dtype;
  }
  throw std::runtime_error(concat(what, " must be float32, float64, bfloat16 or float16, got ", dtype_text(found)));
}

}  // namespace dlk
