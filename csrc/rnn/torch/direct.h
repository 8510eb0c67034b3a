// What the direct calls of layers and cells share (direct.cpp, direct_modules.cpp): Python objects, the checks that a
// call is a plain one, and the way of its tensors from and to Python.
#pragma once

#include <Python.h>
#include <strings.h>

#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

#include "boundary.h"
#include "core/isa.h"

namespace dlk {

// An owned reference to a Python object.
class Object {
 public:
  explicit Object(PyObject* object = nullptr) : object_(object) {}
  Object(Object&& other) noexcept : object_(other.release()) {}
  ~Object() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }

 private:
  PyObject* object_;
};

// What the calls use of torch, see connect(). The references are never given back.
struct TorchSide {
  PyObject *tensor, *parameter;         // types
  PyObject *to_handles, *from_handles;  // functions between lists of tensors and lists of capsules
  PyObject* is_deterministic;           // a function
  PyObject* forward_ad;                 // a module, whose _current_level is negative if no tensor has a tangent
  PyObject* must_be_false;              // a tuple of functions: all return False or 0 in a plain call
  PyObject *current_level, *requires_grad, *is_neg, *version, *data_ptr;  // names
};
extern TorchSide torch_side;

// Thrown for a call that is not served. A Python error may be set.
struct NotServed {};

inline void require(bool condition) {
  if (!condition) throw NotServed();
}

inline Object checked(PyObject* result) {
  require(result != nullptr);
  return Object(result);
}

inline bool is_true(const Object& object) {
  const int truth = PyObject_IsTrue(object.get());
  require(truth >= 0);
  return truth != 0;
}

// Whether nothing between Python and the kernel has to see or change the call: no mode, transform, tracer or profiler,
// no autocast and no tangents.
inline void require_plain_call() {
  const Object level = checked(PyObject_GetAttr(torch_side.forward_ad, torch_side.current_level));
  require(PyLong_AsLong(level.get()) < 0);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(torch_side.must_be_false); ++i) {
    require(!is_true(checked(PyObject_CallNoArgs(PyTuple_GET_ITEM(torch_side.must_be_false, i)))));
  }
}

// Whether torch.use_deterministic_algorithms is on.
inline bool is_deterministic() { return is_true(checked(PyObject_CallNoArgs(torch_side.is_deterministic))); }

inline bool flag(PyObject* object) {
  require(PyBool_Check(object));
  return object == Py_True;
}

// Whether the object is a tensor and not of a subclass of a program's.
inline bool is_plain_tensor(PyObject* object) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  return type == torch_side.tensor || type == torch_side.parameter;
}

// The handles of a list of tensors. They keep the tensors alive.
inline std::vector<Tensor> handles_of(PyObject* list) {
  const Object capsules = checked(PyObject_CallOneArg(torch_side.to_handles, list));
  require(PyList_Check(capsules.get()));
  std::vector<Tensor> handles;
  handles.reserve(static_cast<size_t>(PyList_GET_SIZE(capsules.get())));
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(capsules.get()); ++i) {
    handles.emplace_back(
        static_cast<AtenTensorHandle>(PyCapsule_GetPointer(PyList_GET_ITEM(capsules.get(), i), nullptr)));
  }
  return handles;
}

// The tensors of a call. Subclasses may have an operator of their own, a tensor that requires a gradient needs
// autograd, and the values of a negative view are not those in memory.
class GivenTensors {
 public:
  GivenTensors() : list_(checked(PyList_New(0))), autograd_(aoti_torch_grad_mode_is_enabled()) {}

  void require_no_gradient(PyObject* tensor) const {
    require(!autograd_ || !is_true(checked(PyObject_GetAttr(tensor, torch_side.requires_grad))));
  }
  void add(PyObject* tensor) {
    require(is_plain_tensor(tensor));
    require_no_gradient(tensor);
    require(!is_true(checked(PyObject_CallMethodNoArgs(tensor, torch_side.is_neg))));
    require(PyList_Append(list_.get(), tensor) == 0);
  }
  void add_if(PyObject* tensor) {
    if (tensor != Py_None) add(tensor);
  }

