// One tile of the forward: the outputs of kTileRows weight rows of one shift (rows n, n + period, ...) and the tokens
// of a group.
//
// Each row and token has a vector of partial sums, which starts with the row's part of h · bᵀ and, for integers, the
// products of its offsets and sums of x. accumulate-inl.h adds the products with x. At the end, the vectors of a token
// become kTileRows outputs at once:
//
// clang-format off
//   sums of a token   row 0   [ lane 0 .. lane kLanes - 1 ]  ->  y[n]              + bias
//                     row 1   [ lane 0 .. lane kLanes - 1 ]  ->  y[n + period]     + bias
//                     ..                                         ..
// clang-format on
//
// Rows that integer products cannot serve (verdict/rows-inl.h) are summed again in float32, and so are rows with
// weights that are not finite, where decoded weights are multiplied by padding.
#pragma once

#include <cstdint>

#include "cpp/cpu/few_tokens/accumulate-inl.h"
#include "cpp/cpu/few_tokens/arrange-inl.h"
#include "cpp/cpu/few_tokens/low_rank-inl.h"
#include "cpp/cpu/few_tokens/products-inl.h"
#include "cpp/cpu/few_tokens/weight-inl.h"
#include "cpp/cpu/isa/isa.h"
#include "cpp/cpu/isa/stream.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/cpu/verdict/rows-inl.h"
#include "cpp/format/code_tables.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace few_tokens {

using namespace stream;
using namespace verdict;

using RowBits = uint32_t;  // one bit per row of a tile
static_assert(kTileRows < 32);

template <class T, class Products>
class ForwardTile {
 public:
  using Plan = ForwardPlan<Products>;
  ForwardTile(const LinearProblem& p, const Products& products, const Plan& plan, int64_t first_token,
              const ArrangedX<Products>& x)
      : p_(p), products_(products), plan_(plan), first_token_(first_token), x_(x) {}

  // What `sums` points to: [token][row][kLanes].
  static constexpr int64_t kSumFloats = int64_t{Products::kMaxTokens} * kTileRows * kLanes;

  // Computes `count` weight rows n, n + period, ... for a group of kTokens tokens. The first group finds the rows that
  // its Products do not serve, and `apart` keeps them for the other groups.
  template <int kTokens>
  void compute(int64_t n, int64_t count, int64_t group, const ScaleReader& reader, GranuleScales& scales,
               RowBits* apart, float* sums) const {
    const int64_t m0 = plan_.groups.first(group);
    const int shift = plan_.rows.shift(n);
    const bool start_at_zero = p_.lora.rank == 0 && !p_.lora.adapters && !kSumsOffsets && count == kTileRows;
    if (p_.lora.adapters) {
      start_by_adapter<kTokens>(n, count, m0, reader, scales, sums);
    } else if (!start_at_zero) {
      start<kTokens>(n, count, m0, reader, scales, sums);
    }
    FirstChunks first_chunks(large_codes(p_.w.code), (shift + 1) / 2);
    first_chunks.start();
    const bool looks = !Products::kServesEveryRow && group == 0 && shift + p_.w.k >= kChunk;
    // Not a constant, or GCC compiles a copy of accumulate() without `first_chunks`. The copy has fewer registers for
    // sums: 8 tokens took 1.25 times as long.
    const bool counts = looks && scales.offset == nullptr;
    add_products<kTokens>(n, count, m0, reader, scales, start_at_zero, counts ? &first_chunks : nullptr, sums);
    if (!Products::kServesEveryRow && group == 0) {
      RowBits left = (RowBits{1} << count) - 1;
      if (counts && first_chunks.suffice(scales.bound)) left = 0;
      if constexpr (kSumsOffsets) {
        if (looks && scales.bound < bits_float(kInfinityBits))
          left &= rows_left_by_first_weights(n, count, reader, scales);
      }
      if (left) decode(reader, scales);
      *apart = left ? concentrated_rows(n, left, reader, scales) : 0;
    }
    if (kDecodesOffsets && group == 0) *apart = padding_may_be_nan(scales) ? (RowBits{1} << count) - 1 : 0;
    for (RowBits left = Products::kServesEveryRow && !kDecodesOffsets ? 0 : *apart; left; left &= left - 1) {
      const int64_t t = __builtin_ctz(left);
      decode(reader, scales);
      sum_in_float(n + t * plan_.rows.period, m0, kTokens, reader, scales, sums + t * kLanes);
    }
    finish(n, count, m0, kTokens, reader, scales, sums);
  }

