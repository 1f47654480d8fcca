// Fills tiles with dense operands (x, dy, the low-rank factors) and with decoded weights.
//
// Both sides of a product must agree on the order of the summed elements, and nothing else depends on it, so W stays in
// the order in which its nibbles are decoded. Where W is a, a tile holds 16 of its rows, and of a group of 64 columns
// the even ones are one step, the odd ones the next. Where W is b, a tile holds 16 pairs of rows, and of 32 columns the
// even ones are one tile, the odd ones the other. Either way a row of a tile is one table look-up, and nothing is
// shuffled:
//
// clang-format off
//   W is a:   group of a row   0  1  2  3  4  5 .. 63      step 2g    0 2 4 6 .. 62      row of a tile
//             (high nibble, low nibble, ..)                step 2g+1  1 3 5 7 .. 63      the same row of the next step's
//
//   W is b:   row n            0  1  2  3 .. 31            tile 0     (n, n+1) of column 0, of column 2, .. 30
//             row n + 1        0  1  2  3 .. 31            tile 1     (n, n+1) of column 1, of column 3, .. 31
// clang-format on
#pragma once

#include <cstdint>

#include "cpp/cpu/isa/panel.h"
#include "cpp/cpu/many_tokens/dense-inl.h"
#include "cpp/cpu/many_tokens/weight-inl.h"
#include "cpp/cpu/many_tokens_tiles/multiply-inl.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace many_tokens_tiles {

using namespace panel;
using many_tokens::block_at;
using many_tokens::Mask;
using many_tokens::Matrix;
using many_tokens::Piece;
using many_tokens::ScaledPiece;
using many_tokens::with_group_decoder;
using Words = WordBf16;
using Vector = Words::Vector;

inline constexpr int64_t kRowBytes = 64;
static_assert(kLanes == kTileRows && many_tokens::kGroup == Slices::kGroup);

inline void store_row(char* tile_row, Vector words) { Words::store(reinterpret_cast<Words::Word*>(tile_row), words); }
inline F load_row(const char* tile_row) { return load(reinterpret_cast<const float*>(tile_row)); }

// Loads up to 32 elements of a row, in memory order or in decoded order (W is a). A row that is not `present` is zeros.
template <bool decoded>
inline F load_words(const bfloat16* p, int64_t count, bool present = true) {
  return present && count > 0 ? Words::load_pairs<decoded>(p, count) : zero();
}

// ---- dense operands ----

// Fills one tile per step with tokens [token, token + tokens), at most 16, and elements [begin, begin + size) of m. The
// tiles lie `step_bytes` apart. Where W is a, the tokens are the columns of b, so squares of 16 tokens and 16 words are
// transposed.
template <WeightIs weight_is>
void fill_dense(const Matrix<bfloat16>& m, int64_t token, int64_t tokens, int64_t begin, int64_t size, char* out,
                int64_t step_bytes) {
  if constexpr (weight_is == WeightIs::kB) {
    for (int64_t c = 0; c < round_up(size, Slices::kGroup); c += kStep, out += step_bytes) {
      for (int64_t t = 0; t < kTileRows; ++t) {
        const F row = t < tokens ? load_words<false>(m.at(token + t, begin + c), size - c) : zero();
        store_row(out + t * kRowBytes, Words::as_words(row));
      }
    }
  } else {
    for (int64_t c = 0; c < size; c += Slices::kGroup, out += 2 * step_bytes) {
      for (int half = 0; half < 2; ++half) {
        const int64_t left = size - c - half * kStep;
        const bfloat16* const in = m.at(token, begin + c + half * kStep);
        F v[kLanes];
        if (tokens == kTileRows && left >= kStep) {
          unroll<kLanes>([&](auto t) { v[t.value] = Words::load_pairs<true>(in + t.value * m.stride, kStep); });
        } else {
          for (int t = 0; t < kLanes; ++t) v[t] = t < tokens ? load_words<true>(in + t * m.stride, left) : zero();
        }
        transpose(v);
        unroll<kLanes>([&](auto i) {  // word i of half a group: even ones are the first step's
          store_row(out + i.value % 2 * step_bytes + (half * kLanes / 2 + i.value / 2) * kRowBytes,
                    Words::as_words(v[i.value]));
        });
      }
    }
  }
}

// Does the same for the tiles of a pair of tokens: two per step, or one if the tokens fill no second.
template <WeightIs weight_is>
void fill_dense_pair(const Matrix<bfloat16>& m, int64_t token, int64_t tokens, int64_t begin, int64_t size, char* out) {
  const int64_t step_bytes = ceil_div(tokens, kTileRows) * kTileBytes;
  for (int64_t t = 0; t < tokens; t += kTileRows, out += kTileBytes)
    fill_dense<weight_is>(m, token + t, min(kTileRows, tokens - t), begin, size, out, step_bytes);
}

// ---- dense operands in the place of W: the low-rank factors ----

