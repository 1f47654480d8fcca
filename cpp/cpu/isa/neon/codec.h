// The vocabulary codec:: for NEON (ARMv8.0 Advanced SIMD). scalar/codec.h says what each name means.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "cpp/cpu/isa/dynamic8_cells.h"
#include "cpp/cpu/isa/neon/bfloat16.h"
#include "cpp/cpu/isa/neon/tables.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/format/codes.h"
#include "cpp/format/dtypes.h"
#include "cpp/format/stochastic.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace codec {

inline constexpr int kLanes = 16;
inline constexpr int kGroup = 2 * kLanes;

using Floats = SixteenFloats;

// operation(quarter of a, of b), for each of the four quarters.
template <class Operation>
inline Floats quarters(const Floats& a, const Floats& b, Operation operation) {
  return {{operation(a.q[0], b.q[0]), operation(a.q[1], b.q[1]), operation(a.q[2], b.q[2]), operation(a.q[3], b.q[3])}};
}

inline Floats splat(float x) { return {{vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x)}}; }
inline Floats load(const float* p) { return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}}; }
inline void store(float* p, const Floats& x) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, x.q[i]);
}
inline Floats add(const Floats& a, const Floats& b) {
  return quarters(a, b, [](float32x4_t x, float32x4_t y) { return vaddq_f32(x, y); });
}
inline Floats sub(const Floats& a, const Floats& b) {
  return quarters(a, b, [](float32x4_t x, float32x4_t y) { return vsubq_f32(x, y); });
}
inline Floats mul(const Floats& a, const Floats& b) {
  return quarters(a, b, [](float32x4_t x, float32x4_t y) { return vmulq_f32(x, y); });
}
inline Floats fma(const Floats& a, const Floats& b, Floats c) {
  for (int i = 0; i < 4; ++i) c.q[i] = vfmaq_f32(c.q[i], a.q[i], b.q[i]);
  return c;
}
inline Floats halves(float low, float high) {
  return {{vdupq_n_f32(low), vdupq_n_f32(low), vdupq_n_f32(high), vdupq_n_f32(high)}};
}

inline void accumulate(double* sums, const Floats& x) {
  for (int i = 0; i < 4; ++i, sums += 4) {
    vst1q_f64(sums, vaddq_f64(vld1q_f64(sums), vcvt_f64_f32(vget_low_f32(x.q[i]))));
    vst1q_f64(sums + 2, vaddq_f64(vld1q_f64(sums + 2), vcvt_high_f64_f32(x.q[i])));
  }
}

struct Pairs {
  Floats even, odd;
};
inline Pairs load_pairs(const float* p) {
  const float32x4x2_t a = vld2q_f32(p), b = vld2q_f32(p + 8), c = vld2q_f32(p + 16), d = vld2q_f32(p + 24);
  return {{{a.val[0], b.val[0], c.val[0], d.val[0]}}, {{a.val[1], b.val[1], c.val[1], d.val[1]}}};
}
inline const uint16_t* words(const void* p) { return static_cast<const uint16_t*>(p); }
inline Pairs load_pairs(const bfloat16* p) {
  Pairs r;
  for (int i = 0; i < 4; ++i) {
    const uint32x4_t both = vreinterpretq_u32_u16(vld1q_u16(words(p + 8 * i)));
    r.even.q[i] = vreinterpretq_f32_u32(vshlq_n_u32(both, 16));
    r.odd.q[i] = vreinterpretq_f32_u32(vandq_u32(both, vdupq_n_u32(0xFFFF0000u)));
  }
  return r;
}
inline Pairs load_pairs(const float16* p) {
  Pairs r;
  for (int i = 0; i < 4; i += 2) {
    const uint16x8x2_t both = vld2q_u16(words(p + 8 * i));
    const float16x8_t even = vreinterpretq_f16_u16(both.val[0]), odd = vreinterpretq_f16_u16(both.val[1]);
    r.even.q[i] = vcvt_f32_f16(vget_low_f16(even)), r.even.q[i + 1] = vcvt_high_f32_f16(even);
    r.odd.q[i] = vcvt_f32_f16(vget_low_f16(odd)), r.odd.q[i + 1] = vcvt_high_f32_f16(odd);
  }
  return r;
}