 private:
  static constexpr bool kSumsOffsets = Products::kOffsets == OffsetsEnter::kSums;
  static constexpr bool kDecodesOffsets = Products::kOffsets == OffsetsEnter::kCodes;

  // Where rows share lanes, decoded weights of other rows are multiplied by the zeros around a token. The products are
  // NaN if these weights are not finite.
  bool padding_may_be_nan(const GranuleScales& scales) const {
    return plan_.rows.period > 1 && !(scales.bound < bits_float(kInfinityBits));
  }

  // Adds the products of the tile's rows and x, some segments at a time: as many as stay in the first-level cache are
  // multiplied with a weight row before the next row. `first_chunks`, if any, sees the first chunk of every row.
  template <int kTokens>
  [[gnu::always_inline]] void add_products(int64_t n, int64_t count, int64_t m0, const ScaleReader& reader,
                                           const GranuleScales& scales, bool start_at_zero, FirstChunks* first_chunks,
                                           float* sums) const {
    const int64_t period = plan_.rows.period, k = p_.w.k;
    const int shift = plan_.rows.shift(n), arrangement = plan_.arrangement(shift);
    const typename Products::X* x = x_.values + arrangement * plan_.arrangement_values() + m0 * plan_.chunks * kChunk;
    const float* scale_of_x = x_.scales + arrangement * plan_.arrangement_scales() + m0 * plan_.segments;
    const int64_t segment_bytes =
        kTokens * plan_.segment_chunks * kChunk * static_cast<int64_t>(sizeof(typename Products::X));
    const int64_t most = segment_bytes < 12288 ? 24576 / segment_bytes : 1;
    const int64_t weights = shift + k, chunks = ceil_div(weights, kChunk);
    const int64_t first_weight = plan_.rows.first_weight(n);
    RowSegments segments;
    segments.scales = scales.scale;
    segments.offsets = scales.offset;
    segments.row_weights = period * k;
    segments.log2_granule = reader.log2_granule();
    segments.segment_chunks = plan_.segment_chunks;
    segments.prefetch_ahead = int64_t{kTileRows} * period * k / 2;  // the same bytes of the next super-tile
    // Intel's first level evicts the lines before they are read, so they are prefetched to the second: 440 us instead
    // of 540 for 4096x4096 and one token. On AMD, the first level is faster.
    segments.prefetch_to_second_level = current_cpu().intel;
    for (int64_t s = 0; s * plan_.segment_chunks < chunks; s += most) {
      const int64_t chunk = s * plan_.segment_chunks, first = first_weight + chunk * kChunk;
      segments.packed = p_.w.packed + first / 2;
      segments.first_weight = first - (scales.first << reader.log2_granule());
      const bool is_last = chunks - chunk <= most * plan_.segment_chunks;
      segments.chunks = is_last ? chunks - chunk : most * plan_.segment_chunks;
      segments.last_weights = is_last ? weights - (chunks - 1) * kChunk : kChunk;
      const typename Products::X* x_at = x + chunk * kTokens * kChunk;
      segments.starts_sums = start_at_zero && s == 0;
      FirstChunks* const look = s == 0 ? first_chunks : nullptr;
      const float* const x_scales = scale_of_x + s * kTokens;
      if constexpr (Products::kMaxPairedTokens == 0) {
        const auto accumulate_with = [&](auto of_chunks) {
          accumulate_chunks<kTokens>(products_, segments, of_chunks, count, x_at, x_scales, look, sums);
        };
        if (plan_.has_whole_chunks) {
          if (scales.undecoded) {
            accumulate_with(reader.nested_chunks(scales.first));
          } else {
            accumulate_with(DecodedChunkScales{scales.scale});
          }
          continue;
        }
      }
      int64_t t = 0;
      if constexpr (kTokens <= Products::kMaxPairedTokens) {
        accumulate<kTokens, 2>(products_, segments, count, x_at, x_scales, look, sums);
        t = count & ~int64_t{1};
        segments.packed += t * segments.row_weights / 2;
        segments.first_weight += t * segments.row_weights;
      }
      if (t < count) accumulate<kTokens, 1>(products_, segments, count - t, x_at, x_scales, look, sums + t * kLanes);
    }
  }

