// SPDX-License-Identifier: Apache-2.0
// Binds the stages of one backend: integers in. Every binding is written once, for whichever of the
// ...Cpu and ...Cuda functions a backend names. Both take one argument of how to run, the number of
// threads or the stream, at the same place.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <type_traits>

#include "cell_scores.h"
#include "check.h"
#include "joint_tile.h"
#include "lattice.h"
#include "logits_grad.h"
#include "normalizer_repair.h"
#include "occupancy.h"

namespace transducer {

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

struct CpuBackend {
  using Queue = int;
  static constexpr const char* kQueueName = "num_threads";
  template <typename T>
  static constexpr auto kCellScores = &CellScoresCpu<T>;
  template <typename T>
  static constexpr auto kLogitsGrad = &LogitsGradCpu<T>;
  template <typename T>
  static constexpr auto kJoinForward = &JoinForwardCpu<T>;
  template <typename T>
  static void JoinBackwardWithoutScratch(const LatticeBatch& batch, const RowTile& tile,
                                         const T* grad_hidden, const T* hidden, const T* enc,
                                         const T* pred, int64_t width, Activation activation,
                                         Queue num_threads, int32_t*, Compute<T>* grad_enc,
                                         Compute<T>* grad_pred) {
    JoinBackwardCpu<T>(batch, tile, grad_hidden, hidden, enc, pred, width, activation, num_threads,
                       grad_enc, grad_pred);
  }
  template <typename T>
  static constexpr auto kJoinBackward = &JoinBackwardWithoutScratch<T>;
  template <typename T>
  static constexpr auto kRepair = &RepairNormalizerCpu<T>;
  template <typename T>
  static constexpr auto kRepairBackward = &RepairNormalizerBackwardCpu<T>;
  static constexpr auto kLattice = &LatticeCpu;

  static Queue QueueOf(Address num_threads) { return static_cast<int>(num_threads); }
  static int64_t LatticeScratch(const LatticeBatch& batch, Topology, bool with_uses) {
    return with_uses ? 0 : batch.num_rows;
  }
  static int64_t JoinBackwardScratch(const LatticeBatch&, const RowTile&) { return 0; }
};

struct CudaBackend {
  using Queue = void*;
  static constexpr const char* kQueueName = "stream";
  template <typename T>
  static constexpr auto kCellScores = &CellScoresCuda<T>;
  template <typename T>
  static constexpr auto kLogitsGrad = &LogitsGradCuda<T>;
  template <typename T>
  static constexpr auto kJoinForward = &JoinForwardCuda<T>;
  template <typename T>
  static constexpr auto kJoinBackward = &JoinBackwardCuda<T>;
  template <typename T>
  static constexpr auto kRepair = &RepairNormalizerCuda<T>;
  template <typename T>
  static constexpr auto kRepairBackward = &RepairNormalizerBackwardCuda<T>;
  static constexpr auto kLattice = &LatticeCuda;

  static Queue QueueOf(Address stream) { return As<void>(stream); }
  static int64_t LatticeScratch(const LatticeBatch& batch, Topology topology, bool with_uses) {
    return LatticeScratchCuda(batch, topology, with_uses);
  }
  static int64_t JoinBackwardScratch(const LatticeBatch& batch, const RowTile& tile) {
    return JoinBackwardScratchCuda(batch, tile);
  }
};

template <typename Backend>
void CellScores(const LatticeBatch& batch, const RowTile& tile, DType dtype, Address logits,
                int64_t vocab_size, int64_t blank, bool from_log_softmax, Address queue,
                Address normalizer, Address blank_score, Address label_score) {
  ForDType(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Backend::template kCellScores<T>(batch, tile, As<const T>(logits), vocab_size, blank,
                                     from_log_softmax, Backend::QueueOf(queue),
                                     As<Score>(normalizer), As<Score>(blank_score),
                                     As<Score>(label_score));
  });
}

