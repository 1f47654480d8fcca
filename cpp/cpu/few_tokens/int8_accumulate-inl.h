// The inner loop of the forward in int8: kLanes weight rows side by side, a row per lane, and the tokens of a group.
//
//   for each segment               load its bytes of each row, and transpose them: a dword of 8 weights of each row
//     for each dword               decode it once (or B::kRows dwords, for as many tokens at once)
//       for each token             sum[token] += dword · the same columns of the token, which are broadcast
//     for each block             sums[token] += unit of the token's segment · (scale · sum [+ offset · sum of x])
//
// No sum crosses lanes, and float32 adds segments in their order, as many_tokens/multiply_int8-inl.h does.
#pragma once

#include <cstdint>

#include "cpp/cpu/isa/byte_rows.h"
#include "cpp/cpu/isa/bytes.h"
#include "cpp/cpu/isa/panel.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/int8_segment-inl.h"
#include "cpp/cpu/shared/prefetch-inl.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/format/portable.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace few_tokens_int8 {

using namespace panel;

inline constexpr int kSegmentBytes = kInt8Segment / 2;

// The word of a segment of x that has the columns of dword `dword` of the packed weights with even or odd numbers.
constexpr int word_of_x(int dword, bool odd) { return dword / 2 * 4 + dword % 2 + 2 * odd; }

// A segment of some tokens of x: the words, as a broadcast panel (many_tokens/multiply_int8-inl.h), and for each block
// the units, what sums start from and the sums of x. All have 32 bits, and `blocks` are those of a segment.
template <int rows>
struct SegmentOfX {
  int64_t tokens;
  int blocks;

  int64_t words(int64_t token) const { return in_broadcast<rows>(token, 0, kSegmentWords); }
  int64_t unit(int block, int64_t token) const { return words(round_up(tokens, rows)) + block * tokens + token; }
  int64_t start(int block, int64_t token) const { return unit(blocks, 0) + block * tokens + token; }
  int64_t sum(int block, int64_t token) const { return start(blocks, 0) + block * tokens + token; }
  int64_t size() const { return sum(blocks, 0); }
};

// kLanes weight rows and the tokens of a group, as operands.
struct RowsAndTokens {
  const uint8_t* packed;  // of the first row
  int64_t row_bytes;      // from a row to the next
  const float* scales;    // [segment][block][kLanes]
  int64_t to_offsets;     // from a scale to its offset, or 0
  const int32_t* x;       // [segment][SegmentOfX]
};

// The sums of the tokens of a group. Few tokens have several sums each, because a product waits for the previous one,
// unless a Sum has several registers (kRows > 1).
template <class B, int kTokens>
struct Sums {
  static constexpr int kRows = B::kRows, kSums = ceil_div(kTokens, kRows);
  static constexpr int kChains = B::kPartialSteps || kRows > 1 || kTokens > 2 ? 1 : 2;
  static_assert(kRows == 1 || B::kAddedToDy == 0, "sums of several tokens start from zeros");
  typename B::Sum sum[kSums][kChains];

  [[gnu::always_inline]] void start(const int32_t* from) {
    unroll<kSums>([&](auto i) {
      unroll<kChains>([&](auto c) { sum[i][c] = B::splat_sum(c || B::kAddedToDy == 0 ? 0 : from[i]); });
    });
  }
  [[gnu::always_inline]] F total(int i) const {
    F all = B::to_floats(sum[i / kRows][0], i % kRows);
    if constexpr (kChains == 2) all = add(all, B::to_floats(sum[i][1]));  // exact
    return all;
  }
  // Adds the products of kDwords dwords of packed weights and x.
  template <int kDwords>
  [[gnu::always_inline]] void add_products(const typename B::Values& values, const F* packed, int dword,
                                           const int32_t* x) {
    if constexpr (B::kPartialSteps == 0) {
      add_to<kDwords>(values, packed, dword, x, sum);
    } else {
      constexpr int kAtOnce = B::kPartialSteps / 2 < kDwords ? B::kPartialSteps / 2 : kDwords;
      unroll<kDwords / kAtOnce>([&](auto part) QLORA_INLINE_LAMBDA {
        typename B::Partial partial[kSums][1];
        unroll<kSums>([&](auto i) { partial[i][0] = B::no_partial(); });
        add_to<kAtOnce>(values, packed + part * kAtOnce, dword + part * kAtOnce, x, partial);
        unroll<kSums>([&](auto i) { sum[i][0] = B::add_partial(partial[i][0], sum[i][0]); });
      });
    }
  }