  // One bit for each of the `rows` of the tile that is concentrated.
  [[gnu::noinline]] RowBits concentrated_rows(int64_t n, RowBits rows, const ScaleReader& reader,
                                              const GranuleScales& scales) const {
    const RowConcentration concentration(p_.w, reader, scales);
    RowBits concentrated = 0;
    for (; rows; rows &= rows - 1) {
      const int64_t t = __builtin_ctz(rows);
      concentrated |= RowBits{concentration.is_concentrated(n + t * plan_.rows.period)} << t;
    }
    return concentrated;
  }

  // One bit for each of the rows n, n + period, .. that may be concentrated. Each holds a chunk, whose weights have
  // offsets.
  [[gnu::noinline]] RowBits rows_left_by_first_weights(int64_t n, int64_t count, const ScaleReader& reader,
                                                       const GranuleScales& scales) const {
    FirstWeights first_weights(products_.float_book, scales.bound, plan_.rows.shift(n) != 0);
    // If rows are whole granules apart, the lanes have the same position in all of them.
    const bool alike = (plan_.rows.period * p_.w.k & (reader.granule() - 1)) == 0;
    RowBits left = (RowBits{1} << count) - 1;
    unroll<FirstWeights::kRounds>([&](auto round) {
      LaneGranules lanes = lane_granules(plan_.rows.first_weight(n), reader);
      for (RowBits rows = left; rows; rows &= rows - 1) {
        const int64_t t = __builtin_ctz(rows);
        const int64_t weight = plan_.rows.first_weight(n + t * plan_.rows.period);
        if (!alike) lanes = lane_granules(weight, reader);
        const int64_t granule = (weight >> reader.log2_granule()) - scales.first;
        first_weights.see<round.value>(t, load_chunk(p_.w.packed + weight / 2),
                                       lane_scales(scales.scale + granule, lanes),
                                       lane_scales(scales.offset + granule, lanes));
      }
      if (left) left = first_weights.rows_left(count);
    });
    return left;
  }

  // The granules of the lanes of a chunk that starts at a weight, counted from that of the weight.
  static LaneGranules lane_granules(int64_t weight, const ScaleReader& reader) {
    return granule_of_lanes(static_cast<int>(weight & (reader.granule() - 1)), reader.log2_granule());
  }

  // Replaces the sums of weight row n by sums of float32 products of its own weights.
  [[gnu::noinline]] void sum_in_float(int64_t n, int64_t m0, int64_t tokens, const ScaleReader& reader,
                                      const GranuleScales& scales, float* sums) const {
    const int64_t k = p_.w.k;
    for (int64_t i = 0; i < tokens; ++i) {
      const Lora& lora = lora_of(p_.lora, first_token_ + m0 + i);
      const int64_t rank = lora.rank;
      const T* b = static_cast<const T*>(lora.b) + lora.b_row(n);
      Floats acc = zero();
      for (int64_t j = 0; j < rank; j += kLanes)
        acc = fma(load(b + j, rank - j), load(x_.h + (j / kLanes * p_.m + m0 + i) * kLanes), acc);
      store(sums + i * kTileRows * kLanes, acc);
    }
    WeightPieces pieces(p_.w, reader, scales);
    for (int64_t begin = 0; begin < k; begin += WeightPieces::kWeights) {
      const int64_t count = min(k - begin, WeightPieces::kWeights);
      const float* w = pieces.decode(n * k + begin, n * k + begin + count);
      for (int64_t i = 0; i < tokens; ++i) {
        const T* x = static_cast<const T*>(p_.x) + (m0 + i) * k + begin;
        Floats acc = zero();
        for (int64_t j = 0; j < count; j += kLanes) acc = fma(load(w + j, count - j), load(x + j, count - j), acc);
        float* const sum = sums + i * kTileRows * kLanes;
        store(sum, add(load(sum), acc));
      }
    }
  }

