// few_tokens_int: the sums of dx in integers, for 16-bit types where each group of 64 columns has one scale.
//
// Weight rows are taken in pairs, whose codes become the two int16 of a lane. dy times the scale of its row and group
// is rounded to 14 bits of the largest such product of the tile, so that one instruction does 32 products and 16 rows
// are summed exactly in int32.
//
// Rounding dy · scale is no worse than rounding w where the 16 products of a column are of a size. That is seen from
// logarithms: for a token and a group of columns, the largest |dy · scale| of the tile over the geometric mean of the
// 16 must not exceed 2^kMostSpread. What 14 bits cost, as root mean squares: 0.29 steps of largest / 16383 a
// product, where a rounding of w makes 0.42 * 2^-8 of it (bfloat16; float16: 2^-11). Spreads of 2^7 and 2^4 keep the
// first below 1.4 of the second, and their sum below the two roundings (w, dx) of the same formula in that type, as
// codes have next to no error here. N(0, 1) has a spread of 2^2.
//
// A token, tile and group that exceed it are *uneven* (outliers in dy, weight rows of very different size, NaN, numbers
// at the ends of float32's range) and are summed in float32, for themselves alone. So is, for every token, a group with
// a column of which a few weights decide the sum (column_concentration-inl.h).
#pragma once

#include <cstdint>

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/few_tokens/budget-inl.h"
#include "cpp/cpu/few_tokens/code_tables.h"
#include "cpp/cpu/few_tokens/column_concentration-inl.h"
#include "cpp/cpu/few_tokens/low_rank-inl.h"
#include "cpp/cpu/few_tokens/slabs-inl.h"
#include "cpp/cpu/few_tokens/weight-inl.h"
#include "cpp/cpu/isa/row_pairs.h"
#include "cpp/cpu/isa/stream.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/shared/carver-inl.h"
#include "cpp/cpu/shared/dropout.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/pages-inl.h"
#include "cpp/cpu/shared/scratch.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace few_tokens {

using namespace stream;

inline constexpr int kDxPairs = kDxTileRows / 2;  // of rows in a tile
inline constexpr int64_t kFetchAhead = 4096;      // bytes of a strip, beyond the tile that follows
inline constexpr float kLargestDy = 16383.0f;     // 16 products with 13-bit codes stay inside int32

// log2 |x| from the bits of x, less than 0.1 too small: linear between powers of two.
inline float approximate_log2(double bits) { return static_cast<float>(bits * 0x1p-23 - 127.0); }

// Prefetches the bytes that a strip has of each row from `row` on, one line in a call. It goes along whole rows,
// although a tile is used column by column: the lines of a page come slower from memory when they are fetched in two
// halves.
class LineFetcher {
 public:
  LineFetcher(const uint8_t* row, int64_t bytes, int64_t row_bytes)
      : line_(row),
        end_(bytes < row_bytes ? row + bytes : row + 2 * kDxTileRows * row_bytes),
        gap_(row_bytes - bytes),
        row_bytes_(row_bytes) {}
  void operator()() {
    __builtin_prefetch(line_, 0, 2);
    line_ += 64;
    if (line_ >= end_) line_ = end_ + gap_, end_ += row_bytes_;
  }

 private:
  const uint8_t *line_, *end_;
  int64_t gap_, row_bytes_;
};

