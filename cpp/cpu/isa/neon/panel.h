// The vocabulary panel:: for NEON (ARMv8.0 Advanced SIMD). scalar/panel.h says what each name means. A vector is two
// registers of four lanes.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "cpp/cpu/isa/neon/bfloat16.h"
#include "cpp/cpu/isa/neon/tables.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/format/codes.h"
#include "cpp/format/dtypes.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace panel {

inline constexpr int kLanes = 8;
inline constexpr int kAccumulators = 12;  // 24 of 32 registers: the rest hold operands
inline constexpr bool kSpareRegisters = false;

struct F {
  float32x4_t low, high;
};
struct U {
  uint32x4_t low, high;
};

inline F splat(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
inline F zero() { return splat(0.0f); }
inline F add(F a, F b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
inline F mul(F a, F b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
inline F multiply_add(F a, F b, F c) { return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)}; }
// One lane: FMLA multiplies all lanes by it.
using Broadcast = float;
inline Broadcast broadcast(const float* p) { return *p; }
inline F multiply_add(Broadcast a, F b, F c) { return {vfmaq_n_f32(c.low, b.low, a), vfmaq_n_f32(c.high, b.high, a)}; }

inline F load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
inline F load(const bfloat16* p) {
  const uint16x8_t words = vld1q_u16(reinterpret_cast<const uint16_t*>(p));
  return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(words), 16)),
          vreinterpretq_f32_u32(vshll_high_n_u16(words, 16))};
}
inline F load(const float16* p) {
  const float16x8_t words = vreinterpretq_f16_u16(vld1q_u16(reinterpret_cast<const uint16_t*>(p)));
  return {vcvt_f32_f16(vget_low_f16(words)), vcvt_high_f32_f16(words)};
}
inline void store(float* p, F v) {
  vst1q_f32(p, v.low);
  vst1q_f32(p + 4, v.high);
}
inline void store(bfloat16* p, F v) { vst1q_u16(reinterpret_cast<uint16_t*>(p), round_to_bfloat16(v.low, v.high)); }
inline void store(float16* p, F v) {
  const float16x8_t words = vcvt_high_f16_f32(vcvt_f16_f32(v.low), v.high);
  vst1q_u16(reinterpret_cast<uint16_t*>(p), vreinterpretq_u16_f16(words));
}

// Loads `count` elements, and zeros after them. Nothing beyond them is touched.
template <class T>
inline F load_first(const T* p, int count) {
  T some[kLanes] = {};
  __builtin_memcpy(some, p, static_cast<size_t>(count) * sizeof(T));
  return load(some);
}
template <class T>
inline void store_first(T* p, F v, int count) {
  T all[kLanes];
  store(all, v);
  __builtin_memcpy(p, all, static_cast<size_t>(count) * sizeof(T));
}

// Zeroes the lanes of v whose random bits are below `threshold`.
inline F keep_from(F v, const uint32_t* bits, uint32_t threshold) {
  const auto keep = [threshold](float32x4_t x, const uint32_t* of_x) {
    const uint32x4_t kept = vcgeq_u32(vld1q_u32(of_x), vdupq_n_u32(threshold));
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(x), kept));
  };
  return {keep(v.low, bits), keep(v.high, bits + 4)};
}

// Splits the pairs of neighbouring lanes of a and then b into their first and their second lanes.
inline void unzip(F a, F b, F& even, F& odd) {
  even = {vuzp1q_f32(a.low, a.high), vuzp1q_f32(b.low, b.high)};
  odd = {vuzp2q_f32(a.low, a.high), vuzp2q_f32(b.low, b.high)};
}

// Lane i of the j-th <-> lane j of the i-th.
inline void transpose4(float32x4_t& a, float32x4_t& b, float32x4_t& c, float32x4_t& d) {
  const auto pair = [](float32x4_t x) { return vreinterpretq_f64_f32(x); };
  const auto join = [](float64x2_t x) { return vreinterpretq_f32_f64(x); };
  const float64x2_t ab0 = pair(vtrn1q_f32(a, b)), ab1 = pair(vtrn2q_f32(a, b));
  const float64x2_t cd0 = pair(vtrn1q_f32(c, d)), cd1 = pair(vtrn2q_f32(c, d));
  a = join(vzip1q_f64(ab0, cd0)), b = join(vzip1q_f64(ab1, cd1));
  c = join(vzip2q_f64(ab0, cd0)), d = join(vzip2q_f64(ab1, cd1));
}

// v[i][j] <-> v[j][i]
inline void transpose(F (&v)[kLanes]) {
  transpose4(v[0].low, v[1].low, v[2].low, v[3].low);
  transpose4(v[0].high, v[1].high, v[2].high, v[3].high);
  transpose4(v[4].low, v[5].low, v[6].low, v[7].low);
  transpose4(v[4].high, v[5].high, v[6].high, v[7].high);
  for (int i = 0; i < 4; ++i) {
    const float32x4_t upper_right = v[i].high;
    v[i].high = v[4 + i].low;
    v[4 + i].low = upper_right;
  }
}