// Fills two tiles per step with rows [row, row + rows) of m, at most 32, as W is a. The order of the elements is that
// of decoded weights (kDecoded) or of memory.
template <many_tokens::Order order>
void fill_rows(const Matrix<bfloat16>& m, int64_t row, int64_t rows, int64_t begin, int64_t size, char* out) {
  for (int64_t r = 0; r < kPair; ++r) {
    char* to = out + r / kTileRows * kTileBytes + r % kTileRows * kRowBytes;
    if constexpr (order == many_tokens::Order::kMemory) {
      for (int64_t c = 0; c < size; c += kStep, to += 2 * kTileBytes)
        store_row(to, Words::as_words(load_words<false>(m.at(row + r, begin + c), size - c, r < rows)));
    } else {
      for (int64_t c = 0; c < size; c += Slices::kGroup, to += 4 * kTileBytes) {
        F even, odd;
        const bfloat16* const in = m.at(row + r, begin + c);
        const F low = load_words<true>(in, size - c, r < rows);
        const F high = load_words<true>(in + kStep, size - c - kStep, r < rows);
        unzip(low, high, even, odd);
        store_row(to, Words::as_words(even));
        store_row(to + 2 * kTileBytes, Words::as_words(odd));
      }
    }
  }
}

// Fills two tiles per step and 32 columns with rows [begin, begin + size) and columns [column, column + columns) of m,
// as W is b: pairs of rows. Zeros fill the last step. The tiles of the next 32 columns begin `piece_bytes` further on.
inline void fill_columns(const Matrix<bfloat16>& m, int64_t begin, int64_t size, int64_t column, int64_t columns,
                         char* out, int64_t piece_bytes) {
  for (int64_t r = 0; r < round_up(size, kStep); r += 2) {
    char* to = out + r / kStep * 2 * kTileBytes + r % kStep / 2 * kRowBytes;
    const bfloat16 *const row = m.at(begin + r, column), *const next = m.at(begin + r + 1, column);
    for (int64_t c = 0; c < columns; c += kPair, to += piece_bytes) {
      Vector words[2];
      Words::pair_rows(load_words<false>(row + c, columns - c, r < size),
                       load_words<false>(next + c, columns - c, r + 1 < size), words);
      store_row(to, words[0]);
      store_row(to + kTileBytes, words[1]);
    }
  }
}

// ---- W ----

// Whether each half of a group is in one block, whose scale can multiply the 16 code values instead of every weight.
inline bool has_tables(const Weight& w) { return has_one_scale_per(Slices::kGroup / 2, w) && !is_wide(w.code); }

// A decoder decodes a piece in small steps. Step s of the multiplication may read the piece after kStepsAhead + s calls
// of step().

// Decodes rows [row, row + rows), at most 32, and the columns of a slice, as a. A step decodes a group of 16 rows.
class RowsDecoder {
 public:
  static constexpr int64_t kStepsAhead = 2;
  RowsDecoder() = default;
  RowsDecoder(const ScaledPiece& source, int64_t row, int64_t rows, const Slice& s, char* out, int64_t)
      : values_(Words::values_of(source.table())),
        source_(&source),
        row_(row),
        rows_(rows),
        begin_(s.begin),
        size_(s.size),
        left_(s.element_steps()),
        out_(out),
        has_tables_(has_tables(source.weight()) && source.weight().k % Slices::kGroup == 0) {}
  void step() {
    if (left_ == 0) return;
    const int64_t first = half_ * kTileRows, rows = min(kTileRows, rows_ - first);
    char* out = out_ + half_ * kTileBytes;
    if (has_tables_ && source_->has_offsets()) {
      decode_tables<true>(row_ + first, rows, out);
    } else if (has_tables_) {
      decode_tables<false>(row_ + first, rows, out);
    } else {
      with_group_decoder(*source_, [&](const auto& decode) {
        for (int64_t r = 0; r < rows; ++r) {
          F v[4];
          decode(row_ + first + r, begin_ + column_, size_ - column_, v);
          store_row(out + r * kRowBytes, Words::round_pair(v[0], v[2]));
          store_row(out + r * kRowBytes + 2 * kTileBytes, Words::round_pair(v[1], v[3]));
        }
      });
    }
    for (int64_t r = max(rows, 0); r < kTileRows; ++r) {
      store_row(out + r * kRowBytes, Words::as_words(zero()));
      store_row(out + r * kRowBytes + 2 * kTileBytes, Words::as_words(zero()));
    }
    --left_;
    half_ ^= 1;
    if (half_ == 0) column_ += Slices::kGroup, out_ += 4 * kTileBytes;
  }

 private:
  template <bool kHasOffsets>
  void decode_tables(int64_t row, int64_t rows, char* out) const {
    const int64_t k = source_->weight().k, row_scales = source_->row_scales(), to_offset = source_->to_offset();
    const int shift = source_->shift();
    const bool of_halves = !source_->aligned();
    int64_t flat = source_->flat(row, begin_ + column_);
    const uint8_t* packed = source_->weight().packed + (flat >> 1);
    const float* scales = source_->scales(row);
    for (int64_t r = 0; r < rows; ++r, packed += k / 2, flat += k, scales += row_scales, out += kRowBytes) {
      Vector words[2];
      const float* const scale = scales + (flat >> shift);
      const auto block = block_at<kHasOffsets>(scale, to_offset);
      if (of_halves) {
        Words::decode_row(values_, packed, block, block_at<kHasOffsets>(scale + 1, to_offset), words);
      } else {
        Words::decode_row(values_, packed, block, words);
      }
      store_row(out, words[0]);
      store_row(out + 2 * kTileBytes, words[1]);
    }
  }

