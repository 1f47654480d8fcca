// many_tokens_int8: the forward with x rounded to int8 (cpp/cpu/shared/int8_segment-inl.h).
//
// x is rounded once per call, into the lanes panel that all tasks read. A task is that of forward-inl.h, with W decoded
// to int8. The low-rank product and the bias stay what they are there, and the low-rank product gets x itself.
#pragma once

#include <cstdint>

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/isa/bytes.h"
#include "cpp/cpu/isa/panel.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/many_tokens/forward-inl.h"
#include "cpp/cpu/many_tokens/low_rank-inl.h"
#include "cpp/cpu/many_tokens/multiply_int8-inl.h"
#include "cpp/cpu/many_tokens/tasks-inl.h"
#include "cpp/cpu/many_tokens/weight-inl.h"
#include "cpp/cpu/shared/carver-inl.h"
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

// x rounded to int8, as a lanes panel [tile][k / 4][width] and what belongs to its lanes.
struct Int8Tokens {
  const int64_t stride;  // lanes from a block of W, or a segment if blocks are larger, to the next one
  int32_t* words = nullptr;
  float* units = nullptr;     // [block][stride]
  int32_t* starts = nullptr;  // [block][stride], what sums start from
  float* sums = nullptr;      // [block][stride], the sum of a block's x, for weights with offsets

  explicit Int8Tokens(int64_t tokens) : stride(round_up(tokens, kTileLanes)) {}
  void take(Carver* memory, const LinearProblem& p) {
    const int64_t segments = p.w.k / kInt8Segment, blocks = segments * blocks_per_segment(p.w);
    words = memory->take<int32_t>(stride * (p.w.k / 4));
    units = memory->take<float>(stride * blocks);
    starts = memory->take<int32_t>(stride * blocks);
    sums = memory->take<float>(p.w.scales.offsets ? stride * blocks : 0);
  }
};

// Rounds the 64 values of a segment for each of up to kLanes tokens of x, from `first` of `tokens` on.
template <class B, class T>
void round_tokens(const LinearProblem& p, const T* x, int64_t tokens, int64_t first, int64_t segment, int added,
                  const Int8Tokens& out) {
  constexpr int kVectors = kInt8Segment / kLanes;
  const int64_t depth = p.w.k / 4, tile = first & -kTileLanes, width = tile_width(tokens - tile);
  const int blocks = blocks_per_segment(p.w), words = kSegmentWords / blocks;
  alignas(64) int32_t rows[kLanes][kSegmentWords];
  for (int64_t i = 0; i < kLanes; ++i) {
    const bool is_token = first + i < tokens;  // lanes without a token hold zeros
    const T* const at = x + (first + i) * p.w.k + segment * kInt8Segment;
    F v[kVectors];
    unroll<kVectors>([&](auto j) { v[j.value] = is_token ? load(at + j.value * kLanes) : zero(); });
    const float unit = B::template round<Int8Order::kDecoded>(v, rows[i]);
    for (int b = 0; b < blocks; ++b)
      out.units[(segment * blocks + b) * out.stride + first + i] = unit_of_block(unit, rows[i] + b * words, words);
  }
  int32_t* const to = out.words + tile * depth + segment * kSegmentWords * width + (first - tile) * B::kRows;
  if constexpr (B::kRows == 1) {
    unroll<kSegmentWords / kLanes>([&](auto square) {
      F v[kLanes];
      unroll<kLanes>([&](auto i) { v[i.value] = B::as_floats(B::load(rows[i.value] + square.value * kLanes)); });
      transpose(v);
      unroll<kLanes>([&](auto i) { B::store_bits(to + (square.value * kLanes + i.value) * width, v[i.value]); });
    });
  } else {
    for (int i = 0; i < kLanes; ++i) spread<B::kRows>(rows[i], to + i * B::kRows, width * B::kRows);
  }
  for (int b = 0; b < blocks; ++b) {
    auto sum = B::splat_sum(0);
    for (int d = b * words; d < (b + 1) * words; d += B::kRows) sum = B::add_bytes(B::load(to + d * width), sum);
    const int64_t at = (segment * blocks + b) * out.stride + first;
    B::store_sum(out.starts + at, sum);
    if (p.w.scales.offsets) store(out.sums + at, B::to_floats(sum));
    for (int64_t i = 0; i < kLanes; ++i) out.starts[at + i] *= -added;
  }
}

