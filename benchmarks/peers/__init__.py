# SPDX-License-Identifier: Apache-2.0
"""Everything that is measured. Adapters import their project when they are used, not before."""

from __future__ import annotations

import importlib

from benchmarks.jobs import Implementation
from benchmarks.peers import (
    k2_names,
    optimized_transducer,
    ours,
    plain_torch,
    torchaudio,
    transformers,
    warp_rnnt,
    warp_transducer,
    warprnnt_numba,
)

ADAPTERS = (
    plain_torch,
    torchaudio,
    k2_names,
    optimized_transducer,
    warp_transducer,
    warp_rnnt,
    warprnnt_numba,
    transformers,
    ours,
)


class Absent(Exception):
    """Why an implementation cannot be measured here."""


def implementations(extra: tuple[str, ...] = ()) -> dict[str, Implementation]:
    """By name; `extra` are further modules with an IMPLEMENTATIONS of their own."""
    adapters = [*ADAPTERS, *(importlib.import_module(name) for name in extra)]
    return {entry.name: entry for adapter in adapters for entry in adapter.IMPLEMENTATIONS}


def require_present(implementation: Implementation) -> None:
    """Raises Absent unless the project can be imported and has what the adapter calls."""
    try:
        module = importlib.import_module(implementation.module)
    except ImportError as error:
        raise Absent(str(error).splitlines()[0]) from error
    missing = [name for name in implementation.needs if not hasattr(module, name)]
    if missing:
        raise Absent(f"{implementation.module} has no {', '.join(missing)}")
