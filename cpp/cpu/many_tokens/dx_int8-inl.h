// many_tokens_int8: dX with dy · scale rounded to int8 (cpp/cpu/shared/int8_segment-inl.h).
//
// A task is that of dx-inl.h. A scale belongs to one row and a group of columns, so it cannot multiply a sum over rows,
// but it can multiply dy: for each group of columns, dy · scale is rounded anew, as a product of fractions
// (int8_segment-inl.h). Segments are of 64 rows. Offsets multiply dy itself in float32, one product for a whole block.
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
class DxInt8Task : DxIntegersTask<W, T> {
 public:
  using Base = DxIntegersTask<W, T>;

  DxInt8Task(const LinearDxProblem& p, const CenteredCodes<Int8CodeTable>& codes, const T* g, int64_t first_token,
             int64_t token, int64_t tokens, int64_t column, int64_t columns)
      : Base(p, g, first_token, token, tokens, column, columns,
             p.w.scales.block_size < kInt8Segment ? kLeastIntBlock : kInt8Segment),
        codes_(codes),
        values_(B::values_of(codes.table, 0)),
        dy_(reinterpret_cast<int16_t*>(this->broadcast_)) {}

  void operator()() {
    this->run([this] { add_weight(); });
  }

 private:
  static constexpr int64_t kSliceRows = 4 * DxInt8Panels::kDepth;
  static constexpr int64_t kRoundedTokens = 48;  // so that they stay in the cache, and whole tiles of all sets
  static constexpr int kVectors = kInt8Segment / kLanes;

  void add_weight() {
    const typename Int8Unit<B>::Session session(kSegmentWords);
    const LinearDxProblem& p = this->p_;
    const Cut slices = cut(p.w.n, min(kSliceRows, 2 * this->shape_.piece_depth), kInt8Segment);
    const Pieces pieces{{0, p.w.n, this->column_, this->columns_}, slices.size, kIntColumns};
    const int64_t group = this->group_;
    ScaledPiece source;
    for (Piece piece = pieces.first(); piece.rows > 0; piece = pieces.after(piece)) {
      const int segments = static_cast<int>(ceil_div(piece.rows, kInt8Segment));
      if (pieces.begins_strip(piece)) {
        source = ScaledPiece(p.w, pieces.strip(piece.row), this->scales_);
        round_slice(piece, segments);
        this->add_offsets(source, piece, codes_.center);
      }
      decode(source, piece, segments);
      WeightLinePrefetcher prefetcher = prefetch_piece(p.w, pieces.after(piece));
      for (int64_t c = 0; c < kIntColumns; c += group)
        scales_of_[c / group].load(source, piece, segments, piece.column + c);
      float* const sums = this->sums_ + (piece.column - this->column_) * this->tokens_;
      for (int64_t t = 0; t < this->tokens_; t += kRoundedTokens) {
        const int64_t some = min(this->tokens_ - t, kRoundedTokens);
        DxInt8Panels in{rounded_, words_, units_, starts_, kRoundedTokens, kIntColumns, segments};
        for (int64_t l = 0; l < kIntColumns; l += kTileLanes) {
          if (l % group == 0) scale_slice(piece, segments, t, some, scales_of_[l / group]);
          in.lanes = words_ + l * segments * kSegmentWords, in.starts = starts_ + l;
          multiply_int8<DxInt8Tile<B>, 2>(in, some, sums + l * this->tokens_ + t * kTileLanes,
                                          piece.row == 0 && p.lora.rank == 0, prefetcher);
        }
      }
    }
  }

  // The scales of a piece's rows in a group of columns, and zeros after them.
  struct Scales {
    alignas(64) float value[kSliceRows];
    alignas(64) int16_t fraction[kSliceRows];
    float largest[DxInt8Panels::kMostSegments];

    void load(const ScaledPiece& source, const Piece& piece, int segments, int64_t column) {
      for (int64_t r = 0; r < piece.rows; ++r) value[r] = *source.scale_at(piece.row + r, column);
      for (int64_t r = piece.rows; r < segments * kInt8Segment; ++r) value[r] = 0.0f;
      for (int s = 0; s < segments; ++s) {
        F v[kVectors];
        unroll<kVectors>([&](auto i) { v[i.value] = panel::load(value + s * kInt8Segment + i.value * kLanes); });
        largest[s] = B::round_to_fractions(v, fraction + s * kInt8Segment);
      }
    }
  };

