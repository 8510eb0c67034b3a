// Argument checks of the operators. They stand behind those of the Python layer, which
// raises torch's own exception types: here the point is that no call can crash.
#pragma once

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <string>

#include "tensor.h"

namespace dlk {

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// RuntimeError in Python; DLK_CHECK_VALUE: ValueError.
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

// `what` names the argument in messages, e.g. "h0".
inline void check_tensor(const Tensor& tensor, const char* what, int32_t dtype, std::initializer_list<int64_t> shape,
                         const Device* device = nullptr) {
  if (device) {
    DLK_CHECK(tensor.device() == *device, what, " must be on the device of x");
  } else {
    DLK_CHECK(tensor.on_cpu(), what, " must be on the CPU like x");
  }
  const int32_t found = tensor.dtype();
  DLK_CHECK(found == dtype, what, " must be ", dtype_text(dtype), ", got ", dtype_text(found));
  const int64_t dim = static_cast<int64_t>(shape.size());
  DLK_CHECK(tensor.dim() == dim && std::equal(shape.begin(), shape.end(), tensor.sizes()), what, " must have shape ",
            shape_text(shape.begin(), dim), ", got ", shape_text(tensor));
}

// The dtypes of a call's tensors. Without a product dtype (rnn_ops.h) all are of the first one's.
class Dtypes {
 public:
  Dtypes() = default;
  Dtypes(DType of_x, int64_t product) : of_x_(of_x), mixed_(product >= 0) {
    DLK_CHECK(product >= -1 && product <= static_cast<int64_t>(DType::f16), "product_dtype: unknown number ", product);
    product_ = mixed_ ? static_cast<DType>(product) : of_x;
    DLK_CHECK(!mixed_ || (of_x != DType::f64 && product_ != DType::f64),
              "product_dtype: expected -1 with float64, got ", product);
  }

  DType product() const { return product_; }
  // That of an output: a number of DType, or -1 for x's.
  DType output(int64_t number, const char* what) const {
    if (number == -1) return of_x_;
    DLK_CHECK(mixed_ && number >= 0 && number <= static_cast<int64_t>(DType::f16) && number != int64_t(DType::f64),
              what, ": expected -1, or with product_dtype 0, 2 or 3, got ", number);
    return static_cast<DType>(number);
  }
  // That of an argument of this shape, which is checked.
  DType check(const Tensor& tensor, const char* what, std::initializer_list<int64_t> shape,
              const Device* device = nullptr) const {
    DType found = of_x_;
    if (mixed_) {
      for (DType dtype : {DType::f32, DType::bf16, DType::f16})
        if (tensor.dtype() == torch_dtype(dtype)) found = dtype;
    }
    check_tensor(tensor, what, torch_dtype(found), shape, device);
    return found;
  }

 private:
  DType of_x_ = DType::f32, product_ = DType::f32;
  bool mixed_ = false;
};

inline DType check_float(const Tensor& tensor, const char* what) {
  DLK_CHECK(tensor.on_cpu(), what, " must be on the CPU");
  const int32_t found = tensor.dtype();
  for (DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16}) {
    if (found == torch_dtype(dtype)) return dtype;
  }
  throw std::runtime_error(concat(what, " must be float32, float64, bfloat16 or float16, got ", dtype_text(found)));
}

}  // namespace dlk
