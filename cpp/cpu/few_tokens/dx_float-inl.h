// few_tokens_float: the sums of dx in float32 products, for any shape.
#pragma once

#include <cstdint>

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/few_tokens/budget-inl.h"
#include "cpp/cpu/few_tokens/low_rank-inl.h"
#include "cpp/cpu/few_tokens/slabs-inl.h"
#include "cpp/cpu/few_tokens/weight-inl.h"
#include "cpp/cpu/isa/stream.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/shared/carver-inl.h"
#include "cpp/cpu/shared/dropout.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/scratch.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace few_tokens {

using namespace stream;

inline constexpr int kDxTokens = 4;  // per pass over a tile

// With offsets each weight is decoded before it is multiplied, as in the forward.
template <class T, bool kHasOffsets>
class FloatDx {
 public:
  explicit FloatDx(const LinearDxProblem& p) : p_(p), rows_(p.w.k), book_(p.w.table().value) {}

  // As many chunks as half of the scratch holds sums for.
  int64_t strip_chunks() const {
    const int64_t fit = kMaxScratchBytes / 2 / (4 * rows_.period * p_.m * kChunk) - 1;
    return fit < 64 ? fit : 64;
  }
  int64_t tile_rows() const { return int64_t{kDxTileRows} * rows_.period; }
  int64_t scale_floats() const {
    return ceil_div(tile_rows() * p_.w.k, ScaleReader(p_.w.scales).granule()) + 2 + kLanes;
  }

  // Chunks begin .. end - 1 of the sums over rows first_row .. last_row - 1.
  void operator()(int64_t first_row, int64_t last_row, int64_t begin, int64_t end, const SlabSums& out) const {
    // Rows with a shift reach into one chunk more.
    const int64_t count = end - begin + (rows_.period > 1), period = rows_.period;
    const ScaleReader reader(p_.w.scales);
    const int64_t sum_count = period * count * p_.m * kChunk;
    Memory memory;
    const auto lay_out = [&](void* base) {
      Carver carver(base);
      memory.sums = carver.take<float>(sum_count);
      memory.scales = carver.take<float>(scale_floats());
      memory.offsets = kHasOffsets ? carver.take<float>(scale_floats()) : nullptr;
      memory.dy = carver.take<float>(p_.m * kDxTileRows);
      return carver.used();
    };
    lay_out(scratch(ScratchUse::kThread, lay_out(nullptr)));
    for (int64_t i = 0; i < sum_count; i += kLanes) store(memory.sums + i, zero());

    for (int64_t n = first_row; n < last_row; n += tile_rows()) {
      // The scales of all columns are read, not only the strip's: those of whole rows are contiguous, and decoding many
      // at once is fast.
      const int64_t last = n + tile_rows() < last_row ? n + tile_rows() : last_row;
      const int64_t first_granule = rows_.first_weight(n) >> reader.log2_granule();
      const int64_t granules = ceil_div(last * p_.w.k, reader.granule()) - first_granule;
      reader.read(first_granule, granules, memory.scales);
      if constexpr (kHasOffsets) reader.read_offsets(first_granule, granules, memory.scales, memory.offsets);
      for (int64_t s = 0; s < period && n + s < last; ++s)
        tile(n + s, last, begin, count, reader, first_granule, memory);
    }
    gather(begin, end, count, memory, out);
  }

 private:
  struct Memory {
    float *sums, *scales, *offsets, *dy;
  };

  // Adds rows n, n + period, ... < last of W, chunks first .. first + count - 1. memory.scales begins at granule
  // `first_granule`.
  [[gnu::flatten]] void tile(int64_t n, int64_t last, int64_t first, int64_t count, const ScaleReader& reader,
                             int64_t first_granule, const Memory& memory) const {
    const int64_t period = rows_.period, rows = ceil_div(last - n, period), weights = p_.w.k + rows_.shift(n);
    const float* scales_of_row[kDxTileRows];
    LaneGranules granules[kDxTileRows];
    for (int64_t t = 0; t < rows; ++t) {
      const int64_t begin = rows_.first_weight(n + t * period) + first * kChunk;
      const int64_t granule = begin >> reader.log2_granule();
      scales_of_row[t] = memory.scales + granule - first_granule;
      granules[t] =
          granule_of_lanes(static_cast<int>(begin - (granule << reader.log2_granule())), reader.log2_granule());
      const T* dy = static_cast<const T*>(p_.dy) + n + t * period;
      for (int64_t i = 0; i < p_.m; ++i) memory.dy[i * kDxTileRows + t] = to_float(dy[i * p_.w.n]);
    }
    const FloatCodebook book = book_;
    const int64_t ahead = kDxTileRows * period * p_.w.k / 2;
    float* sums = memory.sums + (rows_.shift(n) * period / 8) * count * p_.m * kChunk;
    for (int64_t c = 0; c < count; ++c) {
      const int64_t rest = weights - (first + c) * kChunk;
      if (rest <= 0) break;
      const auto codes_of = [&](int64_t t) {
        const uint8_t* packed = p_.w.packed + (rows_.first_weight(n + t * period) + (first + c) * kChunk) / 2;
        __builtin_prefetch(packed + ahead, 0, 2);
        return decode(rest < kChunk ? load_chunk(packed, ceil_div(rest, 2)) : load_chunk(packed), book);
      };
      const auto scales_of = [&](int64_t t) {
        const float* at = scales_of_row[t] + c * (kChunk >> reader.log2_granule());
        return lane_scales(at, granules[t], ceil_div(rest, kLaneWeights));
      };
      const auto offsets_of = [&](int64_t t) {
        const float* at = scales_of_row[t] + (memory.offsets - memory.scales) + c * (kChunk >> reader.log2_granule());
        return lane_scales(at, granules[t], ceil_div(rest, kLaneWeights));
      };
      for (int64_t i = 0; i < p_.m; i += kDxTokens) {
        with_count<kDxTokens>(p_.m - i < kDxTokens ? p_.m - i : kDxTokens, [&](auto tokens) {
          add_rows<tokens>(rows, codes_of, scales_of, offsets_of, memory.dy + i * kDxTileRows, sums + i * kChunk);
        });
      }
      sums += p_.m * kChunk;
    }
  }

