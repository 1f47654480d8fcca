// Decodes packed weights into panels (multiply-inl.h), a group of kGroup elements at a time.
//
// Where groups coincide with the packed format (they begin at multiples of kGroup and lie in one quantization block), a
// group's scale multiplies the 16 code values once, not every weight: the weight is *aligned*. Anything else (k no
// multiple of kGroup, blocks smaller than a group) is *ragged*: each element is multiplied by its own block's scale,
// and what lies beyond the row is zeroed. Both give the same bits. Wide codes have no table that a scale could
// multiply, so no weight of theirs is aligned, and WideReader decodes them.
//
// The functions that decode are templates of whether the weight has offsets, so that one without them pays nothing.
#pragma once

#include <cstdint>

#include "cpp/cpu/codec/scales-inl.h"
#include "cpp/cpu/codec/wide_reader-inl.h"
#include "cpp/cpu/isa/panel.h"
#include "cpp/cpu/many_tokens/dropout_mask-inl.h"
#include "cpp/cpu/many_tokens/multiply-inl.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/prefetch-inl.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace many_tokens {

using namespace panel;

template <class T>
inline void swap(T& a, T& b) {
  const T old = a;
  a = b, b = old;
}

// A piece of a weight: rows [row, row + rows) and columns [column, column + columns).
struct Piece {
  int64_t row, rows, column, columns;
};

// How an area of a weight is cut into pieces: strips of `rows` rows, one below the other, each into `columns` columns.
struct Pieces {
  Piece area;
  int64_t rows, columns;

  Piece at(int64_t row, int64_t column) const {
    return {row, min(rows, area.row + area.rows - row), column, min(columns, area.column + area.columns - column)};
  }
  Piece first() const { return at(area.row, area.column); }
  Piece after(const Piece& piece) const {
    const int64_t column = piece.column + piece.columns;
    return column < area.column + area.columns ? at(piece.row, column) : at(piece.row + piece.rows, area.column);
  }
  bool begins_strip(const Piece& piece) const { return piece.column == area.column; }
  Piece strip(int64_t row) const { return {row, at(row, area.column).rows, area.column, area.columns}; }
};

// The scale at `scale`, and of weights with offsets also the offset, which lies `to_offset` floats further on.
template <bool kHasOffsets>
inline auto block_at(const float* scale, int64_t to_offset) {
  if constexpr (kHasOffsets) {
    return ScaleAndOffset{*scale, scale[to_offset]};
  } else {
    return *scale;
  }
}

// A piece and the scales of its quantization blocks, which are decoded once for all panels that the piece is decoded
// into. The offsets of a weight that has them are stored like the scales, to_offset() floats further on.
class ScaledPiece {
 public:
  ScaledPiece() = default;
  // `scales` has room for arrays(w) * scale_floats(rows, columns), or of whole rows for run_floats(w, rows).
  ScaledPiece(const Weight& w, const Piece& piece, float* scales)
      : w_(&w), shift_(__builtin_ctzll(static_cast<uint64_t>(w.scales.block_size))) {
    const bool one_run = piece.columns == w.k;  // of blocks, without gaps between rows
    // In a run, scales are stored without gaps. Otherwise each row has room for all blocks it may overlap. scales(row)
    // is indexed by the block's number in the whole weight, so row_scales_ is a row's room minus the blocks by which a
    // row advances.
    row_scales_ = one_run ? 0 : piece.columns / kMinBlockSize + 2 + kLanes - (w.k >> shift_);
    if (is_wide(w.code)) wide_ = WideReader<kLanes>(w);
    if (has_offsets()) to_offset_ = one_run ? run_room(w, piece.rows) : scale_floats(piece.rows, piece.columns);
    scales_ = scales - block(piece.row, piece.column) - piece.row * row_scales_;
    for (int64_t row = piece.row, step = one_run ? piece.rows : 1; row < piece.row + piece.rows; row += step) {
      const int64_t first = block(row, piece.column);
      const int64_t last = block(row + step - 1, piece.column + piece.columns - 1);
      float* const of_row = scales_ + row * row_scales_ + first;
      read_scales(w.scales, first, last + 1 - first, of_row);
      if (has_offsets()) read_offsets(w.scales, first, last + 1 - first, of_row, of_row + to_offset_);
    }
  }
  // Decoding loads whole vectors of scales.
  static constexpr int64_t scale_floats(int64_t rows, int64_t columns) {
    return rows * (columns / kMinBlockSize + 3 + kLanes);
  }
  static int64_t arrays(const Weight& w) { return w.scales.offsets ? 2 : 1; }
  static int64_t run_floats(const Weight& w, int64_t rows) { return arrays(w) * run_room(w, rows); }

