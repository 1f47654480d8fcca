// The vocabulary stream:: for NEON (ARMv8.0 Advanced SIMD). scalar/stream.h says what each name means. A vector is two
// registers of four lanes, because half a chunk would be too little work per iteration. So 32 registers hold as much as
// AVX2's 16.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "cpp/cpu/isa/neon/bfloat16.h"
#include "cpp/cpu/isa/neon/tables.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/format/dtypes.h"
#include "cpp/format/packing.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace stream {

struct Floats {
  float32x4_t low, high;
};
struct Ints {
  int32x4_t low, high;
};

inline constexpr int kLanes = 8;
inline constexpr int kLaneWeights = 8;
inline constexpr int kChunk = kLanes * kLaneWeights;
inline constexpr int kMaxIntTokens = 2;
inline constexpr int kMaxPairedIntTokens = 0;
inline constexpr int kMaxFloatTokens = 4;
inline constexpr int kDxSums = 8;

inline Floats splat(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
inline Floats zero() { return splat(0.0f); }
inline Floats load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
inline void store(float* p, Floats x) {
  vst1q_f32(p, x.low);
  vst1q_f32(p + 4, x.high);
}
inline Floats add(Floats a, Floats b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
inline Floats mul(Floats a, Floats b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
inline Floats fma(Floats a, Floats b, Floats c) {
  return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
}
inline Floats min(Floats a, Floats b) { return {vminq_f32(a.low, b.low), vminq_f32(a.high, b.high)}; }
inline Floats absolute(Floats x) { return {vabsq_f32(x.low), vabsq_f32(x.high)}; }
inline Floats to_floats(Ints x) { return {vcvtq_f32_s32(x.low), vcvtq_f32_s32(x.high)}; }
inline Ints round_to_ints(Floats x) { return {vcvtnq_s32_f32(x.low), vcvtnq_s32_f32(x.high)}; }
inline float sum(Floats x) { return vaddvq_f32(vaddq_f32(x.low, x.high)); }

inline uint32x4_t magnitude(float32x4_t x) { return vandq_u32(vreinterpretq_u32_f32(x), vdupq_n_u32(0x7FFFFFFF)); }
inline Ints max_bits(Ints seen, Floats x) {
  const auto larger = [](int32x4_t before, float32x4_t now) {
    return vreinterpretq_s32_u32(vmaxq_u32(vreinterpretq_u32_s32(before), magnitude(now)));
  };
  return {larger(seen.low, x.low), larger(seen.high, x.high)};
}
inline int count_at_least(Floats x, float bound) {
  const float32x4_t least = vdupq_n_f32(bound);
  const auto at_least = [least](float32x4_t v) { return vreinterpretq_s32_u32(vcgeq_f32(vabsq_f32(v), least)); };
  return -vaddvq_s32(vaddq_s32(at_least(x.low), at_least(x.high)));  // true is -1
}
inline bool all_finite(Floats x) { return vmaxvq_u32(vmaxq_u32(magnitude(x.low), magnitude(x.high))) < 0x7F800000u; }

// Loads the first `count` of kLanes elements. The others are 0.
template <class T>
struct Elements {
  T element[kLanes];
};
template <class T>
inline Elements<T> load_elements(const T* p, int64_t count) {
  Elements<T> r = {};
  __builtin_memcpy(r.element, p, static_cast<size_t>(count < kLanes ? count : kLanes) * sizeof(T));
  return r;
}
inline Floats widen(const float* p) { return load(p); }
inline Floats widen(const bfloat16* p) {
  const uint16x8_t words = vld1q_u16(reinterpret_cast<const uint16_t*>(p));
  return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(words), 16)),
          vreinterpretq_f32_u32(vshll_high_n_u16(words, 16))};
}
inline Floats widen(const float16* p) {
  const float16x8_t words = vreinterpretq_f16_u16(vld1q_u16(reinterpret_cast<const uint16_t*>(p)));
  return {vcvt_f32_f16(vget_low_f16(words)), vcvt_high_f32_f16(words)};
}
template <class T>
inline Floats load(const T* p, int64_t count) {
  if (count >= kLanes) return widen(p);
  const Elements<T> some = load_elements(p, count);
  return widen(some.element);
}
inline void narrow(float* p, Floats x) { store(p, x); }
inline void narrow(bfloat16* p, Floats x) {
  vst1q_u16(reinterpret_cast<uint16_t*>(p), round_to_bfloat16(x.low, x.high));
}
inline void narrow(float16* p, Floats x) {
  const float16x8_t words = vcvt_high_f16_f32(vcvt_f16_f32(x.low), x.high);
  vst1q_u16(reinterpret_cast<uint16_t*>(p), vreinterpretq_u16_f16(words));
}
template <class T>
inline void store(T* p, Floats x, int64_t count) {
  if (count >= kLanes) return narrow(p, x);
  T all[kLanes];
  narrow(all, x);
  __builtin_memcpy(p, all, static_cast<size_t>(count) * sizeof(T));
}

