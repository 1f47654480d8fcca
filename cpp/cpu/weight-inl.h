// Decoding packed weights into panels (tile-inl.h), a group of kGroup elements at a time. Included inside the kernels'
// anonymous namespace.
//
// A group that lies in one block and begins at a whole byte takes the fast way: its scale multiplies the 16 code values
// once, not every weight. Any other (k no multiple of the block size, odd k, the end of a row) takes the mixed way,
// which multiplies each element by its own block's scale and zeroes what lies beyond the row. Both give the same bits.
#pragma once

#include "cpp/cpu/panel-inl.h"

// The scales of `count` consecutive blocks.
inline void load_scales(const Scales& s, int64_t first, int64_t count, float* out) {
  if (s.absmax) {
    for (int64_t i = 0; i < count; ++i) out[i] = s.absmax[first + i];
    return;
  }
  const float offset = *s.nested_offset;
  int64_t nested = first / s.nested_block_size, left = s.nested_block_size - first % s.nested_block_size;
  for (int64_t i = 0; i < count; ++i, --left) {
    if (left == 0) {
      ++nested;
      left = s.nested_block_size;
    }
    out[i] = kDynamic8.value[s.codes[first + i]] * s.nested_absmax[nested] + offset;
  }
}

// Columns [column, column + columns) of one row of w.
class Segment {
 public:
  static constexpr int64_t kMaxElements = 2 * kDepth;
  Segment(const Weight& w, int64_t row, int64_t column, int64_t columns)
      : packed_(w.packed),
        bytes_(packed_bytes(w.n * w.k)),
        flat_(row * w.k + column),
        columns_(columns),
        shift_(__builtin_ctzll(static_cast<uint64_t>(w.scales.block_size))),
        first_block_(flat_ >> shift_) {
    load_scales(w.scales, first_block_, ((flat_ + columns - 1) >> shift_) - first_block_ + 1, scales_);
  }

  bool whole(int64_t c) const {
    const int64_t begin = flat_ + c;
    return !(begin & 1) && c + kGroup <= columns_ && begin >> shift_ == (begin + kGroup - 1) >> shift_;
  }
  const uint8_t* packed(int64_t c) const { return packed_ + ((flat_ + c) >> 1); }
  float scale(int64_t c) const { return scales_[((flat_ + c) >> shift_) - first_block_]; }

  // Of the group at column c, vector j lane i is element 4i + j.
  void decode(const Table& nf4, int64_t c, F (&v)[4]) const {
    if (whole(c)) {
      const Table t = scaled(nf4, scale(c));
      const Codes codes = load_codes(packed(c));
      unroll<4>([&](auto j) { v[j.value] = lookup<j.value>(t, codes); });
      return;
    }
    const int64_t begin = flat_ + c;
    const Codes codes = load_codes(packed(c), begin & 1, bytes_ - (begin >> 1));
    const F scales = load(scales_ + ((begin >> shift_) - first_block_));
    const int offset = static_cast<int>(begin & ((int64_t{1} << shift_) - 1));
    const int valid = static_cast<int>(at_most(columns_ - c, kGroup));
    unroll<4>(
        [&](auto j) { v[j.value] = scale_mixed<j.value>(lookup<j.value>(nf4, codes), scales, offset, shift_, valid); });
  }

 private:
  const uint8_t* packed_;
  int64_t bytes_, flat_, columns_;
  int shift_;
  int64_t first_block_;
  float scales_[kMaxElements / kMinBlockSize + 1 + kLanes];
};

// A burst of short row segments, a row apart, is nothing a hardware prefetcher foresees.
inline void prefetch_segment(const Weight& w, int64_t row, int64_t column, int64_t columns) {
  constexpr int64_t kRowsAhead = 12, kLine = 64;
  const uint8_t* p = w.packed + (((row + kRowsAhead) * w.k + column) >> 1);
  for (int64_t b = 0; b < columns / 2; b += kLine) __builtin_prefetch(p + b);
}

// Rows [row, row + rows) into a rows panel, in decoded order. Returns the depth in words: whole groups.
template <class W>
int decode_rows(const Weight& w, int64_t row, int64_t rows, int64_t column, int64_t columns, typename W::Word* panel) {
  const Table nf4 = nf4_table();
  for (int64_t i = 0; i < rows; ++i) {
    prefetch_segment(w, row + i, column, columns);
    const Segment segment(w, row + i, column, columns);
    for (int64_t c = 0; c < columns; c += kGroup) {
      typename W::Word* out = panel + i * kDepth + c / W::kElements;
      if constexpr (W::kElements == 1) {
        F v[4];
        segment.decode(nf4, c, v);
        unroll<4>([&](auto j) { W::store(out + j.value * kLanes, v[j.value]); });
      } else if (segment.whole(c)) {
        W::decode_row(segment.packed(c), nf4, segment.scale(c), out);
      } else {
        F v[4];
        segment.decode(nf4, c, v);
        W::store(out, W::round_pair(v[0], v[2]));
        W::store(out + kLanes, W::round_pair(v[1], v[3]));
      }
    }
  }
  return static_cast<int>(round_up(columns, kGroup) / W::kElements);
}

// Rows [row, row + rows) into a lanes panel whose lanes are the columns, in decoded order, `lanes` of them: the columns
// rounded up to whole groups. The sum is over rows.
template <class W>
void decode_lanes(const Weight& w, int64_t row, int64_t rows, int64_t column, int64_t columns, int64_t lanes,
                  typename W::Word* panel) {
  const Table nf4 = nf4_table();
  const int64_t depth = ceil_div(rows, W::kElements);
  for (int64_t d = 0; d < depth; ++d) {
    const int64_t r = row + d * W::kElements;
    prefetch_segment(w, r, column, columns);
    const Segment segment(w, r, column, columns);
    if constexpr (W::kElements == 1) {
      for (int64_t c = 0; c < columns; c += kGroup) {
        F v[4];
        segment.decode(nf4, c, v);
        store_group<W>(panel, lanes, depth, d, c, v);
      }
    } else {
      const bool pairs = r + 1 < row + rows;
      prefetch_segment(w, r + 1, column, columns);
      const Segment next(w, r + (pairs ? 1 : 0), column, columns);
      for (int64_t c = 0; c < columns; c += kGroup) {
        typename W::Vector words[4];
        if (pairs && segment.whole(c) && next.whole(c)) {
          W::decode_two_rows(segment.packed(c), next.packed(c), nf4, segment.scale(c), next.scale(c), words);
        } else {
          F v[4], below[4] = {zero(), zero(), zero(), zero()};
          segment.decode(nf4, c, v);
          if (pairs) next.decode(nf4, c, below);
          unroll<4>([&](auto j) { words[j.value] = W::round_pair(v[j.value], below[j.value]); });
        }
        store_group<W>(panel, lanes, depth, d, c, words);
      }
    }
  }
}
