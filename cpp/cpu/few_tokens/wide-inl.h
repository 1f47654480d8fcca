// few_tokens_float for wide codes, those of more than 4 bits: the forward and dX. Rows are whole blocks, so nothing is
// shifted. A group of weights is decoded once for up to kWideTokens tokens (codec/wide_reader-inl.h).
//
// The forward sums kWideRows rows of W together. x is arranged once per call, in the order in which groups are decoded:
// [group of tokens][group of columns][token][vector][lane].
#pragma once

#include <cstdint>

#include "cpp/cpu/codec/scales-inl.h"
#include "cpp/cpu/codec/wide_reader-inl.h"
#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/few_tokens/arrange-inl.h"
#include "cpp/cpu/few_tokens/budget-inl.h"
#include "cpp/cpu/few_tokens/forward-inl.h"
#include "cpp/cpu/few_tokens/low_rank-inl.h"
#include "cpp/cpu/few_tokens/slabs-inl.h"
#include "cpp/cpu/isa/stream.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/shared/carver-inl.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/scratch.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/cpu/shared/with_type-inl.h"
#include "cpp/cpu/shared/work_stealing-inl.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace few_tokens {

using namespace stream;

inline constexpr int kWideTokens = 4;
inline constexpr int kWideRows = kLanes == 16 ? 4 : 2;

// Reads W by rows: groups of weights, with the scales of some rows at a time.
class WideRows {
 public:
  using Reader = WideReader<kLanes>;
  static constexpr int64_t kGroup = Reader::kGroup;
  static_assert(sizeof(Floats) == sizeof(Reader::Floats) && kChunk % kGroup == 0 && kGroup % kUnit == 0);

  explicit WideRows(const Weight& w)
      : w_(w), reader_(w), blocks_(w.k / w.scales.block_size), shift_(__builtin_ctzll(uint64_t(w.scales.block_size))) {}

  int64_t groups() const { return ceil_div(w_.k, kGroup); }  // of a row
  // The floats for the scales of so many rows. A last group may reach beyond the last row.
  int64_t scale_floats(int64_t rows) const { return arrays() * room(rows); }

  // Reads the scales of rows n .. n + rows - 1 into `scales`.
  void read(int64_t n, int64_t rows, float* scales) {
    first_ = n, scales_ = scales, to_offset_ = w_.scales.offsets ? room(rows) : 0;
    read_scales(w_.scales, n * blocks_, rows * blocks_, scales);
    read_offsets(w_.scales, n * blocks_, rows * blocks_, scales, scales + to_offset_);
  }

  // Where row n begins: its bytes, and its scales, which have been read.
  struct Row {
    const uint8_t* packed;
    const float* scales;
  };
  Row row(int64_t n) const { return {w_.packed + w_.bytes(n * w_.k), scales_ + (n - first_) * blocks_}; }
  // From a row to the next one.
  int64_t row_bytes() const { return w_.bytes(w_.k); }
  int64_t row_scales() const { return blocks_; }

  // Group `group` of a row: v · scale are its weights, zeros where it ends beyond the row.
  template <int kBits, WideCode::Kind kind>
  [[gnu::always_inline]] void decode(const Row& row, int64_t group, Floats (&v)[4], Floats& scale) const {
    typename Reader::Floats read[4];
    const int64_t column = group * kGroup;
    const float* const of_block = row.scales + (column >> shift_);
    reader_.template values<kBits, kind>(row.packed + group * Reader::template kBytes<kBits>, read);
    typename Reader::Floats by = reader_.of_lanes(of_block);
    if (to_offset_) {
      const typename Reader::Floats offset = reader_.of_lanes(of_block + to_offset_);
      for (auto& x : read) x = x * by + offset;
      by = 1.0f - typename Reader::Floats{};
    }
    if (w_.k - column < kGroup) {  // what follows may be anything, also infinite scales
      for (auto& x : read) Reader::keep_first(w_.k - column, x);
      Reader::keep_first(w_.k - column, by);
    }
    __builtin_memcpy(v, read, sizeof v);
    __builtin_memcpy(&scale, &by, sizeof scale);
  }