  const Weight& weight() const { return *w_; }
  const WideReader<kLanes>& wide() const { return wide_; }
  // Of 4-bit codes. Wide codes have none, and any one does for what reads it without using it.
  const CodeTable& table() const { return is_wide(w_->code) ? kCodeTables[0] : w_->table(); }
  int shift() const { return shift_; }
  int64_t flat(int64_t row, int64_t column) const { return row * w_->k + column; }
  // scales(row)[b] is the scale of block b, numbered through the whole weight, for the blocks that the row lies in.
  const float* scales(int64_t row) const { return scales_ + row * row_scales_; }
  int64_t row_scales() const { return row_scales_; }  // from scales(row) to scales(row + 1)
  bool has_offsets() const { return static_cast<bool>(w_->scales.offsets); }
  int64_t to_offset() const { return to_offset_; }

  // Whether the groups that begin at multiples of kGroup coincide with the packed format.
  bool aligned() const { return aligned(*w_); }
  static bool aligned(const Weight& w) { return has_one_scale_per(kGroup, w) && !is_wide(w.code); }
  // Whether pieces are decoded during multiplications. With offsets they are not, which would nearly double what is
  // compiled.
  static bool interleaves(const Weight& w) { return kSpareRegisters && aligned(w) && !w.scales.offsets; }
  // The packed bytes and the block of such a group, which begins at (row, column).
  const uint8_t* packed(int64_t row, int64_t column) const { return w_->packed + (flat(row, column) >> 1); }
  template <bool kHasOffsets>
  auto block_of(int64_t row, int64_t column) const {
    return block_at<kHasOffsets>(scale_at(row, column), to_offset_);
  }
  // The scale of the block of (row, column), which those of the row's next blocks follow.
  const float* scale_at(int64_t row, int64_t column) const { return scales(row) + block(row, column); }

 private:
  static int64_t run_room(const Weight& w, int64_t rows) {
    return ceil_div(rows * w.k, w.scales.block_size) + 2 + kLanes;
  }
  int64_t block(int64_t row, int64_t column) const { return flat(row, column) >> shift_; }

  const Weight* w_ = nullptr;
  int shift_ = 0;
  int64_t row_scales_ = 0, to_offset_ = 0;
  float* scales_ = nullptr;
  WideReader<kLanes> wide_;
};

inline WeightLinePrefetcher prefetch_piece(const Weight& w, const Piece& piece) {
  const auto units = [&](int64_t weights) { return weights * w.bits() / 4; };  // it counts in weights of 4 bits
  return {w.packed, units(piece.row * w.k + piece.column), piece.rows, units(w.k), units(piece.columns)};
}

// Decodes any group of 4-bit codes of a weight.
template <bool kHasOffsets>
class RaggedDecoder {
 public:
  explicit RaggedDecoder(const ScaledPiece& source) : source_(source), values_(values_of(source.table())) {}

