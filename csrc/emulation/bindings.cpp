// SPDX-License-Identifier: Apache-2.0
// The Python module _emulated, for tests: the CUDA stages under emulation, as `_emulated.cuda`.
// It takes the batches, tiles and enumerations of transducer_toolkit._C.
#include "../bind_stages.h"
#include "cuda_emulation.h"

namespace py = pybind11;

PYBIND11_MODULE(_emulated, m) {
  using namespace transducer;
  py::module_::import("transducer_toolkit._C");  // registers the types
  py::enum_<emulation::Order>(m, "Order")
      .value("forward", emulation::Order::kForward)
      .value("reverse", emulation::Order::kReverse)
      .value("random", emulation::Order::kRandom);
  m.def("set_order", &emulation::SetOrder, py::arg("order"), py::arg("seed") = 0);
  m.def("num_grids", &emulation::NumGrids);
  py::module_ cuda = m.def_submodule("cuda");
  BindStages<CudaBackend>(cuda);
}