 private:
  int64_t arrays() const { return w_.scales.offsets ? 2 : 1; }
  int64_t room(int64_t rows) const { return rows * blocks_ + kLanes; }

  const Weight& w_;
  const Reader reader_;
  const int64_t blocks_;  // of a row
  const int shift_;
  int64_t first_ = 0, to_offset_ = 0;
  const float* scales_ = nullptr;
};

// sums [kTokens][kRows] of rows n, n + 1, ... and the tokens of x.
template <int kBits, WideCode::Kind kind, int kRows, int kTokens>
void sum_rows(const WideRows& w, int64_t n, const float* x, float* sums) {
  Floats acc[kRows][kTokens];
  unroll<kRows>([&](auto r) { unroll<kTokens>([&](auto i) { acc[r][i] = zero(); }); });
  WideRows::Row rows[kRows];
  for (int r = 0; r < kRows; ++r) rows[r] = w.row(n + r);
  const int64_t ahead = kRows * w.row_bytes(), groups = w.groups();
  for (int64_t g = 0; g < groups; ++g, x += kTokens * WideRows::kGroup) {
    unroll<kRows>([&](auto r) {
      Floats v[4], scale;
      __builtin_prefetch(rows[r].packed + g * WideRows::Reader::kBytes<kBits> + ahead, 0, 2);
      w.decode<kBits, kind>(rows[r], g, v, scale);
      unroll<kTokens>([&](auto i) {
        Floats product = mul(v[0], load(x + i * WideRows::kGroup));
        unroll<3>([&](auto j) { product = fma(v[j + 1], load(x + i * WideRows::kGroup + (j + 1) * kLanes), product); });
        acc[r][i] = fma(product, scale, acc[r][i]);
      });
    });
  }
  unroll<kTokens>([&](auto i) { unroll<kRows>([&](auto r) { sums[i * kRows + r] = sum(acc[r][i]); }); });
}

template <class T>
class WideForward {
 public:
  explicit WideForward(const LinearProblem& p)
      : p_(p), groups_(p.m, kWideTokens), columns_(WideRows(p.w).groups() * WideRows::kGroup) {}

  Outcome run(const Pool& pool) {
    const int64_t m = p_.m, k = p_.w.k, rank = p_.lora.rank;
    T* dropped = nullptr;
    const auto lay_out = [&](void* base) {
      Carver memory(base);
      x_ = memory.take<float>(m * columns_);
      units_ = memory.take<float>(m);
      h_ = memory.take<float>(m * padded_rank(rank));
      dropped = memory.take<T>(rank && p_.lora.dropout.active() ? m * k : 0);
      return memory.used();
    };
    const int64_t bytes = lay_out(nullptr), scale_floats = WideRows(p_.w).scale_floats(kWideRows);
    if (bytes > kMaxScratchBytes || 4 * scale_floats > kMaxScratchBytes / 2) return Outcome::kTooLarge;
    lay_out(scratch(ScratchUse::kCall, bytes));
    prepare(pool, p_, 0, dropped, h_, m, [&](int64_t token) { arrange(token); });
    const Items items(p_.w, kWideRows);
    const ScaleReader reader(p_.w.scales);
    run_stealing(pool, ceil_div(p_.w.n, items.rows), ceil_div(kWorthThreads, items.rows * k * m),
                 max(ceil_div(kLeastStolenBytes, max(p_.w.bytes(items.rows * k), 1)), 2),
                 [&](WorkStealingRanges& ranges, int64_t thread) {
                   float* const scales =
                       Carver(scratch(ScratchUse::kThread, 4 * scale_floats)).take<float>(scale_floats);
                   WideRows rows(p_.w);
                   walk<T>(p_, items, reader, ranges, thread,
                           [&](int64_t first, int64_t last) { compute(first, last, rows, scales); });
                 });
    return Outcome::kDone;
  }

