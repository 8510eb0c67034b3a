// The forward of layers and cells, called from Python without torch's dispatcher: `layers` and `cell` of `_C`. They
// serve plain calls only, those for which the dispatcher would do nothing but call the CPU kernel, and return None for
// all others and for those that the checks refuse. The caller then goes the usual way, which raises the errors.
//
// Tensors cross the boundary to Python by two functions of torch._C._aoti, which Inductor's C++ wrapper uses too. For a
// step of LSTM(128, 128) the dispatcher with its conversions takes longer than the kernel.
#include <Python.h>

#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

#include "boundary.h"
#include "torch/module.h"

namespace dlk {
namespace {

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
  PyObject *current_level, *requires_grad, *is_neg;  // names
};
TorchSide torch_side{};

// Thrown for a call that is not served. A Python error may be set.
struct NotServed {};

void require(bool condition) {
  if (!condition) throw NotServed();
}

Object checked(PyObject* result) {
  require(result != nullptr);
  return Object(result);
}

bool is_true(const Object& object) {
  const int truth = PyObject_IsTrue(object.get());
  require(truth >= 0);
  return truth != 0;
}

// Whether nothing between Python and the kernel has to see or change the call: no mode, transform, tracer or profiler,
// no autocast and no tangents.
void require_plain_call() {
  const Object level = checked(PyObject_GetAttr(torch_side.forward_ad, torch_side.current_level));
  require(PyLong_AsLong(level.get()) < 0);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(torch_side.must_be_false); ++i) {
    require(!is_true(checked(PyObject_CallNoArgs(PyTuple_GET_ITEM(torch_side.must_be_false, i)))));
  }
}

bool flag(PyObject* object) {
  require(PyBool_Check(object));
  return object == Py_True;
}

// The tensors of a call. Subclasses may have an operator of their own, a tensor that requires a gradient needs
// autograd, and the values of a negative view are not those in memory.
class GivenTensors {
 public:
  GivenTensors() : list_(checked(PyList_New(0))), autograd_(aoti_torch_grad_mode_is_enabled()) {}

  void add(PyObject* tensor) {
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
    require(type == torch_side.tensor || type == torch_side.parameter);
    require(!autograd_ || !is_true(checked(PyObject_GetAttr(tensor, torch_side.requires_grad))));
    require(!is_true(checked(PyObject_CallMethodNoArgs(tensor, torch_side.is_neg))));
    require(PyList_Append(list_.get(), tensor) == 0);
  }
  void add_if(PyObject* tensor) {
    if (tensor != Py_None) add(tensor);
  }

