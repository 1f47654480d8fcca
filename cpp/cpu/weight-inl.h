// Decoding packed weights into panels (tile-inl.h), a group of kGroup elements at a time. Included inside the kernels'
// anonymous namespace.
//
// Where groups coincide with the packed format (they begin at multiples of kGroup and lie in one block), a group's
// scale multiplies the 16 code values once, not every weight. Anything else (k no multiple of kGroup, blocks smaller
// than a group) multiplies each element by its own block's scale and zeroes what lies beyond the row. Both give the
// same bits.
#pragma once

#include "cpp/cpu/panel-inl.h"

// Whether groups from a multiple of kGroup on coincide with the packed format, and whether rows begin with a block.
inline bool aligned(const Weight& w) { return w.k % kGroup == 0 && w.scales.block_size >= kGroup; }
inline bool rows_begin_blocks(const Weight& w) { return (w.k & (w.scales.block_size - 1)) == 0; }

// Rows [row, row + rows) and columns [column, column + columns) of a weight, with the scales of the blocks they lie in,
// which are decoded once for however many panels the tile is decoded to.
class WeightTile {
 public:
  // `scales` has room for scale_floats(rows, columns).
  WeightTile(const Weight& w, int64_t row, int64_t rows, int64_t column, int64_t columns, float* scales)
      : w_(&w), row_(row), column_(column), stride_(scale_floats(1, columns)), scales_(scales) {
    if (columns == w.k) stride_ = 0;
    const int64_t runs = stride_ ? rows : 1, rows_of_run = stride_ ? 1 : rows;
    for (int64_t i = 0; i < runs; ++i) {
      const int64_t first = block(row + i, column), last = block(row + i + rows_of_run - 1, column + columns - 1);
      read_scales(w.scales, first, last + 1 - first, scales + i * stride_);
    }
  }
  // Decoding loads whole vectors of scales.
  static constexpr int64_t scale_floats(int64_t rows, int64_t columns) {
    return rows * (columns / kMinBlockSize + 2 + kLanes);
  }

  const Weight& weight() const { return *w_; }
  const Table& nf4() const { return nf4_; }
  int shift() const { return shift_; }
  int64_t flat(int64_t row, int64_t column) const { return row * w_->k + column; }
  int64_t block(int64_t row, int64_t column) const { return flat(row, column) >> shift_; }
  // Such that the scale of the row's block b is at [b].
  const float* scales(int64_t row) const {
    return scales_ + (row - row_) * stride_ - block(stride_ ? row : row_, column_);
  }

  // From the scale of a row's block to that of the same block of the next row, where rows begin with a block.
  int64_t row_scales() const { return stride_ ? stride_ : w_->k >> shift_; }

 private:
  const Weight* w_;
  int64_t row_, column_;
  int64_t stride_;  // floats from a row's scales to the next's; 0 if the rows are whole and their blocks one run
  const float* scales_;
  Table nf4_ = nf4_table();
  int shift_ = __builtin_ctzll(static_cast<uint64_t>(w_->scales.block_size));
};

// The packed bytes of rows [row, row + rows) and columns [column, column + columns), as far as they exist.
inline Ahead packed_ahead(const Weight& w, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  return {w.packed + ((row * w.k + column) >> 1), at_most(rows, w.n - row), w.k / 2,
          at_most(columns, w.k - column) / 2};
}

// A row of an aligned tile from a column on.
class AlignedRow {
 public:
  AlignedRow(const WeightTile& t, int64_t row, int64_t column)
      : packed_(t.weight().packed + (t.flat(row, column) >> 1)),
        flat_(t.flat(row, column)),
        shift_(t.shift()),
        nf4_(t.nf4()),
        scales_(t.scales(row)) {}

  const uint8_t* packed(int64_t c) const { return packed_ + (c >> 1); }
  float scale(int64_t c) const { return scales_[(flat_ + c) >> shift_]; }
  // The values its codes stand for in the group at column c.
  Table table(int64_t c) const { return scaled(nf4_, splat(scale(c))); }

  // Of the group at column c, vector j lane i is element 4i + j.
  void decode(int64_t c, F (&v)[4]) const {
    const Table t = table(c);
    const Codes codes = load_codes(packed(c));
    unroll<4>([&](auto j) { v[j.value] = lookup<j.value>(t, codes); });
  }

 private:
  const uint8_t* packed_;
  int64_t flat_;
  int shift_;
  const Table& nf4_;
  const float* scales_;
};

// The same of any row, whose elements from `columns` on are zero.
class RaggedRow {
 public:
  RaggedRow(const WeightTile& t, int64_t row, int64_t column, int64_t columns)
      : t_(t), flat_(t.flat(row, column)), columns_(columns), scales_(t.scales(row)) {}

  void decode(int64_t c, F (&v)[4]) const {
    const Weight& w = t_.weight();
    const int64_t begin = flat_ + c;
    const Codes codes = load_codes(w.packed + (begin >> 1), begin & 1, packed_bytes(w.n * w.k) - (begin >> 1));
    const F scales = load(scales_ + (begin >> t_.shift()));
    const int offset = static_cast<int>(begin & (w.scales.block_size - 1));
    const int valid = static_cast<int>(at_most(columns_ - c, kGroup));
    unroll<4>([&](auto j) {
      v[j.value] = scale_mixed<j.value>(lookup<j.value>(t_.nf4(), codes), scales, offset, t_.shift(), valid);
    });
  }

