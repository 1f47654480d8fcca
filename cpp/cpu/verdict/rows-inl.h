// Finds the weight rows that integer products cannot serve: those whose sum depends on a few weights.
//
// Integer products round x to a fixed step of the largest value of its segment (few_tokens/forward_int-inl.h), so a
// small x has a large relative error. In a sum of many products of like size that error is far below the rounding of a
// weight to the dtype. In a row of the identity, whose single weight may meet a small x, it is the error of the whole
// sum. Such rows are *concentrated*:
//
//   sum over k of min(|w_k|, m / 8)  <  2 m,   m = the largest |w| of the row
//
// In every other row at least 16 weights share at least twice the largest. Panels ask for 8 m (Rule::least_sum).
// README.md derives what follows.
//
// For most tiles, the first chunks of the rows prove that no row is concentrated, by counting *large* codes
// (LargeCodes), whose weights are at least a known fraction of their scale. In other tiles each row is examined
// separately, and is decoded if counting all its codes proves nothing.
//
// With offsets, a code alone says nothing about the size of a weight, so first chunks are decoded. Rows of zeros, and
// those whose weights are all far smaller than the values and the offsets of which they are sums, count as
// concentrated, because the integer sums of both cancel only to float32's precision.
#pragma once

#include <cstdint>

#include "cpp/cpu/codec/largest-inl.h"
#include "cpp/cpu/codec/scale_reader-inl.h"
#include "cpp/cpu/isa/codec.h"
#include "cpp/cpu/isa/stream.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/cpu/verdict/tokens-inl.h"
#include "cpp/format/code_tables.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace verdict {

using namespace stream;

// Scales above it may make sums overflow although y is finite.
inline constexpr float kHugeScale = 0x1p90f;

// In units of the largest weight: the most that one weight contributes to the sum, and the least sum of a row of the
// kernels for few tokens.
inline constexpr float kMaxOfOne = 0.125f, kMinOfAll = kFewTokensRule.least_sum;

// Decoded scales and offsets of granules first .. first + count - 1. `offset` is null where the weight has none.
struct GranuleScales {
  const float *scale, *offset;
  int64_t first, count;
  float bound;                 // no finite scale is above it; with offsets, no weight is (weight_bound)
  float* undecoded = nullptr;  // where `scale` points, if the scales have yet to be read
};

// A bound of the weights of some granules, and of the values and offsets of which they are sums. It is not finite if
// one of these is not.
inline float weight_bound(const CodeTable& table, const float* scale, const float* offset, int64_t count) {
  return table.largest * bits_float(largest_bits_within(scale, count)) + bits_float(largest_bits_within(offset, count));
}

// Yields the weights of W piece by piece, as float32 in memory order.
class WeightPieces {
 public:
  static constexpr int64_t kWeights = 32 * kLanes;  // so that a lane sums at most 32 products of a piece

  WeightPieces(const Weight& w, const ScaleReader& reader, const GranuleScales& scales)
      : packed_(w.packed),
        packed_end_(w.packed + packed_bytes(w.n * w.k)),
        values_(w.table()),
        reader_(reader),
        scales_(scales) {}

  // Weights begin .. end - 1, at most kWeights of them. The pointer is valid until the next call.
  const float* decode(int64_t begin, int64_t end) {
    constexpr int64_t kGroup = codec::kGroup;
    const int64_t first = begin / kGroup * kGroup;
    for (int64_t i = first; i < end; i += kGroup) {
      const uint8_t* packed = packed_ + i / 2;
      uint8_t copy[kGroup / 2] = {};
      if (packed_end_ - packed < kGroup / 2) {
        for (int64_t b = 0; b < packed_end_ - packed; ++b) copy[b] = packed[b];
        packed = copy;
      }
      if (reader_.granule() < kGroup) {
        decode_halves(i, packed, weights_ + (i - first));
        continue;
      }
      codec::decode<false>(table_of((i >> reader_.log2_granule()) - scales_.first), packed, weights_ + (i - first));
    }
    return weights_ + (begin - first);
  }

 private:
  codec::Table<float> table_of(int64_t granule) const {
    if (scales_.offset) return codec::make_table<float>(values_, scales_.scale[granule], scales_.offset[granule]);
    return codec::make_table<float>(values_, scales_.scale[granule]);
  }

  // Decodes the group at i, whose halves have scales of their own. A half whose scale is not given is left out.
  void decode_halves(int64_t i, const uint8_t* packed, float* out) const {
    constexpr int64_t kHalf = codec::kGroup / 2;
    float group[codec::kGroup];
    for (int64_t half = 0; half < codec::kGroup; half += kHalf) {
      const int64_t granule = ((i + half) >> reader_.log2_granule()) - scales_.first;
      if (granule < 0 || granule >= scales_.count) continue;
      codec::decode<false>(table_of(granule), packed, group);
      for (int64_t j = half; j < half + kHalf; ++j) out[j] = group[j];
    }
  }