  int64_t in_slice(int64_t segment, int64_t token) const { return segment * this->tokens_ + token; }

  // Rounds dy of the piece's rows to fractions of each segment.
  void round_slice(const Piece& piece, int segments) {
    for (int64_t t = 0; t < this->tokens_; ++t) {
      const T* const ahead = this->dy(min(t + 3, this->tokens_ - 1)) + piece.row;
      for (int64_t r = 0; r < piece.rows; r += 64 / sizeof(T)) __builtin_prefetch(ahead + r);
      for (int s = 0; s < segments; ++s) {
        F v[kVectors];
        load_dy(piece, s, t, v);
        largest_[in_slice(s, t)] = B::round_to_fractions(v, dy_ + in_slice(s, t) * kInt8Segment);
      }
    }
  }
  void load_dy(const Piece& piece, int segment, int64_t token, F (&v)[kVectors]) const {
    const int64_t first = int64_t{segment} * kInt8Segment, rows = piece.rows - first;
    const T* const dy = this->dy(token) + piece.row + first;
    unroll<kVectors>([&](auto i) {
      const int64_t at = i.value * kLanes;
      v[i.value] = rows >= kInt8Segment ? load(dy + at) : load_some(dy + at, rows - at);
    });
  }

  // Rounds the slice of some tokens times the scales of a group.
  void scale_slice(const Piece& piece, int segments, int64_t token, int64_t tokens, const Scales& scales) {
    const float one = static_cast<float>(1.0 / codes_.table.per_one);
    for (int s = 0; s < segments; ++s) {
      int32_t* const out = rounded_ + s * kSegmentWords * B::kRows;
      float factors[kRoundedTokens], *const units = units_ + s * kRoundedTokens;
      B::round_products(dy_ + in_slice(s, token) * kInt8Segment, scales.fraction + s * kInt8Segment, tokens, out,
                        DxInt8Panels::kDepth, factors);
      const float* const largest = largest_ + in_slice(s, token);
      const float unit = scales.largest[s] * kUnitOfFractions;
      int without_factor = 0;
      for (int64_t t = 0; t < tokens; ++t) {
        units[t] = largest[t] * unit / factors[t] * one;
        without_factor += factors[t] == 0.0f;
      }
      if (without_factor == 0) [[likely]]
        continue;
      for (int64_t t = 0; t < tokens; ++t) {
        if (factors[t] > 0.0f) continue;
        F v[kVectors];
        load_dy(piece, s, token + t, v);
        unroll<kVectors>([&](auto i) {
          v[i.value] = mul(v[i.value], panel::load(scales.value + s * kInt8Segment + i.value * kLanes));
        });
        alignas(64) int32_t words[kSegmentWords];
        units[t] = B::template round<Int8Order::kMemory>(v, words) * one;
        spread<B::kRows>(words, out + in_broadcast<B::kRows>(t, 0, DxInt8Panels::kDepth), B::kRows * B::kRows);
      }
    }
  }

  void decode(const ScaledPiece& source, const Piece& piece, int segments) {
    const int64_t depth = int64_t{segments} * kSegmentWords, last = piece.row + piece.rows - 1;
    int32_t* out = words_;
    constexpr int kRows = 4 * B::kRows;
    for (int64_t row = piece.row; row < piece.row + 4 * depth; row += kRows, out += kTileLanes * B::kRows) {
      const uint8_t* packed[kRows];  // rows beyond the last one meet zeros
      for (int i = 0; i < kRows; ++i) packed[i] = source.packed(min(row + i, last), piece.column);
      B::decode_lanes(values_, packed, this->halves_, out, kTileLanes * depth);
    }
    if constexpr (B::kAddedToDy == 0) return;  // sums start from zeros
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
  const typename B::Values values_;
  // A slice of dy [segment][token][kInt8Segment] as fractions, and the largest of each segment.
  int16_t* const dy_;
  alignas(64) float largest_[DxInt8Panels::kMostSegments * kMostTokens];
  alignas(64) int32_t words_[kIntColumns * DxInt8Panels::kDepth];
  alignas(64) int32_t starts_[DxInt8Panels::kMostSegments * kIntColumns];
  Scales scales_of_[kIntColumns / kLeastIntBlock];
  // The slice of some tokens times the scales of a group.
  alignas(64) int32_t rounded_[kRoundedTokens * DxInt8Panels::kDepth];
  alignas(64) float units_[kRoundedTokens * DxInt8Panels::kMostSegments];
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
