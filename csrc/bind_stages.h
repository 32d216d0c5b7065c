// SPDX-License-Identifier: Apache-2.0
// Binds the stages of one backend. Each binding is written once and calls the ...Cpu or the ...Cuda
// function, which differ in one argument: the queue, that is the number of threads or the stream.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "additive_scores.h"
#include "bind_struct.h"
#include "cell_scores.h"
#include "check.h"
#include "coarse_to_fine.h"
#include "duration_lattice.h"
#include "joint_tile.h"
#include "lattice.h"
#include "logits_grad.h"
#include "occupancy.h"
#include "prune_windows.h"

namespace transducer {

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

// ForDType for float32 and float64 only.
template <typename F>
void ForComputeDType(DType dtype, F f) {
  TRANSDUCER_CHECK(dtype == DType::kFloat32 || dtype == DType::kFloat64, "float32 or float64 only");
  if (dtype == DType::kFloat32) return f(static_cast<float*>(nullptr));
  f(static_cast<double*>(nullptr));
}

// Structs whose element type is a DType at run time.
struct AnyLogitRows {
  DType dtype;
  Address data;
  int64_t vocab_size, pitch;

  template <typename T>
  LogitRows<T> Of() const {
    return {As<const T>(data), vocab_size, pitch};
  }
};

// DurationArcs as lists.
struct AnyDurationArcs {
  std::vector<int> blank_frames, label_frames;

  DurationArcs Of() const {
    DurationArcs arcs{};
    arcs.num_blank = Copy(blank_frames, arcs.blank_frames);
    arcs.num_label = Copy(label_frames, arcs.label_frames);
    return arcs;
  }

 private:
  static int Copy(const std::vector<int>& from, int* to) {
    TRANSDUCER_CHECK(from.size() <= kMaxDurations, "too many durations");
    std::copy(from.begin(), from.end(), to);
    return static_cast<int>(from.size());
  }
};

struct AnyJoinInputs {
  DType dtype;
  Address enc, pred;
  int64_t width;
  Activation activation;

  template <typename T>
  JoinInputs<T> Of() const {
    return {As<const T>(enc), As<const T>(pred), width, activation};
  }
};

struct AnyJoinGrads {
  Address enc, pred;

  template <typename T>
  JoinGrads<T> Of() const {
    return {As<Compute<T>>(enc), As<Compute<T>>(pred)};
  }
};

struct AnyAdditiveCells {
  DType dtype;
  int64_t num_utterances, num_frames, num_columns, vocab_size;
  Address am, lm, product;
  double threshold;

  template <typename T>
  AdditiveCells<T> Of() const {
    return {num_utterances,  num_frames,      num_columns,          vocab_size,
            As<const T>(am), As<const T>(lm), As<const T>(product), static_cast<T>(threshold)};
  }
};

struct AnyAdditiveExponentials {
  Address am, lm, am_max, lm_max, lm_sum;

  template <typename T>
  AdditiveExponentials<T> Of() const {
    return {As<T>(am), As<T>(lm), As<T>(am_max), As<T>(lm_max), As<Score>(lm_sum)};
  }
};

struct AnyPrunePosteriors {
  DType dtype;
  int64_t num_utterances, num_symbols, num_frames, px_frames;
  Address px, py, boundary;

  template <typename T>
  PrunePosteriors<T> Of() const {
    return {num_utterances,
            num_symbols,
            num_frames,
            px_frames,
            As<const T>(px),
            As<const T>(py),
            As<const int64_t>(boundary)};
  }
};

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
  static constexpr auto kJoinBackward = &JoinBackwardCpu<T>;
  template <typename T>
  static constexpr auto kAdditiveExponentials = &AdditiveExponentialsCpu<T>;
  template <typename T>
  static constexpr auto kAdditiveScores = &AdditiveScoresCpu<T>;
  template <typename T>
  static constexpr auto kAdditiveWeights = &AdditiveWeightsCpu<T>;
  template <typename T>
  static constexpr auto kAdditiveGradients = &AdditiveGradientsCpu<T>;
  template <typename T>
  static constexpr auto kPruneWindows = &PruneWindowsCpu<T>;
  static constexpr auto kLattice = &LatticeCpu;
  static constexpr auto kDurationLattice = &DurationLatticeCpu;
  static constexpr auto kKeptRows = &KeptRowsCpu;
  static constexpr auto kReplaceScores = &ReplaceScoresCpu;
  static constexpr auto kRowWeights = &RowWeightsCpu;
  static constexpr auto kLatticeScratch = &LatticeScratchCpu;
  static constexpr auto kKeptRowsScratch = &KeptRowsScratchCpu;
  static constexpr auto kRowWeightsScratch = &RowWeightsScratchCpu;
  static constexpr auto kJoinBackwardScratch = &JoinBackwardScratchCpu;