struct Chunk {
  uint8x16_t low, high;  // lanes 0..3 and 4..7
};
inline Chunk load_chunk(const uint8_t* p) { return {vld1q_u8(p), vld1q_u8(p + 16)}; }
inline Chunk load_chunk(const uint8_t* p, int64_t bytes) {
  if (bytes >= kChunk / 2) return load_chunk(p);
  uint8_t byte[kChunk / 2] = {};
  __builtin_memcpy(byte, p, static_cast<size_t>(bytes));
  return load_chunk(byte);
}

struct CodeSet {
  uint8x16_t has;
  explicit CodeSet(const uint8_t* has_) : has(vld1q_u8(has_)) {}
};
inline int count_bytes_with(const CodeSet& codes, Chunk chunk) {
  const auto some = [&](uint8x16_t x) {
    return vorrq_u8(vqtbl1q_u8(codes.has, low_nibbles(x)), vqtbl1q_u8(codes.has, high_nibbles(x)));
  };
  return -vaddvq_s8(vreinterpretq_s8_u8(vaddq_u8(some(chunk.low), some(chunk.high))));  // true is -1
}

// A chunk lies in at most three granules. Their scales are a table of bytes, and each lane looks up four of them.
struct LaneGranules {
  uint8x16_t low, high;
};
inline LaneGranules granule_of_lanes(int phase, int log2_granule) {
  static constexpr int32_t kFirstWeight[kLanes] = {0, 8, 16, 24, 32, 40, 48, 56};
  const auto bytes_of_lanes = [&](const int32_t* first_weight) {
    const int32x4_t weight = vaddq_s32(vld1q_s32(first_weight), vdupq_n_s32(phase));
    const int32x4_t granule = vshlq_s32(weight, vdupq_n_s32(-log2_granule));
    return vreinterpretq_u8_s32(vmlaq_n_s32(vdupq_n_s32(0x03020100), granule, 0x04040404));
  };
  return {bytes_of_lanes(kFirstWeight), bytes_of_lanes(kFirstWeight + 4)};
}
inline Floats lane_scales(const float* scales, LaneGranules granules) {
  const uint8x16_t table = vreinterpretq_u8_f32(vld1q_f32(scales));
  return {vreinterpretq_f32_u8(vqtbl1q_u8(table, granules.low)),
          vreinterpretq_f32_u8(vqtbl1q_u8(table, granules.high))};
}
inline Floats lane_scales(const float* scales, LaneGranules granules, int64_t lanes) {
  static constexpr int32_t kLane[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7};
  const int32x4_t end = vdupq_n_s32(static_cast<int32_t>(lanes < kLanes ? lanes : kLanes));
  const auto first = [end](float32x4_t x, const int32_t* lane) {
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(x), vcltq_s32(vld1q_s32(lane), end)));
  };
  const Floats all = lane_scales(scales, granules);
  return {first(all.low, kLane), first(all.high, kLane + 4)};
}

