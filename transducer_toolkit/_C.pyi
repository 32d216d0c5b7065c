# SPDX-License-Identifier: Apache-2.0
"""The compiled module: csrc/bindings.cpp and csrc/bind_stages.h, whose headers document each field.

`int` stands for sizes and for addresses. A test compares the names with those of the built module.
"""

from collections.abc import Sequence
from typing import ClassVar, TypedDict

class Error(RuntimeError): ...

class DType:
    __members__: ClassVar[dict[str, DType]]
    float32: ClassVar[DType]
    float64: ClassVar[DType]
    float16: ClassVar[DType]
    bfloat16: ClassVar[DType]

class Topology:
    __members__: ClassVar[dict[str, Topology]]
    regular: ClassVar[Topology]
    modified: ClassVar[Topology]
    constrained: ClassVar[Topology]
    one_sym_per_frame: ClassVar[Topology]

class Activation:
    __members__: ClassVar[dict[str, Activation]]
    identity: ClassVar[Activation]
    tanh: ClassVar[Activation]
    relu: ClassVar[Activation]
    gelu: ClassVar[Activation]
    silu: ClassVar[Activation]

# --- structs --------------------------------------------------------------------------------------

class LatticeBatch:
    fields: ClassVar[tuple[str, ...]]
    def __init__(
        self,
        *,
        num_utterances: int,
        max_frames: int,
        max_targets: int,
        num_rows: int,
        row_stride: int,
        rows_per_utterance: int,
        num_frames: int,
        num_targets: int,
        first_row: int,
        targets: int,
        band_start: int,
        windows: int,
        first_frame: int,
    ) -> None: ...

class RowTile:
    fields: ClassVar[tuple[str, ...]]
    def __init__(
        self, *, rows: int, begin: int, size: int, whole_logits: bool, places: int
    ) -> None: ...

class LogitRows:
    fields: ClassVar[tuple[str, ...]]
    def __init__(self, *, dtype: DType, data: int, vocab_size: int, pitch: int) -> None: ...

class QuantizedLogits:
    fields: ClassVar[tuple[str, ...]]
    def __init__(
        self,
        *,
        data: int,
        row_scales: int,
        column_scales: int,
        bias: int,
        vocab_size: int,
        pitch: int,
    ) -> None: ...

MAX_QUANTIZED_WIDTH: int

class LogitsOptions:
    fields: ClassVar[tuple[str, ...]]
    def __init__(
        self,
        *,
        blank: int,
        from_log_softmax: bool,
        clamp: float,
        num_big_blanks: int,
        num_durations: int,
        is_hat: bool,
    ) -> None: ...

class CellScoresOut:
    fields: ClassVar[tuple[str, ...]]
    def __init__(self, *, normalizer: int, blank: int, label: int, extra: int) -> None: ...

class LatticeOptions:
    fields: ClassVar[tuple[str, ...]]
    def __init__(
        self, *, topology: Topology, delay_penalty: float, fastemit_lambda: float, exact: bool
    ) -> None: ...

class LatticeScores:
    fields: ClassVar[tuple[str, ...]]
    def __init__(self, *, blank: int, label: int) -> None: ...

class LatticeOut:
    fields: ClassVar[tuple[str, ...]]
    def __init__(self, *, loss: int, use_blank: int, use_label: int) -> None: ...

class DurationArcs:
    fields: ClassVar[tuple[str, ...]]
    def __init__(self, *, blank_frames: Sequence[int], label_frames: Sequence[int]) -> None: ...

class ArcScores:
    fields: ClassVar[tuple[str, ...]]
    def __init__(self, *, blank: int, label: int) -> None: ...

class ArcOut:
    fields: ClassVar[tuple[str, ...]]
    def __init__(self, *, loss: int, use_blank: int, use_label: int) -> None: ...

MAX_DURATIONS: int
MAX_BIG_BLANKS: int

class Uses:
    fields: ClassVar[tuple[str, ...]]
    def __init__(
        self, *, blank: int, label: int, taken_blank: int, taken_label: int, taken_lowest: int
    ) -> None: ...

class KeptRowsOut:
    fields: ClassVar[tuple[str, ...]]
    def __init__(
        self, *, rows: int, num_kept: int, dropped: int, lowest: int, total: int
    ) -> None: ...

