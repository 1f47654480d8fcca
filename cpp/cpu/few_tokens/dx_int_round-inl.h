// Rounds dy · scale to integers for the integer sums of dx, a strip of a tile of weight rows at a time.
//
// A lane multiplies two weight rows at once, so dy times the scales of two rows becomes a pair of int16:
//
//   pairs[j][token][group] = (round(dy[2j] · scale[2j][group] / unit), round(dy[2j+1] · scale[2j+1][group] / unit))
//
// The unit of a token and tile is the largest possible |dy · scale| over 16383 (14 bits), so that one instruction
// computes 32 products and 16 rows are summed exactly in int32.
//
// Rounding dy · scale is no worse than rounding w if the 16 products of a column are similar in size. Logarithms tell:
// for a token and a group of columns, the largest |dy · scale| of the tile over the geometric mean of the 16 must not
// exceed the largest spread. The root mean square error of a product is 0.29 units, where rounding w to the dtype makes
// 0.42 * 2^-8 (bfloat16) or 0.42 * 2^-11 (float16) of the product. With spreads of 2^7 and 2^4, the first stays
// below 1.4 of the second, and their sum below the two roundings (of w and of dx) of the same formula in that type,
// since codes have next to no error here. N(0, 1) has a spread of 2^2.
//
// A token and group of a tile that exceed the spread fall back to float32: outliers in dy, weight rows of very
// different size, NaN, numbers near the ends of float32's range. Concentrated groups (dx_int_scan-inl.h) fall back for
// every token.
#pragma once

#include <cstdint>

#include "cpp/cpu/few_tokens/dx_int_scan-inl.h"
#include "cpp/cpu/few_tokens/slabs-inl.h"
#include "cpp/cpu/few_tokens/weight-inl.h"
#include "cpp/cpu/isa/row_pairs.h"
#include "cpp/cpu/isa/stream.h"
#include "cpp/cpu/shared/carver-inl.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/verdict/columns-inl.h"
#include "cpp/format/code_tables.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace few_tokens {

using namespace stream;
using namespace verdict;

inline constexpr int kDxPairs = kDxTileRows / 2;  // of rows in a tile
inline constexpr float kLargestDy = 16383.0f;     // 16 products with 13-bit codes stay inside int32

// log2 |x| from the bits of x, less than 0.1 too small: linear between powers of two.
inline float approximate_log2(double bits) { return static_cast<float>(bits * 0x1p-23 - 127.0); }

// A strip of a tile.
struct RoundedTile {
  static constexpr int64_t kMaskWords = kDxStripGroups / kLanes;

  float* scales;          // [row][kDxScaleStride], one per group
  float* unit;            // [token]: the value of 1 in the integer sums
  int32_t* pairs;         // [pair][token][kDxStripGroups]: rounded dy · scale of two rows, or 0 for fallbacks
  float* log2_scale;      // [group]: the mean over the rows of the tile
  uint16_t* served;       // [token][kMaskWords]: a bit per group, 0 for fallbacks
  uint64_t concentrated;  // a bit per group that falls back for every token

  void take(Carver* carver, int64_t m) {
    scales = carver->take<float>(kDxTileRows * kDxScaleStride);
    unit = carver->take<float>(m);
    pairs = carver->take<int32_t>(kDxPairs * m * kDxStripGroups);
    log2_scale = carver->take<float>(kDxStripGroups + kLanes);
    served = carver->take<uint16_t>(m * kMaskWords);
  }
  bool serves(int64_t token, int64_t group) const {
    return served[token * kMaskWords + group / kLanes] >> group % kLanes & 1;
  }
};

template <class T>
class DxRounder {
 public:
  DxRounder(const LinearDxProblem& p, const DxScan& scan)
      : p_(p), codes_(int_codes(p.w.code)), row_groups_(p.w.k / kDxColumns), scan_(scan) {}