// The bytes of four lanes, sorted by their place in the lane. So a look-up leaves byte b of each lane in quarter b.
inline uint8x16_t transpose_bytes(uint8x16_t lanes) {
  static constexpr uint8_t kOrder[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  return vqtbl1q_u8(lanes, vld1q_u8(kOrder));
}

struct FloatCodebook {
  FloatTable table;
  explicit FloatCodebook(const float* value) : table(float_table(value)) {}
};
struct FloatCodes {
  Floats v[8];
};
inline FloatCodes decode(Chunk chunk, const FloatCodebook& book) {
  const uint8x16_t low = transpose_bytes(chunk.low), high = transpose_bytes(chunk.high);
  FloatCodes out;
  unroll<2>([&](auto is_high) {
    const SixteenFloats a = look_up(book.table, is_high ? high_nibbles(low) : low_nibbles(low));
    const SixteenFloats b = look_up(book.table, is_high ? high_nibbles(high) : low_nibbles(high));
    unroll<4>([&](auto byte) { out.v[2 * byte + is_high] = {a.q[byte], b.q[byte]}; });
  });
  return out;
}

// The order in which the bytes of a register are looked up, and the weight that is element i of vector s in that order.
// SMLAL and SMLAL2 sum elements i and 4 + i in lane i.
constexpr int weight_of_byte(int s, int byte) { return 2 * byte + (1 - (s & 1)); }
struct LaneOrder {
  static uint8x16_t bytes(uint8x16_t lanes) { return transpose_bytes(lanes); }
  static constexpr int weight(int s, int i) { return weight_of_byte(s, 4 * (i % 4) + (s & 2) + i / 4); }
};
struct HalfOrder {
  static uint8x16_t bytes(uint8x16_t lanes) { return lanes; }
  static constexpr int weight(int s, int i) { return weight_of_byte(s, 4 * (s & 2) + i); }
};
struct IntCodebook {
  WordTable table;
  explicit IntCodebook(const int16_t* value)
      : table(word_table(vreinterpretq_u16_s16(vld1q_s16(value)), vreinterpretq_u16_s16(vld1q_s16(value + 8)))) {}
};
struct Pairs {
  int16x8_t low, high;  // of lanes 0..3 and 4..7
};
struct IntCodes {
  Pairs v[4];
};
template <class Order>
inline IntCodes decode(Chunk chunk, const IntCodebook& book, Order) {
  const uint8x16_t low = Order::bytes(chunk.low), high = Order::bytes(chunk.high);
  IntCodes out;
  unroll<2>([&](auto even) {  // weights, of the high nibbles
    const Words a = look_up(book.table, even ? high_nibbles(low) : low_nibbles(low));
    const Words b = look_up(book.table, even ? high_nibbles(high) : low_nibbles(high));
    out.v[even] = {vreinterpretq_s16_u16(a.low), vreinterpretq_s16_u16(b.low)};
    out.v[2 + even] = {vreinterpretq_s16_u16(a.high), vreinterpretq_s16_u16(b.high)};
  });
  return out;
}
inline int32x4_t dot(int32x4_t acc, int16x8_t a, int16x8_t b) {
  return vmlal_high_s16(vmlal_s16(acc, vget_low_s16(a), vget_low_s16(b)), a, b);
}
inline Ints dot(Ints acc, Pairs a, Pairs b) { return {dot(acc.low, a.low, b.low), dot(acc.high, a.high, b.high)}; }
inline Ints dot(Pairs a, Pairs b) {
  const auto first = [](int16x8_t x, int16x8_t y) {
    return vmlal_high_s16(vmull_s16(vget_low_s16(x), vget_low_s16(y)), x, y);
  };
  return {first(a.low, b.low), first(a.high, b.high)};
}
inline Pairs load_pairs(const int16_t* p) { return {vld1q_s16(p), vld1q_s16(p + 8)}; }
inline Pairs load_pairs_once(const int16_t* p) { return load_pairs(p); }
template <class Order>
inline void store_in_code_order(const Ints (&value)[8], int16_t* out, Order) {
  int32_t weight[kChunk];
  __builtin_memcpy(weight, value, sizeof(weight));
  for (int s = 0; s < 4; ++s)
    for (int half = 0; half < kChunk; half += kChunk / 2)
      for (int i = 0; i < 8; ++i) *out++ = static_cast<int16_t>(weight[half + Order::weight(s, i)]);
}

inline Floats sums_of(const float* rows) {
  const auto half_sums = [&](int row) { return vaddq_f32(vld1q_f32(rows + 8 * row), vld1q_f32(rows + 8 * row + 4)); };
  const auto sums_of_four = [&](int row) {
    return vpaddq_f32(vpaddq_f32(half_sums(row), half_sums(row + 1)),
                      vpaddq_f32(half_sums(row + 2), half_sums(row + 3)));
  };
  return {sums_of_four(0), sums_of_four(4)};
}

}  // namespace stream
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