  static Queue QueueOf(Address num_threads) { return static_cast<int>(num_threads); }
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
  static constexpr auto kAdditiveExponentials = &AdditiveExponentialsCuda<T>;
  template <typename T>
  static constexpr auto kAdditiveScores = &AdditiveScoresCuda<T>;
  template <typename T>
  static constexpr auto kAdditiveWeights = &AdditiveWeightsCuda<T>;
  template <typename T>
  static constexpr auto kAdditiveGradients = &AdditiveGradientsCuda<T>;
  template <typename T>
  static constexpr auto kPruneWindows = &PruneWindowsCuda<T>;
  static constexpr auto kLattice = &LatticeCuda;
  static constexpr auto kDurationLattice = &DurationLatticeCuda;
  static constexpr auto kKeptRows = &KeptRowsCuda;
  static constexpr auto kReplaceScores = &ReplaceScoresCuda;
  static constexpr auto kRowWeights = &RowWeightsCuda;
  static constexpr auto kLatticeScratch = &LatticeScratchCuda;
  static constexpr auto kKeptRowsScratch = &KeptRowsScratchCuda;
  static constexpr auto kRowWeightsScratch = &RowWeightsScratchCuda;
  static constexpr auto kJoinBackwardScratch = &JoinBackwardScratchCuda;

  static Queue QueueOf(Address stream) { return As<void>(stream); }
};

template <typename Backend>
void CellScores(const LatticeBatch& batch, const RowTile& tile, const AnyLogitRows& logits,
                const LogitsOptions& options, Address queue, const CellScoresOut& out) {
  ForDType(logits.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Backend::template kCellScores<T>(batch, tile, logits.Of<T>(), options, Backend::QueueOf(queue),
                                     out);
  });
}

template <typename Backend>
void Lattice(const LatticeBatch& batch, const LatticeOptions& options, const LatticeScores& scores,
             Address queue, Address scratch, const LatticeOut& out) {
  Backend::kLattice(batch, options, scores, Backend::QueueOf(queue), As<void>(scratch), out);
}

template <typename Backend>
void DurationLattice(const LatticeBatch& batch, const LatticeOptions& options,
                     const AnyDurationArcs& arcs, const ArcScores& scores, Address queue,
                     Address scratch, const ArcOut& out) {
  Backend::kDurationLattice(batch, options, arcs.Of(), scores, Backend::QueueOf(queue),
                            As<void>(scratch), out);
}

template <typename Backend>
void KeptRows(const LatticeBatch& batch, const Uses& uses, double dropped_mass, Address queue,
              Address scratch, const KeptRowsOut& out) {
  Backend::kKeptRows(batch, uses, dropped_mass, Backend::QueueOf(queue), As<void>(scratch), out);
}

template <typename Backend>
void ReplaceScores(const LatticeBatch& batch, const RowTile& tile, const FineScores& fine,
                   int64_t first_place, Address queue, const RefinedOut& out) {
  Backend::kReplaceScores(batch, tile, fine, first_place, Backend::QueueOf(queue), out);
}

template <typename Backend>
void RowWeights(const LatticeBatch& batch, const RowWeightsIn& inputs, const LogitsOptions& logits,
                const RowWeightsOptions& options, Address queue, Address scratch, Address weight) {
  Backend::kRowWeights(batch, inputs, logits, options, Backend::QueueOf(queue), As<void>(scratch),
                       As<Score>(weight));
}

template <typename Backend>
void LogitsGrad(const LatticeBatch& batch, const RowTile& tile, const AnyLogitRows& logits,
                const LogitsOptions& options, const Posteriors& posteriors, Address queue,
                Address grad) {
  ForDType(logits.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Backend::template kLogitsGrad<T>(batch, tile, logits.Of<T>(), options, posteriors,
                                     Backend::QueueOf(queue), As<T>(grad));
  });
}

template <typename Backend>
void JoinForward(const LatticeBatch& batch, const RowTile& tile, const AnyJoinInputs& inputs,
                 Address queue, Address hidden) {
  ForDType(inputs.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Backend::template kJoinForward<T>(batch, tile, inputs.Of<T>(), Backend::QueueOf(queue),
                                      As<T>(hidden));
  });
}