  // Rounds the tile of weight rows n, n + 1, ... < last_row and groups first .. first + groups - 1. The units depend on
  // whole rows of W, not on the strip. Returns whether all groups are served for every token.
  bool round_tile(int64_t n, int64_t last_row, int64_t first, int64_t groups, const ScaleReader& reader,
                  const RoundedTile& tile) const {
    const int64_t rows = last_row - n < kDxTileRows ? last_row - n : kDxTileRows;
    float bound[kDxTileRows] = {};
    for (int64_t t = 0; t < rows; ++t) {
      const int64_t row_group = (n + t) * row_groups_;
      reader.read(row_group + first, groups, tile.scales + t * kDxScaleStride);
      bound[t] = reader.largest(row_group, row_groups_);
    }
    for (int64_t b = 0; b < groups; b += kLanes) {
      Floats sum = zero();
      Ints largest = no_ints();
      for (int64_t t = 0; t < rows; ++t) {
        const Ints bits = magnitude_bits(load(tile.scales + t * kDxScaleStride + b));
        largest = max_ints(largest, bits);
        sum = add(sum, to_floats(bits));
      }
      const Floats mean = fma(sum, splat(0x1p-23f / static_cast<float>(rows)), splat(-127.0f));
      store(tile.log2_scale + b, where_less(largest, kInfinityBits, mean));
    }
    for (uint64_t left = tile.concentrated; left; left &= left - 1)
      tile.log2_scale[__builtin_ctzll(left)] = -bits_float(kInfinityBits);
    uint32_t fallbacks = 0;
    for (int64_t i = 0; i < p_.m; ++i) fallbacks |= round_scaled_dy(i, n, rows, groups, bound, tile);
    return !fallbacks;
  }

 private:
  // Rounds for one token. Returns a bit for each lane that falls back in any vector of groups.
  uint32_t round_scaled_dy(int64_t i, int64_t n, int64_t rows, int64_t groups, const float* bound,
                           const RoundedTile& tile) const {
    const T* row = static_cast<const T*>(p_.dy) + i * p_.w.n + n;
    float dy[kDxTileRows] = {};
    uint32_t largest_bits = 0, largest_dy_bits = 0;
    int64_t bits_sum = 0, nonzero = 0;
    for (int64_t t = 0; t < rows; ++t) {
      dy[t] = to_float(row[t]);
      const uint32_t dy_bits = float_bits(dy[t]) & kMagnitudeBits, bits = float_bits(dy[t] * bound[t]) & kMagnitudeBits;
      largest_bits = bits > largest_bits ? bits : largest_bits;
      largest_dy_bits = dy_bits > largest_dy_bits ? dy_bits : largest_dy_bits;
      bits_sum += dy_bits, nonzero += dy_bits != 0;
    }
    const bool in_range = largest_bits >= power_of_two_bits(-60) && largest_bits <= power_of_two_bits(60) &&
                          bits_float(largest_dy_bits) <= scan_.most_dy[i];
    const float largest = in_range ? bits_float(largest_bits) : 1.0f;
    tile.unit[i] = static_cast<float>(largest / (kLargestDy * codes_.per_one));
    // The least log2_scale of a group that is served.
    float least = bits_float(kInfinityBits);
    if (nonzero == 0) {
      least = -least;
    } else if (in_range) {
      least = approximate_log2(largest_bits) -
              approximate_log2(static_cast<double>(bits_sum) / static_cast<double>(nonzero)) - kMaxLog2Spread<T>;
    }
    for (int64_t t = 0; t < kDxTileRows; ++t) dy[t] *= kLargestDy / largest;
    uint32_t fallbacks = 0;
    for (int64_t b = 0; b < groups; b += kLanes) {
      const uint32_t served = lanes_at_least(load(tile.log2_scale + b), splat(least));
      tile.served[i * RoundedTile::kMaskWords + b / kLanes] = static_cast<uint16_t>(served);
      fallbacks |= ~served & first_lane_bits(groups - b);
      for (int64_t j = 0; j < kDxPairs && 2 * j < rows; ++j) {
        const float* upper = tile.scales + 2 * j * kDxScaleStride + b;
        const float* lower = 2 * j + 1 < rows ? upper + kDxScaleStride : upper;  // a missing row has dy = 0
        store_pairs(tile.pairs + (j * p_.m + i) * kDxStripGroups + b,
                    round_to_ints(mul(load(upper), splat(dy[2 * j])), served),
                    round_to_ints(mul(load(lower), splat(dy[2 * j + 1])), served));
      }
    }
    return fallbacks;
  }

  const LinearDxProblem& p_;
  const IntCodeTable& codes_;
  const int64_t row_groups_;
  const DxScan scan_;
};

}  // namespace few_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