// sums [group][token][4][kLanes] += the products of pairs of rows of W, whose lower row lies `to_lower` bytes after the
// upper one; dy [pair][token][kDxStripGroups] is dy times the scale of both. This is a function of its own, and has no
// loop over pairs, or GCC keeps pointers in memory and copies sums back and forth.
template <int kTokens, int kPairs>
[[gnu::noinline, gnu::flatten]] void add_pairs(const IntCodebook& codebook, const uint8_t* packed, int64_t row_bytes,
                                               int64_t to_lower, int64_t groups, const int32_t* dy, const float* unit,
                                               float* sums, LineFetcher fetch) {
  // A pass takes as many of the four nibbles as registers can sum for all tokens.
  constexpr int kNibbles = kTokens <= 5 ? 4 : kTokens <= 12 ? 2 : 1;
  const IntCodebook book = codebook;
  for (int64_t b = 0; b < groups; ++b, packed += kDxColumns / 2, ++dy, sums += kTokens * kDxColumns) {
    unroll<4 / kNibbles>([&](auto pass) {
      Ints acc[kTokens][kNibbles];
      unroll<kTokens>([&](auto i) { unroll<kNibbles>([&](auto s) { acc[i][s] = no_ints(); }); });
      const uint8_t* upper = packed;
      unroll<kPairs>([&](auto j) {
        if (pass == 0) fetch();
        const Ints words = load_row_pair(upper, upper + to_lower);
        Ints codes[kNibbles];
        unroll<kNibbles>([&](auto s) { codes[s] = decode_nibble<pass * kNibbles + s>(words, book); });
        unroll<kTokens>([&](auto i) {
          const Ints pair = splat_pair(dy[(j * kTokens + i) * kDxStripGroups]);
          unroll<kNibbles>([&](auto s) { acc[i][s] = dot(acc[i][s], codes[s], pair); });
        });
        upper += 2 * row_bytes;
      });
      unroll<kTokens>([&](auto i) {
        unroll<kNibbles>([&](auto s) {
          float* sum = sums + i * kDxColumns + (pass * kNibbles + s) * kLanes;
          store(sum, fma(to_floats(acc[i][s]), splat(unit[i]), load(sum)));
        });
      });
    });
  }
}

// What is known about a call before its sums are computed.
struct DxBefore {
  uint8_t* concentrated;  // of each group: 1 if it has a concentrated column
  float* most_dy;         // of each token: the largest |dy| of an even tile
};

template <class T>
class IntDx {
 public:
  IntDx(const LinearDxProblem& p, const DxBefore& before)
      : p_(p), codes_(kIntCodes[p.w.code]), book_(codes_.value), row_groups_(p.w.k / kDxColumns), before_(before) {}

  int64_t strip_chunks() const { return kDxStripGroups * kDxColumns / kChunk; }
  int64_t tile_rows() const { return kDxTileRows; }

  // Chunks begin .. end - 1 of the sums over rows first_row .. last_row - 1.
  void operator()(int64_t first_row, int64_t last_row, int64_t begin, int64_t end, const SlabSums& out) const {
    const int64_t first = begin * (kChunk / kDxColumns), last = end * (kChunk / kDxColumns);
    const int64_t groups = (last < row_groups_ ? last : row_groups_) - first;
    Memory memory;
    const auto lay_out = [&](void* base) {
      Carver carver(base);
      memory.sums = carver.take<float>(groups * p_.m * kDxColumns);
      memory.scales = carver.take<float>(kDxTileRows * kScaleStride);
      memory.unit = carver.take<float>(p_.m);
      memory.pairs = carver.take<int32_t>(kDxPairs * p_.m * kDxStripGroups);
      memory.log2_scale = carver.take<float>(kDxStripGroups + kLanes);
      memory.even = carver.take<uint16_t>(p_.m * kMaskWords);
      return carver.used();
    };
    lay_out(scratch(ScratchUse::kThread, lay_out(nullptr)));
    for (int64_t i = 0; i < groups * p_.m * kDxColumns; i += kLanes) store(memory.sums + i, zero());
    memory.concentrated = 0;
    for (int64_t b = 0; b < groups; ++b) memory.concentrated |= uint64_t{before_.concentrated[first + b]} << b;
    with_count<kMaxDxTokens>(p_.m,
                             [&](auto tokens) { add_tile_sums<tokens>(first_row, last_row, first, groups, memory); });
    for (int64_t b = 0; b < groups; ++b) {
      for (int64_t i = 0; i < p_.m; ++i) {
        const float* sums = memory.sums + (b * p_.m + i) * kDxColumns;
        store_in_order({load(sums), load(sums + kLanes), load(sums + 2 * kLanes), load(sums + 3 * kLanes)},
                       out.at(i, (first + b) * kDxColumns));
      }
    }
  }