template <typename Backend>
void JoinBackward(const LatticeBatch& batch, const RowTile& tile, const AnyJoinInputs& inputs,
                  Address hidden, Address grad_hidden, Address queue, Address scratch,
                  const AnyJoinGrads& grads) {
  ForDType(inputs.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Backend::template kJoinBackward<T>(batch, tile, inputs.Of<T>(), As<const T>(hidden),
                                       As<const T>(grad_hidden), Backend::QueueOf(queue),
                                       As<void>(scratch), grads.Of<T>());
  });
}

template <typename Backend>
void ExponentialsOfSides(const AnyAdditiveCells& cells, const AdditiveTerms& terms, Address queue,
                         const AnyAdditiveExponentials& out, const AdditiveContexts& contexts) {
  ForComputeDType(cells.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Backend::template kAdditiveExponentials<T>(cells.Of<T>(), terms, Backend::QueueOf(queue),
                                               out.Of<T>(), contexts);
  });
}

template <typename Backend>
void AdditiveScores(const AnyAdditiveCells& cells, const AdditiveTerms& terms,
                    const AnyAdditiveExponentials& exponentials, const AdditiveContexts& contexts,
                    Address queue, const AdditiveScoresOut& out) {
  ForComputeDType(cells.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Backend::template kAdditiveScores<T>(cells.Of<T>(), terms, exponentials.Of<T>(), contexts,
                                         Backend::QueueOf(queue), out);
  });
}

template <typename Backend>
void AdditiveWeights(const AnyAdditiveCells& cells, const AdditiveTerms& terms,
                     const AdditiveScoreGrads& grads, Address queue, Address grad_normalizer,
                     Address weight) {
  ForComputeDType(cells.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Backend::template kAdditiveWeights<T>(cells.Of<T>(), terms, grads, Backend::QueueOf(queue),
                                          As<Score>(grad_normalizer), As<T>(weight));
  });
}

template <typename Backend>
void AdditiveGradients(const AnyAdditiveCells& cells, const AdditiveTerms& terms,
                       const AnyAdditiveExponentials& exponentials, const AdditiveScoreGrads& grads,
                       const AdditiveSaved& saved, Address queue, Address grad_am,
                       Address grad_lm) {
  ForComputeDType(cells.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Backend::template kAdditiveGradients<T>(cells.Of<T>(), terms, exponentials.Of<T>(), grads,
                                            saved, Backend::QueueOf(queue), As<T>(grad_am),
                                            As<T>(grad_lm));
  });
}

template <typename Backend>
void PruneWindows(const AnyPrunePosteriors& posteriors, const PruneOptions& options, Address queue,
                  Address ranges) {
  ForDType(posteriors.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Backend::template kPruneWindows<T>(posteriors.Of<T>(), options, Backend::QueueOf(queue),
                                       As<int64_t>(ranges));
  });
}

