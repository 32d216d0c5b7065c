// SPDX-License-Identifier: Apache-2.0
// The table of topologies: which arcs a lattice has, and where a path may end.
// transducer_toolkit/ops/topology.py has the same rows in the same order; a test compares the two.
#pragma once

#include <type_traits>

namespace transducer {

enum class Topology : int { kRegular = 0, kModified = 1, kConstrained = 2, kOneSymPerFrame = 3 };

// A blank arc leads from (t, u) to (t + blank_frames, u), a label arc to (t + label_frames, u + 1).
// The two flags may be set only where label_frames is 1: Python's Topology refuses other rows.
struct TopologyTraits {
  const char* name;
  int blank_frames;        // 1
  int label_frames;        // 0 or 1
  bool label_takes_blank;  // a label arc from (t, u) also takes the blank of (t, u + 1)
  bool ends_with_label;    // a label arc may leave the last frame; else a path ends with a blank
};

constexpr TopologyTraits kTopologies[] = {
    {"regular", 1, 0, false, false},
    {"modified", 1, 1, false, true},
    {"constrained", 1, 1, true, true},
    {"one_sym_per_frame", 1, 1, false, false},
};
constexpr int kNumTopologies = static_cast<int>(sizeof(kTopologies) / sizeof(kTopologies[0]));

constexpr const TopologyTraits& TraitsOf(Topology topology) {
  return kTopologies[static_cast<int>(topology)];
}

// The same at compile time, as constants that device code may use.
template <Topology kTopology>
struct StaticTraits {
  static constexpr int kLabelFrames = TraitsOf(kTopology).label_frames;
  static constexpr bool kLabelTakesBlank = TraitsOf(kTopology).label_takes_blank;
  static constexpr bool kEndsWithLabel = TraitsOf(kTopology).ends_with_label;
  static_assert(TraitsOf(kTopology).blank_frames == 1, "the recursions advance frame by frame");
  static_assert(kLabelFrames == 0 || kLabelFrames == 1, "");
  static_assert(kLabelFrames == 1 || !(kLabelTakesBlank || kEndsWithLabel),
                "a flag needs label_frames 1");
};

// Calls f(std::integral_constant<Topology, topology>).
template <typename F, int kIndex = 0>
void CallWithTopology(Topology topology, F f) {
  if constexpr (kIndex < kNumTopologies) {
    constexpr auto kTopology = static_cast<Topology>(kIndex);
    if (topology == kTopology) return f(std::integral_constant<Topology, kTopology>{});
    CallWithTopology<F, kIndex + 1>(topology, f);
  }
}

}  // namespace transducer
