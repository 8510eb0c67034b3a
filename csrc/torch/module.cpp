// The host module `_C`; importing it registers the operators.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "boxing.h"
#include "core/isa.h"
#include "core/patience.h"
#include "core/plan_constants.h"
#include "rnn/torch/ops.h"
#include "rnn/cpu/plan_reason.h"
#include "rnn/variants.h"
#include "threads.h"
#include "rnn/cuda/plan_cap.h"
#ifdef DLKERNELS_CUDA_ARCHS
#include "rnn/cuda/gpu_limits.h"
#endif
#include "module.h"

namespace py = pybind11;

namespace dlk {
namespace {

LayerShape make_shape(const std::string& mode, const py::object& dtype, int64_t T, int64_t B, int64_t I, int64_t H,
                      int64_t P, int D, std::optional<int64_t> rows = std::nullopt, int64_t bits = 0) {
  if (T < 1 || B < 1 || I < 0 || H < 1 || P < 0 || D < 1 || D > 2) {
    throw std::invalid_argument("sizes must be positive, and D one or two");
  }
  const DType of = dtype_from_name(py::str(dtype));
  return {cell_from_mode(mode), of, T, B, I, H, P, D, rows ? *rows : T * B, false, weights_of_bits(bits)};
}

py::dict plan_dict(const Plan& plan, const LayerShape& shape) {
  py::dict dict;
  dict["kernel"] = std::string("cpu/") + isa_name(plan.isa) + "/" + mode_name(shape.cell);
  dict["isa"] = isa_name(plan.isa);
  dict["threads"] = plan.threads;
  dict["split"] = split_name(plan.split);
  dict["recurrence"] = plan.recurrence == Plan::dot ? "dot" : "tiles";
  dict["chunk_steps"] = plan.chunk_steps;
  dict["directions_side_by_side"] = plan.directions_side_by_side;
  dict["reason"] = plan_reason(plan, shape);
  return dict;
}

py::dict cuda_plan_dict(const SequencePlan& plan, const LayerShape& shape, bool backward) {
  SliceShape slice{};
  if (plan.units > 0) slice = slice_shape(gate_count(shape.cell), shape.dtype != DType::f32, plan.units, backward);
  py::dict dict;
  dict["kernel"] = std::string("cuda/") + plan_kind_name(plan.kind) + "/" + mode_name(shape.cell);
  dict["kind"] = plan_kind_name(plan.kind);
  dict["blocks"] = plan.slices * plan.groups;
  dict["slices"] = plan.slices;
  dict["groups"] = plan.groups;
  dict["groups_at_once"] = plan.groups_at_once;
  dict["tile"] = plan.tile;
  dict["columns"] = plan.columns;
  dict["units"] = plan.units;
  dict["rows"] = slice.rows;
  dict["terms"] = plan.layout.terms;
  dict["splits"] = slice.splits;
  dict["register_steps"] = slice.register_steps;
  dict["shared_steps"] = plan.layout.shared_steps;
  dict["shared_weights"] = plan.layout.exchange - plan.layout.weights;
  dict["shared_bytes"] = plan.layout.bytes;
  dict["reason"] = std::string(plan.reason);
  return dict;
}

// The limits of a device of this machine, or of an H200 if `device` is empty.
GpuLimits limits_of(std::optional<int> device) {
#ifdef DLKERNELS_CUDA_ARCHS
  if (device) return capped(gpu_limits(*device));
#else
  if (device) throw std::runtime_error("compiled without CUDA kernels");
#endif
  return capped(kH200);
}

py::dict build_info() {
  py::list isas;
  for (Isa isa : compiled_isas()) isas.append(isa_name(isa));
  py::dict info;
  info["torch_target"] =
      std::to_string(TORCH_TARGET_VERSION >> 56) + "." + std::to_string((TORCH_TARGET_VERSION >> 48) & 0xff);
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
#if defined(DLKERNELS_BUILD_FLAGS)
  info["flags"] = DLKERNELS_BUILD_FLAGS;
#else
  info["flags"] = "";
#endif
  info["isas"] = isas;
#ifdef DLKERNELS_CUDA_ARCHS
  info["with_cuda"] = true;
  info["cuda_archs"] = DLKERNELS_CUDA_ARCHS;
  info["cuda_release"] = DLKERNELS_CUDA_RELEASE;
  info["why_no_cuda"] = "";
#else
  info["with_cuda"] = false;
  info["cuda_archs"] = "";
  info["cuda_release"] = "";
  info["why_no_cuda"] = DLKERNELS_WHY_NO_CUDA;
#endif
  return info;
}

py::dict traits_dict() {
  py::dict dict;
  for (CellKind cell : kCellKinds) {
    const CellTraits traits = cell_traits(cell);
    py::dict row;
    row["gates"] = traits.gates;
    row["saved"] = traits.saved;
    row["bounded"] = traits.bounded;
    row["narrow"] = traits.narrow;
    row["state_follows"] = traits.state_follows;
    row["gate_grads"] = gate_grad_slots(cell);
    row["parted_gate"] = traits.parted_gate;
    row["cell_state"] = traits.cell_state;
    row["direct_path"] = traits.direct_path;
    row["projection"] = traits.projection;
    dict[mode_name(cell)] = row;
  }
  return dict;
}

py::dict features_dict() {
  py::dict dict;
  for (const auto& [name, present] : cpu_features()) dict[name] = present;
  return dict;
}

}  // namespace

DType dtype_from_name(std::string name) {
  const std::string prefix = "torch.";
  if (name.rfind(prefix, 0) == 0) name = name.substr(prefix.size());
  for (auto [known, dtype] : {std::pair{"float32", DType::f32}, std::pair{"float64", DType::f64},
                              std::pair{"bfloat16", DType::bf16}, std::pair{"float16", DType::f16}}) {
    if (name == known) return dtype;
  }
  throw std::invalid_argument("unknown dtype '" + name + "', expected float32, float64, bfloat16 or float16");
}

}  // namespace dlk

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled part of dlkernels: importing it registers the operators torch.ops.dlkernels.*.";

  m.def("build_info", &dlk::build_info);
  m.def("cpu_features", &dlk::features_dict);
  m.def("cell_traits", &dlk::traits_dict, "What the kernels take each cell to be.");
  m.def("isa", [] { return dlk::isa_name(dlk::current_isa()); });
  m.def("available_isas", [] {
    py::list names;
    for (dlk::Isa isa : dlk::available_isas()) names.append(dlk::isa_name(isa));
    return names;
  });
  m.def(
      "set_isa",
      [](const std::optional<std::string>& name) {
        if (name) {
          dlk::set_isa(dlk::isa_from_name(*name));
        } else {
          dlk::reset_isa();
        }
      },
      py::arg("name").none(true));
  m.def("prefers_torch", &dlk::prefers_torch,
        "Whether calls that torch's operators serve are left to them: there are only scalar kernels for this machine.");
  m.def("pretend_scalar_machine", &dlk::pretend_scalar_machine,
        "Makes the process take the machine for one without vector kernels. For tests.", py::arg("on"));
  m.def(
      "plan_constants",
      [] {
        py::dict dict;
        for (const auto& [name, number] : dlk::named_plan_constants(dlk::current_isa())) dict[name.c_str()] = number;
        return dict;
      },
      "The numbers by which plans choose under the instruction set in force (core/plan_constants.def).");
  m.def(
      "override_plan_constants",
      [](const std::map<std::string, int64_t>& numbers) {
        dlk::override_plan_constants(dlk::current_isa(), {numbers.begin(), numbers.end()});
      },
      "Changes them for this process, to these and otherwise those of the table. For tests and measurements.",
      py::arg("numbers"));
  m.def("set_poison", &dlk::set_poison, py::arg("on"));
  m.def("set_least_patience", &dlk::set_least_patience,
        "Microseconds that teams of threads wait for their members at least; 0: as planned. For tests.", py::arg("us"));
  dlk::bind_attention(m);
  dlk::bind_direct_calls(m);
  m.def(
      "plan",
      [](const std::string& mode, const py::object& dtype, int64_t T, int64_t B, int64_t I, int64_t H, int64_t P, int D,
         std::optional<int> threads, bool backward, bool deterministic, bool packed_weights,
         std::optional<int64_t> rows, int64_t bits, bool variant) {
        const dlk::LayerShape shape = dlk::make_shape(mode, dtype, T, B, I, H, P, D, rows, bits);
        const dlk::Isa isa = dlk::current_isa();
        const int most = threads ? *threads : dlk::thread_count();
        return dlk::plan_dict(variant ? dlk::variant_plan(shape, isa, most, backward)
                                      : dlk::rnn_plan(shape, isa, most, backward, deterministic, packed_weights),
                              shape);
      },
      "What would run for these sizes. threads=None: as many as torch uses now. rows: of packed data, else T * B. "
      "bits: of a packed weight, 0 for those of dtype. variant: with layer normalisation, zoneout or recurrent "
      "dropout.",
      py::arg("mode"), py::arg("dtype"), py::arg("T"), py::arg("B"), py::arg("I"), py::arg("H"), py::arg("P") = 0,
      py::arg("D") = 1, py::arg("threads") = py::none(), py::arg("backward") = false, py::arg("deterministic") = false,
      py::arg("packed_weights") = false, py::arg("rows") = py::none(), py::arg("bits") = 0, py::arg("variant") = false);
  m.def(
      "cuda_plan",
      [](const std::string& mode, const py::object& dtype, int64_t T, int64_t B, int64_t H, int D, bool backward,
         std::optional<int> device) {
        const dlk::LayerShape shape = dlk::make_shape(mode, dtype, T, B, 0, H, 0, D);
        return dlk::cuda_plan_dict(dlk::sequence_plan(shape, dlk::limits_of(device), backward), shape, backward);
      },
      "What would run on a CUDA device; on an H200 where device is None, whatever this machine has.", py::arg("mode"),
      py::arg("dtype"), py::arg("T"), py::arg("B"), py::arg("H"), py::arg("D") = 1, py::arg("backward") = false,
      py::arg("device") = py::none());
  m.def(
      "cap_cuda_plan", [](const std::string& kind) { dlk::set_plan_cap(dlk::plan_kind_from_name(kind)); },
      "The best kind of plan that CUDA layers may take: cluster (all), grid or steps. For tests and measurements.",
      py::arg("kind"));
  m.def("last_run", []() -> py::object {
    const dlk::LayerShape* shape = dlk::last_shape();
    if (!shape) return py::none();
    const dlk::LastRun& run = dlk::rnn_last_run();
    py::dict dict = dlk::plan_dict(run.plan, *shape);
    dict["members"] = run.members;
    dict["backward"] = run.backward;
    return std::move(dict);
  });
  m.def(
      "packed_bytes",
      [](const std::string& mode, const py::object& dtype, int64_t I, int64_t H, int64_t P, int D, int64_t bits) {
        const dlk::LayerShape shape = dlk::make_shape(mode, dtype, 1, 1, I, H, P, D, std::nullopt, bits);
        return dlk::rnn_packed_bytes(shape, dlk::current_isa());
      },
      py::arg("mode"), py::arg("dtype"), py::arg("I"), py::arg("H"), py::arg("P") = 0, py::arg("D") = 1,
      py::arg("bits") = 0);
}