  // The handles of the tensors in the order in which they were added.
  std::vector<Tensor> handles() const {
    std::vector<Tensor> handles = handles_of(list_.get());
    for (const Tensor& tensor : handles) {
      require(tensor.on_cpu());
      void* data = nullptr;  // is null if the values are not in memory: a tensor of zeros, or freed storage
      DLK_TORCH(aoti_torch_get_data_ptr, tensor.get(), &data);
      require(data || tensor.numel() == 0);
    }
    return handles;
  }

 private:
  Object list_;
  bool autograd_;
};

// Hands over the tensors of GivenTensors::handles() one after the other.
class Handles {
 public:
  explicit Handles(std::vector<Tensor> tensors) : tensors_(std::move(tensors)) {}
  Tensor take() { return std::move(tensors_[next_++]); }
  OptionalTensor take_if(PyObject* tensor) {
    return tensor == Py_None ? OptionalTensor() : OptionalTensor(take().release());
  }

 private:
  std::vector<Tensor> tensors_;
  size_t next_ = 0;
};

// A list of the tensors, which it takes over.
inline PyObject* to_python(std::vector<Tensor> tensors) {
  const size_t count = tensors.size();
  Object capsules = checked(PyList_New(static_cast<Py_ssize_t>(count)));
  for (size_t i = 0; i < count; ++i) {
    PyObject* capsule = PyCapsule_New(tensors[i].get(), nullptr, nullptr);
    require(capsule != nullptr);
    PyList_SET_ITEM(capsules.get(), static_cast<Py_ssize_t>(i), capsule);
  }
  Object list = checked(PyObject_CallOneArg(torch_side.from_handles, capsules.get()));
  for (size_t i = 0; i < count; ++i) tensors[i].release();
  return list.release();
}

// Runs `compute` while other Python threads may run.
template <class Compute>
std::vector<Tensor> without_gil(const Compute& compute) {
  struct Release {
    PyThreadState* state = PyEval_SaveThread();
    ~Release() { PyEval_RestoreThread(state); }
  } release;
  const NoGrad guard;
  return compute();
}

// The Python object that `serve` returns, or None if the call is not served.
template <class Serve>
PyObject* served_or_none(const Serve& serve) noexcept {
  try {
    return serve();
  } catch (const NotServed&) {
  } catch (const std::exception&) {
    // A check has refused the call or there is no memory. Both happen again on the usual way, which says so.
  }
  PyErr_Clear();
  Py_RETURN_NONE;
}

// The cell of an operator's mode, such as "rnn_tanh", or of a layer's, such as "RNN_TANH".
inline CellKind cell_of(PyObject* mode) {
  const char* name = PyUnicode_AsUTF8(mode);
  require(name != nullptr);
  for (CellKind cell : kCellKinds) {
    if (strcasecmp(name, mode_name(cell)) == 0) return cell;
  }
  throw NotServed();
}

// A view of a tensor's memory from `offset` values behind its first one on.
inline AtenTensorHandle view_of(const Tensor& tensor, int64_t dim, const int64_t* sizes, const int64_t* strides,
                                int64_t offset = 0) {
  AtenTensorHandle handle = nullptr;  // torch counts the offset from where the tensor begins
  DLK_TORCH(aoti_torch__reinterpret_tensor, tensor.get(), dim, sizes, strides, offset, &handle);
  return handle;
}

// `count` entries of a state of all layers, a view.
inline OptionalTensor layers_of(const OptionalTensor& state, int64_t first, int64_t count) {
  const int64_t sizes[] = {count, state.size(1), state.size(2)};
  return OptionalTensor(view_of(state, 3, sizes, state.strides(), first * state.strides()[0]));
}

// The last states of all layers in one tensor.
inline Tensor joined(const std::vector<Tensor>& states) {
  const Tensor& one = states[0];
  const int64_t sizes[] = {one.size(0) * static_cast<int64_t>(states.size()), one.size(1), one.size(2)};
  Tensor all = empty(sizes, 3, one.dtype());
  char* to = static_cast<char*>(all.data());
  for (const Tensor& state : states) {
    const size_t bytes = state.byte_count();
    if (bytes > 0) std::memcpy(to, state.data(), bytes);
    to += bytes;
  }
  return all;
}

