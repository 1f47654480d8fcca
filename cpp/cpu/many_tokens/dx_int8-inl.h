// many_tokens_int8: dX with dy · scale rounded to int8 (cpp/cpu/shared/int8_segment-inl.h).
//
// A task is that of dx-inl.h. A scale belongs to one row and a group of columns, so it cannot multiply a sum over rows,
// but it can multiply dy: for each group of columns, dy · scale is rounded anew. Segments are of 64 rows. Offsets
// multiply dy itself in float32, one product for a whole block.
#pragma once

#include <cstdint>

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/isa/bytes.h"
#include "cpp/cpu/isa/panel.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/many_tokens/dx-inl.h"
#include "cpp/cpu/many_tokens/dx_integers-inl.h"
#include "cpp/cpu/many_tokens/low_rank-inl.h"
#include "cpp/cpu/many_tokens/multiply_int8-inl.h"
#include "cpp/cpu/many_tokens/tasks-inl.h"
#include "cpp/cpu/many_tokens/weight-inl.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/int8_segment-inl.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/prefetch-inl.h"
#include "cpp/cpu/shared/scratch.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace many_tokens {

using namespace panel;

// dx of tokens [token, token + tokens) and columns [column, column + columns).
template <class B, class W, class T>
class DxInt8Task : DxTask<W, T> {
 public:
  using Base = DxTask<W, T>;

  DxInt8Task(const LinearDxProblem& p, const CenteredCodes<Int8CodeTable>& codes, const T* g, int64_t first_token,
             int64_t token, int64_t tokens, int64_t column, int64_t columns)
      : Base(p, g, first_token, token, tokens, column, columns),
        codes_(codes),
        group_(p.w.scales.block_size < kInt8Segment ? kLeastIntBlock : kInt8Segment),
        values_(B::values_of(codes.table, 0)),
        dy_(reinterpret_cast<float*>(this->broadcast_)),
        offset_sums_(p.w, group_, column, columns, tokens) {}

  void operator()() {
    this->begin();
    if (halves_ && this->p_.lora.rank) exchange_halves(this->sums_, this->tokens_, this->columns_, true);
    add_weight();
    if (this->p_.w.scales.offsets) {
      for (int64_t t = 0; t < this->tokens_; ++t)
        offset_sums_.add_to(t, this->sums_ + t * kTileLanes, this->columns_, this->tokens_ * kTileLanes);
    }
    if (halves_) exchange_halves(this->sums_, this->tokens_, this->columns_, false);
    this->finish();
  }

 private:
  static constexpr int64_t kSliceRows = 4 * DxInt8Panels::kDepth;
  static constexpr int64_t kRoundedTokens = 48;  // so that they stay in the cache, and whole tiles of all sets

  void add_weight() {
    const typename Int8Unit<B>::Session session(kSegmentWords);
    const LinearDxProblem& p = this->p_;
    const Cut slices = cut(p.w.n, min(kSliceRows, 2 * this->shape_.piece_depth), kInt8Segment);
    const Pieces pieces{{0, p.w.n, this->column_, this->columns_}, slices.size, kIntColumns};
    ScaledPiece source;
    for (Piece piece = pieces.first(); piece.rows > 0; piece = pieces.after(piece)) {
      if (pieces.begins_strip(piece)) {
        source = ScaledPiece(p.w, pieces.strip(piece.row), this->scales_);
        load_slice(piece.row, piece.rows);
        if (p.w.scales.offsets) {
          offset_sums_.add(source, piece.row, piece.rows, codes_.center,
                           [&](int64_t t) { return static_cast<const T*>(p.dy) + this->place(t) * p.w.n; });
        }
      }
      const int segments = static_cast<int>(ceil_div(piece.rows, kInt8Segment));
      decode(source, piece, segments);
      WeightLinePrefetcher prefetcher = prefetch_piece(p.w, pieces.after(piece));
      for (int64_t c = 0; c < kIntColumns; c += group_)
        load_scales(source, piece, segments, piece.column + c, c / group_);
      float* const sums = this->sums_ + (piece.column - this->column_) * this->tokens_;
      for (int64_t t = 0; t < this->tokens_; t += kRoundedTokens) {
        const int64_t some = min(this->tokens_ - t, kRoundedTokens);
        DxInt8Panels in{rounded_, words_, units_, starts_, kRoundedTokens, kIntColumns, segments};
        for (int64_t l = 0; l < kIntColumns; l += kTileLanes) {
          if (l % group_ == 0) round_slice(t, some, segments, l / group_);
          in.lanes = words_ + l * segments * kSegmentWords, in.starts = starts_ + l;
          multiply_int8<DxInt8Tile<B>, 2>(in, some, sums + l * this->tokens_ + t * kTileLanes,
                                          piece.row == 0 && p.lora.rank == 0, prefetcher);
        }
      }
    }
  }