// The low byte of each of 16 dwords.
inline uint8x16_t low_bytes(uint32x4_t a, uint32x4_t b, uint32x4_t c, uint32x4_t d) {
  const auto word = [](uint32x4_t x) { return vreinterpretq_u16_u32(x); };
  const uint16x8_t low = vuzp1q_u16(word(a), word(b)), high = vuzp1q_u16(word(c), word(d));
  return vuzp1q_u8(vreinterpretq_u8_u16(low), vreinterpretq_u8_u16(high));
}

using Codes = uint8x16_t;

// Codes by table and one comparison. [-1, 1] is cut into 31 cells of 1/15, so narrow that a cell holds at most one
// decision boundary. TBL looks up the code at the lower end of a cell, and the boundary in it, which is out of reach if
// the cell has none.
inline constexpr float kCellsPerOne = 15.0f;
inline constexpr float kCellRounder = 8388608.0f + 16.0f;  // adding it leaves round(x) + 16 in the low bits
struct Cells {
  uint8_t code[32] = {};
  uint8_t boundary[4][32] = {};  // byte p of each
  // Whether codes are found this way: they ascend with the values, the largest of which is 1; no cell holds two
  // boundaries, and none is so near an edge that rounding could move it across.
  bool serve = false;

  constexpr Cells() = default;
  explicit constexpr Cells(const CodeTable& table) : serve(table.is_ascending && table.largest == 1.0f) {
    for (int cell = 0; cell < 32 && serve; ++cell) {
      const double low = (cell - 16.5) / kCellsPerOne, high = (cell - 15.5) / kCellsPerOne;
      int below = 0;
      while (below < kCodes - 1 && table.boundary[below] < low) ++below;
      float inside = 2.0f;
      if (below < kCodes - 1 && table.boundary[below] < high) {
        inside = table.boundary[below];
        serve &= inside - low > 1e-4 && high - inside > 1e-4;
        serve &= below + 1 == kCodes - 1 || table.boundary[below + 1] > high;
      }
      code[cell] = static_cast<uint8_t>(below);
      for (int p = 0; p < 4; ++p)
        boundary[p][cell] = static_cast<uint8_t>(__builtin_bit_cast(uint32_t, inside) >> (8 * p));
    }
  }
};
inline constexpr PerCode<Cells> kCells;
static_assert(kCells[Code::kNf4].serve);

// For tables that cells serve.
class FastEncoder {
 public:
  static constexpr bool serves(Code code) { return !is_custom(code) && kCells[code].serve; }
  explicit FastEncoder(Code code) : cells_(&kCells[code]), values_(float_table(table_of(code).value)) {}
  Codes encode_within(const Floats& q) const {
    const auto cell_of = [](float32x4_t x) {
      return vreinterpretq_u32_f32(vfmaq_f32(vdupq_n_f32(kCellRounder), x, vdupq_n_f32(kCellsPerOne)));
    };
    const uint8x16_t cell = low_bytes(cell_of(q.q[0]), cell_of(q.q[1]), cell_of(q.q[2]), cell_of(q.q[3]));
    const auto of_cell = [cell](const uint8_t* table) {
      const uint8x16x2_t entries = {{vld1q_u8(table), vld1q_u8(table + 16)}};
      return vqtbl2q_u8(entries, cell);
    };
    const uint8x16_t b0 = of_cell(cells_->boundary[0]), b1 = of_cell(cells_->boundary[1]);
    const uint8x16_t b2 = of_cell(cells_->boundary[2]), b3 = of_cell(cells_->boundary[3]);
    const auto zip1 = [](uint8x16_t a, uint8x16_t b) { return vreinterpretq_u16_u8(vzip1q_u8(a, b)); };
    const auto zip2 = [](uint8x16_t a, uint8x16_t b) { return vreinterpretq_u16_u8(vzip2q_u8(a, b)); };
    const Floats boundary = {
        {floats_of(vzip1q_u16(zip1(b0, b1), zip1(b2, b3))), floats_of(vzip2q_u16(zip1(b0, b1), zip1(b2, b3))),
         floats_of(vzip1q_u16(zip2(b0, b1), zip2(b2, b3))), floats_of(vzip2q_u16(zip2(b0, b1), zip2(b2, b3)))}};
    const uint8x16_t above = low_bytes(vcgtq_f32(q.q[0], boundary.q[0]), vcgtq_f32(q.q[1], boundary.q[1]),
                                       vcgtq_f32(q.q[2], boundary.q[2]), vcgtq_f32(q.q[3], boundary.q[3]));
    return vsubq_u8(of_cell(cells_->code), above);  // true is -1
  }
  Codes encode(const Floats& q) const {
    // The maximum of NaN and -1 is -1, whose code is also NaN's.
    const Floats at_least = quarters(q, splat(-1.0f), [](float32x4_t a, float32x4_t b) { return vmaxnmq_f32(a, b); });
    return encode_within(
        quarters(at_least, splat(1.0f), [](float32x4_t a, float32x4_t b) { return vminnmq_f32(a, b); }));
  }
  Floats values(Codes c) const { return look_up(values_, c); }

