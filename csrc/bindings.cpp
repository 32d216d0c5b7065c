// SPDX-License-Identifier: Apache-2.0
// The Python module transducer_toolkit._C. Integers in: tensors cross as addresses and sizes, so
// the binary does not know PyTorch and never breaks on one of its upgrades. native.py is the only
// caller, owns every tensor, and is trusted with addresses; nothing here may be called by a user.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "additive_scores.h"
#include "bind_stages.h"
#include "check.h"
#include "device.h"
#include "pages.h"
#include "row_kernels.h"

namespace py = pybind11;

namespace transducer {
namespace {

LatticeBatch MakeBatch(int64_t num_utterances, int64_t max_frames, int64_t max_targets,
                       int64_t num_rows, int64_t row_stride, int64_t rows_per_utterance,
                       Address num_frames, Address num_targets, Address first_row, Address targets,
                       Address band_start, Address first_frame) {
  return {num_utterances,
          max_frames,
          max_targets,
          num_rows,
          row_stride,
          rows_per_utterance,
          As<const int64_t>(num_frames),
          As<const int64_t>(num_targets),
          As<const int64_t>(first_row),
          As<const int64_t>(targets),
          As<const int64_t>(band_start),
          As<const int64_t>(first_frame)};
}

RowTile MakeTile(Address rows, int64_t begin, int64_t size, bool whole_logits) {
  return {As<const int64_t>(rows), begin, size, whole_logits};
}

int64_t KeptRows(const LatticeBatch& batch, Address use_blank, Address use_label,
                 double dropped_mass, int num_threads, Address kept_rows, Address num_kept,
                 Address dropped) {
  return KeptRowsCpu(batch, As<const Score>(use_blank), As<const Score>(use_label), dropped_mass,
                     num_threads, As<int64_t>(kept_rows), As<int64_t>(num_kept),
                     As<Score>(dropped));
}

// Calls f with a null pointer of the element type, float or double.
template <typename F>
void ForComputeDType(DType dtype, F f) {
  TRANSDUCER_CHECK(dtype == DType::kFloat32 || dtype == DType::kFloat64, "float32 or float64 only");
  if (dtype == DType::kFloat32) return f(static_cast<float*>(nullptr));
  f(static_cast<double*>(nullptr));
}

void ShiftedExp(DType dtype, Address rows, int64_t num_rows, int64_t size, int num_threads,
                Address exponentials, Address max) {
  ForComputeDType(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    ShiftedExpCpu<T>(As<const T>(rows), num_rows, size, num_threads, As<T>(exponentials),
                     As<T>(max));
  });
}

// What the three stages of an additive joiner share.
struct AdditiveArguments {
  DType dtype;
  int64_t num_utterances, num_frames, num_columns, vocab_size;
  Address am, lm, product;
  double threshold;
  AdditiveTerms terms;

  template <typename F>
  void Call(F f) const {
    ForAdditiveCells(dtype, num_utterances, num_frames, num_columns, vocab_size, am, lm, product,
                     threshold, f);
  }
};

AdditiveArguments MakeAdditiveArguments(DType dtype, int64_t num_utterances, int64_t num_frames,
                                        int64_t num_columns, int64_t vocab_size, Address am,
                                        Address lm, Address product, double threshold,
                                        int64_t num_symbols, Address symbols, int64_t blank,
                                        double combined_scale, double am_only_scale,
                                        Address context_blank, Address context_label) {
  return {dtype,
          num_utterances,
          num_frames,
          num_columns,
          vocab_size,
          am,
          lm,
          product,
          threshold,
          {num_symbols, As<const int64_t>(symbols), blank, combined_scale, am_only_scale,
           As<const Score>(context_blank), As<const Score>(context_label)}};
}

void AdditiveScores(const AdditiveArguments& arguments, Address am_max, Address lm_max,
                    int num_threads, Address normalizer, Address blank_score,
                    Address label_score) {
  arguments.Call([&](const auto& cells) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(cells.am)>>;
    AdditiveScoresCpu(cells, arguments.terms, As<const T>(am_max), As<const T>(lm_max),
                      num_threads, As<Score>(normalizer), As<Score>(blank_score),
                      As<Score>(label_score));
  });
}

void AdditiveWeights(const AdditiveArguments& arguments, Address grad_blank, Address grad_label,
                     int num_threads, Address grad_normalizer, Address scale, Address weight,
                     Address grad_context_blank, Address grad_context_label) {
  arguments.Call([&](const auto& cells) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(cells.am)>>;
    AdditiveWeightsCpu(cells, arguments.terms, As<const Score>(grad_blank),
                       As<const Score>(grad_label), num_threads, As<Score>(grad_normalizer),
                       As<Score>(scale), As<T>(weight), As<Score>(grad_context_blank),
                       As<Score>(grad_context_label));
  });
}

void AdditiveGradients(const AdditiveArguments& arguments, Address am_exp, Address lm_exp,
                       Address normalizer, Address grad_blank, Address grad_label,
                       Address grad_normalizer, Address scale, int num_threads, Address grad_am,
                       Address grad_lm) {
  arguments.Call([&](const auto& cells) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(cells.am)>>;
    AdditiveGradientsCpu(cells, arguments.terms, As<const T>(am_exp), As<const T>(lm_exp),
                         As<const Score>(normalizer), As<const Score>(grad_blank),
                         As<const Score>(grad_label), As<const Score>(grad_normalizer),
                         As<const Score>(scale), num_threads, As<T>(grad_am), As<T>(grad_lm));
  });
}