 private:
  template <int kDwords, class To, int kOf>
  [[gnu::always_inline]] static void add_to(const typename B::Values& values, const F* packed, int dword,
                                            const int32_t* x, To (&to)[kSums][kOf]) {
    unroll<kDwords / kRows>([&](auto w) QLORA_INLINE_LAMBDA {
      typename B::Vector even, odd;
      decode_eight(values, packed + w * kRows, even, odd);
      const int of_even = word_of_x(dword + w * kRows, false), of_odd = word_of_x(dword + w * kRows, true);
      unroll<kSums>([&](auto i) {
        const int32_t* const of_tokens = x + i * kRows * kSegmentWords;
        to[i][0] = B::multiply_add(even, B::broadcast(of_tokens + of_even * kRows), to[i][0]);
        To& other = to[i][kOf - 1];
        other = B::multiply_add(odd, B::broadcast(of_tokens + of_odd * kRows), other);
      });
    });
  }
};

// sums[token][lane] = the products of the rows and tokens
template <class B, int kBlocks, int kTokens>
[[gnu::noinline, gnu::flatten]] void multiply(const typename B::Values& of_code, const RowsAndTokens& operands,
                                              float* sums) {
  constexpr int kDwords = kSegmentBytes / 4, kParts = kBlocks > 2 ? kBlocks : 2, kOfPart = kDwords / kParts;
  // Where registers hold all dwords of a segment, the rows of the next one are transposed between products.
  constexpr bool kAhead = kRowDwords == kDwords;
  constexpr SegmentOfX<B::kRows> kX{kTokens, kBlocks};
  const typename B::Values values = of_code;  // in registers, which no store changes
  const uint8_t *packed = operands.packed, *next_rows = packed + kLanes * operands.row_bytes;
  const int64_t row_bytes = operands.row_bytes, to_offsets = operands.to_offsets;
  const int32_t* x = operands.x;
  const float* scales = operands.scales;
  F rows[kRowDwords], next[kRowDwords];
  if constexpr (kAhead) load_rows(packed, row_bytes, next);
  unroll<kTokens>([&](auto i) { store(sums + i * kLanes, zero()); });
  for (const uint8_t* const end = packed + row_bytes; packed < end; packed += kSegmentBytes) {
    unroll<kLanes * kSegmentBytes / kCacheLine>(
        [&](auto line) { __builtin_prefetch(next_rows + line * kCacheLine, 0, 2); });
    next_rows += kLanes * kSegmentBytes;
    if constexpr (kAhead) unroll<kRowDwords>([&](auto i) { rows[i] = next[i]; });
    Sums<B, kTokens> sum;
    unroll<kParts>([&](auto part) QLORA_INLINE_LAMBDA {
      constexpr int kDword = part * kOfPart, kBlock = part * kBlocks / kParts;
      if constexpr (!kAhead && kDword % kRowDwords == 0) load_rows(packed + kDword * 4, row_bytes, rows);
      if constexpr (part * kBlocks % kParts == 0) sum.start(x + kX.start(kBlock, 0));
      sum.template add_products<kOfPart>(values, rows + kDword % kRowDwords, kDword, x);
      if constexpr (kAhead && part + 1 == kParts / 2)
        load_rows(packed + (packed + kSegmentBytes < end ? kSegmentBytes : 0), row_bytes, next);
      if constexpr ((part + 1) * kBlocks % kParts == 0) {
        const F scale = load(scales + kBlock * kLanes);
        F of_block[kTokens];
        unroll<kTokens>([&](auto i) { of_block[i] = mul(sum.total(i), scale); });
        if (to_offsets) {
          const F offset = load(scales + to_offsets + kBlock * kLanes);
          unroll<kTokens>([&](auto i) {
            const Broadcast sum_of_x = broadcast(reinterpret_cast<const float*>(x) + kX.sum(kBlock, i));
            of_block[i] = multiply_add(sum_of_x, offset, of_block[i]);
          });
        }
        // In memory, as registers are few.
        unroll<kTokens>([&](auto i) {
          const Broadcast unit = broadcast(reinterpret_cast<const float*>(x) + kX.unit(kBlock, i));
          store(sums + i * kLanes, multiply_add(unit, of_block[i], load(sums + i * kLanes)));
        });
      }
    });
    x += kX.size(), scales += kBlocks * kLanes;
  }
}

}  // namespace few_tokens_int8
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
