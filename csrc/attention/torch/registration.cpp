// Registers the attention operators and what Python can ask about their kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "operators.h"
#include "core/isa.h"
#include "torch/threads.h"
#include "torch/module.h"

namespace py = pybind11;

namespace dlk {
namespace {

const char* kernel_name(AttentionPlan::Kernel kernel) { return kernel == AttentionPlan::dot ? "dot" : "tiles"; }

const char* through(Isa isa) {
  switch (bf16_products(isa)) {
    case Bf16Products::tiles:
      return " through the matrix unit, ";
    case Bf16Products::dots:
      return " through register tiles, multiplied as bf16, ";
    case Bf16Products::as_float:
      break;
  }
  return " through register tiles, ";
}

std::string plan_reason(const AttentionPlan& plan, const AttentionShape& shape) {
  const std::string rows = std::to_string(shape.M * shape.group()), keys = std::to_string(shape.N);
  std::string text = std::string(isa_name(plan.isa)) + ": ";
  text += plan.kernel == AttentionPlan::dot
              ? "the " + rows + " query rows of a head of keys are few: one stream of dot products over the keys"
              : "the " + rows + " query rows of a head of keys go in blocks of " + std::to_string(plan.block_m) +
                    through(plan.isa) + std::to_string(plan.block_n) + " keys at a time";
  if (plan.splits > 1) text += "; the " + keys + " keys are split in " + std::to_string(plan.splits) + " parts";
  text += plan.threads == 1 ? "; one thread does everything" : "; " + std::to_string(plan.threads) + " threads share";
  return text;
}

py::dict plan_dict(const AttentionPlan& plan, const AttentionShape& shape) {
  py::dict dict;
  dict["kernel"] = std::string("cpu/") + isa_name(plan.isa) + "/attention/" + kernel_name(plan.kernel);
  dict["isa"] = isa_name(plan.isa);
  dict["threads"] = plan.threads;
  dict["split"] = plan.splits;
  dict["block_m"] = plan.block_m;
  dict["block_n"] = plan.block_n;
  dict["reason"] = plan_reason(plan, shape);
  return dict;
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def(
      "attention_plan",
      [](const py::object& dtype, int64_t B, int64_t H, int64_t Hkv, int64_t M, int64_t N, int64_t D, int64_t Dv,
         std::optional<int> threads, bool backward) {
        if (B < 1 || Hkv < 1 || H < Hkv || H % Hkv != 0 || M < 0 || N < 0 || D < 0 || Dv < 0) {
          throw std::invalid_argument("sizes must be positive, and H a multiple of Hkv");
        }
        AttentionInputs in{};
        in.shape = {dtype_from_name(py::str(dtype)), B, H, Hkv, M, N, D, Dv};
        const AttentionPlan plan =
            attention_plan(in, current_isa(), threads ? *threads : thread_count(), backward, false);
        return plan_dict(plan, in.shape);
      },
      "What would run for these sizes. threads=None: as many as torch uses now. Packed sequences: their mean lengths.",
      py::arg("dtype"), py::arg("B"), py::arg("H"), py::arg("Hkv"), py::arg("M"), py::arg("N"), py::arg("D"),
      py::arg("Dv"), py::arg("threads") = py::none(), py::arg("backward") = false);
  m.def("attention_last_run", []() -> py::object {
    const AttentionShape* shape = last_attention_shape();
    if (!shape) return py::none();
    const AttentionLastRun& run = attention_last_run();
    py::dict dict = plan_dict(run.plan, *shape);
    dict["members"] = run.members;
    dict["backward"] = run.backward;
    return std::move(dict);
  });
}

}  // namespace dlk

STABLE_TORCH_LIBRARY_FRAGMENT(dlkernels, library) {
  const auto define = [&](const char* name, const std::string& arguments, const char* results) {
    library.def((std::string(name) + "(" + arguments + ") -> " + results).c_str());
  };
  define("attention", dlk::AttentionForwardArguments::schema(), "(Tensor o, Tensor lse, Tensor stats)");
  define("attention_backward", dlk::AttentionBackwardArguments::schema(), "Tensor[]");
  define("attention_map", dlk::AttentionMapArguments::schema(), "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, library) {
  library.impl("attention", dlk::boxed<dlk::on_cpu::attention>);
  library.impl("attention_backward", dlk::boxed<dlk::on_cpu::attention_backward>);
  library.impl("attention_map", dlk::boxed<dlk::on_cpu::attention_map>);
}
