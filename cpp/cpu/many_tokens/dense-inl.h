// Copies dense operands (x, dy and the low-rank factors) into panels.
//
// The order of the summed elements does not matter to a matrix product as long as both operands agree, and the order of
// the lanes does not matter until the result is stored. So packed weights keep the order in which their nibbles are
// decoded, group by group, and dense operands that meet them are rearranged to match (Order::kDecoded). Without packed
// weights, both operands keep the order of memory (Order::kMemory). A group, with 16 lanes:
//
// clang-format off
//   in memory    0  1  2  3 |  4  5  6  7 |  8  9 .. |    ..    | 60 61 62 63      element 4i + j
//   decoded      0  4  8 .. 60 |  1  5  9 .. 61 |  2  6 .. 62 |  3  7 .. 63       stands at j * kLanes + i
//                    j = 0            j = 1          j = 2         j = 3
// clang-format on
#pragma once

#include <cstdint>

#include "cpp/cpu/isa/panel.h"
#include "cpp/cpu/many_tokens/dropout_mask-inl.h"
#include "cpp/cpu/many_tokens/multiply-inl.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/format/philox.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace many_tokens {

using namespace panel;

enum class Order { kMemory, kDecoded };

// A row-major matrix, with or without dropout of its elements. If there are `rows`, row i is row rows[i] of `data`.
template <class T>
struct Matrix {
  const T* data;
  int64_t stride;  // elements from a row to the next
  Dropout dropout = {};
  const int64_t* rows = nullptr;  // only load_broadcast takes such a matrix

  const T* at(int64_t row, int64_t column) const { return data + row * stride + column; }
};

template <class T>
inline F load_some(const T* p, int64_t count) {
  return count >= kLanes ? load(p) : count > 0 ? load_first(p, static_cast<int>(count)) : zero();
}
template <class T>
inline void store_some(T* p, F v, int64_t count) {
  if (count >= kLanes) {
    store(p, v);
  } else if (count > 0) {
    store_first(p, v, static_cast<int>(count));
  }
}

// Copies rows [row, row + rows) and columns [column, column + columns) of `m` into a broadcast panel. Zeros fill the
// last vector of a row.
template <class W, class T>
void load_broadcast(const Matrix<T>& m, int64_t row, int64_t rows, int64_t column, int64_t columns,
                    typename W::Word* panel) {
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t of_data = m.rows ? m.rows[row + i] : row + i;
    const T* in = m.at(of_data, column);
    if constexpr (W::kElements == 2) {
      if (!m.dropout.active()) {
        for (int64_t c = 0; c < columns; c += 2 * kLanes)
          store(reinterpret_cast<float*>(panel + i * kDepth + c / 2),
                W::template load_pairs<false>(in + c, columns - c));
        continue;
      }
    }
    const Mask mask(m.dropout, of_data * m.stride + column, columns);
    for (int64_t c = 0; c < columns; c += kLanes)
      W::store_elements(panel + i * kDepth, c, mask(load_some(in + c, columns - c), c));
  }
}

// Copies a group of one row's elements, in `order`.
template <Order order, class T>
inline void load_group(const T* p, int64_t count, const Mask& mask, int64_t column, F (&v)[4]) {
  unroll<4>([&](auto q) {
    constexpr int first = q.value * kLanes;
    v[q.value] = mask(load_some(p + first, count - first), column + first);
  });
  if constexpr (order == Order::kDecoded) memory_to_decoded_order(v);
}

// Stores word `word` of lanes [lane, lane + kGroup) of a lanes panel.
template <class W>
inline void store_group(typename W::Word* panel, int64_t lanes, int64_t depth, int64_t word, int64_t lane,
                        const typename W::Vector (&v)[4]) {
  for (int q = 0; q < 4 && lane < lanes; q += 2, lane += kTileLanes) {
    const int64_t width = tile_width(lanes - lane);
    typename W::Word* out = panel + lane * depth + word * width;
    W::store(out, v[q]);
    if (width == kTileLanes) W::store(out + kLanes, v[q + 1]);
  }
}

// Does the same for a group that fills two tiles, `tile_stride` words apart.
template <class W>
inline void store_whole_group(typename W::Word* out, int64_t tile_stride, const typename W::Vector (&v)[4]) {
  W::store(out, v[0]);
  W::store(out + kLanes, v[1]);
  W::store(out + tile_stride, v[2]);
  W::store(out + tile_stride + kLanes, v[3]);
}