// Binds the structs. Only _C calls it; _emulated uses the types of _C.
inline void BindStageStructs(pybind11::module_& m) {
  BindStruct<LatticeBatch>(m, "LatticeBatch",
                           FieldOf("num_utterances", &LatticeBatch::num_utterances),
                           FieldOf("max_frames", &LatticeBatch::max_frames),
                           FieldOf("max_targets", &LatticeBatch::max_targets),
                           FieldOf("num_rows", &LatticeBatch::num_rows),
                           FieldOf("row_stride", &LatticeBatch::row_stride),
                           FieldOf("rows_per_utterance", &LatticeBatch::rows_per_utterance),
                           FieldOf("num_frames", &LatticeBatch::num_frames),
                           FieldOf("num_targets", &LatticeBatch::num_targets),
                           FieldOf("first_row", &LatticeBatch::first_row),
                           FieldOf("targets", &LatticeBatch::targets),
                           FieldOf("band_start", &LatticeBatch::band_start),
                           FieldOf("windows", &LatticeBatch::windows),
                           FieldOf("first_frame", &LatticeBatch::first_frame));
  BindStruct<RowTile>(m, "RowTile", FieldOf("rows", &RowTile::rows),
                      FieldOf("begin", &RowTile::begin), FieldOf("size", &RowTile::size),
                      FieldOf("whole_logits", &RowTile::whole_logits),
                      FieldOf("places", &RowTile::places));
  BindStruct<AnyLogitRows>(m, "LogitRows", FieldOf("dtype", &AnyLogitRows::dtype),
                           FieldOf("data", &AnyLogitRows::data),
                           FieldOf("vocab_size", &AnyLogitRows::vocab_size),
                           FieldOf("pitch", &AnyLogitRows::pitch));
  BindStruct<LogitsOptions>(m, "LogitsOptions", FieldOf("blank", &LogitsOptions::blank),
                            FieldOf("from_log_softmax", &LogitsOptions::from_log_softmax),
                            FieldOf("clamp", &LogitsOptions::clamp),
                            FieldOf("num_big_blanks", &LogitsOptions::num_big_blanks),
                            FieldOf("num_durations", &LogitsOptions::num_durations),
                            FieldOf("is_hat", &LogitsOptions::is_hat));
  BindStruct<CellScoresOut>(m, "CellScoresOut", FieldOf("normalizer", &CellScoresOut::normalizer),
                            FieldOf("blank", &CellScoresOut::blank),
                            FieldOf("label", &CellScoresOut::label),
                            FieldOf("extra", &CellScoresOut::extra));
  BindStruct<LatticeOptions>(m, "LatticeOptions", FieldOf("topology", &LatticeOptions::topology),
                             FieldOf("delay_penalty", &LatticeOptions::delay_penalty),
                             FieldOf("fastemit_lambda", &LatticeOptions::fastemit_lambda),
                             FieldOf("exact", &LatticeOptions::exact));
  BindStruct<LatticeScores>(m, "LatticeScores", FieldOf("blank", &LatticeScores::blank),
                            FieldOf("label", &LatticeScores::label));
  BindStruct<LatticeOut>(m, "LatticeOut", FieldOf("loss", &LatticeOut::loss),
                         FieldOf("use_blank", &LatticeOut::use_blank),
                         FieldOf("use_label", &LatticeOut::use_label));
  BindStruct<AnyDurationArcs>(m, "DurationArcs",
                              FieldOf("blank_frames", &AnyDurationArcs::blank_frames),
                              FieldOf("label_frames", &AnyDurationArcs::label_frames));
  BindStruct<ArcScores>(m, "ArcScores", FieldOf("blank", &ArcScores::blank),
                        FieldOf("label", &ArcScores::label));
  BindStruct<ArcOut>(m, "ArcOut", FieldOf("loss", &ArcOut::loss),
                     FieldOf("use_blank", &ArcOut::use_blank),
                     FieldOf("use_label", &ArcOut::use_label));
  m.attr("MAX_DURATIONS") = kMaxDurations;
  m.attr("MAX_BIG_BLANKS") = kMaxBigBlanks;
  BindStruct<Uses>(m, "Uses", FieldOf("blank", &Uses::blank), FieldOf("label", &Uses::label),
                   FieldOf("taken_blank", &Uses::taken_blank),
                   FieldOf("taken_label", &Uses::taken_label),
                   FieldOf("taken_lowest", &Uses::taken_lowest));
  BindStruct<KeptRowsOut>(m, "KeptRowsOut", FieldOf("rows", &KeptRowsOut::rows),
                          FieldOf("num_kept", &KeptRowsOut::num_kept),
                          FieldOf("dropped", &KeptRowsOut::dropped),
                          FieldOf("lowest", &KeptRowsOut::lowest),
                          FieldOf("total", &KeptRowsOut::total));
  BindStruct<FineScores>(m, "FineScores", FieldOf("blank", &FineScores::blank),
                         FieldOf("label", &FineScores::label), FieldOf("extra", &FineScores::extra),
                         FieldOf("num_extra", &FineScores::num_extra));
  BindStruct<RefinedOut>(m, "RefinedOut", FieldOf("blank", &RefinedOut::blank),
                         FieldOf("label", &RefinedOut::label), FieldOf("extra", &RefinedOut::extra),
                         FieldOf("places", &RefinedOut::places),
                         FieldOf("error", &RefinedOut::error));
  BindStruct<RowWeightsIn>(m, "RowWeightsIn", FieldOf("blank", &RowWeightsIn::blank),
                           FieldOf("label", &RowWeightsIn::label),
                           FieldOf("extra", &RowWeightsIn::extra),
                           FieldOf("use_blank", &RowWeightsIn::use_blank),
                           FieldOf("use_label", &RowWeightsIn::use_label),
                           FieldOf("use_extra", &RowWeightsIn::use_extra),
                           FieldOf("loss", &RowWeightsIn::loss),
                           FieldOf("error", &RowWeightsIn::error),
                           FieldOf("places", &RowWeightsIn::places));
  BindStruct<RowWeightsOptions>(m, "RowWeightsOptions",
                                FieldOf("of_fine_rows", &RowWeightsOptions::of_fine_rows),
                                FieldOf("error_scale", &RowWeightsOptions::error_scale),
                                FieldOf("unknown_error", &RowWeightsOptions::unknown_error),
                                FieldOf("least_error", &RowWeightsOptions::least_error),
                                FieldOf("exponent", &RowWeightsOptions::exponent),
                                FieldOf("least_gradient", &RowWeightsOptions::least_gradient));
  BindStruct<Posteriors>(m, "Posteriors", FieldOf("normalizer", &Posteriors::normalizer),
                         FieldOf("use_blank", &Posteriors::use_blank),
                         FieldOf("use_label", &Posteriors::use_label),
                         FieldOf("loss_grad", &Posteriors::loss_grad),
                         FieldOf("use_extra", &Posteriors::use_extra));
  BindStruct<AnyJoinInputs>(m, "JoinInputs", FieldOf("dtype", &AnyJoinInputs::dtype),
                            FieldOf("enc", &AnyJoinInputs::enc),
                            FieldOf("pred", &AnyJoinInputs::pred),
                            FieldOf("width", &AnyJoinInputs::width),
                            FieldOf("activation", &AnyJoinInputs::activation));
  BindStruct<AnyJoinGrads>(m, "JoinGrads", FieldOf("enc", &AnyJoinGrads::enc),
                           FieldOf("pred", &AnyJoinGrads::pred));
  BindStruct<AnyAdditiveCells>(m, "AdditiveCells", FieldOf("dtype", &AnyAdditiveCells::dtype),
                               FieldOf("num_utterances", &AnyAdditiveCells::num_utterances),
                               FieldOf("num_frames", &AnyAdditiveCells::num_frames),
                               FieldOf("num_columns", &AnyAdditiveCells::num_columns),
                               FieldOf("vocab_size", &AnyAdditiveCells::vocab_size),
                               FieldOf("am", &AnyAdditiveCells::am),
                               FieldOf("lm", &AnyAdditiveCells::lm),
                               FieldOf("product", &AnyAdditiveCells::product),
                               FieldOf("threshold", &AnyAdditiveCells::threshold));
  BindStruct<AdditiveTerms>(m, "AdditiveTerms", FieldOf("num_symbols", &AdditiveTerms::num_symbols),
                            FieldOf("symbols", &AdditiveTerms::symbols),
                            FieldOf("boundary", &AdditiveTerms::boundary),
                            FieldOf("blank", &AdditiveTerms::blank),
                            FieldOf("combined_scale", &AdditiveTerms::combined_scale),
                            FieldOf("lm_only_scale", &AdditiveTerms::lm_only_scale),
                            FieldOf("am_only_scale", &AdditiveTerms::am_only_scale));
  BindStruct<AnyAdditiveExponentials>(m, "AdditiveExponentials",
                                      FieldOf("am", &AnyAdditiveExponentials::am),
                                      FieldOf("lm", &AnyAdditiveExponentials::lm),
                                      FieldOf("am_max", &AnyAdditiveExponentials::am_max),
                                      FieldOf("lm_max", &AnyAdditiveExponentials::lm_max),
                                      FieldOf("lm_sum", &AnyAdditiveExponentials::lm_sum));
  BindStruct<AdditiveContexts>(m, "AdditiveContexts", FieldOf("blank", &AdditiveContexts::blank),
                               FieldOf("label", &AdditiveContexts::label),
                               FieldOf("lattices", &AdditiveContexts::lattices));
  BindStruct<AdditiveScoresOut>(m, "AdditiveScoresOut",
                                FieldOf("normalizer", &AdditiveScoresOut::normalizer),
                                FieldOf("blank", &AdditiveScoresOut::blank),
                                FieldOf("label", &AdditiveScoresOut::label));
  BindStruct<AdditiveScoreGrads>(m, "AdditiveScoreGrads",
                                 FieldOf("blank", &AdditiveScoreGrads::blank),
                                 FieldOf("label", &AdditiveScoreGrads::label),
                                 FieldOf("factor", &AdditiveScoreGrads::factor));
  BindStruct<AdditiveSaved>(m, "AdditiveSaved", FieldOf("normalizer", &AdditiveSaved::normalizer),
                            FieldOf("grad_normalizer", &AdditiveSaved::grad_normalizer));
  BindStruct<AnyPrunePosteriors>(m, "PrunePosteriors", FieldOf("dtype", &AnyPrunePosteriors::dtype),
                                 FieldOf("num_utterances", &AnyPrunePosteriors::num_utterances),
                                 FieldOf("num_symbols", &AnyPrunePosteriors::num_symbols),
                                 FieldOf("num_frames", &AnyPrunePosteriors::num_frames),
                                 FieldOf("px_frames", &AnyPrunePosteriors::px_frames),
                                 FieldOf("px", &AnyPrunePosteriors::px),
                                 FieldOf("py", &AnyPrunePosteriors::py),
                                 FieldOf("boundary", &AnyPrunePosteriors::boundary));
  BindStruct<PruneOptions>(m, "PruneOptions", FieldOf("width", &PruneOptions::width),
                           FieldOf("step", &PruneOptions::step));
}