 private:
  const Cells* cells_;
  FloatTable values_;
};

// For all tables: the boundaries below q are counted, and the code of that rank is looked up.
class Encoder {
 public:
  explicit Encoder(Code code)
      : table_(&table_of(code)), code_of_rank_(vld1q_u8(table_->code_of_rank)), values_(float_table(table_->value)) {}
  Codes encode(const Floats& q) const {
    uint32x4_t below[4] = {vdupq_n_u32(0), vdupq_n_u32(0), vdupq_n_u32(0), vdupq_n_u32(0)};
    for (const float boundary : table_->boundary) {
      for (int i = 0; i < 4; ++i) below[i] = vsubq_u32(below[i], vcgtq_f32(q.q[i], vdupq_n_f32(boundary)));
    }
    return vqtbl1q_u8(code_of_rank_, low_bytes(below[0], below[1], below[2], below[3]));
  }
  Codes encode_within(const Floats& q) const { return encode(q); }
  Floats values(Codes c) const { return look_up(values_, c); }

 private:
  const CodeTable* table_;
  uint8x16_t code_of_rank_;
  FloatTable values_;
};

inline void store_codes(uint8_t* codes, Codes c) { vst1q_u8(codes, c); }
inline void store_packed(uint8_t* packed, Codes even, Codes odd) { vst1q_u8(packed, vsliq_n_u8(odd, even, 4)); }

class Thresholds {
 public:
  explicit Thresholds(uint64_t seed) : words_(seed_words(seed)) {}
  Pairs at(uint64_t first) const {
    Pairs r;
    for (uint64_t i = 0; i < 4; ++i) {
      r.even.q[i] = every_other(element_word(first + 8 * i));
      r.odd.q[i] = every_other(element_word(first + 8 * i + 1));
    }
    return r;
  }

 private:
  // The thresholds of the elements i, i + 2, i + 4 and i + 6. `word` is that of element i.
  float32x4_t every_other(uint32_t word) const {
    const uint32_t step[] = {0, 2 * kElementStep, 4 * kElementStep, 6 * kElementStep};
    uint32x4_t x = veorq_u32(vaddq_u32(vdupq_n_u32(word), vld1q_u32(step)), vdupq_n_u32(words_.before));
    x = vmulq_u32(veorq_u32(x, vshrq_n_u32(x, 16)), vdupq_n_u32(0x85EBCA6Bu));
    x = vaddq_u32(x, vdupq_n_u32(words_.behind));
    x = vmulq_u32(veorq_u32(x, vshrq_n_u32(x, 13)), vdupq_n_u32(0xC2B2AE35u));
    const float32x4_t number = vcvtq_f32_u32(vshrq_n_u32(x, 16));
    return vmulq_f32(vaddq_f32(number, vdupq_n_f32(0.5f)), vdupq_n_f32(1.0f / 65536.0f));
  }

  SeedWords words_;
};

