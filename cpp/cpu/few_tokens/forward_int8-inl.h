// few_tokens_int8: the forward in int8. Rows of W are whole segments of x, so nothing is shifted, and kLanes rows at a
// time are decoded side by side: a lane has the sums of a row, and scales, B and bias are vectors of rows.
//
//   int8_accumulate-inl.h   the inner loop
//   this file               x rounded to int8, the scales of a tile of rows, low rank and bias
//
// A call whose operands do not fit the scratch is left to many tokens.
#pragma once

#include <cstdint>

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/few_tokens/arrange-inl.h"
#include "cpp/cpu/few_tokens/budget-inl.h"
#include "cpp/cpu/few_tokens/forward-inl.h"
#include "cpp/cpu/few_tokens/int8_accumulate-inl.h"
#include "cpp/cpu/few_tokens/low_rank-inl.h"
#include "cpp/cpu/isa/bytes.h"
#include "cpp/cpu/isa/panel.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/shared/carver-inl.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/int8_segment-inl.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/scratch.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/cpu/shared/with_type-inl.h"
#include "cpp/cpu/shared/work_stealing-inl.h"
#include "cpp/format/code_tables.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace few_tokens_int8 {

using few_tokens::lora_of;
using few_tokens::TokenGroups;

// The last tile begins within the weight, and B is read and transposed in whole vectors.
static_assert(kLanes <= kInt8Rows && kLanes - kRowDwords <= stream::kLanes);
inline constexpr int kMostTokens = 8;  // of a group: registers hold their sums beside the decoded rows

template <class T, class B>
class Int8Forward {
 public:
  Int8Forward(const LinearProblem& p, const Int8CodeTable& codes)
      : p_(p),
        added_(B::added_to(codes)),
        values_(B::values_of(codes, added_)),
        per_scale_(static_cast<float>(1.0 / codes.per_one)),
        groups_(p.m, kMostTokens),
        reader_(p.w.scales, kInt8Segment),
        segments_(p.w.k / kInt8Segment),
        blocks_(blocks_per_segment(p.w)),
        group_size_(OfX{ceil_div(p.m, groups_.count), blocks_}.size() * segments_) {}

  Outcome run(const Pool& pool) {
    const int64_t m = p_.m, k = p_.w.k, rank = p_.lora.rank;
    const auto transposed = [](int64_t columns) { return kLanes * round_up(columns, kRowDwords); };
    const int64_t of_scales = transposed(segments_ * blocks_), of_b = transposed(rank);
    const int64_t most = max(of_scales, of_b) + stream::kLanes;  // whole vectors are read and written
    T* dropped = nullptr;
    const auto lay_out = [&](void* base) {
      Carver memory(base);
      x_ = memory.take<int32_t>(group_size_ * groups_.count);
      h_ = memory.take<float>(m * few_tokens::padded_rank(rank));
      dropped = memory.take<T>(rank && p_.lora.dropout.active() ? m * k : 0);
      return memory.used();
    };
    const int64_t bytes = lay_out(nullptr);
    if (bytes > few_tokens::kMaxScratchBytes || 16 * most > few_tokens::kMaxScratchBytes) return Outcome::kTooLarge;
    lay_out(scratch(ScratchUse::kCall, bytes));
    few_tokens::prepare(pool, p_, 0, dropped, h_, m, [&](int64_t token) { round(token); });
    const few_tokens::Items items(p_.w, kLanes);
    run_stealing(pool, ceil_div(p_.w.n, items.rows), ceil_div(few_tokens::kWorthThreads, items.rows * k * m),
                 max(ceil_div(few_tokens::kLeastStolenBytes, max(items.rows * k / 2, 1)), 2),
                 [&](WorkStealingRanges& ranges, int64_t thread) {
                   Scratch s{};
                   const auto lay_out = [&](void* base) {
                     Carver memory(base);
                     s.read = memory.take<float>(most);
                     s.scales = memory.take<float>(of_scales);
                     s.offsets = memory.take<float>(p_.w.scales.offsets ? of_scales : 0);
                     s.b = memory.take<float>(of_b);
                     return memory.used();
                   };
                   lay_out(scratch(ScratchUse::kThread, lay_out(nullptr)));
                   few_tokens::walk<T>(p_, items, reader_, ranges, thread,
                                       [&](int64_t first, int64_t last) { compute(first, last, s); });
                 });
    return Outcome::kDone;
  }

 private:
  using OfX = SegmentOfX<B::kRows>;

  // Of a thread.
  struct Scratch {
    float *read, *scales, *offsets, *b;
  };

  // Rounds a token of x.
  void round(int64_t token) const {
    int64_t group = 0;
    while (groups_.first(group + 1) <= token) ++group;
    const int64_t first = groups_.first(group), tokens = groups_.tokens(group);
    const T* x = static_cast<const T*>(p_.x) + token * p_.w.k;
    const OfX of{tokens, blocks_};
    int32_t* out = x_ + group * group_size_;
    for (int64_t s = 0; s < segments_; ++s, x += kInt8Segment, out += of.size()) {
      F v[kInt8Segment / kLanes];
      for (int i = 0; i < kInt8Segment / kLanes; ++i) v[i] = load(x + i * kLanes);
      float* const floats = reinterpret_cast<float*>(out);
      alignas(64) int32_t words[kSegmentWords], sum_of_word[kSegmentWords];
      const float unit = B::template round<Int8Order::kDecoded>(v, words);
      spread<B::kRows>(words, out + of.words(token - first), B::kRows * B::kRows);
      for (int i = 0; i < kSegmentWords; i += kLanes)
        WordInt8::store_sum(sum_of_word + i, WordInt8::add_bytes(WordInt8::load(words + i), WordInt8::splat_sum(0)));
      for (int b = 0; b < blocks_; ++b) {
        const int of_block = kSegmentWords / blocks_;
        int32_t sum = 0;
        for (int i = b * of_block; i < (b + 1) * of_block; ++i) sum += sum_of_word[i];
        floats[of.unit(b, token - first)] = unit_of_block(unit, words + b * of_block, of_block);
        out[of.start(b, token - first)] = -added_ * sum;
        floats[of.sum(b, token - first)] = static_cast<float>(sum);
      }
    }
  }