  void operator()(int64_t row, int64_t column, int64_t count, F (&v)[4]) const {
    const Weight& w = source_.weight();
    const int64_t begin = source_.flat(row, column);
    const Codes codes = load_codes(w.packed + (begin >> 1), begin & 1, packed_bytes(w.n * w.k) - (begin >> 1));
    const float* scale = source_.scale_at(row, column);
    const int block = static_cast<int>(w.scales.block_size);
    int first = block - static_cast<int>(begin & (block - 1));  // of the next block
    const auto table_at = [&](const float* at) {
      return decoded_table(values_, block_at<kHasOffsets>(at, source_.to_offset()));
    };
    const auto table = table_at(scale), next = table_at(scale + 1);
    unroll<4>([&](auto j) {
      v[j.value] = joined<j.value>(first, lookup<j.value>(table, codes), lookup<j.value>(next, codes));
    });
    while ((first += block) < kGroup) {
      const auto another = table_at(++scale + 1);
      unroll<4>([&](auto j) { v[j.value] = joined<j.value>(first, v[j.value], lookup<j.value>(another, codes)); });
    }
    if (count >= kGroup) return;
    unroll<4>([&](auto j) { v[j.value] = joined<j.value>(static_cast<int>(count), v[j.value], zero()); });
  }

 private:
  const ScaledPiece& source_;
  const Table values_;
};

// Calls use(decode) for any weight, aligned or not. decode(row, column, count, v) decodes `count` elements of the group
// at that row and column of the weight, and zeros for the rest: lane i of vector j is element 4i + j.
template <class Use>
void with_group_decoder(const ScaledPiece& source, const Use& use) {
  if (!is_wide(source.weight().code)) {
    if (source.has_offsets()) return use(RaggedDecoder<true>(source));
    return use(RaggedDecoder<false>(source));
  }
  const WideReader<kLanes> reader = source.wide();
  with_wide(wide_code(source.weight().code), [&]<int kBits, WideCode::Kind kind>() {
    use([&](int64_t row, int64_t column, int64_t count, F(&v)[4]) QLORA_INLINE_LAMBDA {
      typename WideReader<kLanes>::Floats read[4];
      const float* const scale = source.scale_at(row, column);
      reader.template decode<kBits, kind>(source.flat(row, column), scale, source.to_offset(), read);
      if (count < kGroup) {
        for (auto& x : read) WideReader<kLanes>::keep_first(count, x);
      }
      static_assert(sizeof v == sizeof read);
      __builtin_memcpy(v, read, sizeof v);
    });
  });
}

// What a piece is decoded into, in decoded order and with its columns rounded up to whole groups. The rows of a
// broadcast panel are the piece's rows, and its depth the columns. The lanes of a lanes panel are the piece's columns,
// and its depth the rows.
enum class Becomes { kBroadcast, kLanes };

template <class W, bool kHasOffsets>
void decode_aligned_broadcast(const ScaledPiece& source, const Piece& piece, typename W::Word* panel) {
  const typename W::Values values = W::values_of(source.table());
  for (int64_t row = piece.row; row < piece.row + piece.rows; ++row, panel += kDepth) {
    for (int64_t c = 0; c < piece.columns; c += kGroup) {
      W::decode_row(values, source.packed(row, piece.column + c), source.block_of<kHasOffsets>(row, piece.column + c),
                    panel + c / W::kElements);
    }
  }
}

template <class W>
void decode_broadcast(const ScaledPiece& source, const Piece& piece, typename W::Word* panel) {
  if (source.aligned()) {
    const auto decode = source.has_offsets() ? decode_aligned_broadcast<W, true> : decode_aligned_broadcast<W, false>;
    return decode(source, piece, panel);
  }
  with_group_decoder(source, [&](const auto& decode) {
    for (int64_t row = piece.row; row < piece.row + piece.rows; ++row, panel += kDepth) {
      for (int64_t c = 0; c < piece.columns; c += kGroup) {
        F v[4];
        decode(row, piece.column + c, piece.columns - c, v);
        W::store_decoded_row(v, panel + c / W::kElements);
      }
    }
  });
}