template <typename Backend>
void Lattice(const LatticeBatch& batch, Topology topology, double delay_penalty,
             double fastemit_lambda, bool exact, Address blank_score, Address label_score,
             Address queue, Address scratch, Address loss, Address use_blank, Address use_label) {
  Backend::kLattice(batch, {topology, delay_penalty, fastemit_lambda, exact},
                    As<const Score>(blank_score), As<const Score>(label_score),
                    Backend::QueueOf(queue), As<Score>(scratch), As<Score>(loss),
                    As<Score>(use_blank), As<Score>(use_label));
}

template <typename Backend>
void LogitsGrad(const LatticeBatch& batch, const RowTile& tile, DType dtype, Address logits,
                int64_t vocab_size, int64_t blank, bool from_log_softmax, double clamp,
                Address normalizer, Address use_blank, Address use_label, Address loss_grad,
                Address queue, Address grad) {
  ForDType(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Backend::template kLogitsGrad<T>(batch, tile, As<const T>(logits), vocab_size, blank,
                                     from_log_softmax, clamp, As<const Score>(normalizer),
                                     As<const Score>(use_blank), As<const Score>(use_label),
                                     As<const Score>(loss_grad), Backend::QueueOf(queue),
                                     As<T>(grad));
  });
}

template <typename Backend>
void JoinForward(const LatticeBatch& batch, const RowTile& tile, DType dtype, Address enc,
                 Address pred, int64_t width, Activation activation, Address queue,
                 Address hidden) {
  ForDType(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Backend::template kJoinForward<T>(batch, tile, As<const T>(enc), As<const T>(pred), width,
                                      activation, Backend::QueueOf(queue), As<T>(hidden));
  });
}

