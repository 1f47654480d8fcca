// The vocabulary stream:: in plain C++, the definition of what the kernels for few tokens ask of a vector unit.
// `Floats` is a vector of kLanes floats, `Ints` one of kLanes dwords. In plain C++ these kernels are for tests, which
// force them by name. Nothing is inlined, because the unrolled kernels would take minutes to compile.
//
// A *chunk* is kLanes dwords of packed bytes: lane i holds the eight weights 8i .. 8i+7. Decoding takes one nibble of
// every lane at a time, so a sum of products stays in the lane of its weights, and a lane, which lies in one
// quantization block, is scaled after the sum. The high nibble of a byte comes first, so nibble s of a lane, counted
// from the low end, is its weight s ^ 1:
//
// clang-format off
//   bits of a lane    31..28 27..24 23..20 19..16 15..12  11..8   7..4   3..0
//   nibble s               7      6      5      4      3      2      1      0
//   weight, 8i +           6      7      4      5      2      3      0      1
// clang-format on
//
// x is arranged in that order once per call.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/format/dtypes.h"
#include "cpp/format/packing.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace stream {

inline constexpr int kLanes = 16;
inline constexpr int kLaneWeights = 8;
inline constexpr int kChunk = kLanes * kLaneWeights;  // weights

// How many tokens a kernel processes at once: as many as registers hold sums for, beside the decoded codes of one
// weight row, or of two (paired; 0 means that there are too few registers for two).
inline constexpr int kMaxIntTokens = 4;
inline constexpr int kMaxPairedIntTokens = 0;
inline constexpr int kMaxFloatTokens = 4;
inline constexpr int kDxSums = 16;  // vectors of dx's sums that stay in registers beside the decoded codes

struct Floats {
  float lane[kLanes];
};
struct Ints {
  int32_t lane[kLanes];
};
// Ints by what they hold: a chunk of packed bytes, the granules of its lanes, two int16 per lane. A set may represent
// each in another form.
using Chunk = Ints;
using LaneGranules = Ints;
using Pairs = Ints;
template <class Result, class Function>
inline Result each_lane(const Function& function) {
  Result r;
  for (int i = 0; i < kLanes; ++i) r.lane[i] = function(i);
  return r;
}