  // The largest |dy| that a tile may have and be even: with it as the largest of all, is_even holds of a token's dy.
  static float most_of_tile(const T* dy, int64_t rows) {
    const float largest = bits_float(largest_bits_within(dy, rows));
    if (is_even(dy, rows, rows, largest, kSpread)) return largest;
    return most_of_sorted(dy, rows);
  }

 private:
  // The same from a histogram of the exponents and the two bits behind them: at most a fifth below the exact value.
  [[gnu::noinline]] static float most_of_sorted(const T* dy, int64_t rows) {
    constexpr int kDropped = 21, kBins = 1 << (31 - kDropped);
    uint32_t count[kBins] = {};
    for (int64_t n = 0; n < rows; ++n) ++count[(float_bits(to_float(dy[n])) & kMagnitudeBits) >> kDropped];
    int64_t zeros = 0;
    for (int64_t n = 0; n < rows; ++n) zeros += to_float(dy[n]) == 0.0f;
    const int64_t nonzero = rows - zeros;
    if (4 * nonzero < 3 * rows) return 0.0f;
    const auto least_of = [&](int64_t eighths) {  // of so many eighths of the nonzero
      int bin = kBins - 1;
      for (int64_t seen = count[bin]; 8 * seen < eighths * nonzero && bin > 0; seen += count[bin]) --bin;
      return bits_float(static_cast<uint32_t>(bin) << kDropped);
    };
    const float of_large = least_of(5), of_most = 8 * least_of(7);
    return kSpread * (of_large < of_most ? of_large : of_most);
  }

  static constexpr int64_t kScaleStride = kDxScaleStride;
  static constexpr int64_t kMaskWords = kDxStripGroups / kLanes;
  static constexpr float kMostSpread = kMantissaBits<T> == 7 ? 7.0f : 4.0f;
  static constexpr float kSpread = kMantissaBits<T> == 7 ? 128.0f : 16.0f;  // 2^kMostSpread

  struct Memory {
    float *sums, *scales, *unit;
    int32_t* pairs;         // [pair][token][group]: dy * scale of two rows of W, or 0 where that is uneven
    float* log2_scale;      // [group]: the mean over the rows of a tile
    uint64_t concentrated;  // a bit for each group that is uneven for every token
    uint16_t* even;         // [token][kMaskWords]: a bit a group
  };

  template <int kTokens>
  void add_tile_sums(int64_t first_row, int64_t last_row, int64_t first, int64_t groups, const Memory& memory) const {
    const int64_t row_bytes = p_.w.k / 2, bytes = groups * (kDxColumns / 2);
    const int64_t rows_ahead = kFetchAhead < bytes * kDxTileRows ? ceil_div(kFetchAhead, bytes) : kDxTileRows;
    const ScaleReader reader(p_.w.scales, kDxColumns);
    PageToucher touch_pages;
    for (int64_t n = first_row; n < last_row; n += kDxTileRows) {
      // Pages are known before a line of them is fetched.
      const int64_t known = n == first_row ? n : n + 2 * kDxTileRows, next = n + 3 * kDxTileRows;
      if (known < last_row)
        touch_pages(p_.w.packed + known * row_bytes, p_.w.packed + (next < last_row ? next : last_row) * row_bytes);
      const bool all_even = weigh(n, last_row, first, groups, reader, memory);
      const uint8_t* packed = p_.w.packed + n * row_bytes + first * (kDxColumns / 2);
      if (!all_even) add_uneven(packed, n, last_row, groups, memory);
      const int64_t fetched = n + kDxTileRows + rows_ahead;
      const LineFetcher fetch(packed + (fetched < last_row ? fetched - n : 0) * row_bytes, bytes, row_bytes);
      if (last_row - n >= kDxTileRows) {
        add_pairs<kTokens, kDxPairs>(book_, packed, row_bytes, row_bytes, groups, memory.pairs, memory.unit,
                                     memory.sums, fetch);
        continue;
      }
      for (int64_t t = 0; t < last_row - n; t += 2) {
        const int64_t to_lower = n + t + 1 < last_row ? row_bytes : 0;  // a missing row has dy = 0
        add_pairs<kTokens, 1>(book_, packed + t * row_bytes, row_bytes, to_lower, groups,
                              memory.pairs + t / 2 * kTokens * kDxStripGroups, memory.unit, memory.sums, fetch);
      }
    }
  }