  // Computes weight rows first .. last - 1 for all tokens.
  void compute(int64_t first, int64_t last, const Scratch& s) const {
    const int64_t row = min(first, p_.w.n - kLanes), k = p_.w.k;  // the last tile begins in the one before it
    const int64_t blocks = segments_ * blocks_;
    reader_.read(row * blocks, kLanes * blocks, s.read);
    transpose(s.read, blocks, per_scale_, s.scales);
    if (p_.w.scales.offsets) {
      reader_.read_offsets(row * blocks, kLanes * blocks, s.read, s.read);
      transpose(s.read, blocks, 1.0f, s.offsets);
    }
    const Lora* lora_in_b = nullptr;
    for (int64_t group = 0; group < groups_.count; ++group) {
      const int64_t m0 = groups_.first(group), tokens = groups_.tokens(group);
      const RowsAndTokens operands = {p_.w.packed + row * k / 2, k / 2, s.scales,
                                      p_.w.scales.offsets ? s.offsets - s.scales : 0, x_ + group * group_size_};
      float sums[kMostTokens * kLanes];
      with_count<kMostTokens>(tokens, [&](auto count) {
        if (blocks_ == 1) return multiply<B, 1, count.value>(values_, operands, sums);
        if (blocks_ == 2) return multiply<B, 2, count.value>(values_, operands, sums);
        multiply<B, 4, count.value>(values_, operands, sums);
      });
      for (int64_t i = 0; i < tokens; ++i) {
        const Lora& lora = lora_of(p_.lora, m0 + i);
        if (lora.rank && &lora != lora_in_b) read_b(lora, row, s);
        lora_in_b = &lora;
        finish(m0 + i, lora.rank, s.b, load(sums + i * kLanes), row, first, last);
      }
    }
  }

  // rows [kLanes][count] · factor -> out [count][kLanes]
  static void transpose(const float* rows, int64_t count, float factor, float* out) {
    for (int64_t j = 0; j < count; j += kRowDwords) {
      F v[kRowDwords];
      load_rows(rows + j, count * 4, v);
      for (int i = 0; i < kRowDwords; ++i) store(out + (j + i) * kLanes, mul(v[i], splat(factor)));
    }
  }

  // Reads rows of B, transposed. A vector that is stored after a row's end is overwritten by the next row.
  static void read_b(const Lora& lora, int64_t row, const Scratch& s) {
    const T* b = static_cast<const T*>(lora.b) + lora.b_row(row);
    for (float *to = s.read, *const end = to + kLanes * lora.rank; to < end; to += lora.rank, b += lora.b_row(1)) {
      for (int64_t j = 0; j < lora.rank; j += kLanes) {
        const int64_t ranks = lora.rank - j;
        store(to + j, ranks < kLanes ? load_first(b + j, static_cast<int>(ranks)) : load(b + j));
      }
    }
    transpose(s.read, lora.rank, 1.0f, s.b);
  }

  // Adds low rank and bias to the sums of a token, whose first lane is `row`, and stores rows first .. last - 1.
  void finish(int64_t token, int64_t rank, const float* b, F sum, int64_t row, int64_t first, int64_t last) const {
    constexpr int64_t kOfH = stream::kLanes;
    for (int64_t j = 0; j < rank; ++j)
      sum = multiply_add(load(b + j * kLanes), splat(h_[(j / kOfH * p_.m + token) * kOfH + j % kOfH]), sum);
    if (p_.bias) sum = add(sum, load(static_cast<const T*>(p_.bias) + row));
    T* const y = static_cast<T*>(p_.y) + token * p_.w.n;
    if (row == first) return store(y + row, sum);
    T all[kLanes];
    store(all, sum);
    for (int64_t n = first; n < last; ++n) y[n] = all[n - row];
  }

  const LinearProblem& p_;
  const int added_;
  const typename B::Values values_;
  const float per_scale_;
  const TokenGroups groups_;
  const ScaleReader reader_;
  const int64_t segments_;
  const int blocks_;          // of a segment
  const int64_t group_size_;  // words of x that the largest group takes
  int32_t* x_ = nullptr;      // [group][segment][OfX]
  float* h_ = nullptr;        // in the layout of low_rank-inl.h
};

inline Outcome forward(const Pool& pool, const LinearProblem& p) {
  const Int8CodeTable& codes = int8_codes(p.w.code);
  Outcome outcome = Outcome::kDone;
  with_type(p.dtype, [&]<class T>() {
    with_int8_word(codes, blocks_per_segment(p.w),
                   [&]<class B>(B) { outcome = Int8Forward<T, B>(p, codes).run(pool); });
  });
  return outcome;
}

}  // namespace few_tokens_int8
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