  // sums [token][8][kLanes] += the products of `rows` rows of W. A pass sums as many of the eight vectors as registers
  // hold sums for, of all tokens. Decoding the rows again in the next pass costs less than moving sums to memory and
  // back.
  template <int kTokens, class Codes, class Scales, class Offsets>
  [[gnu::always_inline]] void add_rows(int64_t rows, const Codes& codes_of, const Scales& scales_of,
                                       const Offsets& offsets_of, const float* dy, float* sums) const {
    constexpr int kVectors = kTokens * 8 <= kDxSums ? 8 : 4;
    unroll<8 / kVectors>([&](auto pass) {
      Floats sum[kTokens][kVectors];
      const auto at = [&](int i, int s) { return sums + i * kChunk + (pass * kVectors + s) * kLanes; };
      unroll<kTokens>([&](auto i) { unroll<kVectors>([&](auto s) { sum[i][s] = load(at(i, s)); }); });
      for (int64_t t = 0; t < rows; ++t) {
        FloatCodes codes = codes_of(t);
        const Floats scale = scales_of(t);
        if constexpr (kHasOffsets) {
          const Floats offset = offsets_of(t);
          unroll<kVectors>([&](auto s) {
            Floats& weight = codes.v[pass * kVectors + s];
            weight = add(mul(weight, scale), offset);
          });
        }
        unroll<kTokens>([&](auto i) {
          const Floats of_token = splat(dy[i * kDxTileRows + t]);
          const Floats by = kHasOffsets ? of_token : mul(scale, of_token);
          unroll<kVectors>([&](auto s) { sum[i][s] = fma(codes.v[pass * kVectors + s], by, sum[i][s]); });
        });
      }
      unroll<kTokens>([&](auto i) { unroll<kVectors>([&](auto s) { store(at(i, s), sum[i][s]); }); });
    });
  }

  // Adds the sums [shift][chunk][token][vector][lane] of all shifts up to columns in memory order.
  void gather(int64_t begin, int64_t end, int64_t count, const Memory& memory, const SlabSums& out) const {
    const int64_t columns = (end - begin) * kChunk;
    for (int64_t i = 0; i < p_.m; ++i) {
      float* const to = out.at(i, begin * kChunk);
      for (int64_t c = 0; c < columns; c += kLanes) store(to + c, zero());
      for (int64_t shift = 0; shift < rows_.period; ++shift) {
        for (int64_t c = 0; c < count; ++c) {
          const float* sums = memory.sums + ((shift * count + c) * p_.m + i) * kChunk;
          float in_order[kChunk];
          for (int64_t s = 0; s < 8; ++s) {
            float* weight = in_order + (s ^ 1);
            for (int64_t l = 0; l < kLanes; ++l) weight[l * 8] = sums[s * kLanes + l];
          }
          const int64_t column = c * kChunk - shift * (8 / rows_.period), rest = columns - column;
          const int64_t last = rest < kChunk ? rest : kChunk;
          for (int64_t j = column < 0 ? -column : 0; j < last; j += kLanes)
            store(to + column + j, add(load(to + column + j, last - j), load(in_order + j, last - j)), last - j);
        }
      }
    }
  }

  const LinearDxProblem& p_;
  const WeightRows rows_;
  const FloatCodebook book_;
};

template <class T, bool kHasOffsets>
Outcome dx_float_as(const Pool& pool, const LinearDxProblem& p) {
  const FloatDx<T, kHasOffsets> kernel(p);
  if (4 * kernel.scale_floats() > kMaxScratchBytes / 2) return Outcome::kTooLarge;
  dx_with<T>(pool, p, kernel);
  return Outcome::kDone;
}
template <bool kHasOffsets>
Outcome dx_float(const Pool& pool, const LinearDxProblem& p) {
  return p.dtype == DType::kBFloat16 ? dx_float_as<bfloat16, kHasOffsets>(pool, p)
                                     : dx_float_as<float16, kHasOffsets>(pool, p);
}

}  // namespace few_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
