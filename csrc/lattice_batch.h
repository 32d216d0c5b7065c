// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common.h"

namespace transducer {

// One cell (t, u) of the lattice of utterance b.
struct Cell {
  int64_t b = 0, t = 0, u = 0;  // zero, so that indices are in bounds when CellOf finds no cell
};

// The lattices of a batch, and the row of each cell in a logits-like tensor.
//
// Cell (t, u) of utterance b, 0 <= t < num_frames[b], 0 <= u <= num_targets[b], is row
//
//     first_row[b] + t * stride + u - band_start[b][t]
//
//   packed (sum_b T_b * (U_b + 1), V): stride = U_b + 1 (row_stride = 0); first_row = exclusive
//                                      prefix sum of cells, rows_per_utterance = 0
//   padded (B, T, U + 1, V):           row_stride = U + 1, rows_per_utterance = T * (U + 1)
//   band (B, T, R, V):                 row_stride = R, rows_per_utterance = T * R; of frame t only
//                                      the cells band_start <= u < band_start + R exist
//   packed band (sum_b T_b * R, V):    the same with rows_per_utterance = 0
//
// `windows` restricts the cells of each layout further, without moving a row: of frame t only the
// cells windows[b][t][0] <= u < windows[b][t][1] exist, and a label arc out of (t, u) needs
// u + 1 < windows[b][t][1], also where it leads to another frame. The other rows are padding.
//
// In the padded layouts first_row may be greater than the utterance's first row, for a lattice that
// begins at a later frame or symbol. Scores, normalizers and posteriors use the same rows. The
// struct owns no memory; every pointer is on the device of the stage.
struct LatticeBatch {
  int64_t num_utterances;      // B
  int64_t max_frames;          // T: no utterance has more frames
  int64_t max_targets;         // U: width of `targets`; no utterance has more symbols
  int64_t num_rows;            // rows of the logits tensor, padding included
  int64_t row_stride;          // rows from frame to frame; 0 means num_targets[b] + 1
  int64_t rows_per_utterance;  // 0 means that utterance b has rows first_row[b] to first_row[b + 1]
  const int64_t* num_frames;   // (B,) T_b
  const int64_t* num_targets;  // (B,) U_b
  const int64_t* first_row;    // (B,) row of cell (0, band_start[b][0])
  const int64_t* targets;      // (B, U), anything beyond U_b
  const int64_t* band_start;   // (B, T), or null: every frame has all its cells
  const int64_t* windows;      // (B, T, 2), or null: no restriction
  const int64_t* first_frame;  // (B,), or null: 0. The frame of the audio that is frame 0 of the
                               // lattice; only the delay penalty depends on it

  TRANSDUCER_HD int64_t Stride(int64_t b) const {
    return row_stride != 0 ? row_stride : num_targets[b] + 1;
  }
  // Clamps the start to just outside the lattice, so that sums with it cannot overflow.
  TRANSDUCER_HD int64_t BandStart(int64_t b, int64_t t) const {
    if (band_start == nullptr) return 0;
    const int64_t start = band_start[b * max_frames + t], highest = max_targets + 1;
    return start < -row_stride ? -row_stride : start > highest ? highest : start;
  }
  // The cells of frame t are u = ColumnBegin ... ColumnEnd - 1; none for an invalid start.
  TRANSDUCER_HD int64_t ColumnBegin(int64_t b, int64_t t) const {
    const int64_t start = BandStart(b, t), begin = start > 0 ? start : 0;
    if (windows == nullptr) return begin;
    const int64_t window = Window(b, t)[0], highest = max_targets + 1;
    return window < begin ? begin : window > highest ? highest : window;
  }
  TRANSDUCER_HD int64_t ColumnEnd(int64_t b, int64_t t) const {
    const int64_t start = BandStart(b, t);
    int64_t end = num_targets[b] + 1;
    if (band_start != nullptr && start <= end - row_stride) end = start + row_stride;
    return windows == nullptr || Window(b, t)[1] > end ? end : Window(b, t)[1];
  }
  // The cells u < LabelEnd of frame t have a label arc.
  TRANSDUCER_HD int64_t LabelEnd(int64_t b, int64_t t) const {
    const int64_t labels = num_targets[b];
    if (windows == nullptr || Window(b, t)[1] > labels) return labels;
    return Window(b, t)[1] < 1 ? 0 : Window(b, t)[1] - 1;
  }
  TRANSDUCER_HD const int64_t* Window(int64_t b, int64_t t) const {
    return windows + 2 * (b * max_frames + t);
  }
  TRANSDUCER_HD int64_t Row(int64_t b, int64_t t, int64_t u) const {
    return first_row[b] + t * Stride(b) + u - BandStart(b, t);
  }
  TRANSDUCER_HD int64_t Target(int64_t b, int64_t u) const { return targets[b * max_targets + u]; }

