// The forward of layers and cells, called from Python without torch's dispatcher: `layers` and `cell` of `_C`. They
// serve plain calls only, those for which the dispatcher would do nothing but call the CPU kernel, and return None for
// all others and for those that the checks refuse. The caller then goes the usual way, which raises the errors.
//
// Tensors cross the boundary to Python by two functions of torch._C._aoti, which Inductor's C++ wrapper uses too. For a
// step of LSTM(128, 128) the dispatcher with its conversions takes longer than the kernel.
#include "direct.h"

#include "torch/module.h"

namespace dlk {

TorchSide torch_side{};

namespace {

// layers(mode, x, h0, c0, weights, packed, batch_sizes, lengths, num_layers, bidirectional, batch_first)
// -> [y, h_n] or [y, h_n, c_n] or None
// The weights of all layers are in one list; packed is None or a tuple with what `pack` returned for each layer.
PyObject* layers(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return served_or_none([&] {
    require(count == 11 && torch_side.tensor && !prefers_torch());
    const Object weights = checked(PySequence_Tuple(args[4]));
    StackCall call{};
    call.cell = cell_of(args[0]);
    call.x = args[1];
    call.h0 = args[2];
    call.c0 = args[3];
    call.weights = &PyTuple_GET_ITEM(weights.get(), 0);
    call.number = PyTuple_GET_SIZE(weights.get());
    call.packed = args[5];
    call.batch_sizes = args[6];
    call.lengths = args[7];
    call.resets = Py_None;
    call.layers = PyLong_AsLongLong(args[8]);
    require(!PyErr_Occurred());
    call.bidirectional = flag(args[9]);
    call.batch_first = flag(args[10]);
    return to_python(call.run());
  });
}

// cell(mode, x, h, c, w_ih, w_hh, b_ih, b_hh) -> [h'] or [h', c'] or None
PyObject* cell(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return served_or_none([&] {
    require(count == 8 && torch_side.tensor && !prefers_torch());
    return to_python(call_cell(cell_of(args[0]), args[1], args[2], args[3], args + 4));
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
  side.version = PyUnicode_InternFromString("_version");
  side.data_ptr = PyUnicode_InternFromString("data_ptr");
  if (!side.current_level || !side.requires_grad || !side.is_neg || !side.version || !side.data_ptr) return nullptr;
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
    {"layer_module", as_method(layer_module), METH_FASTCALL, "A call of a layer module like `layers`; else None."},
    {"cell_module", as_method(cell_module), METH_FASTCALL, "A call of a cell module like `cell`; else None."},
    {"hold", as_method(hold), METH_FASTCALL, "Keeps what calls with packed weights need of them, as a capsule."},
    {"connect", connect, METH_VARARGS, "Passes what `layers` and `cell` use of torch."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void bind_direct_calls(pybind11::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw pybind11::error_already_set();
}

}  // namespace dlk