// y of tokens [token, token + tokens), counted from first_token, and weight rows [row, row + rows).
template <class B, class W, class T>
class ForwardInt8Task : ForwardTask<W, T> {
 public:
  using Base = ForwardTask<W, T>;

  ForwardInt8Task(const LinearProblem& p, const Int8Tokens& x, const T* h, int64_t first_token, int64_t token,
                  int64_t tokens, int64_t row, int64_t rows)
      : Base(p, h, first_token, first_token + token, tokens, row, rows),
        x_(x),
        token_in_x_(token),
        codes_(int8_codes(p.w.code)),
        values_(B::values_of(codes_, B::added_to(codes_))),
        blocks_(blocks_per_segment(p.w)),
        panel_(reinterpret_cast<int32_t*>(this->strip_)) {}

  void operator()() {
    add_weight();
    this->finish();
  }

 private:
  using Unit = Int8Unit<B>;
  using Panels = ForwardInt8Panels<B>;
  static constexpr int64_t kStripRows = Unit::kPanelBytes / (4 * Panels::kDepth) / Unit::kHeight * Unit::kHeight;
  // scales_ has room for those of two strips of the exact kernels.
  static_assert(Unit::kPanelBytes <= 4 * StripShape::kPanelWords && kStripRows <= 2 * StripShape::kMostRows);

  void add_weight() {
    const typename Unit::Session session(kSegmentWords / blocks_);
    // Columns at once: so many that the task's part of x stays in the second-level cache.
    const int64_t most_columns = 4 * kMostLaneWords / round_up(this->tokens_, kTileLanes);
    const int64_t columns = max(most_columns / piece_columns_, 1) * piece_columns_;
    for (int64_t c = 0; c < this->p_.w.k; c += columns) add_columns(c, min(columns, this->p_.w.k - c));
  }
  void add_columns(int64_t column, int64_t columns) {
    const Weight& w = this->p_.w;
    const Pieces pieces{{this->row_, this->rows_, column, columns}, strips_.size, piece_columns_};
    const auto multiply = multiply_of_blocks();
    RowPagePrefetcher pages(w, column, columns);
    pages.go_to(this->row_, this->row_ + this->rows_);
    ScaledPiece source;
    for (Piece piece = pieces.first(); piece.rows > 0; piece = pieces.after(piece)) {
      if (pieces.begins_strip(piece)) {
        pages.reach(piece.row + 3 * pieces.rows);
        source = ScaledPiece(w, pieces.strip(piece.row), this->scales_);
      }
      decode(source, piece);
      WeightLinePrefetcher prefetcher = prefetch_piece(w, pieces.after(piece));
      const int64_t segment = piece.column / kInt8Segment;
      Panels in{};
      in.broadcast = panel_, in.scales = piece_scales_, in.offsets = w.scales.offsets ? piece_offsets_ : nullptr;
      in.stride = x_.stride, in.words = kSegmentWords / blocks_,
      in.blocks = static_cast<int>(piece.columns / kInt8Segment) * blocks_;
      for (int64_t l = 0; l < this->tokens_; l += kTileLanes) {
        const int64_t width = tile_width(this->tokens_ - l), lane = token_in_x_ + l;
        in.lanes = x_.words + lane * (w.k / 4) + piece.column / 4 * width;
        in.units = x_.units + segment * blocks_ * x_.stride + lane;
        in.starts = x_.starts + segment * blocks_ * x_.stride + lane;
        in.x_sums = x_.sums + segment * blocks_ * x_.stride + lane;
        float* const sums = this->sums_ + l * this->rows_ + (piece.row - this->row_) * width;
        multiply(in, width, piece.rows, sums, piece.column == 0, prefetcher);
      }
    }
  }
  auto multiply_of_blocks() const {
    if constexpr (Unit::kUnrollsBlocks) {
      return blocks_ == 1   ? &ForwardInt8Task::multiply<kSegmentWords>
             : blocks_ == 2 ? &ForwardInt8Task::multiply<kSegmentWords / 2>
                            : &ForwardInt8Task::multiply<kSegmentWords / 4>;
    } else {
      return &ForwardInt8Task::multiply<0>;
    }
  }
  template <int words_of_block>
  static void multiply(const Panels& in, int64_t width, int64_t rows, float* sums, bool first,
                       WeightLinePrefetcher& prefetcher) {
    using Tile = ForwardInt8Tile<B, words_of_block>;
    if (width == kTileLanes) {
      multiply_int8<Tile, 2>(in, rows, sums, first, prefetcher);
    } else {
      multiply_int8<Tile, 1>(in, rows, sums, first, prefetcher);
    }
  }