// Decodes the rows that fill words.
template <class W, bool kHasOffsets>
void decode_aligned_lanes(const ScaledPiece& source, const Piece& piece, typename W::Word* panel) {
  const typename W::Values values = W::values_of(source.table());
  const int64_t depth = ceil_div(piece.rows, W::kElements);
  for (int64_t d = 0; d < piece.rows / W::kElements; ++d, panel += kTileLanes) {
    const int64_t row = piece.row + d * W::kElements, next = row + W::kElements - 1;
    for (int64_t c = 0; c < piece.columns; c += kGroup) {
      const int64_t column = piece.column + c;
      typename W::Vector words[4];
      W::decode_lanes(values, source.packed(row, column), source.packed(next, column),
                      source.block_of<kHasOffsets>(row, column), source.block_of<kHasOffsets>(next, column), words);
      store_whole_group<W>(panel + c * depth, kTileLanes * depth, words);
    }
  }
}

template <class W>
void decode_lanes(const ScaledPiece& source, const Piece& piece, typename W::Word* panel) {
  const int64_t depth = ceil_div(piece.rows, W::kElements);
  int64_t d = 0;
  if (source.aligned()) {
    const auto decode = source.has_offsets() ? decode_aligned_lanes<W, true> : decode_aligned_lanes<W, false>;
    decode(source, piece, panel);
    d = piece.rows / W::kElements;
    if (d == depth) return;
  }
  with_group_decoder(source, [&](const auto& decode) {
    for (; d < depth; ++d) {
      const int64_t row = piece.row + d * W::kElements, next = row + W::kElements - 1;
      for (int64_t c = 0; c < piece.columns; c += kGroup) {
        typename W::Vector words[4];
        if constexpr (W::kElements == 1) {
          decode(row, piece.column + c, piece.columns - c, words);
        } else {
          F v[4], below[4] = {zero(), zero(), zero(), zero()};
          decode(row, piece.column + c, piece.columns - c, v);
          if (next < piece.row + piece.rows) decode(next, piece.column + c, piece.columns - c, below);
          unroll<4>([&](auto j) { words[j.value] = W::round_pair(v[j.value], below[j.value]); });
        }
        store_whole_group<W>(panel + c * depth + d * kTileLanes, kTileLanes * depth, words);
      }
    }
  });
}

// Decodes an aligned piece group by group, interleaved with a multiplication (multiply-inl.h), and prefetches the
// packed bytes of the piece `after` it. A group of lanes takes several stores, which would stall the multiplication if
// every step had them. So only one in `steps_between` steps, a power of two, decodes a group. The object is aligned to
// cache lines, because every step reads most of it.
template <class W, Becomes becomes>
class alignas(64) GroupDecoder {
 public:
  using Word = typename W::Word;
  static constexpr int kRowsPerStep = becomes == Becomes::kLanes ? W::kElements : 1;

  GroupDecoder(const ScaledPiece& source, const Piece& piece, const Piece& after, Word* panel, int64_t steps_between)
      : values_(W::values_of(source.table())),
        packed_(source.weight().packed),
        flat_(source.flat(piece.row, piece.column)),
        k_(source.weight().k),
        distance_((source.flat(after.row, after.column) - flat_) / 2),
        scales_(source.scales(piece.row)),
        row_scales_(source.row_scales()),
        out_(panel),
        steps_(piece.rows / kRowsPerStep),
        left_(steps_),
        columns_(piece.columns),
        shift_(source.shift()),
        mask_(static_cast<int>(steps_between) - 1) {}