void BindAdditiveScores(py::module_& cpu) {
  using py::arg;
  const py::kw_only named;
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  py::class_<AdditiveArguments>(cpu, "AdditiveArguments")
      .def(py::init(&MakeAdditiveArguments), named, arg("dtype"), arg("num_utterances"),
           arg("num_frames"), arg("num_columns"), arg("vocab_size"), arg("am"), arg("lm"),
           arg("product"), arg("threshold"), arg("num_symbols"), arg("symbols"), arg("blank"),
           arg("combined_scale"), arg("am_only_scale"), arg("context_blank"),
           arg("context_label"));
  cpu.def("shifted_exp", &ShiftedExp, no_gil, named, arg("dtype"), arg("rows"), arg("num_rows"),
          arg("size"), arg("num_threads"), arg("exponentials"), arg("max"));
  cpu.def("additive_scores", &AdditiveScores, no_gil, arg("arguments"), named, arg("am_max"),
          arg("lm_max"), arg("num_threads"), arg("normalizer"), arg("blank_score"),
          arg("label_score"));
  cpu.def("additive_weights", &AdditiveWeights, no_gil, arg("arguments"), named,
          arg("grad_blank"), arg("grad_label"), arg("num_threads"), arg("grad_normalizer"),
          arg("scale"), arg("weight"), arg("grad_context_blank"), arg("grad_context_label"));
  cpu.def("additive_gradients", &AdditiveGradients, no_gil, arg("arguments"), named,
          arg("am_exp"), arg("lm_exp"), arg("normalizer"), arg("grad_blank"), arg("grad_label"),
          arg("grad_normalizer"), arg("scale"), arg("num_threads"), arg("grad_am"),
          arg("grad_lm"));
}

py::dict BuildInfo() {
  py::dict info;
  info["version"] = TRANSDUCER_VERSION;
  info["compiler"] = TRANSDUCER_COMPILER;
  info["build_type"] = TRANSDUCER_BUILD_TYPE;
  info["cpu_path"] = GetRowKernelSet().name;
  info["cuda_runtime"] = CudaRuntimeVersion();
  info["cuda_architectures"] = TRANSDUCER_CUDA_ARCHITECTURES;
  return info;
}

}  // namespace
}  // namespace transducer

PYBIND11_MODULE(_C, m) {
  using namespace transducer;
  m.doc() = "Native stages of transducer_toolkit; use transducer_toolkit.ops.native.";
  py::register_exception<Error>(m, "Error", PyExc_RuntimeError);

  py::enum_<DType>(m, "DType")
      .value("float32", DType::kFloat32)
      .value("float64", DType::kFloat64)
      .value("float16", DType::kFloat16)
      .value("bfloat16", DType::kBFloat16);
  py::enum_<Topology> topologies(m, "Topology");
  for (int i = 0; i < kNumTopologies; ++i) {
    topologies.value(kTopologies[i].name, static_cast<Topology>(i));
  }
  m.def("topology_traits", [](Topology topology) {
    const TopologyTraits& traits = TraitsOf(topology);
    py::dict row;
    row["blank_frames"] = traits.blank_frames;
    row["label_frames"] = traits.label_frames;
    row["label_takes_blank"] = traits.label_takes_blank;
    row["ends_with_label"] = traits.ends_with_label;
    return row;
  });
  py::enum_<Activation>(m, "Activation")
      .value("identity", Activation::kIdentity)
      .value("tanh", Activation::kTanh)
      .value("relu", Activation::kRelu)
      .value("gelu", Activation::kGelu)
      .value("silu", Activation::kSilu);

  py::class_<LatticeBatch>(m, "LatticeBatch")
      .def(py::init(&MakeBatch), py::kw_only(), py::arg("num_utterances"), py::arg("max_frames"),
           py::arg("max_targets"), py::arg("num_rows"), py::arg("row_stride"),
           py::arg("rows_per_utterance"), py::arg("num_frames"), py::arg("num_targets"),
           py::arg("first_row"), py::arg("targets"), py::arg("band_start"),
           py::arg("first_frame"));
  py::class_<RowTile>(m, "RowTile")
      .def(py::init(&MakeTile), py::kw_only(), py::arg("rows"), py::arg("begin"), py::arg("size"),
           py::arg("whole_logits"));

  py::module_ cpu = m.def_submodule("cpu");
  BindStages<CpuBackend>(cpu);
  cpu.def("kept_rows", &KeptRows, py::call_guard<py::gil_scoped_release>(), py::arg("batch"),
          py::kw_only(), py::arg("use_blank"), py::arg("use_label"), py::arg("dropped_mass"),
          py::arg("num_threads"), py::arg("kept_rows"), py::arg("num_kept"), py::arg("dropped"));
  cpu.def(
      "advise_huge_pages",
      [](Address data, int64_t bytes) { AdviseHugePages(As<void>(data), bytes); },
      py::kw_only(), py::arg("data"), py::arg("bytes"));

  BindAdditiveScores(cpu);

  py::module_ cuda = m.def_submodule("cuda");
  cuda.def("device_count", &CudaDeviceCount);
#ifdef TRANSDUCER_WITH_CUDA
  BindCudaStages(cuda);
#endif

  m.def("build_info", &BuildInfo);
}
