// SPDX-License-Identifier: Apache-2.0
// The Python module transducer_toolkit._C. Integers in: tensors cross as addresses and sizes, so
// the binary does not know PyTorch and never breaks on one of its upgrades. native.py is the only
// caller, owns every tensor, and is trusted with addresses; nothing here may be called by a user.
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

RowTile MakeTile(Address rows, int64_t begin, int64_t size) {
  return {As<const int64_t>(rows), begin, size};
}

int64_t KeptRows(const LatticeBatch& batch, Address use_blank, Address use_label,
                 double dropped_mass, int num_threads, Address kept_rows, Address num_kept,
                 Address dropped) {
  return KeptRowsCpu(batch, As<const Score>(use_blank), As<const Score>(use_label), dropped_mass,
                     num_threads, As<int64_t>(kept_rows), As<int64_t>(num_kept),
                     As<Score>(dropped));
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
  m.doc() = "Native stages of transducer_toolkit; use transducer_toolkit.native.";
  py::register_exception<Error>(m, "Error", PyExc_RuntimeError);

  py::enum_<DType>(m, "DType")
      .value("float32", DType::kFloat32)
      .value("float64", DType::kFloat64)
      .value("float16", DType::kFloat16)
      .value("bfloat16", DType::kBFloat16);
  py::enum_<Topology>(m, "Topology")
      .value("regular", Topology::kRegular)
      .value("modified", Topology::kModified)
      .value("constrained", Topology::kConstrained)
      .value("one_sym_per_frame", Topology::kOneSymPerFrame);
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
      .def(py::init(&MakeTile), py::kw_only(), py::arg("rows"), py::arg("begin"), py::arg("size"));

  py::module_ cpu = m.def_submodule("cpu");
  BindStages<CpuBackend>(cpu);
  cpu.def("kept_rows", &KeptRows, py::call_guard<py::gil_scoped_release>(), py::arg("batch"),
          py::kw_only(), py::arg("use_blank"), py::arg("use_label"), py::arg("dropped_mass"),
          py::arg("num_threads"), py::arg("kept_rows"), py::arg("num_kept"), py::arg("dropped"));
  cpu.def(
      "advise_huge_pages",
      [](Address data, int64_t bytes) { AdviseHugePages(As<void>(data), bytes); },
      py::kw_only(), py::arg("data"), py::arg("bytes"));

  py::module_ cuda = m.def_submodule("cuda");
  cuda.def("device_count", &CudaDeviceCount);
#ifdef TRANSDUCER_WITH_CUDA
  BindCudaStages(cuda);
#endif

  m.def("build_info", &BuildInfo);
}