  float* slice(int64_t segment, int64_t token) const { return dy_ + (segment * this->tokens_ + token) * kInt8Segment; }

  // Rows [row, row + rows) of dy as floats, and zeros after them up to a whole segment.
  void load_slice(int64_t row, int64_t rows) {
    const int64_t padded = round_up(rows, kInt8Segment);
    for (int64_t t = 0; t < this->tokens_; ++t) {
      const T* const dy = static_cast<const T*>(this->p_.dy) + this->place(t) * this->p_.w.n + row;
      for (int64_t r = 0; r < padded; r += kLanes)
        store(slice(r / kInt8Segment, t) + r % kInt8Segment, load_some(dy + r, rows - r));
    }
  }

  // The scales of the piece's rows in the group of columns that begins at `column`, and zeros after them.
  void load_scales(const ScaledPiece& source, const Piece& piece, int segments, int64_t column, int64_t group) {
    float* const scales = piece_scales_[group];
    for (int64_t r = 0; r < piece.rows; ++r) scales[r] = *source.scale_at(piece.row + r, column);
    for (int64_t r = piece.rows; r < segments * kInt8Segment; ++r) scales[r] = 0.0f;
  }

  // Rounds the slice of some tokens times the scales of a group.
  void round_slice(int64_t token, int64_t tokens, int segments, int64_t group) {
    constexpr int kVectors = kInt8Segment / kLanes;
    const float one = static_cast<float>(1.0 / codes_.table.per_one);
    for (int s = 0; s < segments; ++s) {
      F scales[kVectors];
      unroll<kVectors>(
          [&](auto i) { scales[i.value] = load(piece_scales_[group] + s * kInt8Segment + i.value * kLanes); });
      B::round_rows(slice(s, token), kInt8Segment, scales, tokens, rounded_ + s * kSegmentWords, DxInt8Panels::kDepth,
                    units_ + s * kRoundedTokens);
      for (int64_t t = 0; t < tokens; ++t) units_[s * kRoundedTokens + t] *= one;
    }
  }

  void decode(const ScaledPiece& source, const Piece& piece, int segments) {
    const int64_t depth = int64_t{segments} * kSegmentWords, last = piece.row + piece.rows - 1;
    int32_t* out = words_;
    for (int64_t row = piece.row; row < piece.row + 4 * depth; row += 4, out += kTileLanes) {
      const uint8_t* packed[4];  // rows beyond the last one meet zeros
      for (int i = 0; i < 4; ++i) packed[i] = source.packed(min(row + i, last), piece.column);
      B::decode_lanes(values_, packed, halves_, out, kTileLanes * depth);
    }
    for (int64_t l = 0; l < kIntColumns; l += kLanes) {
      const int32_t* lane = words_ + l / kTileLanes * kTileLanes * depth + l % kTileLanes;
      for (int s = 0; s < segments; ++s) {
        auto sum = B::splat_sum(0);
        for (int d = 0; d < kSegmentWords; ++d, lane += kTileLanes) sum = B::add_bytes(B::load(lane), sum);
        int32_t* const start = starts_ + s * kIntColumns + l;
        B::store_sum(start, sum);
        for (int i = 0; i < kLanes; ++i) start[i] *= -B::kAddedToDy;
      }
    }
  }

  const CenteredCodes<Int8CodeTable>& codes_;
  const int64_t group_;  // columns that share a row's scale
  const bool halves_ = group_ < kGroup;
  const typename B::Values values_;
  float* const dy_;  // a slice [segment][token][kInt8Segment]
  alignas(64) int32_t words_[kIntColumns * DxInt8Panels::kDepth];
  alignas(64) int32_t starts_[DxInt8Panels::kMostSegments * kIntColumns];
  alignas(64) float piece_scales_[kIntColumns / kLeastIntBlock][kSliceRows];
  // The slice of some tokens times the scales of a group.
  alignas(64) int32_t rounded_[kRoundedTokens * DxInt8Panels::kDepth];
  alignas(64) float units_[kRoundedTokens * DxInt8Panels::kMostSegments];
  OffsetSums<T> offset_sums_;
};

template <class B, class W, class T>
void dx_int8_as(const Pool& pool, const LinearDxProblem& p) {
  const CenteredCodes<Int8CodeTable> codes(int8_codes(p.w.code), p.w);
  for_tokens_with_g<W, T>(pool, p, [&](const T* g, int64_t first, int64_t tokens) {
    run_dx_tasks(pool, p, kIntColumns, tokens, [&](int64_t token, int64_t of_task, int64_t column, int64_t columns) {
      DxInt8Task<B, W, T>(p, codes, g, first, first + token, of_task, column, columns)();
    });
  });
}

}  // namespace many_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