  // Sets the sums to the lanes of h · bᵀ, and adds the products of offsets.
  template <int kTokens>
  [[gnu::noinline]] void start(int64_t n, int64_t count, int64_t m0, const ScaleReader& reader,
                               const GranuleScales& scales, float* sums) const {
    const int64_t rank = p_.lora.rank, row_stride = plan_.rows.period * rank;
    const T* b = static_cast<const T*>(p_.lora.b) + n * rank;
    for (int64_t t = 0; t < kTileRows; ++t, b += row_stride, sums += kLanes) {
      Floats acc[kTokens];
      unroll<kTokens>([&](auto i) { acc[i] = zero(); });
      const float* h = x_.h + m0 * kLanes;
      for (int64_t j = 0; t < count && j < rank; j += kLanes, h += p_.m * kLanes) {
        const Floats row = load(b + j, rank - j);
        unroll<kTokens>([&](auto i) { acc[i] = fma(row, load(h + i * kLanes), acc[i]); });
      }
      if constexpr (kSumsOffsets) {
        if (t < count) add_offsets<kTokens>(n + t * plan_.rows.period, m0, reader, scales, acc);
      }
      unroll<kTokens>([&](auto i) { store(sums + i * kTileRows * kLanes, acc[i]); });
    }
  }

  // The same, where each token may use another adapter.
  template <int kTokens>
  [[gnu::noinline]] void start_by_adapter(int64_t n, int64_t count, int64_t m0, const ScaleReader& reader,
                                          const GranuleScales& scales, float* sums_of_tokens) const {
    float* sums = sums_of_tokens;
    for (int64_t i = 0; i < kTokens; ++i, sums += kTileRows * kLanes) {
      const Lora& lora = lora_of(p_.lora, first_token_ + m0 + i);
      const T* const b = static_cast<const T*>(lora.b) + lora.b_row(n);
      const int64_t row_stride = lora.b_row(plan_.rows.period), rank = lora.rank;
      for (int64_t t = rank ? count : 0; t < kTileRows; ++t) store(sums + t * kLanes, zero());
      // Ranks [j, j + ranks), for all rows while their h is in registers.
      const auto add_ranks = [&](auto vectors, int64_t j, int64_t ranks) {
        Floats h[vectors.value];
        unroll<vectors.value>(
            [&](auto v) { h[v.value] = load(x_.h + ((j / kLanes + v.value) * p_.m + m0 + i) * kLanes); });
        for (int64_t t = 0; t < count; ++t) {
          Floats acc = j ? load(sums + t * kLanes) : zero();
          unroll<vectors.value>([&](auto v) {
            acc = fma(load(b + t * row_stride + j + v.value * kLanes, ranks - v.value * kLanes), h[v.value], acc);
          });
          store(sums + t * kLanes, acc);
        }
      };
      int64_t j = 0;
      for (; j + 2 * kLanes <= rank; j += 2 * kLanes) add_ranks(Index<2>{}, j, 2 * kLanes);
      for (; j + kLanes <= rank; j += kLanes) add_ranks(Index<1>{}, j, kLanes);
      if (j < rank) add_ranks(Index<1>{}, j, rank - j);
    }
    if constexpr (kSumsOffsets) {
      for (int64_t t = 0; t < count; ++t) {
        const auto at = [&](int i) { return sums_of_tokens + (i * kTileRows + t) * kLanes; };
        Floats acc[kTokens];
        unroll<kTokens>([&](auto i) { acc[i] = load(at(i)); });
        add_offsets<kTokens>(n + t * plan_.rows.period, m0, reader, scales, acc);
        unroll<kTokens>([&](auto i) { store(at(i), acc[i]); });
      }
    }
  }