  Words::Values values_ = {};
  const ScaledPiece* source_ = nullptr;
  int64_t row_ = 0, rows_ = 0, begin_ = 0, size_ = 0, left_ = 0, column_ = 0, half_ = 0;
  char* out_ = nullptr;
  bool has_tables_ = false;
};

// Decodes columns [column, column + columns) and the rows of a slice, as b, into up to kMostPieces pieces of 32
// columns. `column` is a multiple of 32. A step decodes 32 rows of all pieces.
template <int kMostPieces>
class ColumnsDecoder {
 public:
  static constexpr int64_t kStepsAhead = 1;
  ColumnsDecoder() = default;
  ColumnsDecoder(const ScaledPiece& source, int64_t column, int64_t columns, const Slice& s, char* out,
                 int64_t piece_bytes)
      : values_(Words::values_of(source.table())),
        source_(&source),
        column_(column),
        columns_(columns),
        row_(s.begin),
        rows_(s.size),
        left_(s.element_steps()),
        piece_bytes_(piece_bytes),
        out_(out),
        has_tables_(has_tables(source.weight())) {}
  void step() {
    if (left_ == 0) return;
    if (has_tables_ && columns_ % kPair == 0 && rows_ >= kStep) {
      with_count<kMostPieces>(columns_ / kPair, [&](auto pieces) {
        if (source_->has_offsets()) {
          decode_whole<pieces.value, true>();
        } else {
          decode_whole<pieces.value, false>();
        }
      });
    } else {
      decode_ragged();
    }
    row_ += kStep, rows_ -= kStep, out_ += 2 * kTileBytes, --left_;
  }

 private:
  template <int kPieces, bool kHasOffsets>
  void decode_whole() const {
    const int64_t k = source_->weight().k, row_scales = source_->row_scales(), to_offset = source_->to_offset();
    const int shift = source_->shift();
    const bool second_half = column_ % Slices::kGroup != 0;  // of a group is the first piece
    const bool of_halves = !source_->aligned();
    int64_t flat = source_->flat(row_, column_);
    const uint8_t* packed = source_->weight().packed + (flat >> 1);
    const float* scales = source_->scales(row_);
    char* to = out_;
    for (int64_t r = 0; r < kStep; r += 2, packed += k, flat += 2 * k, scales += 2 * row_scales, to += kRowBytes) {
      Vector table = {}, words[2];
      unroll<kPieces>([&](auto i) {
        constexpr int64_t c = i.value * kPair;
        if (i.value == 0 || of_halves || (i.value % 2 == 0) != second_half) {
          const float* const below = scales + row_scales;
          table = Words::row_table(values_, block_at<kHasOffsets>(scales + ((flat + c) >> shift), to_offset),
                                   block_at<kHasOffsets>(below + ((flat + c + k) >> shift), to_offset));
        }
        Words::decode_columns(packed + c / 2, packed + (c + k) / 2, table, words);
        store_row(to + i.value * piece_bytes_, words[0]);
        store_row(to + i.value * piece_bytes_ + kTileBytes, words[1]);
      });
    }
  }
  void decode_ragged() const {
    const int64_t first_group = column_ & -Slices::kGroup, end = column_ + columns_;
    with_group_decoder(*source_, [&](const auto& decode) {
      char* to = out_;
      for (int64_t r = 0; r < kStep; r += 2, to += kRowBytes) {
        for (int64_t group = first_group; group < end; group += Slices::kGroup) {
          F v[4] = {}, below[4] = {}, words[4], halves[2][2];  // words (row, next row); even and odd columns
          if (r < rows_) decode(row_ + r, group, end - group, v);
          if (r + 1 < rows_) decode(row_ + r + 1, group, end - group, below);
          unroll<4>([&](auto j) { words[j.value] = Words::as_floats(Words::round_pair(v[j.value], below[j.value])); });
          zip(words[0], words[2], halves[0][0], halves[1][0]);
          zip(words[1], words[3], halves[0][1], halves[1][1]);
          unroll<2>([&](auto half) {
            const int64_t c = group + half.value * kPair - column_;
            if (c < 0 || c >= columns_) return;
            store_row(to + c / kPair * piece_bytes_, Words::as_words(halves[half.value][0]));
            store_row(to + c / kPair * piece_bytes_ + kTileBytes, Words::as_words(halves[half.value][1]));
          });
        }
      }
    });
  }

  Words::Values values_ = {};
  const ScaledPiece* source_ = nullptr;
  int64_t column_ = 0, columns_ = 0, row_ = 0, rows_ = 0, left_ = 0, piece_bytes_ = 0;
  char* out_ = nullptr;
  bool has_tables_ = false;
};

}  // namespace many_tokens_tiles
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
