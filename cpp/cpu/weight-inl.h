// Decoding packed weights into panels (tile-inl.h), a group of kGroup elements at a time. Included inside the kernels'
// anonymous namespace.
//
// Where groups coincide with the packed format (they begin at multiples of kGroup and lie in one block), a group's
// scale multiplies the 16 code values once, not every weight. Anything else (k no multiple of kGroup, blocks smaller
// than a group) multiplies each element by its own block's scale and zeroes what lies beyond the row. Both give the
// same bits.
#pragma once

#include "cpp/cpu/panel-inl.h"

// What decoding needs of a weight, found once a panel.
struct Decoder {
  const Weight& w;
  Table nf4 = nf4_table();
  int shift = __builtin_ctzll(static_cast<uint64_t>(w.scales.block_size));
  int64_t bytes = packed_bytes(w.n * w.k);

  int64_t flat(int64_t row, int64_t column) const { return row * w.k + column; }
  bool aligned(int64_t row, int64_t column, int64_t columns) const {
    return (flat(row, column) | columns) % kGroup == 0 && w.scales.block_size >= kGroup;
  }
};

// The scales of blocks asked for in ascending order.
class ScaleCursor {
 public:
  ScaleCursor(const Scales& s, int64_t block) : s_(s) {
    if (s.absmax) return;
    offset_ = splat(*s.nested_offset);
    seek(block / s.nested_block_size);
  }
  F splat_of(int64_t block) {
    if (s_.absmax) return splat(s_.absmax[block]);
    if (block >= end_) seek(block / s_.nested_block_size);
    return add(mul(splat(kDynamic8.value[s_.codes[block]]), nested_), offset_);
  }
  // out[0 .. count) = the scales of blocks first ..; up to kLanes more are written.
  void read(int64_t first, int64_t count, float* out) {
    if (s_.absmax) {
      for (int64_t i = 0; i < count; i += kLanes) store(out + i, load_some(s_.absmax + first + i, count - i));
      return;
    }
    for (int64_t i = 0; i < count;) {
      if (first + i >= end_) seek((first + i) / s_.nested_block_size);
      const int64_t some = at_most(at_most(count - i, end_ - (first + i)), kLanes);
      store(out + i,
            add(mul(look_up(kDynamic8.value, s_.codes + first + i, static_cast<int>(some)), nested_), offset_));
      i += some;
    }
  }

 private:
  void seek(int64_t nested) {
    nested_ = splat(s_.nested_absmax[nested]);
    end_ = (nested + 1) * s_.nested_block_size;
  }

  const Scales& s_;
  int64_t end_ = 0;  // of the blocks nested_ is for
  F nested_ = zero(), offset_ = zero();
};

// Columns [column, column + columns) of a row that is aligned there.
class AlignedRow {
 public:
  AlignedRow(const Decoder& d, int64_t row, int64_t column)
      : packed_(d.w.packed + (d.flat(row, column) >> 1)),
        flat_(d.flat(row, column)),
        shift_(d.shift),
        nf4_(d.nf4),
        scales_(d.w.scales, flat_ >> shift_) {}

  const uint8_t* packed(int64_t c) const { return packed_ + (c >> 1); }
  // The values its codes stand for in the group at column c.
  Table table(int64_t c) { return scaled(nf4_, scales_.splat_of((flat_ + c) >> shift_)); }

  // Of the group at column c, vector j lane i is element 4i + j.
  void decode(int64_t c, F (&v)[4]) {
    const Table t = table(c);
    const Codes codes = load_codes(packed(c));
    unroll<4>([&](auto j) { v[j.value] = lookup<j.value>(t, codes); });
  }

 private:
  const uint8_t* packed_;
  int64_t flat_;
  int shift_;
  const Table& nf4_;
  ScaleCursor scales_;
};

// The same of any row.
class RaggedRow {
 public:
  static constexpr int64_t kMaxElements = 2 * kDepth;
  RaggedRow(const Decoder& d, int64_t row, int64_t column, int64_t columns)
      : d_(d), flat_(d.flat(row, column)), columns_(columns), first_block_(flat_ >> d.shift) {
    ScaleCursor(d.w.scales, first_block_).read(first_block_, block(columns - 1) + 1, scales_);
  }