 private:
  const WeightTile& t_;
  int64_t flat_, columns_;
  const float* scales_;
};

// Rows [row, row + rows) of a tile into a rows panel, in decoded order. Returns the depth in words: whole groups.
template <class W>
int decode_rows(const WeightTile& tile, int64_t row, int64_t rows, int64_t column, int64_t columns,
                typename W::Word* panel) {
  const bool aligned = panel::aligned(tile.weight());
  for (int64_t i = 0; i < rows; ++i, panel += kDepth) {
    if (aligned) {
      const AlignedRow in(tile, row + i, column);
      for (int64_t c = 0; c < columns; c += kGroup) W::decode_row(in.packed(c), in.scale(c), panel + c / W::kElements);
    } else {
      const RaggedRow in(tile, row + i, column, columns);
      for (int64_t c = 0; c < columns; c += kGroup) {
        F v[4];
        in.decode(c, v);
        W::store_decoded_row(v, panel + c / W::kElements);
      }
    }
  }
  return static_cast<int>(round_up(columns, kGroup) / W::kElements);
}

// Does what decode_rows does beside a multiplication, and fetches the memory `distance` bytes behind, which is to be
// decoded after it. The tile's groups must coincide with the packed format and its rows begin with a block.
template <class W>
class DecodeAhead {
 public:
  DecodeAhead(const WeightTile& tile, int64_t row, int64_t rows, int64_t column, int64_t columns,
              typename W::Word* panel, int64_t distance)
      : packed_(tile.weight().packed + tile.flat(row, column) / 2),
        distance_(distance),
        row_bytes_(tile.weight().k / 2),
        scales_(tile.scales(row) + tile.block(row, column)),
        row_scales_(tile.row_scales()),
        out_(panel),
        rows_left_(rows),
        rows_(rows),
        column_(column),
        end_(column + columns),
        shift_(tile.shift()) {}

  void step() {
    if (rows_left_ == 0) return;
    __builtin_prefetch(packed_ + distance_, 0, 2);
    W::decode_row(packed_, *scales_, out_);
    packed_ += row_bytes_, scales_ += row_scales_, out_ += kDepth;
    if (--rows_left_ > 0) return;
    if (column_ + kGroup >= end_) return;
    packed_ += kGroup / 2 - rows_ * row_bytes_;
    scales_ += ((column_ + kGroup) >> shift_) - (column_ >> shift_) - rows_ * row_scales_;
    out_ += kGroup / W::kElements - rows_ * kDepth;
    rows_left_ = rows_, column_ += kGroup;
  }
  void finish() {
    while (rows_left_ > 0) step();
  }

 private:
  const uint8_t* packed_;
  int64_t distance_, row_bytes_;
  const float* scales_;
  int64_t row_scales_;
  typename W::Word* out_;
  int64_t rows_left_, rows_, column_, end_;
  int shift_;
};

// Words of one row, or of two that lie one above the other.
template <class W>
inline void decode_words(const AlignedRow& row, const AlignedRow& next, int64_t c, typename W::Vector (&words)[4]) {
  if constexpr (W::kElements == 1) {
    row.decode(c, words);
  } else {
    W::decode_two_rows(row, next, c, words);
  }
}
template <class W>
inline void decode_words(const RaggedRow& row, const RaggedRow* next, int64_t c, typename W::Vector (&words)[4]) {
  if constexpr (W::kElements == 1) {
    row.decode(c, words);
  } else {
    F v[4], below[4] = {zero(), zero(), zero(), zero()};
    row.decode(c, v);
    if (next) next->decode(c, below);
    unroll<4>([&](auto j) { words[j.value] = W::round_pair(v[j.value], below[j.value]); });
  }
}

// Rows [row, row + rows) and columns [column, column + columns) of a tile into a lanes panel whose lanes are the
// columns, in decoded order, rounded up to whole groups. The sum is over rows.
template <class W>
void decode_lanes(const WeightTile& tile, int64_t row, int64_t rows, int64_t column, int64_t columns,
                  typename W::Word* panel) {
  const int64_t depth = ceil_div(rows, W::kElements);
  const bool aligned = panel::aligned(tile.weight());
  for (int64_t d = 0; d < depth; ++d) {
    const int64_t r = row + d * W::kElements;
    const bool last = r + W::kElements > row + rows;  // of two rows, and the second is not there
    typename W::Word* out = panel + d * kTileLanes;
    typename W::Vector words[4];
    if (aligned && !last) {
      const AlignedRow in(tile, r, column), next(tile, r + W::kElements - 1, column);
      for (int64_t c = 0; c < columns; c += kGroup) {
        decode_words<W>(in, next, c, words);
        store_whole_group<W>(out + c * depth, kTileLanes * depth, words);
      }
    } else {
      const RaggedRow in(tile, r, column, columns), next(tile, r + (last ? 0 : W::kElements - 1), column, columns);
      for (int64_t c = 0; c < columns; c += kGroup) {
        decode_words<W>(in, last ? nullptr : &next, c, words);
        store_whole_group<W>(out + c * depth, kTileLanes * depth, words);
      }
    }
  }
}