  // Fills pairs, and the value of their unit for each token. The unit depends on whole rows of W, not on the strip.
  // Returns whether every group is even for every token.
  bool weigh(int64_t n, int64_t last_row, int64_t first, int64_t groups, const ScaleReader& reader,
             const Memory& memory) const {
    const int64_t rows = last_row - n < kDxTileRows ? last_row - n : kDxTileRows;
    float bound[kDxTileRows] = {};
    for (int64_t t = 0; t < rows; ++t) {
      const int64_t row_group = (n + t) * row_groups_;
      reader.read(row_group + first, groups, memory.scales + t * kScaleStride);
      bound[t] = reader.largest(row_group, row_groups_);
    }
    for (int64_t b = 0; b < groups; b += kLanes) {
      Floats sum = zero();
      Ints largest = no_ints();
      for (int64_t t = 0; t < rows; ++t) {
        const Ints bits = magnitude_bits(load(memory.scales + t * kScaleStride + b));
        largest = max_ints(largest, bits);
        sum = add(sum, to_floats(bits));
      }
      const Floats mean = fma(sum, splat(0x1p-23f / static_cast<float>(rows)), splat(-127.0f));
      store(memory.log2_scale + b, where_less(largest, kInfinityBits, mean));
    }
    for (uint64_t left = memory.concentrated; left; left &= left - 1)
      memory.log2_scale[__builtin_ctzll(left)] = -bits_float(kInfinityBits);
    uint32_t uneven = 0;
    for (int64_t i = 0; i < p_.m; ++i) uneven |= weigh_token(i, n, rows, groups, bound, memory);
    return !uneven;
  }

  // The same for one token. Returns a bit for each uneven lane of any vector of groups.
  uint32_t weigh_token(int64_t i, int64_t n, int64_t rows, int64_t groups, const float* bound,
                       const Memory& memory) const {
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
                          bits_float(largest_dy_bits) <= before_.most_dy[i];
    const float largest = in_range ? bits_float(largest_bits) : 1.0f;
    memory.unit[i] = static_cast<float>(largest / (kLargestDy * codes_.per_one));
    // The least log2_scale of an even group.
    float least = bits_float(kInfinityBits);
    if (nonzero == 0) {
      least = -least;
    } else if (in_range) {
      least = approximate_log2(largest_bits) -
              approximate_log2(static_cast<double>(bits_sum) / static_cast<double>(nonzero)) - kMostSpread;
    }
    for (int64_t t = 0; t < kDxTileRows; ++t) dy[t] *= kLargestDy / largest;
    uint32_t uneven = 0;
    for (int64_t b = 0; b < groups; b += kLanes) {
      const uint32_t even = lanes_at_least(load(memory.log2_scale + b), splat(least));
      memory.even[i * kMaskWords + b / kLanes] = static_cast<uint16_t>(even);
      uneven |= ~even & first_lane_bits(groups - b);
      for (int64_t j = 0; j < kDxPairs && 2 * j < rows; ++j) {
        const float* upper = memory.scales + 2 * j * kScaleStride + b;
        const float* lower = 2 * j + 1 < rows ? upper + kScaleStride : upper;  // a missing row has dy = 0
        store_pairs(memory.pairs + (j * p_.m + i) * kDxStripGroups + b,
                    round_to_ints(mul(load(upper), splat(dy[2 * j])), even),
                    round_to_ints(mul(load(lower), splat(dy[2 * j + 1])), even));
      }
    }
    return uneven;
  }