// Copies rows [row, row + rows) and columns [column, column + columns) of `m` into a lanes panel whose lanes are the
// columns (`lanes` of them: the columns, or in decoded order the columns rounded up to whole groups). The sum is over
// rows.
template <class W, Order order, class T>
void load_lanes(const Matrix<T>& m, int64_t row, int64_t rows, int64_t column, int64_t columns, int64_t lanes,
                typename W::Word* panel) {
  const int64_t depth = ceil_div(rows, W::kElements);
  for (int64_t d = 0; d < depth; ++d) {
    const int64_t r = row + d * W::kElements;
    const Mask mask(m.dropout, r * m.stride + column, columns);
    if constexpr (W::kElements == 1) {
      for (int64_t c = 0; c < columns; c += kGroup) {
        F v[4];
        load_group<order>(m.at(r, column + c), columns - c, mask, c, v);
        store_group<W>(panel, lanes, depth, d, c, v);
      }
    } else {
      const bool pairs = r + 1 < row + rows;
      const Mask next_mask(m.dropout, (r + 1) * m.stride + column, pairs ? columns : 0);
      for (int64_t c = 0; c < columns; c += kGroup) {
        F v[4], next[4];
        load_group<order>(m.at(r, column + c), columns - c, mask, c, v);
        load_group<order>(m.at(r + (pairs ? 1 : 0), column + c), pairs ? columns - c : 0, next_mask, c, next);
        typename W::Vector words[4];
        unroll<4>([&](auto q) { words[q.value] = W::pair(v[q.value], next[q.value]); });
        store_group<W>(panel, lanes, depth, d, c, words);
      }
    }
  }
}

// Loads a vector of words of a row that begins at *p. The words are in memory order. A word holds neighbours
// (Order::kMemory), or the elements that decoding puts into one word (Order::kDecoded).
template <class W, Order order, class T>
inline F row_words(const T* p, int64_t count) {
  if constexpr (W::kElements == 1) {
    return load_some(p, count);
  } else {
    return W::template load_pairs<order == Order::kDecoded>(p, count);
  }
}

// The place in decoded order of word `word` of a group, which row_words counts in memory order.
template <class W>
constexpr int decoded_word(int word) {
  constexpr int kVectors = 4 / W::kElements;  // that a group decodes to
  return word % kVectors * kLanes + word / kVectors;
}

// Copies rows [row, row + rows) and columns [column, column + columns) of `m` into a lanes panel whose lanes are the
// rows. The sum is over columns, in `order`. Each square of kLanes rows and kLanes words is transposed in registers:
//
// clang-format off
//   m, in words of kElements columns         panel, one tile of lanes
//
//   row a [ a0  a1  a2  a3 .. ]              step 0 [ a0  b0  c0  d0 .. ]
//   row b [ b0  b1  b2  b3 .. ]      ->      step 1 [ a1  b1  c1  d1 .. ]
//   row c [ c0  c1  c2  c3 .. ]              step 2 [ a2  b2  c2  d2 .. ]
//
//   with TwoWords, two lanes a row:          step 0 [ a0 a1  b0 b1  c0 c1 .. ]
//                                            step 1 [ a2 a3  b2 b3  c2 c3 .. ]
// clang-format on
//
// Returns the depth in steps: whole vectors (memory order) or whole groups (decoded order), filled with zeros.
template <class W, Order order, class T>
int transpose_lanes(const Matrix<T>& m, int64_t row, int64_t rows, int64_t column, int64_t columns,
                    typename W::Word* panel) {
  constexpr int kStep = kLanes * W::kElements;  // elements a vector of words holds
  const int64_t elements = round_up(columns, order == Order::kDecoded ? kGroup : kLanes);
  const int64_t depth = elements / W::kElements / W::kWords;
  for (int64_t first = 0; first < rows; first += kLanes) {
    const int64_t tile = first & -kTileLanes, width = tile_width((rows - tile) * W::kWords);
    typename W::Word* out = panel + tile * depth + (first - tile);
    for (int64_t c = 0; c < elements; c += kStep) {
      F v[kLanes];
      if (first + kLanes <= rows && c + kStep <= columns) {
        const T* in = m.at(row + first, column + c);
        unroll<kLanes>([&](auto i) { v[i.value] = row_words<W, order>(in + i.value * m.stride, kStep); });
      } else {
        for (int i = 0; i < kLanes; ++i)
          v[i] = first + i < rows ? row_words<W, order>(m.at(row + first + i, column + c), columns - c) : zero();
      }
      transpose(v);
      const int64_t group = c & -kGroup;
      const int within = static_cast<int>(c % kGroup) / W::kElements;  // words before c in its group
      unroll<kLanes>([&](auto i) {
        const int64_t word = order == Order::kMemory
                                 ? c / W::kElements + i.value
                                 : group / W::kElements + decoded_word<W>(i.value) + decoded_word<W>(within);
        float* const to = reinterpret_cast<float*>(out + word / W::kWords * width);
        if (word >= depth * W::kWords) return;
        if constexpr (W::kWords == 1) {
          store(to, v[i.value]);
        } else {
          constexpr int kNext = order == Order::kMemory ? 1 : 4 / W::kElements;  // vectors to that of the next word
          if constexpr (i.value / kNext % 2 == 0) {
            F low, high;
            W::interleave(v[i.value], v[i.value + kNext], low, high);
            store(to, low);
            if (width == kTileLanes) store(to + kLanes, high);
          }
        }
      });
    }
  }
  return static_cast<int>(depth);
}

}  // namespace many_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