// Convert a group between memory order (element 4i + j) and the order in which nibbles are decoded (vector j, lane i).
inline void decoded_to_memory_order(F (&v)[4]) {
  transpose4(v[0].low, v[1].low, v[2].low, v[3].low);
  transpose4(v[0].high, v[1].high, v[2].high, v[3].high);
  const F low[2] = {{v[0].low, v[1].low}, {v[2].low, v[3].low}};
  const F high[2] = {{v[0].high, v[1].high}, {v[2].high, v[3].high}};
  v[0] = low[0], v[1] = low[1], v[2] = high[0], v[3] = high[1];
}
inline void memory_to_decoded_order(F (&v)[4]) {
  const F low[2] = {v[0], v[1]}, high[2] = {v[2], v[3]};
  v[0] = {low[0].low, high[0].low}, v[1] = {low[0].high, high[0].high};
  v[2] = {low[1].low, high[1].low}, v[3] = {low[1].high, high[1].high};
  transpose4(v[0].low, v[1].low, v[2].low, v[3].low);
  transpose4(v[0].high, v[1].high, v[2].high, v[3].high);
}

// Four consecutive codes of a packed buffer in each lane: element 4i + j of the group is nibble j of lane i, in the
// order high, low, high, low of two bytes. The first bytes of all lanes stand before the second ones.
using Codes = uint8x16_t;
inline Codes load_codes(const uint8_t* packed) {
  const uint8x8x2_t bytes = vld2_u8(packed);
  return vcombine_u8(bytes.val[0], bytes.val[1]);
}
// The same, from the low nibble of *packed on if `odd`, with only `bytes` bytes readable.
inline Codes load_codes(const uint8_t* packed, bool odd, int64_t bytes) {
  uint8_t some[32] = {};
  if (bytes >= 17) {
    __builtin_memcpy(some, packed, 17);
  } else {
    __builtin_memcpy(some, packed, static_cast<size_t>(bytes));
  }
  if (!odd) return load_codes(some);
  return vsriq_n_u8(vshlq_n_u8(load_codes(some), 4), load_codes(some + 1), 4);
}

// The values of a code and their scale. lookup<j> decodes code j of each lane.
struct Table {
  FloatTable values;
  float32x4_t scale;
};
inline Table values_of(const CodeTable& table) { return {float_table(table.value), vdupq_n_f32(1.0f)}; }
inline Table scaled(const Table& t, F scale) { return {t.values, vmulq_f32(t.scale, scale.low)}; }
template <int j>
inline F lookup(const Table& t, Codes c) {
  const SixteenFloats x = look_up(t.values, j % 2 ? low_nibbles(c) : high_nibbles(c));
  constexpr int kFirst = j / 2 * 2;
  return {vmulq_f32(x.q[kFirst], t.scale), vmulq_f32(x.q[kFirst + 1], t.scale)};
}
// The same with an offset.
struct OffsetTable {
  Table scaled;
  float32x4_t offset;
};
inline OffsetTable add_offset(const Table& t, F offset) { return {t, offset.low}; }
template <int j>
inline F lookup(const OffsetTable& t, Codes c) {
  const F x = lookup<j>(t.scaled, c);
  return {vaddq_f32(x.low, t.offset), vaddq_f32(x.high, t.offset)};
}

inline U iota() {
  static constexpr uint32_t kLane[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7};
  return {vld1q_u32(kLane), vld1q_u32(kLane + 4)};
}

// Elements 4i + j of a group: those before element `first` from a, the others from b.
template <int j>
inline F joined(int first, F a, F b) {
  const auto join = [first](uint32x4_t lane, float32x4_t x, float32x4_t y) {
    const int32x4_t element = vreinterpretq_s32_u32(vaddq_u32(vshlq_n_u32(lane, 2), vdupq_n_u32(j)));
    return vbslq_f32(vcltq_s32(element, vdupq_n_s32(first)), x, y);
  };
  return {join(iota().low, a.low, b.low), join(iota().high, a.high, b.high)};
}

// Random bits of elements 4*group .. 4*(group + kLanes) - 1.
inline void philox4(uint64_t seed, uint64_t group, uint32_t* bits) {
  const uint32x4_t first = vdupq_n_u32(static_cast<uint32_t>(group));
  uint32x4_t c0 = vaddq_u32(first, iota().low), c2 = vdupq_n_u32(0), c3 = vdupq_n_u32(0);
  const uint32x4_t carry = vcltq_u32(c0, first);  // true is -1
  uint32x4_t c1 = vsubq_u32(vdupq_n_u32(static_cast<uint32_t>(group >> 32)), carry);
  const auto multiply = [](uint32x4_t c, uint32_t by, uint32x4_t* high) {
    const uint32x4_t a = vreinterpretq_u32_u64(vmull_n_u32(vget_low_u32(c), by));
    const uint32x4_t b = vreinterpretq_u32_u64(vmull_high_n_u32(c, by));
    *high = vuzp2q_u32(a, b);
    return vuzp1q_u32(a, b);
  };
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    uint32x4_t h0, h1;
    const uint32x4_t l0 = multiply(c0, 0xD2511F53u, &h0), l1 = multiply(c2, 0xCD9E8D57u, &h1);
    c0 = veorq_u32(veorq_u32(h1, c1), vdupq_n_u32(k0));
    c2 = veorq_u32(veorq_u32(h0, c3), vdupq_n_u32(k1));
    c1 = l1;
    c3 = l0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const uint32x4x4_t words = {{c0, c1, c2, c3}};
  vst4q_u32(bits, words);
}
inline void philox(uint64_t seed, uint64_t group, uint32_t* bits) {
  philox4(seed, group, bits);
  philox4(seed, group + 4, bits + 16);
}

template <class W>
using TwoWords = W;

}  // namespace panel
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
