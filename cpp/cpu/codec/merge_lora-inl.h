// Adds an adapter to a weight, and encodes the sum under the weight's scales with stochastic rounding. The sum stays in
// registers and the first cache:
//
//     w                strip
//     +----------+----------+-----
//     | tile     |          |          4 rows, 32 columns at a time: the low-rank update, then w + update, then codes
//     +----------+          |
//     | tile     |          |  task    32 rows
//     +----------+----------+-----
//
// Columns of a strip are so few that their part of A stays in the first cache while the task's tiles use it.
#pragma once

#include <cstdint>

#include "cpp/cpu/codec/dequantize-inl.h"
#include "cpp/cpu/codec/encode_stochastic-inl.h"
#include "cpp/cpu/codec/scales-inl.h"
#include "cpp/cpu/isa/codec.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/scratch.h"
#include "cpp/format/codes.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {

inline constexpr int64_t kMergeRows = 32;            // of a task
inline constexpr int kUpdateRows = 4;                // of a tile
inline constexpr int64_t kStripOfA = 16384;          // bytes
inline constexpr int64_t kHalf = codec::kGroup / 2;  // the even or the odd columns of a group

// The decoded scales of some blocks, and what follows from them. Offsets exist where the weight has them.
struct BlockNumbers {
  static constexpr int64_t kPerBlock = 4;
  float *scale, *inverse, *offset, *zero_point;

  BlockNumbers(float* memory, const Scales& scales, int64_t first, int64_t count)
      : scale(memory), inverse(memory + count), offset(memory + 2 * count), zero_point(memory + 3 * count) {
    read_scales(scales, first, count, scale);
    for (int64_t i = 0; i < count; ++i) inverse[i] = inverse_scale(scale[i]);
    if (scales.offsets) read_offsets(scales, first, count, scale, offset);
    if (scales.offsets.form == OffsetForm::kZeroPoint8) read_zero_points(scales, first, count, zero_point);
  }
};

// The same for 16 elements of a group, and what they turn into.
template <BlockOffsets kOffsets>
class GroupNumbers {
 public:
  GroupNumbers(const BlockNumbers& of, int64_t block, int64_t block_size)
      : scale_(per_element(of.scale + block, block_size)), inverse_(per_element(of.inverse + block, block_size)) {
    if constexpr (kOffsets != BlockOffsets::kNone) offset_ = per_element(of.offset + block, block_size);
    if constexpr (kOffsets == BlockOffsets::kZeroPoints) shift_ = per_element(of.zero_point + block, block_size);
  }
  // w + update, less the offset, over the scale, where w decodes as in dequantize-inl.h.
  codec::Floats q(codec::Floats value, codec::Floats update) const {
    if constexpr (kOffsets == BlockOffsets::kNone) {
      return codec::mul(codec::add(codec::mul(value, scale_), update), inverse_);
    } else {
      const codec::Floats w = kOffsets == BlockOffsets::kZeroPoints ? codec::mul(codec::add(value, shift_), scale_)
                                                                    : codec::add(codec::mul(value, scale_), offset_);
      return codec::mul(codec::sub(codec::add(w, update), offset_), inverse_);
    }
  }

 private:
  codec::Floats scale_, inverse_, offset_, shift_;
};

// A [r, k] with the even columns of each group before its odd ones: [k / 32][2][r][16].
inline void arrange_a(const MergeProblem& p, int64_t first_group, int64_t end_group, float* arranged) {
  for (int64_t g = first_group; g < end_group; ++g) {
    float* const group = arranged + g * p.rank * codec::kGroup;
    for (int64_t r = 0; r < p.rank; ++r) {
      const codec::Pairs pairs = codec::load_pairs(p.a + r * p.w.k + g * codec::kGroup);
      codec::store(group + r * kHalf, pairs.even);
      codec::store(group + (p.rank + r) * kHalf, pairs.odd);
    }
  }
}

// update[row] = b[row] · a for 16 columns: a chain of fused multiply-adds from the first rank to the last.
template <int kRows>
inline void low_rank_update(const float* a, const float* b, int64_t rank, codec::Floats* update) {
  codec::Floats sum[kRows];
  for (int i = 0; i < kRows; ++i) sum[i] = codec::splat(0.0f);
  for (int64_t r = 0; r < rank; ++r) {
    const codec::Floats columns = codec::load(a + r * kHalf);
    for (int i = 0; i < kRows; ++i) sum[i] = codec::fma(codec::splat(b[i * rank + r]), columns, sum[i]);
  }
  for (int i = 0; i < kRows; ++i) update[i] = sum[i];
}

template <BlockOffsets kOffsets, class Encoder>
class Merge {
 public:
  Merge(const MergeProblem& problem, const StochasticGroups<Encoder>& groups)
      : p_(problem),
        block_size_(problem.w.scales.block_size),
        groups_(groups),
        values_(codec::make_table<float>(codec::Values(problem.w.table()), 1.0f)) {}