 private:
  void arrange(int64_t token) const {
    int64_t group = 0;
    while (groups_.first(group + 1) <= token) ++group;
    const int64_t first = groups_.first(group), tokens = groups_.tokens(group);
    const T* const x = static_cast<const T*>(p_.x) + token * p_.w.k;
    // Products are summed before a scale of W makes them small, so a token with huge values is scaled down.
    bool huge = false;
    for (int64_t c = 0; c < p_.w.k; ++c) huge |= __builtin_fabsf(to_float(x[c])) > 0x1p90f;
    const float factor = huge ? 0x1p-40f : 1.0f;
    units_[token] = 1.0f / factor;
    float* out = x_ + first * columns_ + (token - first) * WideRows::kGroup;
    for (int64_t c = 0; c < columns_; c += WideRows::kGroup, out += tokens * WideRows::kGroup)
      for (int64_t i = 0; i < WideRows::kGroup; ++i)
        out[i % 4 * kLanes + i / 4] = c + i < p_.w.k ? to_float(x[c + i]) * factor : 0.0f;
  }

  // Computes weight rows first .. last - 1, at most kWideRows, for all tokens.
  void compute(int64_t first, int64_t last, WideRows& rows, float* scales) const {
    rows.read(first, last - first, scales);
    for (int64_t group = 0; group < groups_.count; ++group) {
      const int64_t m0 = groups_.first(group);
      with_count<kWideTokens>(groups_.tokens(group), [&](auto tokens) {
        float sums[tokens.value * kWideRows];
        with_wide(wide_code(p_.w.code), [&]<int kBits, WideCode::Kind kind>() {
          const float* const x = x_ + m0 * columns_;
          if (last - first == kWideRows) {
            sum_rows<kBits, kind, kWideRows, tokens.value>(rows, first, x, sums);
            for (int i = 0; i < tokens; ++i)
              for (int64_t r = 0; r < kWideRows; ++r) finish(m0 + i, first + r, sums[i * kWideRows + r]);
            return;
          }
          for (int64_t n = first; n < last; ++n) {
            sum_rows<kBits, kind, 1, tokens.value>(rows, n, x, sums);
            for (int i = 0; i < tokens; ++i) finish(m0 + i, n, sums[i]);
          }
        });
      });
    }
  }

  // Adds low rank and bias, and stores the output of a token and a weight row.
  void finish(int64_t token, int64_t n, float of_row) const {
    of_row *= units_[token];
    const Lora& lora = lora_of(p_.lora, token);
    if (lora.rank) {
      const T* const b = static_cast<const T*>(lora.b) + lora.b_row(n);
      Floats acc = zero();
      for (int64_t j = 0; j < lora.rank; j += kLanes)
        acc = fma(load(b + j, lora.rank - j), load(h_ + (j / kLanes * p_.m + token) * kLanes), acc);
      of_row += sum(acc);
    }
    if (p_.bias) of_row += to_float(static_cast<const T*>(p_.bias)[n]);
    from_float(of_row, static_cast<T*>(p_.y) + token * p_.w.n + n);
  }

  const LinearProblem& p_;
  const TokenGroups groups_;
  const int64_t columns_;  // of x, in whole groups
  float* x_ = nullptr;
  float* units_ = nullptr;  // of each token of x_
  float* h_ = nullptr;      // in the layout of low_rank-inl.h
};

inline Outcome forward_wide(const Pool& pool, const LinearProblem& p) {
  return with_type(p.dtype, [&]<class T>() { return WideForward<T>(p).run(pool); });
}

// A kernel of slabs-inl.h.
template <class T>
class WideDx {
 public:
  explicit WideDx(const LinearDxProblem& p) : p_(p) {}

  int64_t tile_rows() const { return kDxTileRows; }
  int64_t strip_chunks() const { return min(kMaxScratchBytes / 2 / (4 * p_.m * kChunk), 64); }
  int64_t scale_floats() const { return WideRows(p_.w).scale_floats(kDxTileRows); }