// The values below q are counted. Then q is compared with the random boundary above the last of them.
class StochasticEncoder {
 public:
  explicit StochasticEncoder(const CodeTable& table)
      : table_(&table), code_of_rank_(vld1q_u8(table.code_of_rank)), values_(float_table(table.ranked)) {
    float gap[kCodes];
    for (int rank = 0; rank < kCodes; ++rank) gap[rank] = rank + 1 < kCodes ? table.gap[rank] : __builtin_inff();
    gaps_ = float_table(gap);
  }
  Codes encode(const Floats& q, const Floats& threshold) const {
    uint32x4_t below[4] = {vdupq_n_u32(0), vdupq_n_u32(0), vdupq_n_u32(0), vdupq_n_u32(0)};
    for (int rank = 1; rank < kCodes; ++rank) {
      for (int i = 0; i < 4; ++i) below[i] = vsubq_u32(below[i], vcgtq_f32(q.q[i], vdupq_n_f32(table_->ranked[rank])));
    }
    const uint8x16_t rank = low_bytes(below[0], below[1], below[2], below[3]);
    const Floats boundary = add(look_up(values_, rank), mul(threshold, look_up(gaps_, rank)));
    const uint8x16_t above = low_bytes(vcgtq_f32(q.q[0], boundary.q[0]), vcgtq_f32(q.q[1], boundary.q[1]),
                                       vcgtq_f32(q.q[2], boundary.q[2]), vcgtq_f32(q.q[3], boundary.q[3]));
    return vqtbl1q_u8(code_of_rank_, vsubq_u8(rank, above));  // true is -1
  }
  void store(uint8_t* packed, Codes even, Codes odd) const { store_packed(packed, even, odd); }

 private:
  const CodeTable* table_;
  uint8x16_t code_of_rank_;
  FloatTable values_, gaps_;
};

class ConsecutiveEncoder {
 public:
  explicit ConsecutiveEncoder(const CodeTable& table) : least_(table.ranked[0]) {}
  Codes encode(const Floats& q, const Floats& threshold) const {
    const float32x4_t least = vdupq_n_f32(least_), most = vdupq_n_f32(least_ + (kCodes - 2));
    uint32x4_t rank[4];
    for (int i = 0; i < 4; ++i) {
      const float32x4_t below = vminnmq_f32(vmaxnmq_f32(vrndmq_f32(q.q[i]), least), most);  // of NaN: `least`
      const uint32x4_t above = vcgtq_f32(q.q[i], vaddq_f32(below, threshold.q[i]));
      rank[i] = vsubq_u32(vcvtq_u32_f32(vsubq_f32(below, least)), above);
    }
    return low_bytes(rank[0], rank[1], rank[2], rank[3]);
  }
  void store(uint8_t* packed, Codes even, Codes odd) const { store_packed(packed, even, odd); }

 private:
  float least_;
};

inline void store_dynamic8(uint8_t* codes, const Floats& q) {
  using Cells = Dynamic8Cells;
  uint32x4_t code[4];
  for (int i = 0; i < 4; ++i) {
    const int32x4_t bits = vreinterpretq_s32_f32(q.q[i]), sign = vshrq_n_s32(bits, 31);
    const int32x4_t magnitude = vandq_s32(bits, vdupq_n_s32(INT32_MAX));
    const int32x4_t above_least = vsubq_s32(magnitude, vdupq_n_s32(Cells::kLeastBits));
    const int32x4_t place = vminq_s32(vmaxq_s32(above_least, vdupq_n_s32(0)), vdupq_n_s32(Cells::kRange));
    int32_t cell[4], entry[4];
    vst1q_s32(cell, vaddq_s32(vshrq_n_s32(place, Cells::kLowBits), vandq_s32(sign, vdupq_n_s32(Cells::kCells))));
    for (int l = 0; l < 4; ++l) entry[l] = kDynamic8Cells.entry[cell[l]];
    const int32x4_t low = veorq_s32(vandq_s32(place, vdupq_n_s32(Cells::kLowMask)), sign);
    code[i] = vreinterpretq_u32_s32(vshrq_n_s32(vaddq_s32(vld1q_s32(entry), low), Cells::kLowBits));
  }
  vst1q_u8(codes, low_bytes(code[0], code[1], code[2], code[3]));
}