  // Rows of whole groups. `arranged` is A.
  void rows(int64_t begin, int64_t end, const float* arranged) const {
    const int64_t k = p_.w.k, rank = p_.rank, b_floats = (end - begin) * rank;
    const int64_t first_block = begin * k / block_size_, blocks = ceil_div(end * k, block_size_) - first_block;
    const int64_t floats = b_floats + BlockNumbers::kPerBlock * blocks;
    auto* const b = static_cast<float*>(scratch(ScratchUse::kThread, floats * static_cast<int64_t>(sizeof(float))));
    for (int64_t i = 0; i < b_floats; ++i) b[i] = p_.b[begin * rank + i] * p_.scaling;
    const BlockNumbers numbers(b + b_floats, p_.w.scales, first_block, blocks);
    const int64_t bytes = max(rank, 1) * codec::kGroup * static_cast<int64_t>(sizeof(float));
    const int64_t groups = k / codec::kGroup, strip = max(kStripOfA / bytes, 1);
    for (int64_t first = 0; first < groups; first += strip) {
      const int64_t last = min(first + strip, groups);
      int64_t row = begin;
      for (; row + kUpdateRows <= end; row += kUpdateRows) {
        tiles<kUpdateRows>(arranged, b + (row - begin) * rank, numbers, first_block, row, first, last);
      }
      for (; row < end; ++row) tiles<1>(arranged, b + (row - begin) * rank, numbers, first_block, row, first, last);
    }
  }

  // Any group of the flat tensor, which may span rows.
  void group(int64_t first, int64_t count, int64_t block, int64_t blocks) const {
    float memory[2 * BlockNumbers::kPerBlock] = {}, update[codec::kGroup] = {};
    const BlockNumbers numbers(memory, p_.w.scales, block, blocks);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = (first + i) / p_.w.k, column = (first + i) % p_.w.k;
      for (int64_t r = 0; r < p_.rank; ++r) {
        update[i] = __builtin_fmaf(p_.b[row * p_.rank + r] * p_.scaling, p_.a[r * p_.w.k + column], update[i]);
      }
    }
    uint8_t codes[codec::kGroup / 2] = {}, merged[codec::kGroup / 2];
    for (int64_t i = 0; i < packed_bytes(count); ++i) codes[i] = p_.w.packed[first / 2 + i];
    encode(numbers, 0, codec::load_pairs(update), codes, first, merged);
    groups_.keep(merged, count, p_.packed + first / 2);
  }

 private:
  template <int kRows>
  void tiles(const float* arranged, const float* b, const BlockNumbers& numbers, int64_t first_block, int64_t row,
             int64_t first, int64_t last) const {
    const int shift = __builtin_ctzll(static_cast<uint64_t>(block_size_));
    for (int64_t g = first; g < last; ++g) {
      const float* const a = arranged + g * p_.rank * codec::kGroup;
      codec::Floats even[kRows], odd[kRows];
      low_rank_update<kRows>(a, b, p_.rank, even);
      low_rank_update<kRows>(a + p_.rank * kHalf, b, p_.rank, odd);
      for (int i = 0; i < kRows; ++i) {
        const int64_t element = (row + i) * p_.w.k + g * codec::kGroup;
        encode(numbers, (element >> shift) - first_block, {even[i], odd[i]}, p_.w.packed + element / 2, element,
               p_.packed + element / 2);
      }
    }
  }

  void encode(const BlockNumbers& numbers, int64_t block, const codec::Pairs& update, const uint8_t* codes,
              int64_t first, uint8_t* packed) const {
    const GroupNumbers<kOffsets> of(numbers, block, block_size_);
    const codec::Pairs value = codec::decode_pairs(values_, codes);
    groups_.encode({of.q(value.even, update.even), of.q(value.odd, update.odd)}, first, packed);
  }

  const MergeProblem& p_;
  const int64_t block_size_;
  const StochasticGroups<Encoder>& groups_;
  const codec::Table<float> values_;
};

template <BlockOffsets kOffsets, class Encoder>
void merge_with(const Pool& pool, const MergeProblem& p, const StochasticGroups<Encoder>& groups) {
  const Merge<kOffsets, Encoder> merge(p, groups);
  const int64_t n = p.w.n, k = p.w.k;
  if (n * k == 0) return;
  if (k % codec::kGroup != 0) {
    for_each_group(
        pool, n * k, p.w.scales.block_size,
        [&](int64_t first, int64_t count, int64_t block, int64_t blocks) { merge.group(first, count, block, blocks); });
    return;
  }
  auto* const arranged =
      static_cast<float*>(scratch(ScratchUse::kCall, p.rank * k * static_cast<int64_t>(sizeof(float))));
  auto arrange = [&](int64_t begin, int64_t end) { arrange_a(p, begin, end, arranged); };
  pool(k / codec::kGroup, ceil_div(int64_t{4096}, max(p.rank, 1) * codec::kGroup), arrange);
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) merge.rows(t * kMergeRows, min((t + 1) * kMergeRows, n), arranged);
  };
  pool(ceil_div(n, kMergeRows), ceil_div(int64_t{16384}, kMergeRows * k), body);
}

void merge_lora_nf4(const Pool& pool, const MergeProblem& p) {
  codec::with_stochastic_encoder(p.w.code, [&]<class Encoder>(const Encoder& encoder) {
    const StochasticGroups<Encoder> groups{encoder, codec::Thresholds(p.seed), p.w.table().zero_code};
    if (p.w.scales.offsets.form == OffsetForm::kZeroPoint8) {
      merge_with<BlockOffsets::kZeroPoints>(pool, p, groups);
    } else if (p.w.scales.offsets) {
      merge_with<BlockOffsets::kAdded>(pool, p, groups);
    } else {
      merge_with<BlockOffsets::kNone>(pool, p, groups);
    }
  });
}

}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
