// SPDX-License-Identifier: Apache-2.0
// The Python module transducer_toolkit._C. Integers in: tensors cross as addresses and sizes, so
// the binary does not know PyTorch and never breaks on one of its upgrades. native.py is the only
// caller, owns every tensor, and is trusted with addresses; nothing here may be called by a user.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <type_traits>

#include "cell_scores.h"
#include "check.h"
#include "device.h"
#include "joint_tile.h"
#include "lattice.h"
#include "logits_grad.h"
#include "normaliser_repair.h"
#include "occupancy.h"
#include "pages.h"
#include "row_kernels.h"

namespace py = pybind11;

namespace transducer {
namespace {

using Address = std::uintptr_t;

template <typename T>
T* As(Address address) {
  return reinterpret_cast<T*>(address);
}

// Calls f with a null pointer of the element type that stands for `dtype`.
template <typename F>
void ForDType(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32: return f(static_cast<float*>(nullptr));
    case DType::kFloat64: return f(static_cast<double*>(nullptr));
    case DType::kFloat16: return f(static_cast<Half*>(nullptr));
    case DType::kBFloat16: return f(static_cast<BFloat16*>(nullptr));
  }
}

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

void CellScores(const LatticeBatch& batch, const RowTile& tile, DType dtype, Address logits,
                int64_t vocab_size, int64_t blank, bool from_log_softmax, int num_threads,
                Address normaliser, Address blank_score, Address label_score) {
  ForDType(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    CellScoresCpu(batch, tile, As<const T>(logits), vocab_size, blank, from_log_softmax,
                  num_threads, As<Score>(normaliser), As<Score>(blank_score),
                  As<Score>(label_score));
  });
}

void Lattice(const LatticeBatch& batch, Topology topology, double delay_penalty,
             double fastemit_lambda, Address blank_score, Address label_score, int num_threads,
             Address scratch, Address loss, Address use_blank, Address use_label) {
  LatticeCpu(batch, {topology, delay_penalty, fastemit_lambda}, As<const Score>(blank_score),
             As<const Score>(label_score), num_threads, As<Score>(scratch), As<Score>(loss),
             As<Score>(use_blank), As<Score>(use_label));
}

int64_t KeptRows(const LatticeBatch& batch, Address use_blank, Address use_label,
                 double dropped_mass, int num_threads, Address kept_rows, Address num_kept,
                 Address dropped) {
  return KeptRowsCpu(batch, As<const Score>(use_blank), As<const Score>(use_label), dropped_mass,
                     num_threads, As<int64_t>(kept_rows), As<int64_t>(num_kept),
                     As<Score>(dropped));
}

void LogitsGrad(const LatticeBatch& batch, const RowTile& tile, DType dtype, Address logits,
                int64_t vocab_size, int64_t blank, bool from_log_softmax, double clamp,
                Address normaliser, Address use_blank, Address use_label, Address loss_grad,
                int num_threads, Address grad) {
  ForDType(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    LogitsGradCpu(batch, tile, As<const T>(logits), vocab_size, blank, from_log_softmax, clamp,
                  As<const Score>(normaliser), As<const Score>(use_blank),
                  As<const Score>(use_label), As<const Score>(loss_grad), num_threads, As<T>(grad));
  });
}

void JoinForward(const LatticeBatch& batch, const RowTile& tile, DType dtype, Address enc,
                 Address pred, int64_t width, Activation activation, int num_threads,
                 Address hidden) {
  ForDType(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    JoinForwardCpu(batch, tile, As<const T>(enc), As<const T>(pred), width, activation,
                   num_threads, As<T>(hidden));
  });
}

void JoinBackward(const LatticeBatch& batch, const RowTile& tile, DType dtype,
                  Address grad_hidden, Address hidden, Address enc, Address pred, int64_t width,
                  Activation activation, int num_threads, Address grad_enc, Address grad_pred) {
  ForDType(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    JoinBackwardCpu(batch, tile, As<const T>(grad_hidden), As<const T>(hidden), As<const T>(enc),
                    As<const T>(pred), width, activation, num_threads,
                    As<Compute<T>>(grad_enc), As<Compute<T>>(grad_pred));
  });
}

// Calls f with the cells of an additive joiner in float32 or float64.
template <typename F>
void ForAdditiveCells(DType dtype, int64_t num_utterances, int64_t num_frames, int64_t num_columns,
                      int64_t vocab_size, Address am, Address lm, Address product,
                      double threshold, F f) {
  const auto call = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    f(AdditiveCells<T>{num_utterances, num_frames, num_columns, vocab_size, As<const T>(am),
                       As<const T>(lm), As<const T>(product), static_cast<T>(threshold)});
  };
  TRANSDUCER_CHECK(dtype == DType::kFloat32 || dtype == DType::kFloat64, "float32 or float64 only");
  if (dtype == DType::kFloat32) return call(static_cast<float*>(nullptr));
  call(static_cast<double*>(nullptr));
}