  const uint8_t *const packed_, *const packed_end_;
  const codec::Values values_;
  const ScaleReader& reader_;
  const GranuleScales scales_;
  alignas(64) float weights_[kWeights + 2 * codec::kGroup];
};

// What the first chunks of a tile's rows contribute to the sum at least: per row, a count of large weights times a
// scale. It takes a dozen instructions per row and no branch.
class FirstChunks {
 public:
  // Up to `others` bytes of a first chunk belong to the previous row.
  FirstChunks(const LargeCodes& large, int others)
      : large_(large.is_large), least_large_(large.least), others_(others) {}
  void see(Chunk chunk, Floats scales) {
    const int count = count_bytes_with(large_, chunk) - others_;
    least_count_ = count < least_count_ ? count : least_count_;
    store(least_products_, min(mul(absolute(scales), splat(static_cast<float>(count) * kPart)), load(least_products_)));
  }
  // Whether no row is concentrated, as far as the first chunks prove. No scale is above `largest`, which is finite.
  bool suffice(float largest) const {
    if (least_count_ < static_cast<int>(kMinOfAll / kMaxOfOne)) return false;
    const float least = kMinOfAll * kPart * largest / least_large_;
    // count_at_least compares magnitudes, so both sides are shifted to be positive.
    return count_at_least(add(load(least_products_), splat(largest)), largest + least) == kLanes;
  }
  void start() {
    least_count_ = kChunk;
    store(least_products_, splat(bits_float(kInfinityBits)));
  }

 private:
  static constexpr float kPart = 2.0f / kChunk;  // counts are multiplied by it, so that no product overflows

  alignas(64) float least_products_[kLanes];
  const CodeSet large_;
  const float least_large_;
  const int others_;
  int least_count_;
};

// The same for weights with offsets, row by row. A round decodes 32 weights of each first chunk, which mostly suffice.
class FirstWeights {
 public:
  static constexpr int kRounds = kChunk / 32;

  // `book` decodes the weight's codes. No weight of the tile is above `bound`, which is finite. The first lane of a
  // chunk is left out if it `is_shared` with the previous row.
  FirstWeights(const FloatCodebook& book, float bound, bool is_shared) : book_(book), bound_(bound) {
    for (float& most : most_) most = bound * kMaxOfOne;
    if (is_shared) most_[0] = 0.0f;
  }
  template <int kRound>
  void see(int64_t row, Chunk chunk, Floats scale, Floats offset) {
    constexpr int kVectors = kLaneWeights / kRounds;
    const FloatCodes codes = decode(chunk, book_);
    const Floats most = load(most_);
    Floats sum = kRound ? load(sums_ + row * kLanes) : zero();
    unroll<kVectors>([&](auto i) {
      constexpr int kNumber = 2 * (kRound * kVectors + i.value);  // even vectors first, which AVX2 decodes together
      constexpr int kVector = kNumber < kLaneWeights ? kNumber : kNumber - kLaneWeights + 1;
      sum = add(sum, min(absolute(fma(codes.v[kVector], scale, offset)), most));
    });
    store(sums_ + row * kLanes, sum);
  }
  // One bit for each row that may be concentrated, as far as its weights seen prove. Rows from `count` on do not exist.
  uint32_t rows_left(int64_t count) {
    for (int64_t t = count; t < kLanes; ++t) store(sums_ + t * kLanes, splat(bits_float(kInfinityBits)));
    const Floats sums = sums_of(sums_);
    if (count_at_least(sums, kMinOfAll * bound_) == kLanes) return 0;
    float of_row[kLanes];
    store(of_row, sums);
    uint32_t rows = 0;
    for (int t = 0; t < kLanes; ++t) rows |= uint32_t{!(of_row[t] >= kMinOfAll * bound_)} << t;
    return rows;
  }

 private:
  const FloatCodebook& book_;
  const float bound_;
  alignas(64) float most_[kLanes];
  alignas(64) float sums_[kLanes * kLanes];
};

class RowConcentration {
 public:
  RowConcentration(const Weight& w, const ScaleReader& reader, const GranuleScales& scales,
                   const Rule& rule = kFewTokensRule)
      : w_(w), reader_(reader), scales_(scales), large_(large_codes(w.code)), least_sum_(rule.least_sum) {}

  bool is_concentrated(int64_t n) const { return is_concentrated(n * w_.k, (n + 1) * w_.k); }