  void decode(const ScaledPiece& source, const Piece& piece) {
    const float one = static_cast<float>(1.0 / codes_.per_one);
    const int64_t columns_of_block = kInt8Segment / blocks_;
    for (int64_t r = 0; r < piece.rows; ++r) {
      const int64_t row = piece.row + r;
      for (int64_t c = 0; c < piece.columns; c += kInt8Segment)
        B::decode_row(values_, source.packed(row, piece.column + c),
                      panel_ + in_broadcast<B::kRows>(r, c / 4, Panels::kDepth));
      for (int64_t c = 0, at = r * Panels::kMostBlocks; c < piece.columns; c += columns_of_block, ++at) {
        const float* const scale = source.scale_at(row, piece.column + c);
        piece_scales_[at] = *scale * one;
        if (source.has_offsets()) piece_offsets_[at] = scale[source.to_offset()];
      }
    }
  }

  const Int8Tokens& x_;
  const int64_t token_in_x_;
  const Int8CodeTable& codes_;
  const typename B::Values values_;
  const int blocks_;
  int32_t* const panel_;
  const Cut strips_ = cut(this->rows_, kStripRows, 1);
  const int64_t piece_columns_ = cut(this->p_.w.k, 4 * Panels::kDepth, kInt8Segment).size;
  alignas(64) float piece_scales_[kStripRows * Panels::kMostBlocks];
  alignas(64) float piece_offsets_[kStripRows * Panels::kMostBlocks];
};

template <class B, class W, class T>
void forward_int8_as(const Pool& pool, const LinearProblem& p) {
  constexpr int64_t kMostRounded = int64_t{8} << 20;  // values of x at once, so that they stay in the third-level cache
  const int64_t some = min(p.m, max(kMostRounded / p.w.k & -kTileLanes, kMostTokens));
  const int64_t segments = p.w.k / kInt8Segment;
  Int8Tokens x(some);
  T* h = nullptr;
  const auto carve = [&](void* base) {
    Carver memory(base);
    h = memory.take<T>(p.h ? 0 : some * p.lora.rank);
    x.take(&memory, p);
    return memory.used();
  };
  carve(scratch(ScratchUse::kCall, carve(nullptr)));
  const int added = B::added_to(int8_codes(p.w.code));
  for (int64_t first = 0; first < p.m; first += some) {
    const int64_t tokens = min(some, p.m - first), groups = ceil_div(tokens, kLanes);
    const T* const in = static_cast<const T*>(p.x);
    T* const h_of = p.h ? static_cast<T*>(p.h) + first * p.lora.rank : h;
    if (p.lora.rank)
      low_rank_of_call<W, Factor::kRankByFeature>(pool, Matrix<T>{in, p.w.k}, p.lora, first, tokens, p.w.k, h_of);
    auto round = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        round_tokens<B>(p, in + first * p.w.k, tokens, i / segments * kLanes, i % segments, added, x);
    };
    pool(groups * segments, 8, round);
    run_forward_tasks(pool, p.w, tokens, [&](int64_t token, int64_t of_task, int64_t row, int64_t rows) {
      ForwardInt8Task<B, W, T>(p, x, h_of, first, token, of_task, row, rows)();
    });
  }
}

}  // namespace many_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