  // Adds in float32 what pairs leave out of a tile.
  [[gnu::noinline]] void add_uneven(const uint8_t* packed, int64_t n, int64_t last_row, int64_t groups,
                                    const Memory& memory) const {
    const FloatCodebook book(p_.w.table().value);
    const int64_t rows = last_row - n < kDxTileRows ? last_row - n : kDxTileRows, row_bytes = p_.w.k / 2;
    for (int64_t i = 0; i < p_.m; ++i) {
      const T* dy = static_cast<const T*>(p_.dy) + i * p_.w.n + n;
      for (int64_t b = 0; b < groups; ++b) {
        if (memory.even[i * kMaskWords + b / kLanes] >> b % kLanes & 1) continue;
        float* const sums = memory.sums + (b * p_.m + i) * kDxColumns;
        Floats sum[4];
        unroll<4>([&](auto s) { sum[s] = load(sums + s * kLanes); });
        for (int64_t t = 0; t < rows; ++t) {
          const Ints words = load_words(packed + t * row_bytes + b * (kDxColumns / 2));
          const Floats by = splat(memory.scales[t * kScaleStride + b] * to_float(dy[t]));
          unroll<4>([&](auto s) { sum[s] = fma(decode_nibble<s>(words, book), by, sum[s]); });
        }
        unroll<4>([&](auto s) { store(sums + s * kLanes, sum[s]); });
      }
    }
  }

  const LinearDxProblem& p_;
  const IntCodeTable& codes_;
  const IntCodebook book_;
  const int64_t row_groups_;
  const DxBefore before_;
};

template <class T>
Outcome dx_int_as(const Pool& pool, const LinearDxProblem& p) {
  constexpr int64_t kGroups = 16;  // taken by a thread at a time
  const int64_t row_groups = p.w.k / kDxColumns;
  DxBefore before;
  const auto lay_out = [&](void* base) {
    Carver memory(base);
    before.concentrated = memory.take<uint8_t>(row_groups);
    before.most_dy = memory.take<float>(p.m);
    return memory.used();
  };
  lay_out(scratch(ScratchUse::kBefore, lay_out(nullptr)));
  const float largest = ScaleReader(p.w.scales, kDxColumns).largest(0, p.w.n * row_groups);
  auto look = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * kGroups, groups = min(row_groups - first, kGroups);
      ColumnConcentration columns(p.w, first, groups, largest);
      const auto carve = [&](void* base) {
        Carver memory(base);
        columns.take(&memory);
        return memory.used();
      };
      carve(scratch(ScratchUse::kThread, carve(nullptr)));
      const uint64_t concentrated = columns.groups();
      for (int64_t b = 0; b < groups; ++b) before.concentrated[first + b] = concentrated >> b & 1;
    }
  };
  run(pool, p.w.n * p.w.k > 8 * kWorthThreads, ceil_div(row_groups, kGroups), 1, look);
  for (int64_t i = 0; i < p.m; ++i)
    before.most_dy[i] = IntDx<T>::most_of_tile(static_cast<const T*>(p.dy) + i * p.w.n, p.w.n);
  dx_with<T>(pool, p, IntDx<T>(p, before));
  return Outcome::kDone;
}

inline Outcome dx_int(const Pool& pool, const LinearDxProblem& p) {
  if (p.m > kMaxDxTokens) return Outcome::kTooLarge;
  return p.dtype == DType::kBFloat16 ? dx_int_as<bfloat16>(pool, p) : dx_int_as<float16>(pool, p);
}

}  // namespace few_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