  void decode(int64_t c, F (&v)[4]) const {
    const int64_t begin = flat_ + c;
    const Codes codes = load_codes(d_.w.packed + (begin >> 1), begin & 1, d_.bytes - (begin >> 1));
    const F scales = load(scales_ + block(c));
    const int offset = static_cast<int>(begin & (d_.w.scales.block_size - 1));
    const int valid = static_cast<int>(at_most(columns_ - c, kGroup));
    unroll<4>([&](auto j) {
      v[j.value] = scale_mixed<j.value>(lookup<j.value>(d_.nf4, codes), scales, offset, d_.shift, valid);
    });
  }

 private:
  int64_t block(int64_t c) const { return ((flat_ + c) >> d_.shift) - first_block_; }

  const Decoder& d_;
  int64_t flat_, columns_, first_block_;
  float scales_[kMaxElements / kMinBlockSize + 1 + 2 * kLanes];
};

// A burst of short pieces of rows, a row apart, is nothing a hardware prefetcher foresees.
inline void prefetch_piece(const Weight& w, int64_t row, int64_t column, int64_t columns) {
  constexpr int64_t kRowsAhead = 12, kLine = 64;
  const uint8_t* p = w.packed + (((row + kRowsAhead) * w.k + column) >> 1);
  for (int64_t b = 0; b < columns / 2; b += kLine) __builtin_prefetch(p + b);
}

// Rows [row, row + rows) into a rows panel, in decoded order. Returns the depth in words: whole groups.
template <class W>
int decode_rows(const Weight& w, int64_t row, int64_t rows, int64_t column, int64_t columns, typename W::Word* panel) {
  const Decoder decoder{w};
  for (int64_t i = 0; i < rows; ++i, panel += kDepth) {
    prefetch_piece(w, row + i, column, columns);
    if (decoder.aligned(row + i, column, columns)) {
      AlignedRow in(decoder, row + i, column);
      for (int64_t c = 0; c < columns; c += kGroup) W::decode_row(in, c, panel + c / W::kElements);
    } else {
      const RaggedRow in(decoder, row + i, column, columns);
      for (int64_t c = 0; c < columns; c += kGroup) {
        F v[4];
        in.decode(c, v);
        W::store_decoded_row(v, panel + c / W::kElements);
      }
    }
  }
  return static_cast<int>(round_up(columns, kGroup) / W::kElements);
}

// Rows [row, row + rows) into a lanes panel whose lanes are the columns, in decoded order, rounded up to whole groups.
// The sum is over rows.
template <class W>
void decode_lanes(const Weight& w, int64_t row, int64_t rows, int64_t column, int64_t columns,
                  typename W::Word* panel) {
  const Decoder decoder{w};
  const int64_t depth = ceil_div(rows, W::kElements);
  const auto store_words = [&](int64_t c, int64_t d, const typename W::Vector(&v)[4]) {
    store_whole_group<W>(panel + c * depth + d * kTileLanes, kTileLanes * depth, v);
  };
  for (int64_t d = 0; d < depth; ++d) {
    const int64_t r = row + d * W::kElements;
    for (int i = 0; i < W::kElements; ++i) prefetch_piece(w, r + i, column, columns);
    typename W::Vector words[4];
    if constexpr (W::kElements == 1) {
      if (decoder.aligned(r, column, columns)) {
        AlignedRow in(decoder, r, column);
        for (int64_t c = 0; c < columns; c += kGroup) {
          in.decode(c, words);
          store_words(c, d, words);
        }
      } else {
        const RaggedRow in(decoder, r, column, columns);
        for (int64_t c = 0; c < columns; c += kGroup) {
          in.decode(c, words);
          store_words(c, d, words);
        }
      }
    } else {
      const bool pairs = r + 1 < row + rows;
      if (pairs && decoder.aligned(r, column, columns) && decoder.aligned(r + 1, column, columns)) {
        AlignedRow in(decoder, r, column), next(decoder, r + 1, column);
        for (int64_t c = 0; c < columns; c += kGroup) {
          W::decode_two_rows(in, next, c, words);
          store_words(c, d, words);
        }
      } else {
        const RaggedRow in(decoder, r, column, columns), next(decoder, r + (pairs ? 1 : 0), column, columns);
        for (int64_t c = 0; c < columns; c += kGroup) {
          F v[4], below[4] = {zero(), zero(), zero(), zero()};
          in.decode(c, v);
          if (pairs) next.decode(c, below);
          unroll<4>([&](auto j) { words[j.value] = W::round_pair(v[j.value], below[j.value]); });
          store_words(c, d, words);
        }
      }
    }
  }
}
