// SPDX-License-Identifier: Apache-2.0
// The Python module transducer_toolkit._C. Tensors are passed as addresses and sizes, so the binary
// does not know PyTorch and works with every version of it. The modules in transducer_toolkit/ops
// are the only callers; they own every tensor, and their addresses are not checked.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "bind_stages.h"
#include "check.h"
#include "device.h"
#include "pages.h"
#include "row_kernels.h"

namespace py = pybind11;

namespace transducer {
namespace {

void JoinQuantized(const LatticeBatch& batch, const RowTile& tile, const AnyJoinInputs& inputs,
                   int num_threads, Address hidden, Address scales) {
  TRANSDUCER_CHECK(inputs.dtype == DType::kFloat32, "float32 only");
  JoinQuantizedCpu(batch, tile, inputs.Of<float>(), num_threads, As<int8_t>(hidden),
                   As<float>(scales));
}

void BindQuantized(py::module_& m, py::module_& cpu) {
  using py::arg;
  const py::kw_only named;
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  BindStruct<QuantizedLogits>(m, "QuantizedLogits", FieldOf("data", &QuantizedLogits::data),
                              FieldOf("row_scales", &QuantizedLogits::row_scales),
                              FieldOf("column_scales", &QuantizedLogits::column_scales),
                              FieldOf("bias", &QuantizedLogits::bias),
                              FieldOf("vocab_size", &QuantizedLogits::vocab_size),
                              FieldOf("pitch", &QuantizedLogits::pitch));
  m.attr("MAX_QUANTIZED_WIDTH") = static_cast<int64_t>(kMaxQuantizedWidth);
  cpu.def("join_quantized", &JoinQuantized, no_gil, arg("batch"), arg("tile"), named, arg("inputs"),
          arg("num_threads"), arg("hidden"), arg("scales"));
  cpu.def("quantized_cell_scores", &QuantizedCellScoresCpu, no_gil, arg("batch"), arg("tile"),
          named, arg("logits"), arg("options"), arg("num_threads"), arg("out"));
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

  BindStageStructs(m);

  py::module_ cpu = m.def_submodule("cpu");
  BindStages<CpuBackend>(cpu);
  BindQuantized(m, cpu);
  cpu.def(
      "advise_huge_pages",
      [](Address data, int64_t bytes) { AdviseHugePages(As<void>(data), bytes); }, py::kw_only(),
      py::arg("data"), py::arg("bytes"));

  py::module_ cuda = m.def_submodule("cuda");
  cuda.def("device_count", &CudaDeviceCount);
#ifdef TRANSDUCER_WITH_CUDA
  BindStages<CudaBackend>(cuda);
#endif

  m.def("build_info", &BuildInfo);
}
