// Filling tiles: of dense operands (x, dy, the low-rank factors) and of packed weights.
//
// Both sides of a product must agree on the order of the summed elements, and nothing else depends on it, so W stays in
// the order in which its nibbles are decoded. Where W is a, a tile holds 16 of its rows, and of a group of 64 columns the
// even ones are one step, the odd ones the next. Where W is b, a tile holds 16 pairs of rows, and of 32 columns the even
// ones are one tile, the odd ones the other. Either way a row of a tile is one table look-up, and nothing is shuffled:
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
using many_tokens::Mask;
using many_tokens::Matrix;
using many_tokens::Piece;
using many_tokens::RaggedRow;
using many_tokens::ScaledPiece;
using Words = WordBf16;
using Vector = Words::Vector;

inline constexpr int64_t kRowBytes = 64;
static_assert(kLanes == kTileRows && many_tokens::kGroup == Slices::kGroup);

inline void store_row(char* tile_row, Vector words) { Words::store(reinterpret_cast<Words::Word*>(tile_row), words); }
inline F load_row(const char* tile_row) { return load(reinterpret_cast<const float*>(tile_row)); }

// Up to 32 elements of a row in memory order, or decoded order (W is a); `present` says whether there is such a row.
template <bool decoded>
inline F load_words(const bfloat16* p, int64_t count, bool present = true) {
  return present && count > 0 ? Words::load_pairs<decoded>(p, count) : zero();
}

// ---- dense operands ----

// Tokens [token, token + tokens), at most 16, and elements [begin, begin + size) of m to one tile a step, the tiles
// `step_bytes` apart. W is a: the tokens are the columns of b, so squares of 16 tokens and 16 words are transposed.
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

// The same of a pair of tiles, or of the one that the tokens of the pair fill.
template <WeightIs weight_is>
void fill_dense_pair(const Matrix<bfloat16>& m, int64_t token, int64_t tokens, int64_t begin, int64_t size, char* out) {
  const int64_t step_bytes = ceil_div(tokens, kTileRows) * kTileBytes;
  for (int64_t t = 0; t < tokens; t += kTileRows, out += kTileBytes)
    fill_dense<weight_is>(m, token + t, min(kTileRows, tokens - t), begin, size, out, step_bytes);
}

// ---- dense operands in the place of W: the low-rank factors ----

// Rows [row, row + rows), at most 32, of m [.., elements] to two tiles a step. The order of the elements is W's as a
// (kDecoded), or memory's.
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

// Elements [begin, begin + size), rows of m, and columns [column, column + columns), at most 32, to two tiles a step:
// pairs of rows, as W is b.
inline void fill_columns(const Matrix<bfloat16>& m, int64_t begin, int64_t size, int64_t column, int64_t columns,
                         char* out) {
  for (int64_t e = 0; e < round_up(size, kStep); e += 2) {
    char* const to = out + e / kStep * 2 * kTileBytes + e % kStep / 2 * kRowBytes;
    Vector words[2];
    Words::pair_rows(load_words<false>(m.at(begin + e, column), columns, e < size),
                     load_words<false>(m.at(begin + e + 1, column), columns, e + 1 < size), words);
    store_row(to, words[0]);
    store_row(to + kTileBytes, words[1]);
  }
}

// ---- W ----

// Row `row` of W and columns [begin, begin + size), zeros to the end of the last group, to a row of two tiles a group.
inline void decode_row(const ScaledPiece& source, int64_t row, int64_t begin, int64_t size, char* out) {
  if (source.aligned()) {
    const uint8_t* packed = source.packed(row, begin);
    for (int64_t c = 0; c < size; c += Slices::kGroup, packed += Slices::kGroup / 2, out += 4 * kTileBytes) {
      Vector words[2];
      Words::decode_row(packed, source.scale(row, begin + c), words);
      store_row(out, words[0]);
      store_row(out + 2 * kTileBytes, words[1]);
    }
  } else {
    const RaggedRow ragged(source, row, begin, size);
    for (int64_t c = 0; c < size; c += Slices::kGroup, out += 4 * kTileBytes) {
      F v[4];
      ragged.decode(c, v);
      store_row(out, Words::round_pair(v[0], v[2]));
      store_row(out + 2 * kTileBytes, Words::round_pair(v[1], v[3]));
    }
  }
}

// Rows [row, row + rows), at most 32, as a.
inline void decode_rows(const ScaledPiece& source, int64_t row, int64_t rows, int64_t begin, int64_t size, char* out) {
  for (int64_t r = 0; r < kPair; ++r) {
    char* to = out + r / kTileRows * kTileBytes + r % kTileRows * kRowBytes;
    if (r < rows) {
      decode_row(source, row + r, begin, size, to);
    } else {
      for (int64_t c = 0; c < size; c += kStep, to += 2 * kTileBytes) store_row(to, Words::as_words(zero()));
    }
  }
}

// Rows [row, row + 1] and the 64 columns from `column` on, as b: a row of two tiles of one piece, and of those of another
// one, `piece_bytes` after it. `columns` and `rows` are left.
inline void decode_row_pair(const ScaledPiece& source, int64_t row, int64_t rows, int64_t column, int64_t columns,
                            char* out, int64_t piece_bytes) {
  Vector words[4];
  if (source.aligned() && rows > 1) {
    const uint8_t *const packed = source.packed(row, column), *const next = source.packed(row + 1, column);
    const Vector table = Words::row_table(source.scale(row, column), source.scale(row + 1, column));
    Vector half[2];
    Words::decode_columns(packed, next, table, half);
    words[0] = half[0], words[1] = half[1];
    Words::decode_columns(packed + kStep / 2, next + kStep / 2, table, half);
    words[2] = half[0], words[3] = half[1];
  } else {
    F v[4] = {zero(), zero(), zero(), zero()}, next[4] = {zero(), zero(), zero(), zero()};
    if (rows > 0) RaggedRow(source, row, column, columns).decode(0, v);
    if (rows > 1) RaggedRow(source, row + 1, column, columns).decode(0, next);
    decoded_to_memory_order(v);
    decoded_to_memory_order(next);
    for (int half = 0; half < 2; ++half) {
      F even, odd, next_even, next_odd;
      unzip(v[2 * half], v[2 * half + 1], even, odd);
      unzip(next[2 * half], next[2 * half + 1], next_even, next_odd);
      words[2 * half] = Words::round_pair(even, next_even);
      words[2 * half + 1] = Words::round_pair(odd, next_odd);
    }
  }
  store_row(out, words[0]);
  store_row(out + kTileBytes, words[1]);
  store_row(out + piece_bytes, words[2]);
  store_row(out + piece_bytes + kTileBytes, words[3]);
}

// Rows [row, row + rows) and the 64 columns from `column` on as b, to two pieces.
inline void decode_columns(const ScaledPiece& source, int64_t row, int64_t rows, int64_t column, int64_t columns,
                           char* out, int64_t piece_bytes) {
  for (int64_t r = 0; r < round_up(rows, Slices::kGroup); r += 2) {
    char* const to = out + r / kStep * 2 * kTileBytes + r % kStep / 2 * kRowBytes;
    decode_row_pair(source, row + r, rows - r, column, columns, to, piece_bytes);
  }
}

}  // namespace many_tokens_tiles
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