// The weights of all layers, and what `pack` returned for each layer; `packed` is empty if they are not packed.
struct StackWeights {
  std::vector<Tensor> weights, packed;
};

// Lends the weights of one layer to the arguments of a call.
class LentWeights {
 public:
  LentWeights(const StackWeights& all, size_t layer, size_t count, SequenceForwardArguments* a) : a_(a) {
    a->weights.reserve(count);  // what follows cannot throw, so no handle is deleted here
    for (size_t i = 0; i < count; ++i) a->weights.emplace_back(all.weights[layer * count + i].get());
    if (!all.packed.empty()) a->packed = OptionalTensor(all.packed[layer].get());
  }
  ~LentWeights() {
    for (Tensor& weight : a_->weights) weight.release();
    a_->weights.clear();
    a_->packed.release();
  }

 private:
  SequenceForwardArguments* a_;
};

struct Stack {
  CellKind cell;
  int64_t layers, directions;
  OptionalTensor h0, c0;  // of all layers
  const StackWeights* weights;
  SequenceForwardArguments common;  // x is that of the first layer

  // y, h_n and c_n.
  std::vector<Tensor> run() {
    for (const OptionalTensor* state : {&h0, &c0}) {
      require(!*state || (state->dim() == 3 && state->size(0) == layers * directions));
    }
    const size_t number = weights->weights.size();
    require(layers > 0 && number > 0 && number % static_cast<size_t>(layers) == 0);
    const size_t count = number / static_cast<size_t>(layers);
    std::vector<Tensor> results(1), h_n, c_n;
    for (int64_t layer = 0; layer < layers; ++layer) {
      SequenceForwardArguments& a = common;
      if (layer > 0) a.x = std::move(results[0]);
      if (layers == 1) {
        a.h0 = std::move(h0);
        a.c0 = std::move(c0);
      } else {
        if (h0) a.h0 = layers_of(h0, layer * directions, directions);
        if (c0) a.c0 = layers_of(c0, layer * directions, directions);
      }
      const LentWeights lent(*weights, static_cast<size_t>(layer), count, &a);
      auto [y, h, c, saved, cells] = on_cpu::sequence_results(cell, a);
      results[0] = std::move(y);
      h_n.push_back(std::move(h));
      c_n.push_back(std::move(c));
    }
    results.push_back(layers == 1 ? std::move(h_n[0]) : joined(h_n));
    if (cell_traits(cell).cell_state) results.push_back(layers == 1 ? std::move(c_n[0]) : joined(c_n));
    return results;
  }
};

// A tensor with one more dimension of size 1 in front, a view; absent if `tensor` is.
inline OptionalTensor as_one_step(const OptionalTensor& tensor) {
  if (!tensor) return OptionalTensor();
  require(tensor.dim() == 2);
  const int64_t sizes[] = {1, tensor.size(0), tensor.size(1)};
  const int64_t strides[] = {0, tensor.strides()[0], tensor.strides()[1]};
  return OptionalTensor(view_of(tensor, 3, sizes, strides));
}

// A view of a matrix with its dimensions exchanged.
inline OptionalTensor transposed(const OptionalTensor& tensor) {
  require(tensor.dim() == 2);
  const int64_t sizes[] = {tensor.size(1), tensor.size(0)};
  const int64_t strides[] = {tensor.strides()[1], tensor.strides()[0]};
  return OptionalTensor(view_of(tensor, 2, sizes, strides));
}

// The only entry of the first dimension, a view.
inline Tensor first_of(const Tensor& tensor) {
  const int64_t sizes[] = {tensor.size(1), tensor.size(2)};
  return Tensor(view_of(tensor, 2, sizes, tensor.strides() + 1));
}