class FineScores:
    fields: ClassVar[tuple[str, ...]]
    def __init__(self, *, blank: int, label: int, extra: int, num_extra: int) -> None: ...

class RefinedOut:
    fields: ClassVar[tuple[str, ...]]
    def __init__(self, *, blank: int, label: int, extra: int, places: int, error: int) -> None: ...

class RowWeightsIn:
    fields: ClassVar[tuple[str, ...]]
    def __init__(
        self,
        *,
        blank: int,
        label: int,
        extra: int,
        use_blank: int,
        use_label: int,
        use_extra: int,
        loss: int,
        error: int,
        places: int,
    ) -> None: ...

class RowWeightsOptions:
    fields: ClassVar[tuple[str, ...]]
    def __init__(
        self,
        *,
        of_fine_rows: bool,
        error_scale: float,
        unknown_error: float,
        least_error: float,
        exponent: float,
        least_gradient: float,
    ) -> None: ...

class Posteriors:
    fields: ClassVar[tuple[str, ...]]
    def __init__(
        self, *, normalizer: int, use_blank: int, use_label: int, loss_grad: int, use_extra: int
    ) -> None: ...

class JoinInputs:
    fields: ClassVar[tuple[str, ...]]
    def __init__(
        self, *, dtype: DType, enc: int, pred: int, width: int, activation: Activation
    ) -> None: ...

class JoinGrads:
    fields: ClassVar[tuple[str, ...]]
    def __init__(self, *, enc: int, pred: int) -> None: ...

class AdditiveCells:
    fields: ClassVar[tuple[str, ...]]
    def __init__(
        self,
        *,
        dtype: DType,
        num_utterances: int,
        num_frames: int,
        num_columns: int,
        vocab_size: int,
        am: int,
        lm: int,
        product: int,
        threshold: float,
    ) -> None: ...

class AdditiveTerms:
    fields: ClassVar[tuple[str, ...]]
    def __init__(
        self,
        *,
        num_symbols: int,
        symbols: int,
        boundary: int,
        blank: int,
        combined_scale: float,
        lm_only_scale: float,
        am_only_scale: float,
    ) -> None: ...

class AdditiveExponentials:
    fields: ClassVar[tuple[str, ...]]
    def __init__(self, *, am: int, lm: int, am_max: int, lm_max: int, lm_sum: int) -> None: ...

class AdditiveContexts:
    fields: ClassVar[tuple[str, ...]]
    def __init__(self, *, blank: int, label: int, lattices: int) -> None: ...

class AdditiveScoresOut:
    fields: ClassVar[tuple[str, ...]]
    def __init__(self, *, normalizer: int, blank: int, label: int) -> None: ...

class AdditiveScoreGrads:
    fields: ClassVar[tuple[str, ...]]
    def __init__(self, *, blank: int, label: int, factor: int) -> None: ...

class AdditiveSaved:
    fields: ClassVar[tuple[str, ...]]
    def __init__(self, *, normalizer: int, grad_normalizer: int) -> None: ...

class PrunePosteriors:
    fields: ClassVar[tuple[str, ...]]
    def __init__(
        self,
        *,
        dtype: DType,
        num_utterances: int,
        num_symbols: int,
        num_frames: int,
        px_frames: int,
        px: int,
        py: int,
        boundary: int,
    ) -> None: ...

class PruneOptions:
    fields: ClassVar[tuple[str, ...]]
    def __init__(self, *, width: int, step: int) -> None: ...

# --- submodules -----------------------------------------------------------------------------------