void RepairNormaliser(DType dtype, int64_t num_utterances, int64_t num_frames, int64_t num_columns,
                      int64_t vocab_size, Address am, Address lm, Address product,
                      double threshold, int num_threads, Address normaliser) {
  ForAdditiveCells(dtype, num_utterances, num_frames, num_columns, vocab_size, am, lm, product,
                   threshold, [&](const auto& cells) {
                     RepairNormaliserCpu(cells, num_threads, As<Score>(normaliser));
                   });
}

void RepairNormaliserBackward(DType dtype, int64_t num_utterances, int64_t num_frames,
                              int64_t num_columns, int64_t vocab_size, Address am, Address lm,
                              Address product, double threshold, Address normaliser, Address grad,
                              int num_threads, Address grad_am, Address grad_lm) {
  ForAdditiveCells(dtype, num_utterances, num_frames, num_columns, vocab_size, am, lm, product,
                   threshold, [&](const auto& cells) {
                     using T = std::remove_const_t<std::remove_pointer_t<decltype(cells.am)>>;
                     RepairNormaliserBackwardCpu(cells, As<const Score>(normaliser),
                                                 As<const Score>(grad), num_threads,
                                                 As<T>(grad_am), As<T>(grad_lm));
                   });
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

  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  py::module_ cpu = m.def_submodule("cpu");
  cpu.def("cell_scores", &CellScores, no_gil, py::arg("batch"), py::arg("tile"), py::kw_only(),
          py::arg("dtype"), py::arg("logits"), py::arg("vocab_size"), py::arg("blank"), py::arg("from_log_softmax"),
          py::arg("num_threads"), py::arg("normaliser"), py::arg("blank_score"),
          py::arg("label_score"));
  cpu.def("lattice", &Lattice, no_gil, py::arg("batch"), py::kw_only(), py::arg("topology"),
          py::arg("delay_penalty"), py::arg("fastemit_lambda"), py::arg("blank_score"),
          py::arg("label_score"), py::arg("num_threads"), py::arg("scratch"), py::arg("loss"),
          py::arg("use_blank"), py::arg("use_label"));
  cpu.def("kept_rows", &KeptRows, no_gil, py::arg("batch"), py::kw_only(), py::arg("use_blank"),
          py::arg("use_label"), py::arg("dropped_mass"), py::arg("num_threads"),
          py::arg("kept_rows"), py::arg("num_kept"), py::arg("dropped"));
  cpu.def("logits_grad", &LogitsGrad, no_gil, py::arg("batch"), py::arg("tile"), py::kw_only(),
          py::arg("dtype"), py::arg("logits"), py::arg("vocab_size"), py::arg("blank"), py::arg("from_log_softmax"),
          py::arg("clamp"), py::arg("normaliser"), py::arg("use_blank"), py::arg("use_label"),
          py::arg("loss_grad"), py::arg("num_threads"), py::arg("grad"));
  cpu.def("join_forward", &JoinForward, no_gil, py::arg("batch"), py::arg("tile"), py::kw_only(),
          py::arg("dtype"), py::arg("enc"), py::arg("pred"), py::arg("width"), py::arg("activation"),
          py::arg("num_threads"), py::arg("hidden"));
  cpu.def("join_backward", &JoinBackward, no_gil, py::arg("batch"), py::arg("tile"), py::kw_only(),
          py::arg("dtype"), py::arg("grad_hidden"), py::arg("hidden"), py::arg("enc"),
          py::arg("pred"), py::arg("width"), py::arg("activation"), py::arg("num_threads"),
          py::arg("grad_enc"), py::arg("grad_pred"));
  cpu.def(
      "advise_huge_pages",
      [](Address data, int64_t bytes) { AdviseHugePages(As<void>(data), bytes); },
      py::kw_only(), py::arg("data"), py::arg("bytes"));
  cpu.def("repair_normaliser", &RepairNormaliser, no_gil, py::kw_only(), py::arg("dtype"),
          py::arg("num_utterances"), py::arg("num_frames"), py::arg("num_columns"),
          py::arg("vocab_size"), py::arg("am"), py::arg("lm"), py::arg("product"),
          py::arg("threshold"), py::arg("num_threads"), py::arg("normaliser"));
  cpu.def("repair_normaliser_backward", &RepairNormaliserBackward, no_gil, py::kw_only(),
          py::arg("dtype"), py::arg("num_utterances"), py::arg("num_frames"),
          py::arg("num_columns"), py::arg("vocab_size"), py::arg("am"), py::arg("lm"),
          py::arg("product"), py::arg("threshold"), py::arg("normaliser"), py::arg("grad"),
          py::arg("num_threads"), py::arg("grad_am"), py::arg("grad_lm"));

  py::module_ cuda = m.def_submodule("cuda");
  cuda.def("device_count", &CudaDeviceCount);
  cuda.def(
      "add_constant",
      [](Address data, int64_t size, float value, Address stream) {
        CudaAddConstant(As<float>(data), size, value, As<void>(stream));
      },
      no_gil, py::kw_only(), py::arg("data"), py::arg("size"), py::arg("value"),
      py::arg("stream"));

  m.def("build_info", &BuildInfo);
}