// The Python arguments of a call of layers. Absent tensors are None; `packed` is None or a tuple with what `pack`
// returned for each layer. `held`, if not null, replaces the values of `weights` and `packed`. With one_step, x and the
// states are those of a cell, without the dimension of time or layers. resets: [T, B], or [B, T] with batch_first.
struct StackCall {
  CellKind cell;
  PyObject *x, *h0, *c0, *batch_sizes, *lengths, *resets, *packed;
  PyObject* const* weights;  // of all layers
  Py_ssize_t number;         // of weights
  const StackWeights* held;
  int64_t layers;
  bool bidirectional, batch_first, one_step;

  // y, h_n and c_n; for a cell h' and c'.
  std::vector<Tensor> run() const {
    require(packed == Py_None || PyTuple_Check(packed));
    const Py_ssize_t buffers = packed == Py_None ? 0 : PyTuple_GET_SIZE(packed);
    require(buffers == 0 || buffers == layers);
    GivenTensors given;  // the weights first: if a gradient is wanted, it is mostly theirs
    if (held) {
      for (Py_ssize_t i = 0; i < number; ++i) {
        require(is_plain_tensor(weights[i]));
        given.require_no_gradient(weights[i]);
      }
    } else {
      for (Py_ssize_t i = 0; i < number; ++i) given.add(weights[i]);
      for (Py_ssize_t i = 0; i < buffers; ++i) given.add(PyTuple_GET_ITEM(packed, i));
    }
    given.add(x);
    for (PyObject* tensor : {h0, c0, batch_sizes, lengths, resets}) given.add_if(tensor);
    require_plain_call();

    Stack stack{};
    stack.cell = cell;
    stack.layers = layers;
    stack.directions = bidirectional ? 2 : 1;
    SequenceForwardArguments& a = stack.common;
    a.product_dtype = a.h_dtype = a.c_dtype = -1;
    a.bidirectional = bidirectional;
    a.batch_first = batch_first && batch_sizes == Py_None;
    a.deterministic = is_deterministic();
    Handles handles(given.handles());
    StackWeights own;
    if (!held) {
      for (Py_ssize_t i = 0; i < number; ++i) own.weights.push_back(handles.take());
      for (Py_ssize_t i = 0; i < buffers; ++i) own.packed.push_back(handles.take());
    }
    stack.weights = held ? held : &own;
    a.x = handles.take();
    stack.h0 = handles.take_if(h0);
    stack.c0 = handles.take_if(c0);
    a.batch_sizes = handles.take_if(batch_sizes);
    a.lengths = handles.take_if(lengths);
    a.resets = handles.take_if(resets);
    if (a.resets && a.batch_first) a.resets = transposed(a.resets);
    if (one_step) {
      a.x = as_one_step(OptionalTensor(a.x.release()));
      stack.h0 = as_one_step(stack.h0);
      stack.c0 = as_one_step(stack.c0);
    }
    std::vector<Tensor> results = without_gil([&] { return stack.run(); });
    if (!one_step) return results;
    std::vector<Tensor> states;
    for (size_t i = 1; i < results.size(); ++i) states.push_back(first_of(results[i]));
    return states;
  }
};

// h' and c' of a cell with the weights w_ih, w_hh, b_ih and b_hh. Absent tensors are None.
inline std::vector<Tensor> call_cell(CellKind cell, PyObject* x, PyObject* h, PyObject* c, PyObject* const* weights) {
  GivenTensors given;
  for (PyObject* tensor : {weights[0], weights[1], x}) given.add(tensor);
  for (PyObject* tensor : {weights[2], weights[3], h, c}) given.add_if(tensor);
  require_plain_call();

  CellForwardArguments a{};
  a.product_dtype = a.h_dtype = a.c_dtype = -1;
  a.deterministic = is_deterministic();
  Handles handles(given.handles());
  a.w_ih = handles.take();
  a.w_hh = handles.take();
  a.x = handles.take();
  a.b_ih = handles.take_if(weights[2]);
  a.b_hh = handles.take_if(weights[3]);
  a.h = handles.take_if(h);
  a.c = handles.take_if(c);
  return without_gil([&] { return on_cpu::cell_forward(cell, a); });
}

// The functions of Python's module that direct_modules.cpp defines.
PyObject* hold(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* layer_module(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* cell_module(PyObject*, PyObject* const* args, Py_ssize_t count);

}  // namespace dlk