// The stages of a backend.
template <typename Backend>
void BindStages(pybind11::module_& m) {
  using pybind11::arg;
  const pybind11::kw_only named;
  const auto no_gil = pybind11::call_guard<pybind11::gil_scoped_release>();
  const auto queue = arg(Backend::kQueueName);
  m.def("cell_scores", &CellScores<Backend>, no_gil, arg("batch"), arg("tile"), named,
        arg("logits"), arg("options"), queue, arg("out"));
  m.def("lattice", &Lattice<Backend>, no_gil, arg("batch"), named, arg("options"), arg("scores"),
        queue, arg("scratch"), arg("out"));
  m.def("lattice_scratch", Backend::kLatticeScratch, arg("batch"), named, arg("topology"),
        arg("with_uses"));
  m.def("duration_lattice", &DurationLattice<Backend>, no_gil, arg("batch"), named, arg("options"),
        arg("arcs"), arg("scores"), queue, arg("scratch"), arg("out"));
  m.def("duration_lattice_scratch", &DurationLatticeScratch, arg("batch"), named, arg("with_uses"));
  m.def("kept_rows", &KeptRows<Backend>, no_gil, arg("batch"), named, arg("uses"),
        arg("dropped_mass"), queue, arg("scratch"), arg("out"));
  m.def("kept_rows_scratch", Backend::kKeptRowsScratch, arg("batch"));
  m.def("replace_scores", &ReplaceScores<Backend>, no_gil, arg("batch"), arg("tile"), named,
        arg("fine"), arg("first_place"), queue, arg("out"));
  m.def("row_weights", &RowWeights<Backend>, no_gil, arg("batch"), named, arg("inputs"),
        arg("logits"), arg("options"), queue, arg("scratch"), arg("weight"));
  m.def("row_weights_scratch", Backend::kRowWeightsScratch, arg("batch"));
  m.def("logits_grad", &LogitsGrad<Backend>, no_gil, arg("batch"), arg("tile"), named,
        arg("logits"), arg("options"), arg("posteriors"), queue, arg("grad"));
  m.def("join_forward", &JoinForward<Backend>, no_gil, arg("batch"), arg("tile"), named,
        arg("inputs"), queue, arg("hidden"));
  m.def("join_backward", &JoinBackward<Backend>, no_gil, arg("batch"), arg("tile"), named,
        arg("inputs"), arg("hidden"), arg("grad_hidden"), queue, arg("scratch"), arg("grads"));
  m.def("join_backward_scratch", Backend::kJoinBackwardScratch, arg("batch"), arg("tile"));
  m.def("additive_exponentials", &ExponentialsOfSides<Backend>, no_gil, arg("cells"), arg("terms"),
        named, queue, arg("out"), arg("contexts"));
  m.def("additive_scores", &AdditiveScores<Backend>, no_gil, arg("cells"), arg("terms"), named,
        arg("exponentials"), arg("contexts"), queue, arg("out"));
  m.def("additive_weights", &AdditiveWeights<Backend>, no_gil, arg("cells"), arg("terms"), named,
        arg("grads"), queue, arg("grad_normalizer"), arg("weight"));
  m.def("additive_gradients", &AdditiveGradients<Backend>, no_gil, arg("cells"), arg("terms"),
        named, arg("exponentials"), arg("grads"), arg("saved"), queue, arg("grad_am"),
        arg("grad_lm"));
  m.def("prune_windows", &PruneWindows<Backend>, no_gil, arg("posteriors"), named, arg("options"),
        queue, arg("ranges"));
}

}  // namespace transducer