template <typename Backend>
void JoinBackward(const LatticeBatch& batch, const RowTile& tile, DType dtype, Address grad_hidden,
                  Address hidden, Address enc, Address pred, int64_t width, Activation activation,
                  Address queue, Address scratch, Address grad_enc, Address grad_pred) {
  ForDType(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Backend::template kJoinBackward<T>(batch, tile, As<const T>(grad_hidden), As<const T>(hidden),
                                       As<const T>(enc), As<const T>(pred), width, activation,
                                       Backend::QueueOf(queue), As<int32_t>(scratch),
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

template <typename Backend>
void RepairNormalizer(DType dtype, int64_t num_utterances, int64_t num_frames, int64_t num_columns,
                      int64_t vocab_size, Address am, Address lm, Address product,
                      double threshold, Address queue, Address normalizer) {
  ForAdditiveCells(dtype, num_utterances, num_frames, num_columns, vocab_size, am, lm, product,
                   threshold, [&](const auto& cells) {
                     using T = std::remove_const_t<std::remove_pointer_t<decltype(cells.am)>>;
                     Backend::template kRepair<T>(cells, Backend::QueueOf(queue),
                                                  As<Score>(normalizer));
                   });
}

template <typename Backend>
void RepairNormalizerBackward(DType dtype, int64_t num_utterances, int64_t num_frames,
                              int64_t num_columns, int64_t vocab_size, Address am, Address lm,
                              Address product, double threshold, Address normalizer, Address grad,
                              Address queue, Address grad_am, Address grad_lm) {
  ForAdditiveCells(dtype, num_utterances, num_frames, num_columns, vocab_size, am, lm, product,
                   threshold, [&](const auto& cells) {
                     using T = std::remove_const_t<std::remove_pointer_t<decltype(cells.am)>>;
                     Backend::template kRepairBackward<T>(
                         cells, As<const Score>(normalizer), As<const Score>(grad),
                         Backend::QueueOf(queue), As<T>(grad_am), As<T>(grad_lm));
                   });
}

// Everything but kept_rows: CUDA needs room for it, and only the CPU returns the total.
template <typename Backend>
void BindStages(pybind11::module_& m) {
  using pybind11::arg;
  const pybind11::kw_only named;
  const auto no_gil = pybind11::call_guard<pybind11::gil_scoped_release>();
  const auto queue = arg(Backend::kQueueName);
  m.def("cell_scores", &CellScores<Backend>, no_gil, arg("batch"), arg("tile"), named, arg("dtype"),
        arg("logits"), arg("vocab_size"), arg("blank"), arg("from_log_softmax"), queue,
        arg("normalizer"), arg("blank_score"), arg("label_score"));
  m.def("lattice", &Lattice<Backend>, no_gil, arg("batch"), named, arg("topology"),
        arg("delay_penalty"), arg("fastemit_lambda"), arg("exact"), arg("blank_score"),
        arg("label_score"), queue, arg("scratch"), arg("loss"), arg("use_blank"),
        arg("use_label"));
  m.def("lattice_scratch", &Backend::LatticeScratch, arg("batch"), named, arg("topology"),
        arg("with_uses"));
  m.def("logits_grad", &LogitsGrad<Backend>, no_gil, arg("batch"), arg("tile"), named, arg("dtype"),
        arg("logits"), arg("vocab_size"), arg("blank"), arg("from_log_softmax"), arg("clamp"),
        arg("normalizer"), arg("use_blank"), arg("use_label"), arg("loss_grad"), queue,
        arg("grad"));
  m.def("join_forward", &JoinForward<Backend>, no_gil, arg("batch"), arg("tile"), named,
        arg("dtype"), arg("enc"), arg("pred"), arg("width"), arg("activation"), queue,
        arg("hidden"));
  m.def("join_backward", &JoinBackward<Backend>, no_gil, arg("batch"), arg("tile"), named,
        arg("dtype"), arg("grad_hidden"), arg("hidden"), arg("enc"), arg("pred"), arg("width"),
        arg("activation"), queue, arg("scratch"), arg("grad_enc"), arg("grad_pred"));
  m.def("join_backward_scratch", &Backend::JoinBackwardScratch, arg("batch"), arg("tile"));
  m.def("repair_normalizer", &RepairNormalizer<Backend>, no_gil, named, arg("dtype"),
        arg("num_utterances"), arg("num_frames"), arg("num_columns"), arg("vocab_size"), arg("am"),
        arg("lm"), arg("product"), arg("threshold"), queue, arg("normalizer"));
  m.def("repair_normalizer_backward", &RepairNormalizerBackward<Backend>, no_gil, named,
        arg("dtype"), arg("num_utterances"), arg("num_frames"), arg("num_columns"),
        arg("vocab_size"), arg("am"), arg("lm"), arg("product"), arg("threshold"),
        arg("normalizer"), arg("grad"), queue, arg("grad_am"), arg("grad_lm"));
}

// The CUDA stages; the emulated module binds the same.
inline void BindCudaStages(pybind11::module_& m) {
  using pybind11::arg;
  BindStages<CudaBackend>(m);
  m.def("kept_rows_scratch", &KeptRowsScratchCuda, arg("batch"));
  m.def(
      "kept_rows",
      [](const LatticeBatch& batch, Address use_blank, Address use_label, double dropped_mass,
         Address stream, Address scratch, Address kept_rows, Address num_kept, Address dropped) {
        KeptRowsCuda(batch, As<const Score>(use_blank), As<const Score>(use_label), dropped_mass,
                     As<void>(stream), As<Score>(scratch), As<int64_t>(kept_rows),
                     As<int64_t>(num_kept), As<Score>(dropped));
      },
      pybind11::call_guard<pybind11::gil_scoped_release>(), arg("batch"), pybind11::kw_only(),
      arg("use_blank"), arg("use_label"), arg("dropped_mass"), arg("stream"), arg("scratch"),
      arg("kept_rows"), arg("num_kept"), arg("dropped"));
}

}  // namespace transducer