  // Adds the products of a row's offsets and the sums of x over its runs.
  template <int kTokens>
  [[gnu::always_inline]] void add_offsets(int64_t row, int64_t m0, const ScaleReader& reader,
                                          const GranuleScales& scales, Floats (&acc)[kTokens]) const {
    const OffsetRuns& runs = plan_.runs;
    const int shift = plan_.rows.shift(row);
    const int64_t weight = plan_.rows.first_weight(row), log2_granule = reader.log2_granule();
    const float* offset = scales.offset + ((weight >> log2_granule) - scales.first);
    const float* sum =
        x_.sums + plan_.arrangement(shift) * plan_.arrangement_sums() + m0 * runs.vectors(plan_.chunks) * kLanes;
    const auto add_runs = [&](Floats of_runs) {
      unroll<kTokens>([&](auto i) { acc[i] = fma(load(sum + i * kLanes), of_runs, acc[i]); });
      sum += kTokens * kLanes;
    };
    int64_t left = ceil_div(shift + p_.w.k, runs.lanes * kLaneWeights);
    if (runs.are_granules) {
      for (; left >= kLanes; left -= kLanes, offset += kLanes) add_runs(load(offset));
      if (left > 0) add_runs(load(offset, left));
    } else {
      const LaneGranules lanes = lane_granules(weight, reader);
      for (; left > 0; left -= kLanes, offset += kChunk >> log2_granule) add_runs(lane_scales(offset, lanes, left));
    }
  }

  // Writes the outputs. A token whose sums overflowed because of a huge scale becomes a fallback token.
  void finish(int64_t n, int64_t count, int64_t m0, int64_t tokens, const ScaleReader& reader, GranuleScales& scales,
              const float* sums) const {
    const T* bias = static_cast<const T*>(p_.bias);
    const int64_t period = plan_.rows.period;
    for (int64_t i = 0; i < tokens; ++i) {
      Floats out = sums_of(sums + i * kTileRows * kLanes);
      if (Products::kMayOverflow && !all_finite(out) && any_huge(reader, scales))
        x_.fallback_tokens->add(first_token_ + m0 + i);
      T* y = static_cast<T*>(p_.y) + (m0 + i) * p_.w.n + n;
      if (period == 1) {
        if (bias) out = add(out, load(bias + n, count));
        store(y, out, count);
        continue;
      }
      if (bias) {
        float of_row[kLanes] = {};
        for (int64_t t = 0; t < count; ++t) of_row[t] = to_float(bias[n + t * period]);
        out = add(out, load(of_row));
      }
      T value[kLanes];
      store(value, out, kLanes);
      for (int64_t t = 0; t < count; ++t) y[t * period] = value[t];
    }
  }

  // Reads the scales, if the inner loop has read them as they are stored.
  static void decode(const ScaleReader& reader, GranuleScales& scales) {
    if (scales.undecoded) reader.read(scales.first, scales.count, scales.undecoded);
    scales.undecoded = nullptr;
  }

  static bool any_huge(const ScaleReader& reader, GranuleScales& scales) {
    decode(reader, scales);
    return any_huge(scales.scale, scales.count) || (scales.offset && any_huge(scales.offset, scales.count));
  }
  static bool any_huge(const float* x, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = float_bits(x[i]) & kMagnitudeBits;
      if (bits > float_bits(kHugeScale) && bits < kInfinityBits) return true;
    }
    return false;
  }

  const LinearProblem& p_;
  const Products& products_;
  const Plan& plan_;
  const int64_t first_token_;
  const ArrangedX<Products> x_;
};

}  // namespace few_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
