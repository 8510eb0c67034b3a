// Turns a typed function into a boxed kernel of the stable ABI, as TORCH_BOX does, with
// the handles of tensor.h (and without the leak of `str` arguments in torch's conversion).
#pragma once

#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "tensor.h"

namespace dlk {

// Turns autograd's recording off while a kernel runs: the operator itself has already been recorded, and what the
// kernel calls must not be.
class NoGrad {
 public:
  NoGrad() : was_enabled_(aoti_torch_grad_mode_is_enabled()) {
    if (was_enabled_) aoti_torch_grad_mode_set_enabled(false);
  }
  ~NoGrad() {
    if (was_enabled_) aoti_torch_grad_mode_set_enabled(true);
  }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool was_enabled_;
};

// Converts a type from and to a value on the stack. take() takes ownership of what the value holds, give() passes
// ownership to the value.
template <class T>
struct Crossing {
  static_assert(std::is_same_v<T, bool> || std::is_same_v<T, int64_t> || std::is_same_v<T, double>,
                "no schema type for T");  // a schema's float is a double
  static T take(StableIValue value) { return torch::stable::detail::to<T>(value); }
};

template <>
struct Crossing<Tensor> {
  static Tensor take(StableIValue value) { return Tensor(torch::stable::detail::to<AtenTensorHandle>(value)); }
  static StableIValue give(Tensor tensor) { return torch::stable::detail::from(tensor.release()); }
};

template <>
struct Crossing<OptionalTensor> {
  static OptionalTensor take(StableIValue value) {
    const auto handle = torch::stable::detail::to<std::optional<AtenTensorHandle>>(value);
    return handle ? OptionalTensor(*handle) : OptionalTensor();
  }
};

template <>
struct Crossing<std::vector<Tensor>> {
  static std::vector<Tensor> take(StableIValue value) {
    const auto list = torch::stable::detail::to<StableListHandle>(value);
    std::vector<Tensor> tensors;
    size_t size = 0;
    DLK_TORCH(torch_list_size, list, &size);
    tensors.reserve(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue item;
      DLK_TORCH(torch_list_get_item, list, i, &item);
      tensors.push_back(Crossing<Tensor>::take(item));
    }
    DLK_TORCH(torch_delete_list, list);
    return tensors;
  }
  static StableIValue give(std::vector<Tensor> tensors) {
    StableListHandle list = nullptr;
    DLK_TORCH(torch_new_list_reserve_size, tensors.size(), &list);
    for (Tensor& tensor : tensors) {
      DLK_TORCH(torch_list_push_back, list, Crossing<Tensor>::give(std::move(tensor)));
    }
    return torch::stable::detail::from(list);
  }
};

template <>
struct Crossing<std::string> {
  static std::string take(StableIValue value) {
    const auto handle = torch::stable::detail::to<StringHandle>(value);
    const char* text = nullptr;
    size_t length = 0;
    DLK_TORCH(torch_string_c_str, handle, &text);
    DLK_TORCH(torch_string_length, handle, &length);
    std::string copy(text, length);
    DLK_TORCH(torch_delete_string, handle);
    return copy;
  }
};

template <class T>
void give_results(StableIValue* stack, T result) {
  stack[0] = Crossing<T>::give(std::move(result));
}

template <class... T>
void give_results(StableIValue* stack, std::tuple<T...> results) {
  std::apply([&](T&... result) { ((*stack++ = Crossing<T>::give(std::move(result))), ...); }, results);
}

// The name of a type in a schema.
template <class T>
constexpr const char* kSchemaType = nullptr;
template <>
inline constexpr const char* kSchemaType<bool> = "bool";
template <>
inline constexpr const char* kSchemaType<int64_t> = "int";
template <>
inline constexpr const char* kSchemaType<double> = "float";
template <>
inline constexpr const char* kSchemaType<Tensor> = "Tensor";
template <>
inline constexpr const char* kSchemaType<OptionalTensor> = "Tensor?";
template <>
inline constexpr const char* kSchemaType<std::vector<Tensor>> = "Tensor[]";
template <>
inline constexpr const char* kSchemaType<std::string> = "str";

// How an argument is called in a schema. Names that C++ reserves end in an underscore, which the schema does not have.
inline std::string schema_name(std::string name) {
  if (name.back() == '_') name.pop_back();
  return name;
}

// DLK_ARGUMENTS(Name, LIST) makes the struct of an operator's arguments from the one list of them:
//   #define LIST(ARGUMENT) ARGUMENT(Tensor, x, "") ARGUMENT(int64_t, steps, "=0")
// with type, name and what follows the name in the schema. Name::schema() is their part of the schema, Name::take reads
// them from the stack.
#define DLK_MEMBER_OF_ARGUMENTS(Type, name, rest) Type name{};
#define DLK_SCHEMA_OF_ARGUMENTS(Type, name, rest) \
  text += text.empty() ? "" : ", ";               \
  text += std::string(kSchemaType<Type>) + " " + schema_name(#name) + rest;
#define DLK_TAKE_ARGUMENTS(Type, name, rest) taken.name = Crossing<Type>::take(*stack++);
#define DLK_SCHEMA_AND_TAKE(Name, SCHEMA_OF_ALL, TAKE_ALL) \
  static std::string schema() {                            \
    std::string text;                                      \
    SCHEMA_OF_ALL                                          \
    return text;                                           \
  }                                                        \
  static Name take(StableIValue* stack) {                  \
    Name taken;                                            \
    TAKE_ALL                                               \
    return taken;                                          \
  }
#define DLK_ARGUMENTS(Name, LIST)                                                      \
  struct Name {                                                                        \
    LIST(DLK_MEMBER_OF_ARGUMENTS)                                                      \
    DLK_SCHEMA_AND_TAKE(Name, LIST(DLK_SCHEMA_OF_ARGUMENTS), LIST(DLK_TAKE_ARGUMENTS)) \
  };

// The same for an operator that has arguments in common with others. Those are members of the struct Shared, its base:
//   #define LIST(SHARED, OWN) SHARED(Tensor, q, "") OWN(bool, contiguous, "")
#define DLK_NO_MEMBER(Type, name, rest)
#define DLK_ARGUMENTS_WITH_SHARED(Name, Shared, LIST)                                 \
  struct Name : Shared {                                                              \
    LIST(DLK_NO_MEMBER, DLK_MEMBER_OF_ARGUMENTS)                                      \
    DLK_SCHEMA_AND_TAKE(Name, LIST(DLK_SCHEMA_OF_ARGUMENTS, DLK_SCHEMA_OF_ARGUMENTS), \
                        LIST(DLK_TAKE_ARGUMENTS, DLK_TAKE_ARGUMENTS))                 \
  };

// The types of a function's parameters.
template <class Result, class... Parameters>
std::tuple<std::decay_t<Parameters>...> parameters_of(Result (*)(Parameters...));

// The boxed kernel of an operator: `function` is called with the values `fixed` and the struct of its arguments.
template <auto function, auto... fixed>
void boxed(StableIValue* stack, uint64_t /*inputs*/, uint64_t /*outputs*/) {
  using Arguments = std::tuple_element_t<sizeof...(fixed), decltype(parameters_of(function))>;
  // An exception of the standard library's containers. Tensors and workspaces throw errors that say how many bytes.
  static constexpr const char* kNoMemory = "DefaultCPUAllocator: can't allocate memory for the tables of this call";
  const NoGrad guard;
  const Arguments arguments = Arguments::take(stack);
  try {
    give_results(stack, function(fixed..., arguments));
  } catch (const std::bad_alloc&) {
    throw std::runtime_error(kNoMemory);
  } catch (const std::length_error&) {
    throw std::runtime_error(kNoMemory);
  }
}

}  // namespace dlk
