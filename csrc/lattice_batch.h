// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common.h"

namespace transducer {

// One cell (t, u) of the lattice of utterance b.
struct Cell {
  int64_t b = 0, t = 0, u = 0;  // where CellOf finds none, an address made of them is still sane
};

// The lattices of a batch, and which row of a logits-like tensor each of their cells is.
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
// In the padded layouts first_row may lie behind the beginning of the utterance's rows, for a
// lattice that begins at a later frame or symbol. Scores, normalizers and posteriors use the same
// rows, so one index serves every stage. Nothing here is owned; every pointer is on the device the
// stage runs on.
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
  const int64_t* first_frame;  // (B,), or null: 0. Frame 0 of the lattice is this one of the audio;
                               // only the delay penalty asks

  TRANSDUCER_HD int64_t Stride(int64_t b) const {
    return row_stride != 0 ? row_stride : num_targets[b] + 1;
  }
  // A start that leaves no cell is one just outside, whatever it was: no sum with it wraps round.
  TRANSDUCER_HD int64_t BandStart(int64_t b, int64_t t) const {
    if (band_start == nullptr) return 0;
    const int64_t start = band_start[b * max_frames + t], highest = max_targets + 1;
    return start < -row_stride ? -row_stride : start > highest ? highest : start;
  }
  // The cells of frame t are u = ColumnBegin ... ColumnEnd - 1; none if a start is nonsense.
  TRANSDUCER_HD int64_t ColumnBegin(int64_t b, int64_t t) const {
    const int64_t start = BandStart(b, t);
    return start > 0 ? start : 0;
  }
  TRANSDUCER_HD int64_t ColumnEnd(int64_t b, int64_t t) const {
    const int64_t start = BandStart(b, t), end = num_targets[b] + 1;
    if (band_start == nullptr || start > end - row_stride) return end;
    return start + row_stride;
  }
  TRANSDUCER_HD int64_t Row(int64_t b, int64_t t, int64_t u) const {
    return first_row[b] + t * Stride(b) + u - BandStart(b, t);
  }
  TRANSDUCER_HD int64_t Target(int64_t b, int64_t u) const { return targets[b * max_targets + u]; }

  // False for lengths that would lead outside of the tensors: such an utterance gets a NaN loss
  // instead of an out-of-bounds access (callers that did not validate must still be safe).
  TRANSDUCER_HD bool IsValid(int64_t b) const {
    const int64_t frames = num_frames[b], labels = num_targets[b];
    if (frames < 1 || frames > max_frames || labels < 0 || labels > max_targets) return false;
    if (row_stride != 0 && band_start == nullptr && labels + 1 > row_stride) return false;
    // No sum with first_row, which may be anything: it could wrap round.
    const int64_t begin = b * rows_per_utterance, first = first_row[b];
    const int64_t end = rows_per_utterance != 0 ? begin + rows_per_utterance : num_rows;
    if (first < begin || first >= end) return false;
    const int64_t unused = row_stride != 0 && band_start == nullptr ? row_stride - 1 - labels : 0;
    return frames * Stride(b) - unused <= end - first;
  }

  // The utterance that a row belongs to, be it a cell or padding.
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

  // The cell that a row is; false if the row is padding. cell->b is set in any case. Of an
  // utterance that is not valid, every row is padding.
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

// Some rows of a batch, in ascending order: what one call of a stage works on. A logits-like tensor
// beside a tile has one row for each of its rows; with whole_logits those that are read have one for
// each row of the batch.
struct RowTile {
  const int64_t* rows;  // null: begin, begin + 1, ...; else rows[begin], rows[begin + 1], ...
  int64_t begin;
  int64_t size;
  bool whole_logits = false;

  TRANSDUCER_HD int64_t Row(int64_t i) const {
    return rows != nullptr ? rows[begin + i] : begin + i;
  }
  TRANSDUCER_HD int64_t LogitsRow(int64_t i) const { return whole_logits ? Row(i) : i; }
};

// LatticeBatch::CellOf for rows asked in ascending order: most are in the frame of the one before.
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