  // The handles of the tensors in the order in which they were added. They keep the tensors alive.
  std::vector<Tensor> handles() const {
    const Object capsules = checked(PyObject_CallOneArg(torch_side.to_handles, list_.get()));
    require(PyList_Check(capsules.get()));
    std::vector<Tensor> handles;
    handles.reserve(static_cast<size_t>(PyList_GET_SIZE(capsules.get())));
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(capsules.get()); ++i) {
      handles.emplace_back(
          static_cast<AtenTensorHandle>(PyCapsule_GetPointer(PyList_GET_ITEM(capsules.get(), i), nullptr)));
    }
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
PyObject* to_python(std::vector<Tensor> tensors) {
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

CellKind cell_of(PyObject* mode) {
  const char* name = PyUnicode_AsUTF8(mode);
  require(name != nullptr);
  for (CellKind cell : kCellKinds) {
    if (std::strcmp(name, mode_name(cell)) == 0) return cell;
  }
  throw NotServed();
}

// `count` entries of a state of all layers, a view.
OptionalTensor layers_of(const OptionalTensor& state, int64_t first, int64_t count) {
  const int64_t* strides = state.strides();
  const int64_t sizes[] = {count, state.size(1), state.size(2)};
  AtenTensorHandle handle = nullptr;  // torch counts the offset from where the state begins
  DLK_TORCH(aoti_torch__reinterpret_tensor, state.get(), 3, sizes, strides, first * strides[0], &handle);
  return OptionalTensor(handle);
}

// The last states of all layers in one tensor.
Tensor joined(const std::vector<Tensor>& states) {
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

struct Stack {
  CellKind cell;
  int64_t layers, directions;
  OptionalTensor h0, c0;                // of all layers
  std::vector<Tensor> weights, packed;  // the same
  SequenceForwardArguments common;      // x is that of the first layer

  // y, h_n and c_n.
  std::vector<Tensor> run() {
    for (const OptionalTensor* state : {&h0, &c0}) {
      require(!*state || (state->dim() == 3 && state->size(0) == layers * directions));
    }
    require(layers > 0 && !weights.empty() && weights.size() % static_cast<size_t>(layers) == 0);
    const size_t count = weights.size() / static_cast<size_t>(layers);
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
      a.weights.clear();
      for (size_t i = 0; i < count; ++i) {
        a.weights.push_back(std::move(weights[static_cast<size_t>(layer) * count + i]));
      }
      if (!packed.empty()) a.packed = OptionalTensor(packed[static_cast<size_t>(layer)].release());
      auto [y, h, c, saved] = on_cpu::sequence_forward(cell, a);
      results[0] = std::move(y);
      h_n.push_back(std::move(h));
      c_n.push_back(std::move(c));
    }
    results.push_back(layers == 1 ? std::move(h_n[0]) : joined(h_n));
    if (cell_traits(cell).cell_state) results.push_back(layers == 1 ? std::move(c_n[0]) : joined(c_n));
    return results;
  }
};

// layers(mode, x, h0, c0, weights, packed, batch_sizes, lengths, num_layers, bidirectional, batch_first)
// -> [y, h_n] or [y, h_n, c_n] or None
// The weights of all layers are in one list; packed is None or a tuple with what `pack` returned for each layer.
PyObject* layers(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return served_or_none([&] {
    require(count == 11 && torch_side.tensor);
    PyObject *x = args[1], *h0 = args[2], *c0 = args[3], *packed = args[5], *batch_sizes = args[6], *lengths = args[7];
    const Object weights = checked(PySequence_Tuple(args[4]));
    const Py_ssize_t number = PyTuple_GET_SIZE(weights.get());
    require(packed == Py_None || PyTuple_Check(packed));
    const Py_ssize_t buffers = packed == Py_None ? 0 : PyTuple_GET_SIZE(packed);

    GivenTensors given;  // the weights first: if a gradient is wanted, it is mostly theirs
    for (Py_ssize_t i = 0; i < number; ++i) given.add(PyTuple_GET_ITEM(weights.get(), i));
    for (Py_ssize_t i = 0; i < buffers; ++i) given.add(PyTuple_GET_ITEM(packed, i));
    given.add(x);
    for (PyObject* tensor : {h0, c0, batch_sizes, lengths}) given.add_if(tensor);
    require_plain_call();

    Stack stack{};
    stack.cell = cell_of(args[0]);
    stack.layers = PyLong_AsLongLong(args[8]);
    require(!PyErr_Occurred() && (buffers == 0 || buffers == stack.layers));
    SequenceForwardArguments& a = stack.common;
    a.product_dtype = a.h_dtype = a.c_dtype = -1;
    a.bidirectional = flag(args[9]);
    a.batch_first = flag(args[10]) && batch_sizes == Py_None;
    a.deterministic = is_true(checked(PyObject_CallNoArgs(torch_side.is_deterministic)));
    stack.directions = a.bidirectional ? 2 : 1;
    Handles handles(given.handles());
    for (Py_ssize_t i = 0; i < number; ++i) stack.weights.push_back(handles.take());
    for (Py_ssize_t i = 0; i < buffers; ++i) stack.packed.push_back(handles.take());
    a.x = handles.take();
    stack.h0 = handles.take_if(h0);
    stack.c0 = handles.take_if(c0);
    a.batch_sizes = handles.take_if(batch_sizes);
    a.lengths = handles.take_if(lengths);

    return to_python(without_gil([&] { return stack.run(); }));
  });
}

// cell(mode, x, h, c, w_ih, w_hh, b_ih, b_hh) -> [h'] or [h', c'] or None
PyObject* cell(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return served_or_none([&] {
    require(count == 8 && torch_side.tensor);
    GivenTensors given;
    for (Py_ssize_t i : {4, 5, 1}) given.add(args[i]);
    for (Py_ssize_t i : {6, 7, 2, 3}) given.add_if(args[i]);
    require_plain_call();

    CellForwardArguments a{};
    a.product_dtype = a.h_dtype = a.c_dtype = -1;
    a.deterministic = is_true(checked(PyObject_CallNoArgs(torch_side.is_deterministic)));
    Handles handles(given.handles());
    a.w_ih = handles.take();
    a.w_hh = handles.take();
    a.x = handles.take();
    a.b_ih = handles.take_if(args[6]);
    a.b_hh = handles.take_if(args[7]);
    a.h = handles.take_if(args[2]);
    a.c = handles.take_if(args[3]);
    const CellKind kind = cell_of(args[0]);
    return to_python(without_gil([&] { return on_cpu::cell_forward(kind, a); }));
  });
}

// connect(tensor, parameter, to_handles, from_handles, is_deterministic, forward_ad, must_be_false)
PyObject* connect(PyObject*, PyObject* args) {
  TorchSide side{};
  if (!PyArg_ParseTuple(args, "OOOOOOO!", &side.tensor, &side.parameter, &side.to_handles, &side.from_handles,
                        &side.is_deterministic, &side.forward_ad, &PyTuple_Type, &side.must_be_false)) {
    return nullptr;
  }
  side.current_level = PyUnicode_InternFromString("_current_level");
  side.requires_grad = PyUnicode_InternFromString("requires_grad");
  side.is_neg = PyUnicode_InternFromString("is_neg");
  if (!side.current_level || !side.requires_grad || !side.is_neg) return nullptr;
  for (PyObject* object : {side.tensor, side.parameter, side.to_handles, side.from_handles, side.is_deterministic,
                           side.forward_ad, side.must_be_false}) {
    Py_INCREF(object);
  }
  torch_side = side;
  Py_RETURN_NONE;
}

template <class Function>
PyCFunction as_method(Function* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"layers", as_method(layers), METH_FASTCALL, "Layers without gradients, in a plain call; else None."},
    {"cell", as_method(cell), METH_FASTCALL, "A step of a cell without gradients, in a plain call; else None."},
    {"connect", connect, METH_VARARGS, "Passes what `layers` and `cell` use of torch."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void bind_direct_calls(pybind11::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw pybind11::error_already_set();
}

}  // namespace dlk