  // False for lengths that would lead outside of the tensors. Such an utterance gets a NaN loss
  // instead of an out-of-bounds access, because lengths on a device are not validated.
  TRANSDUCER_HD bool IsValid(int64_t b) const {
    const int64_t frames = num_frames[b], labels = num_targets[b];
    if (frames < 1 || frames > max_frames || labels < 0 || labels > max_targets) return false;
    if (row_stride != 0 && band_start == nullptr && labels + 1 > row_stride) return false;
    // first_row may have any value: a sum with it could overflow.
    const int64_t begin = b * rows_per_utterance, first = first_row[b];
    const int64_t end = rows_per_utterance != 0 ? begin + rows_per_utterance : num_rows;
    if (first < begin || first >= end) return false;
    const int64_t unused = row_stride != 0 && band_start == nullptr ? row_stride - 1 - labels : 0;
    return frames * Stride(b) - unused <= end - first;
  }

  // The utterance of a row, which may be a cell or padding.
  TRANSDUCER_HD int64_t UtteranceOf(int64_t row) const {
    if (rows_per_utterance != 0) return row / rows_per_utterance;
    int64_t low = 0, high = num_utterances;  // the last one with first_row <= row
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (first_row[middle] <= row) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // Finds the cell of a row; returns false if the row is padding. Sets cell->b in either case.
  // Every row of an invalid utterance is padding.
  TRANSDUCER_HD bool CellOf(int64_t row, Cell* cell) const {
    const int64_t b = cell->b = UtteranceOf(row);
    if (!IsValid(b) || row < first_row[b]) return false;
    const int64_t offset = row - first_row[b];
    const int64_t stride = Stride(b);
    cell->t = offset / stride;
    if (cell->t >= num_frames[b]) return false;
    cell->u = offset - cell->t * stride + BandStart(b, cell->t);
    return cell->u >= ColumnBegin(b, cell->t) && cell->u < ColumnEnd(b, cell->t);
  }
};

// The rows of a batch that one call of a stage processes, in ascending order. A logits-like
// argument has one row for each row of the tile. With whole_logits, inputs have one for each row of
// the batch; with places, row r of the batch is their row places[r].
struct RowTile {
  const int64_t* rows;  // null: begin, begin + 1, ...; else rows[begin], rows[begin + 1], ...
  int64_t begin;
  int64_t size;
  bool whole_logits = false;
  const int64_t* places = nullptr;  // (num_rows,), or null

  TRANSDUCER_HD int64_t Row(int64_t i) const {
    return rows != nullptr ? rows[begin + i] : begin + i;
  }
  TRANSDUCER_HD int64_t LogitsRow(int64_t i) const {
    if (places != nullptr) return places[Row(i)];
    return whole_logits ? Row(i) : i;
  }
};

// LatticeBatch::CellOf for rows in ascending order, most of which are in the same frame as the
// last.
class CellCursor {
 public:
  TRANSDUCER_HD explicit CellCursor(const LatticeBatch& batch) : batch_(batch) {}

  TRANSDUCER_HD bool Find(int64_t row, Cell* cell) {
    if (row >= begin_ && row < end_) {
      *cell = {b_, t_, row - begin_ + column_};
      return true;
    }
    if (!batch_.CellOf(row, cell)) return false;
    b_ = cell->b;
    t_ = cell->t;
    column_ = batch_.ColumnBegin(b_, t_);
    begin_ = batch_.Row(b_, t_, column_);
    end_ = begin_ + batch_.ColumnEnd(b_, t_) - column_;
    return true;
  }

 private:
  const LatticeBatch& batch_;
  int64_t b_ = 0, t_ = 0, column_ = 0, begin_ = 0, end_ = 0;  // rows [begin_, end_) are frame t_
};

}  // namespace transducer