 private:
  // Whether weights begin .. end - 1, a row, are concentrated.
  bool is_concentrated(int64_t begin, int64_t end) const {
    if (scales_.offset) return is_concentrated_with_offsets(begin, end);
    const int64_t first = begin >> reader_.log2_granule(), last = (end - 1) >> reader_.log2_granule();
    const float largest = bits_float(largest_bits_within(scales_.scale + (first - scales_.first), last + 1 - first));
    const CodeSet large(large_.is_large);
    float sum = 0.0f;
    for (int64_t i = round_up(begin, kLaneWeights); i + kChunk <= end; i += kChunk) {
      const int64_t last_granule = (i + kChunk - 1) >> reader_.log2_granule();
      float least = largest * kMaxOfOne;
      for (int64_t g = i >> reader_.log2_granule(); g <= last_granule; ++g) {
        const float scale = __builtin_fabsf(scales_.scale[g - scales_.first]) * large_.least;
        least = scale < least ? scale : least;
      }
      sum += static_cast<float>(count_bytes_with(large, load_chunk(w_.packed + i / 2))) * least;
      if (sum >= least_sum_ * largest) return false;
    }
    return largest != 0.0f && is_concentrated_exactly(begin, end);
  }

  // Weights are decoded until they prove that the row is not concentrated.
  [[gnu::noinline]] bool is_concentrated_with_offsets(int64_t begin, int64_t end) const {
    constexpr int64_t kPart = codec::kGroup;  // mostly a few suffice
    const int64_t first = (begin >> reader_.log2_granule()) - scales_.first;
    const int64_t count = ((end - 1) >> reader_.log2_granule()) - scales_.first + 1 - first;
    const float bound = weight_bound(w_.table(), scales_.scale + first, scales_.offset + first, count);
    WeightPieces pieces(w_, reader_, scales_);
    float total = 0.0f;
    for (int64_t i = begin; i < end && bound < bits_float(kInfinityBits); i += kPart) {
      const int64_t count = min(end - i, kPart);
      const float* const w = pieces.decode(i, i + count);
      Floats sum_of_part = zero();
      for (int64_t j = 0; j < count; j += kLanes)
        sum_of_part = add(sum_of_part, min(absolute(load(w + j, count - j)), splat(bound * kMaxOfOne)));
      total += sum(sum_of_part);
      if (total >= least_sum_ * bound) return false;
    }
    return is_concentrated_exactly(begin, end, bound);
  }

  // `bound`: with offsets, weight_bound of the row.
  [[gnu::noinline]] bool is_concentrated_exactly(int64_t begin, int64_t end, float bound = 0.0f) const {
    WeightPieces pieces(w_, reader_, scales_);
    const auto each_vector = [&](const auto& see) {
      for (int64_t i = begin; i < end; i += WeightPieces::kWeights) {
        const int64_t count = min(end - i, WeightPieces::kWeights);
        const float* w = pieces.decode(i, i + count);
        for (int64_t j = 0; j < count; j += kLanes) see(load(w + j, count - j));
      }
    };
    Ints seen = round_to_ints(zero());
    each_vector([&](Floats w) { seen = max_bits(seen, w); });
    const uint32_t most = largest_lane(seen);
    if (scales_.offset && bits_float(most) * 64.0f < bound) return true;
    if (most == 0) return scales_.offset != nullptr;
    // A lower bound of min(|w|, m / 8): a weight of at least m / 8 counts as m / 8, one of at least m / 16 as m / 16,
    // one of at least m / 64 as m / 64.
    const float largest = bits_float(most);
    int64_t eighths = 0, sixteenths = 0, sixty_fourths = 0;
    each_vector([&](Floats w) {
      eighths += count_at_least(w, largest * 0.125f), sixteenths += count_at_least(w, largest * 0.0625f);
      sixty_fourths += count_at_least(w, largest * 0.015625f);
    });
    return 4 * eighths + 3 * sixteenths + sixty_fourths < static_cast<int64_t>(64 * least_sum_);
  }

  const Weight& w_;
  const ScaleReader& reader_;
  const GranuleScales scales_;
  const LargeCodes& large_;
  const float least_sum_;
};

// Whether panels of integers serve a row of W: its weights are finite, and it is not concentrated. `scales` has space
// for row_scales(w).
inline int64_t row_scales(const Weight& w) {
  const int64_t granules = ceil_div(w.k, ScaleReader(w.scales).granule());
  return (w.scales.offsets ? 2 : 1) * (granules + 2 + kLanes);
}
inline bool serves_row(const Weight& w, int64_t row, float* scales) {
  const ScaleReader reader(w.scales);
  const int64_t first = row * w.k / reader.granule(), count = ceil_div((row + 1) * w.k, reader.granule()) - first;
  float* const offsets = w.scales.offsets ? scales + row_scales(w) / 2 : nullptr;
  reader.read(first, count, scales);
  if (offsets) reader.read_offsets(first, count, scales, offsets);
  const float* const both[] = {scales, offsets};
  for (const float* values : both) {
    const uint32_t largest = values ? largest_bits_within(values, count) : 0;
    if (bits_float(largest) > kHugeScale || largest >= kInfinityBits) return false;
  }
  const GranuleScales of_row{scales, offsets, first, count, 0.0f};
  return !RowConcentration(w, reader, of_row, kManyTokensRule).is_concentrated(row);
}

}  // namespace verdict
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