template <class T>
class Largest {
 public:
  void see(const T* group) {
    if constexpr (sizeof(T) == 4) {
      for (int i = 0; i < kGroup; i += 4) {
        const uint32x4_t bits = vreinterpretq_u32_f32(vld1q_f32(group + i));
        dwords_ = vmaxq_u32(dwords_, vandq_u32(bits, vdupq_n_u32(0x7FFFFFFF)));
      }
    } else {
      for (int i = 0; i < kGroup; i += 8) {
        words_ = vmaxq_u16(words_, vandq_u16(vld1q_u16(words(group + i)), vdupq_n_u16(0x7FFF)));
      }
    }
  }
  float magnitude() const {
    if constexpr (sizeof(T) == 4) {
      return bits_float(vmaxvq_u32(dwords_));
    } else {
      return to_float(T{vmaxvq_u16(words_)});
    }
  }

 private:
  uint32x4_t dwords_ = vdupq_n_u32(0);
  uint16x8_t words_ = vdupq_n_u16(0);
};

class Values {
 public:
  explicit Values(const CodeTable& table) : values_(load(table.value)) {}
  Floats times(float scale) const { return mul(values_, splat(scale)); }

 private:
  Floats values_;
};
// As planes of bytes: four of them, or two of 16-bit values.
template <class T>
struct Table {
  WordTable words;
};
template <>
struct Table<float> {
  FloatTable floats;
};
template <class T>
Table<T> round_table(const Floats& decoded);
template <>
inline Table<float> round_table(const Floats& decoded) {
  return {float_table(decoded.q[0], decoded.q[1], decoded.q[2], decoded.q[3])};
}
template <>
inline Table<float16> round_table(const Floats& decoded) {
  const auto round = [](float32x4_t low, float32x4_t high) {
    return vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(low), high));
  };
  return {word_table(round(decoded.q[0], decoded.q[1]), round(decoded.q[2], decoded.q[3]))};
}
template <>
inline Table<bfloat16> round_table(const Floats& decoded) {
  return {word_table(round_to_bfloat16(decoded.q[0], decoded.q[1]), round_to_bfloat16(decoded.q[2], decoded.q[3]))};
}
template <class T>
inline Table<T> make_table(const Values& values, float scale) {
  return round_table<T>(values.times(scale));
}

// Plain stores, also with kStream: a core that writes whole lines one after another stops reading them first by itself.
template <bool kStream, class T>
inline void decode(const Table<T>& table, const uint8_t* packed, T* out) {
  const uint8x16_t bytes = vld1q_u8(packed), high = high_nibbles(bytes), low = low_nibbles(bytes);
  const uint8x16_t codes[2] = {vzip1q_u8(high, low), vzip2q_u8(high, low)};
  for (int half = 0; half < 2; ++half, out += kLanes) {
    if constexpr (sizeof(T) == 4) {
      store(out, look_up(table.floats, codes[half]));
    } else {
      const Words words = look_up(table.words, codes[half]);
      vst1q_u16(reinterpret_cast<uint16_t*>(out), words.low);
      vst1q_u16(reinterpret_cast<uint16_t*>(out) + 8, words.high);
    }
  }
}
inline void finish_streaming() {}
inline Pairs decode_pairs(const Table<float>& table, const uint8_t* packed) {
  const uint8x16_t bytes = vld1q_u8(packed);
  return {look_up(table.floats, high_nibbles(bytes)), look_up(table.floats, low_nibbles(bytes))};
}

inline int64_t decode_many_scales(const uint8_t*, int64_t, float, float, float*) { return 0; }
inline int64_t look_up_many_scales(const uint8_t*, int64_t, const float*, float*) { return 0; }
inline int64_t widen_many_scales(const float16* scales, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const float16x8_t eight = vreinterpretq_f16_u16(vld1q_u16(words(scales + i)));
    vst1q_f32(out + i, vcvt_f32_f16(vget_low_f16(eight)));
    vst1q_f32(out + i + 4, vcvt_high_f32_f16(eight));
  }
  return i;
}

inline void multiply_eight(const uint8_t* bytes, float step, float by, float* out) {
  const uint16x8_t integers = vmovl_u8(vld1_u8(bytes));
  const float32x4_t low = vcvtq_f32_u32(vmovl_u16(vget_low_u16(integers)));
  const float32x4_t high = vcvtq_f32_u32(vmovl_u16(vget_high_u16(integers)));
  vst1q_f32(out, vmulq_n_f32(vmulq_n_f32(low, step), by));
  vst1q_f32(out + 4, vmulq_n_f32(vmulq_n_f32(high, step), by));
}

}  // namespace codec
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