class cpu:  # a module
    @staticmethod
    def cell_scores(
        batch: LatticeBatch,
        tile: RowTile,
        *,
        logits: LogitRows,
        options: LogitsOptions,
        num_threads: int,
        out: CellScoresOut,
    ) -> None: ...
    @staticmethod
    def lattice(
        batch: LatticeBatch,
        *,
        options: LatticeOptions,
        scores: LatticeScores,
        num_threads: int,
        scratch: int,
        out: LatticeOut,
    ) -> None: ...
    @staticmethod
    def lattice_scratch(batch: LatticeBatch, *, topology: Topology, with_uses: bool) -> int: ...
    @staticmethod
    def duration_lattice(
        batch: LatticeBatch,
        *,
        options: LatticeOptions,
        arcs: DurationArcs,
        scores: ArcScores,
        num_threads: int,
        scratch: int,
        out: ArcOut,
    ) -> None: ...
    @staticmethod
    def duration_lattice_scratch(batch: LatticeBatch, *, with_uses: bool) -> int: ...
    @staticmethod
    def kept_rows(
        batch: LatticeBatch,
        *,
        uses: Uses,
        dropped_mass: float,
        num_threads: int,
        scratch: int,
        out: KeptRowsOut,
    ) -> None: ...
    @staticmethod
    def kept_rows_scratch(batch: LatticeBatch) -> int: ...
    @staticmethod
    def replace_scores(
        batch: LatticeBatch,
        tile: RowTile,
        *,
        fine: FineScores,
        first_place: int,
        num_threads: int,
        out: RefinedOut,
    ) -> None: ...
    @staticmethod
    def row_weights(
        batch: LatticeBatch,
        *,
        inputs: RowWeightsIn,
        logits: LogitsOptions,
        options: RowWeightsOptions,
        num_threads: int,
        scratch: int,
        weight: int,
    ) -> None: ...
    @staticmethod
    def row_weights_scratch(batch: LatticeBatch) -> int: ...
    @staticmethod
    def logits_grad(
        batch: LatticeBatch,
        tile: RowTile,
        *,
        logits: LogitRows,
        options: LogitsOptions,
        posteriors: Posteriors,
        num_threads: int,
        grad: int,
    ) -> None: ...
    @staticmethod
    def join_forward(
        batch: LatticeBatch, tile: RowTile, *, inputs: JoinInputs, num_threads: int, hidden: int
    ) -> None: ...
    @staticmethod
    def join_backward(
        batch: LatticeBatch,
        tile: RowTile,
        *,
        inputs: JoinInputs,
        hidden: int,
        grad_hidden: int,
        num_threads: int,
        scratch: int,
        grads: JoinGrads,
    ) -> None: ...
    @staticmethod
    def join_backward_scratch(batch: LatticeBatch, tile: RowTile) -> int: ...
    @staticmethod
    def additive_exponentials(
        cells: AdditiveCells,
        terms: AdditiveTerms,
        *,
        num_threads: int,
        out: AdditiveExponentials,
        contexts: AdditiveContexts,
    ) -> None: ...
    @staticmethod
    def additive_scores(
        cells: AdditiveCells,
        terms: AdditiveTerms,
        *,
        exponentials: AdditiveExponentials,
        contexts: AdditiveContexts,
        num_threads: int,
        out: AdditiveScoresOut,
    ) -> None: ...
    @staticmethod
    def additive_weights(
        cells: AdditiveCells,
        terms: AdditiveTerms,
        *,
        grads: AdditiveScoreGrads,
        num_threads: int,
        grad_normalizer: int,
        weight: int,
    ) -> None: ...
    @staticmethod
    def additive_gradients(
        cells: AdditiveCells,
        terms: AdditiveTerms,
        *,
        exponentials: AdditiveExponentials,
        grads: AdditiveScoreGrads,
        saved: AdditiveSaved,
        num_threads: int,
        grad_am: int,
        grad_lm: int,
    ) -> None: ...
    @staticmethod
    def prune_windows(
        posteriors: PrunePosteriors, *, options: PruneOptions, num_threads: int, ranges: int
    ) -> None: ...
    @staticmethod
    def join_quantized(
        batch: LatticeBatch,
        tile: RowTile,
        *,
        inputs: JoinInputs,
        num_threads: int,
        hidden: int,
        scales: int,
    ) -> None: ...
    @staticmethod
    def quantized_cell_scores(
        batch: LatticeBatch,
        tile: RowTile,
        *,
        logits: QuantizedLogits,
        options: LogitsOptions,
        num_threads: int,
        out: CellScoresOut,
    ) -> None: ...
    @staticmethod
    def advise_huge_pages(*, data: int, bytes: int) -> None: ...

