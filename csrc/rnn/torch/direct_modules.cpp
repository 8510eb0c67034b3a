// `layer_module` and `cell_module` of `_C`: the forward of a module in one call from Python. They read its weights and
// options from its __dict__, which in Python takes as long as a small layer computes.
#include "direct.h"

#include <memory>

namespace dlk {
namespace {

// What a module has in its __dict__. References are borrowed.
class Module {
 public:
  explicit Module(PyObject* dict) : dict_(dict) {
    require(PyDict_Check(dict));
    static PyObject* const name = interned("_parameters");
    parameters_ = get(name);
    require(PyDict_Check(parameters_));
  }

  static PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

  PyObject* get_or_null(PyObject* name) const { return PyDict_GetItemWithError(dict_, name); }
  PyObject* get(PyObject* name) const {
    PyObject* value = get_or_null(name);
    require(value != nullptr);
    return value;
  }
  bool has(PyObject* name) const {
    PyObject* value = get_or_null(name);
    return value && value != Py_None;
  }
  // None if it was registered as absent. A weight that is computed anew in every call is not there.
  PyObject* parameter(PyObject* name) const {
    PyObject* value = PyDict_GetItemWithError(parameters_, name);
    require(value != nullptr);
    return value;
  }

 private:
  PyObject *dict_, *parameters_;
};

// Whether autograd has to record the call. It mostly has if the first weight wants a gradient, and then nothing else
// needs to be looked at.
bool is_trained(PyObject* weight) {
  require(is_plain_tensor(weight));
  if (!aoti_torch_grad_mode_is_enabled()) return false;
  return is_true(checked(PyObject_GetAttr(weight, torch_side.requires_grad)));
}

constexpr const char* kHeld = "dlkernels.StackWeights";

// Uses the module's `Prepacked` (rnn/prepacked.py), if it has one, which must be of the weights as they are now.
void take_packed(const Module& module, StackCall* call) {
  static PyObject* const name = Module::interned("_prepacked");
  call->packed = Py_None;
  if (!module.has(name)) return;
  PyObject* prepacked = module.get(name);
  require(PyTuple_Check(prepacked) && PyTuple_GET_SIZE(prepacked) == 6);
  PyObject *packed = PyTuple_GET_ITEM(prepacked, 0), *versions = PyTuple_GET_ITEM(prepacked, 1);
  require(PyTuple_Check(packed) && PyTuple_GET_SIZE(packed) == call->number);
  require(PyTuple_Check(versions) && PyTuple_GET_SIZE(versions) == call->number);
  call->held = static_cast<StackWeights*>(PyCapsule_GetPointer(PyTuple_GET_ITEM(prepacked, 5), kHeld));
  require(call->held != nullptr);
  for (Py_ssize_t i = 0; i < call->number; ++i) {
    require(PyTuple_GET_ITEM(packed, i) == call->weights[i]);
    const Object data = checked(PyObject_CallMethodNoArgs(call->weights[i], torch_side.data_ptr));
    const Tensor& alias = call->held->weights[static_cast<size_t>(i)];
    require(PyLong_AsVoidPtr(data.get()) == alias.data() || alias.numel() == 0);
    const long version = PyLong_AsLong(PyTuple_GET_ITEM(versions, i));
    if (version < 0) continue;  // an inference tensor has no version
    require(PyLong_AsLong(checked(PyObject_GetAttr(call->weights[i], torch_side.version)).get()) == version);
  }
  call->packed = PyTuple_GET_ITEM(prepacked, 2);
}

// The states of hx: None, a tensor, or a tuple of h and c for the lstm.
void take_states(PyObject* hx, bool has_cell_state, StackCall* call) {
  call->h0 = call->c0 = Py_None;
  if (hx == Py_None) return;
  call->h0 = hx;
  if (!has_cell_state) return;
  require(PyTuple_CheckExact(hx) && PyTuple_GET_SIZE(hx) == 2);
  call->h0 = PyTuple_GET_ITEM(hx, 0);
  call->c0 = PyTuple_GET_ITEM(hx, 1);
  require(call->h0 != Py_None && call->c0 != Py_None);
}

PyObject* pair(Object first, Object second) {
  PyObject* tuple = PyTuple_New(2);
  require(tuple != nullptr);
  PyTuple_SET_ITEM(tuple, 0, first.release());
  PyTuple_SET_ITEM(tuple, 1, second.release());
  return tuple;
}

Object item(const Object& list, Py_ssize_t at) {
  PyObject* object = PyList_GET_ITEM(list.get(), at);
  Py_INCREF(object);
  return Object(object);
}

}  // namespace

// hold(aliases, buffers) -> a capsule with both, for `Prepacked`
// Handing over a tensor takes 0.2 us. These are handed over once instead of in each call.
PyObject* hold(PyObject*, PyObject* const* args, Py_ssize_t count) {
  try {
    require(count == 2 && torch_side.tensor && PyTuple_Check(args[0]) && PyTuple_Check(args[1]));
    auto held = std::make_unique<StackWeights>();
    const auto handles = [&](int which) { return handles_of(checked(PySequence_List(args[which])).get()); };
    held->weights = handles(0);
    held->packed = handles(1);
    PyObject* capsule = PyCapsule_New(held.get(), kHeld, [](PyObject* self) {
      delete static_cast<StackWeights*>(PyCapsule_GetPointer(self, kHeld));
    });
    if (capsule) held.release();
    return capsule;
  } catch (const NotServed&) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "hold: expected two tuples of tensors");
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// layer_module(module.__dict__, x, hx, resets) -> (y, h_n) or (y, (h_n, c_n)) or None
PyObject* layer_module(PyObject*, PyObject* const* args, Py_ssize_t count) {
  static PyObject *const names = Module::interned("_flat_weights_names"), *const flat = Module::interned("_flat"),
                         *const mode = Module::interned("mode"), *const num_layers = Module::interned("num_layers"),
                         *const bidirectional = Module::interned("bidirectional"),
                         *const batch_first = Module::interned("batch_first"),
                         *const dropout = Module::interned("dropout"), *const training = Module::interned("training"),
                         *const zoneout = Module::interned("zoneout"),
                         *const recurrent_dropout = Module::interned("recurrent_dropout");
  return served_or_none([&]() -> PyObject* {
    require(count == 4 && torch_side.tensor && !prefers_torch());
    const Module module(args[0]);
    PyObject* weight_names = module.get(names);
    require(PyList_Check(weight_names) && PyList_GET_SIZE(weight_names) > 0);
    if (is_trained(module.parameter(PyList_GET_ITEM(weight_names, 0)))) Py_RETURN_NONE;
    require(!module.has(flat));
    require(!module.has(zoneout) && !module.has(recurrent_dropout));
    std::vector<PyObject*> weights(static_cast<size_t>(PyList_GET_SIZE(weight_names)));
    for (size_t i = 0; i < weights.size(); ++i) {
      weights[i] = module.parameter(PyList_GET_ITEM(weight_names, static_cast<Py_ssize_t>(i)));
    }

    StackCall call{};
    call.cell = cell_of(module.get(mode));
    const bool has_cell_state = cell_traits(call.cell).cell_state;
    call.x = args[1];
    call.batch_sizes = call.lengths = Py_None;
    call.resets = args[3];
    take_states(args[2], has_cell_state, &call);
    call.weights = weights.data();
    call.number = static_cast<Py_ssize_t>(weights.size());
    take_packed(module, &call);
    call.layers = PyLong_AsLongLong(module.get(num_layers));
    call.bidirectional = flag(module.get(bidirectional));
    call.batch_first = flag(module.get(batch_first));
    const double drawn = PyFloat_AsDouble(module.get(dropout));
    require(!PyErr_Occurred() && drawn >= 0 && drawn <= 1);
    require(drawn == 0 || call.layers == 1 || !flag(module.get(training)));
    const Object out(to_python(call.run()));
    if (!has_cell_state) return pair(item(out, 0), item(out, 1));
    return pair(item(out, 0), Object(pair(item(out, 1), item(out, 2))));
  });
}

// cell_module(mode, module.__dict__, x, hx) -> h' or (h', c') or None
PyObject* cell_module(PyObject*, PyObject* const* args, Py_ssize_t count) {
  static PyObject *const w_ih = Module::interned("weight_ih"), *const w_hh = Module::interned("weight_hh"),
                         *const b_ih = Module::interned("bias_ih"), *const b_hh = Module::interned("bias_hh");
  return served_or_none([&]() -> PyObject* {
    require(count == 4 && torch_side.tensor && !prefers_torch());
    const Module module(args[1]);
    PyObject* weights[] = {module.parameter(w_ih), module.parameter(w_hh), module.parameter(b_ih),
                           module.parameter(b_hh)};
    if (is_trained(weights[0])) Py_RETURN_NONE;
    const Py_ssize_t number = weights[2] == Py_None && weights[3] == Py_None ? 2 : 4;

    StackCall call{};
    call.cell = cell_of(args[0]);
    const bool has_cell_state = cell_traits(call.cell).cell_state;
    call.x = args[2];
    call.batch_sizes = call.lengths = call.resets = Py_None;
    take_states(args[3], has_cell_state, &call);
    call.weights = weights;
    call.number = number;
    take_packed(module, &call);
    call.layers = 1;
    call.one_step = true;
    const Object out(
        to_python(call.packed == Py_None ? call_cell(call.cell, call.x, call.h0, call.c0, weights) : call.run()));
    if (!has_cell_state) return item(out, 0).release();
    return pair(item(out, 0), item(out, 1));
  });
}

}  // namespace dlk