  // Chunks begin .. end - 1 of the sums over rows first_row .. last_row - 1.
  void operator()(int64_t first_row, int64_t last_row, int64_t begin, int64_t end, const SlabSums& out) const {
    constexpr int64_t kPerChunk = kChunk / WideRows::kGroup;
    WideRows w(p_.w);
    const int64_t first = begin * kPerChunk, last = min(end * kPerChunk, w.groups());
    const int64_t sum_count = (last - first) * p_.m * WideRows::kGroup;
    float *sums = nullptr, *scales = nullptr, *dy = nullptr;
    const auto lay_out = [&](void* base) {
      Carver memory(base);
      sums = memory.take<float>(sum_count);
      scales = memory.take<float>(scale_floats());
      dy = memory.take<float>(p_.m * kDxTileRows);
      return memory.used();
    };
    lay_out(scratch(ScratchUse::kThread, lay_out(nullptr)));
    for (int64_t i = 0; i < sum_count; i += kLanes) store(sums + i, zero());
    for (int64_t n = first_row; n < last_row; n += kDxTileRows) {
      const int64_t rows = min(kDxTileRows, last_row - n);
      w.read(n, rows, scales);
      for (int64_t i = 0; i < p_.m; ++i)
        for (int64_t r = 0; r < rows; ++r)
          dy[i * kDxTileRows + r] = to_float(static_cast<const T*>(p_.dy)[i * p_.w.n + n + r]);
      with_wide(wide_code(p_.w.code), [&]<int kBits, WideCode::Kind kind>() {
        for (int64_t g = first; g < last; ++g) {
          float* const of_group = sums + (g - first) * p_.m * WideRows::kGroup;
          for (int64_t i = 0; i < p_.m; i += kWideTokens) {
            with_count<kWideTokens>(min(p_.m - i, kWideTokens), [&](auto tokens) {
              add_rows<kBits, kind, tokens.value>(w, n, rows, g, dy + i * kDxTileRows, of_group + i * WideRows::kGroup);
            });
          }
        }
      });
    }
    for (int64_t i = 0; i < p_.m; ++i) {
      for (int64_t g = first; g < last; ++g) {
        const float* const from = sums + ((g - first) * p_.m + i) * WideRows::kGroup;
        float* const to = out.at(i, g * WideRows::kGroup);
        for (int64_t c = 0; c < WideRows::kGroup; ++c) to[c] = from[c % 4 * kLanes + c / 4];
      }
    }
  }

 private:
  // sums [kTokens][4][kLanes] += dy · group `group` of rows n .. n + rows - 1
  template <int kBits, WideCode::Kind kind, int kTokens>
  static void add_rows(const WideRows& w, int64_t n, int64_t rows, int64_t group, const float* dy, float* sums) {
    Floats sum[kTokens][4];
    unroll<kTokens>(
        [&](auto i) { unroll<4>([&](auto j) { sum[i][j] = load(sums + i * WideRows::kGroup + j * kLanes); }); });
    WideRows::Row row = w.row(n);
    const int64_t ahead = kDxTileRows * w.row_bytes() + group * WideRows::Reader::kBytes<kBits>;
    for (int64_t r = 0; r < rows; ++r, row.packed += w.row_bytes(), row.scales += w.row_scales()) {
      Floats v[4], scale;
      __builtin_prefetch(row.packed + ahead, 0, 2);
      w.decode<kBits, kind>(row, group, v, scale);
      unroll<kTokens>([&](auto i) {
        const Floats by = mul(scale, splat(dy[i * kDxTileRows + r]));
        unroll<4>([&](auto j) { sum[i][j] = fma(v[j], by, sum[i][j]); });
      });
    }
    unroll<kTokens>(
        [&](auto i) { unroll<4>([&](auto j) { store(sums + i * WideRows::kGroup + j * kLanes, sum[i][j]); }); });
  }

  const LinearDxProblem& p_;
};

template <class T>
Outcome dx_wide_as(const Pool& pool, const LinearDxProblem& p) {
  const WideDx<T> kernel(p);
  if (4 * kernel.scale_floats() > kMaxScratchBytes / 2) return Outcome::kTooLarge;
  dx_with<T>(pool, p, kernel);
  return Outcome::kDone;
}
inline Outcome dx_wide(const Pool& pool, const LinearDxProblem& p) {
  return p.dtype == DType::kBFloat16 ? dx_wide_as<bfloat16>(pool, p) : dx_wide_as<float16>(pool, p);
}

}  // namespace few_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