class cuda:  # a module; without CUDA in the build it has device_count alone
    @staticmethod
    def device_count() -> int: ...
    @staticmethod
    def cell_scores(
        batch: LatticeBatch,
        tile: RowTile,
        *,
        logits: LogitRows,
        options: LogitsOptions,
        stream: int,
        out: CellScoresOut,
    ) -> None: ...
    @staticmethod
    def lattice(
        batch: LatticeBatch,
        *,
        options: LatticeOptions,
        scores: LatticeScores,
        stream: int,
        scratch: int,
        out: LatticeOut,
    ) -> None: ...
    @staticmethod
    def lattice_scratch(batch: LatticeBatch, *, topology: Topology, with_uses: bool) -> int: ...
    @staticmethod
    def duration_lattice(
        batch: LatticeBatch,
        *,
        options: LatticeOptions,
        arcs: DurationArcs,
        scores: ArcScores,
        stream: int,
        scratch: int,
        out: ArcOut,
    ) -> None: ...
    @staticmethod
    def duration_lattice_scratch(batch: LatticeBatch, *, with_uses: bool) -> int: ...
    @staticmethod
    def kept_rows(
        batch: LatticeBatch,
        *,
        uses: Uses,
        dropped_mass: float,
        stream: int,
        scratch: int,
        out: KeptRowsOut,
    ) -> None: ...
    @staticmethod
    def kept_rows_scratch(batch: LatticeBatch) -> int: ...
    @staticmethod
    def replace_scores(
        batch: LatticeBatch,
        tile: RowTile,
        *,
        fine: FineScores,
        first_place: int,
        stream: int,
        out: RefinedOut,
    ) -> None: ...
    @staticmethod
    def row_weights(
        batch: LatticeBatch,
        *,
        inputs: RowWeightsIn,
        logits: LogitsOptions,
        options: RowWeightsOptions,
        stream: int,
        scratch: int,
        weight: int,
    ) -> None: ...
    @staticmethod
    def row_weights_scratch(batch: LatticeBatch) -> int: ...
    @staticmethod
    def logits_grad(
        batch: LatticeBatch,
        tile: RowTile,
        *,
        logits: LogitRows,
        options: LogitsOptions,
        posteriors: Posteriors,
        stream: int,
        grad: int,
    ) -> None: ...
    @staticmethod
    def join_forward(
        batch: LatticeBatch, tile: RowTile, *, inputs: JoinInputs, stream: int, hidden: int
    ) -> None: ...
    @staticmethod
    def join_backward(
        batch: LatticeBatch,
        tile: RowTile,
        *,
        inputs: JoinInputs,
        hidden: int,
        grad_hidden: int,
        stream: int,
        scratch: int,
        grads: JoinGrads,
    ) -> None: ...
    @staticmethod
    def join_backward_scratch(batch: LatticeBatch, tile: RowTile) -> int: ...
    @staticmethod
    def additive_exponentials(
        cells: AdditiveCells,
        terms: AdditiveTerms,
        *,
        stream: int,
        out: AdditiveExponentials,
        contexts: AdditiveContexts,
    ) -> None: ...
    @staticmethod
    def additive_scores(
        cells: AdditiveCells,
        terms: AdditiveTerms,
        *,
        exponentials: AdditiveExponentials,
        contexts: AdditiveContexts,
        stream: int,
        out: AdditiveScoresOut,
    ) -> None: ...
    @staticmethod
    def additive_weights(
        cells: AdditiveCells,
        terms: AdditiveTerms,
        *,
        grads: AdditiveScoreGrads,
        stream: int,
        grad_normalizer: int,
        weight: int,
    ) -> None: ...
    @staticmethod
    def additive_gradients(
        cells: AdditiveCells,
        terms: AdditiveTerms,
        *,
        exponentials: AdditiveExponentials,
        grads: AdditiveScoreGrads,
        saved: AdditiveSaved,
        stream: int,
        grad_am: int,
        grad_lm: int,
    ) -> None: ...
    @staticmethod
    def prune_windows(
        posteriors: PrunePosteriors, *, options: PruneOptions, stream: int, ranges: int
    ) -> None: ...

# --- functions ------------------------------------------------------------------------------------

class _TopologyTraits(TypedDict):
    blank_frames: int
    label_frames: int
    label_takes_blank: bool
    ends_with_label: bool

class _BuildInfo(TypedDict):
    version: str
    compiler: str
    build_type: str
    cpu_path: str
    cuda_runtime: int
    cuda_architectures: str

def topology_traits(topology: Topology) -> _TopologyTraits: ...
def build_info() -> _BuildInfo: ...