  using Constants = typename W::Values;
  Constants constants() const { return values_; }
  void step(const Constants& values) {
    if (left_ == 0) return;
    if constexpr (becomes == Becomes::kLanes) {
      if (++turn_ & mask_) return;
    }
    const uint8_t* const packed = packed_ + (flat_ >> 1);
    __builtin_prefetch(packed + distance_, 0, 2);
    const float scale = scales_[flat_ >> shift_];
    if constexpr (becomes == Becomes::kBroadcast) {
      W::decode_row(values, packed, scale, out_);
    } else {
      const uint8_t* const next = packed + (k_ >> 1) * (kRowsPerStep - 1);
      const float next_scale =
          scales_[row_scales_ * (kRowsPerStep - 1) + ((flat_ + k_ * (kRowsPerStep - 1)) >> shift_)];
      if (kRowsPerStep > 1) __builtin_prefetch(next + distance_, 0, 2);
      typename W::Vector words[4];
      W::decode_lanes(values, packed, next, scale, next_scale, words);
      store_whole_group<W>(out_, kTileLanes * steps_, words);
    }
    flat_ += k_ * kRowsPerStep, scales_ += row_scales_ * kRowsPerStep, out_ += kOutStep;
    if (--left_ > 0 || (columns_ -= kGroup) <= 0) return;
    flat_ += kGroup - steps_ * kRowsPerStep * k_;
    scales_ -= steps_ * kRowsPerStep * row_scales_;
    out_ += (becomes == Becomes::kBroadcast ? kGroup / W::kElements : kGroup * steps_) - steps_ * kOutStep;
    left_ = steps_;
  }
  void finish() {
    mask_ = 0;
    while (left_ > 0) step(values_);
  }

 private:
  static constexpr int64_t kOutStep = becomes == Becomes::kBroadcast ? kDepth : kTileLanes;

  const typename W::Values values_;
  const uint8_t* packed_;
  int64_t flat_, k_, distance_;
  const float* scales_;
  int64_t row_scales_;
  Word* out_;
  int64_t steps_, left_, columns_;  // steps down the columns of a group, and columns left
  int shift_, mask_, turn_ = 0;
};

// Decodes all pieces and calls multiply(piece, panel, interleaved) for each.
//
// If steps_between is 0, the multiplication of a piece prefetches the bytes of the next one, which is decoded
// afterwards. Otherwise it also decodes the next piece, into the other of two panels, and prefetches the one after
// that. Scales are decoded one strip at a time.
//
// The pages of strips of whole rows, which become a broadcast panel, are prefetched in bursts at least two strips ahead
// (shared/prefetch-inl.h). For strips of a few columns in many rows, which become lanes, this gains nothing.
template <class W, Becomes becomes, class Multiply>
void multiply_pieces(const Weight& w, const Pieces& pieces, typename W::Word* panel, typename W::Word* other_panel,
                     float* scales, float* other_scales, int64_t steps_between, const Multiply& multiply) {
  using Decoder = GroupDecoder<W, becomes>;
  const auto decode = [](const ScaledPiece& source, const Piece& piece, typename W::Word* to) {
    if constexpr (becomes == Becomes::kBroadcast) {
      decode_broadcast<W>(source, piece, to);
    } else {
      decode_lanes<W>(source, piece, to);
    }
  };
  Piece piece = pieces.first();
  if (piece.rows == 0) return;
  const Piece& area = pieces.area;
  RowPagePrefetcher pages(w, area.column, area.columns);
  pages.go_to(area.row, area.row + area.rows);
  const auto prefetch_pages = [&](int64_t row) {
    if constexpr (becomes == Becomes::kBroadcast) pages.reach(row + 3 * pieces.rows);
  };
  prefetch_pages(piece.row);
  ScaledPiece source(w, pieces.strip(piece.row), scales);
  decode(source, piece, panel);
  while (piece.rows > 0) {
    const Piece next = pieces.after(piece);
    if (next.rows > 0 && pieces.begins_strip(next)) {
      prefetch_pages(next.row);
      swap(scales, other_scales);
      source = ScaledPiece(w, pieces.strip(next.row), scales);
    }
    if (kSpareRegisters && steps_between && next.rows % Decoder::kRowsPerStep == 0) {
      Decoder decoder(source, next, pieces.after(next), other_panel, steps_between);
      multiply(piece, panel, decoder);
      decoder.finish();
    } else {
      WeightLinePrefetcher prefetch = prefetch_piece(w, next);
      multiply(piece, panel, prefetch);
      decode(source, next, other_panel);
    }
    swap(panel, other_panel);
    piece = next;
  }
}

}  // namespace many_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