[[gnu::noinline]] inline Floats splat(float x) {
  return each_lane<Floats>([&](int) { return x; });
}
[[gnu::noinline]] inline Floats zero() { return splat(0.0f); }
[[gnu::noinline]] inline Floats load(const float* p) {
  return each_lane<Floats>([&](int i) { return p[i]; });
}
[[gnu::noinline]] inline void store(float* p, const Floats& x) { std::memcpy(p, x.lane, sizeof x.lane); }
[[gnu::noinline]] inline Floats add(const Floats& a, const Floats& b) {
  return each_lane<Floats>([&](int i) { return a.lane[i] + b.lane[i]; });
}
[[gnu::noinline]] inline Floats mul(const Floats& a, const Floats& b) {
  return each_lane<Floats>([&](int i) { return a.lane[i] * b.lane[i]; });
}
[[gnu::noinline]] inline Floats fma(const Floats& a, const Floats& b, const Floats& c) {
  return each_lane<Floats>([&](int i) { return __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]); });
}
// The minimum of a and b. If one is NaN, the result depends on the instruction set.
[[gnu::noinline]] inline Floats min(const Floats& a, const Floats& b) {
  return each_lane<Floats>([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
[[gnu::noinline]] inline Floats absolute(const Floats& x) {
  return each_lane<Floats>([&](int i) { return __builtin_fabsf(x.lane[i]); });
}
[[gnu::noinline]] inline Floats to_floats(const Ints& x) {
  return each_lane<Floats>([&](int i) { return static_cast<float>(x.lane[i]); });
}
[[gnu::noinline]] inline Ints round_to_ints(const Floats& x) {
  return each_lane<Ints>([&](int i) { return static_cast<int32_t>(__builtin_lrintf(x.lane[i])); });
}
[[gnu::noinline]] inline float sum(const Floats& x) {
  float total = 0.0f;
  for (float lane : x.lane) total += lane;
  return total;
}

inline uint32_t magnitude_of_lane(const Floats& x, int i) { return float_bits(x.lane[i]) & 0x7FFFFFFFu; }
// Lane-wise largest |x|, by its bits: a NaN counts as larger than everything.
[[gnu::noinline]] inline Ints max_bits(const Ints& seen, const Floats& x) {
  return each_lane<Ints>([&](int i) {
    const uint32_t before = static_cast<uint32_t>(seen.lane[i]), now = magnitude_of_lane(x, i);
    return static_cast<int32_t>(now > before ? now : before);
  });
}
// How many lanes have |x| >= bound. A NaN does not count.
[[gnu::noinline]] inline int count_at_least(const Floats& x, float bound) {
  int count = 0;
  for (int i = 0; i < kLanes; ++i) count += bits_float(magnitude_of_lane(x, i)) >= bound;
  return count;
}
[[gnu::noinline]] inline bool all_finite(const Floats& x) {
  bool all = true;
  for (int i = 0; i < kLanes; ++i) all &= magnitude_of_lane(x, i) < 0x7F800000u;
  return all;
}

// Loads and stores min(count, kLanes) elements. Lanes beyond them are 0, and nothing beyond them is touched.
template <class T>
[[gnu::noinline]] inline Floats load(const T* p, int64_t count) {
  return each_lane<Floats>([&](int i) { return i < count ? to_float(p[i]) : 0.0f; });
}
template <class T>
[[gnu::noinline]] inline void store(T* p, const Floats& x, int64_t count) {
  for (int i = 0; i < kLanes && i < count; ++i) from_float(x.lane[i], &p[i]);
}

[[gnu::noinline]] inline Chunk load_chunk(const uint8_t* p, int64_t bytes) {
  Chunk chunk = {};
  std::memcpy(chunk.lane, p, static_cast<size_t>(bytes < kChunk / 2 ? bytes : kChunk / 2));
  return chunk;
}
[[gnu::noinline]] inline Chunk load_chunk(const uint8_t* p) { return load_chunk(p, kChunk / 2); }
inline uint32_t nibble(const Chunk& chunk, int lane, int s) {
  return static_cast<uint32_t>(chunk.lane[lane]) >> (4 * s) & 15u;
}

// Some of the 16 codes, 0xFF for each.
struct CodeSet {
  const uint8_t* has;
  explicit CodeSet(const uint8_t* has_) : has(has_) {}
};
// How many bytes of a chunk have at least one of these codes.
[[gnu::noinline]] inline int count_bytes_with(const CodeSet& codes, const Chunk& chunk) {
  int count = 0;
  for (int i = 0; i < kLanes; ++i)
    for (int s = 0; s < 8; s += 2) count += (codes.has[nibble(chunk, i, s)] | codes.has[nibble(chunk, i, s + 1)]) != 0;
  return count;
}

// The granule of each lane, for a chunk that starts `phase` weights into granule 0.
[[gnu::noinline]] inline LaneGranules granule_of_lanes(int phase, int log2_granule) {
  return each_lane<LaneGranules>([&](int i) { return (kLaneWeights * i + phase) >> log2_granule; });
}
[[gnu::noinline]] inline Floats lane_scales(const float* scales, const LaneGranules& granules, int64_t lanes = kLanes) {
  return each_lane<Floats>([&](int i) { return i < lanes ? scales[granules.lane[i]] : 0.0f; });
}

// Codes as float32, one per lane: vector s holds weight s ^ 1 of each lane.
struct FloatCodebook {
  const float* values;
  explicit FloatCodebook(const float* value) : values(value) {}
};
struct FloatCodes {
  Floats v[8];
};
[[gnu::noinline]] inline FloatCodes decode(const Chunk& chunk, const FloatCodebook& book) {
  FloatCodes out;
  for (int s = 0; s < 8; ++s) out.v[s] = each_lane<Floats>([&](int i) { return book.values[nibble(chunk, i, s)]; });
  return out;
}

// Which products a lane sums: those of its own eight weights (LaneOrder), or of any eight of the 32 weights around it
// (HalfOrder). HalfOrder is correct if these 32 share a scale. It saves AVX2 a shuffle; other sets have one order.
struct LaneOrder {};
using HalfOrder = LaneOrder;

// Codes as int16, two per lane: vector s holds weights s ^ 1 and 4 + (s ^ 1) of each lane, in the low and the high
// half.
struct IntCodebook {
  const int16_t* values;
  explicit IntCodebook(const int16_t* value) : values(value) {}
};
struct IntCodes {
  Pairs v[4];
};
inline int32_t pair(int32_t low, int32_t high) {
  return static_cast<int32_t>((static_cast<uint32_t>(low) & 0xFFFFu) | static_cast<uint32_t>(high) << 16);
}
[[gnu::noinline]] inline IntCodes decode(const Chunk& chunk, const IntCodebook& book, LaneOrder) {
  IntCodes out;
  for (int s = 0; s < 4; ++s) {
    out.v[s] = each_lane<Pairs>(
        [&](int i) { return pair(book.values[nibble(chunk, i, s)], book.values[nibble(chunk, i, 4 + s)]); });
  }
  return out;
}
// acc + a.low * b.low + a.high * b.high in each lane
[[gnu::noinline]] inline Ints dot(const Ints& acc, const Pairs& a, const Pairs& b) {
  const auto low = [](int32_t x) { return int32_t{static_cast<int16_t>(x)}; };
  return each_lane<Ints>(
      [&](int i) { return acc.lane[i] + low(a.lane[i]) * low(b.lane[i]) + (a.lane[i] >> 16) * (b.lane[i] >> 16); });
}
[[gnu::noinline]] inline Ints no_ints() {
  return each_lane<Ints>([](int) { return 0; });
}
[[gnu::noinline]] inline Ints dot(const Pairs& a, const Pairs& b) { return dot(no_ints(), a, b); }
[[gnu::noinline]] inline Pairs load_pairs(const int16_t* p) {
  Pairs r;
  std::memcpy(r.lane, p, sizeof r.lane);
  return r;
}
[[gnu::noinline]] inline Pairs load_pairs_once(const int16_t* p) {
  return load_pairs(p);
}  // for values that a compiler would load again at each use
// A chunk of values that fit 16 bits, in memory order -> four vectors of pairs in the order of IntCodes.
[[gnu::noinline]] inline void store_in_code_order(const Ints (&value)[8], int16_t* out, LaneOrder) {
  const auto weight = [&](int w) { return static_cast<int16_t>(value[w / kLanes].lane[w % kLanes]); };
  for (int s = 0; s < 4; ++s) {
    for (int i = 0; i < kLanes; ++i) {
      *out++ = weight(kLaneWeights * i + (s ^ 1));
      *out++ = weight(kLaneWeights * i + 4 + (s ^ 1));
    }
  }
}

// out[j] = sum over lanes of rows[j], for kLanes rows
[[gnu::noinline]] inline Floats sums_of(const float* rows) {
  return each_lane<Floats>([&](int j) { return sum(load(rows + j * kLanes)); });
}

}  // namespace stream
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
