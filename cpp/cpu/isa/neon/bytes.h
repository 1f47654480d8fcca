// The words of the vocabulary panel:: for int8 with NEON, and with SDOT where the set has it. scalar/bytes.h says what
// each name means. Signed bytes are multiplied by signed bytes, so nothing is added to either.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "cpp/cpu/isa/neon/tables.h"
#include "cpp/cpu/isa/panel.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/int8_segment-inl.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/format/code_tables.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace panel {

struct WordInt8 {
  using Word = int32_t;
  struct Vector {
    int8x16_t low, high;
  };
  struct Sum {
    int32x4_t low, high;
  };
  static constexpr int kRows = 1;
  static constexpr int kPartialSteps = 0;
  static int added_to(const Int8CodeTable&) { return 0; }
  static constexpr int kAddedToDy = 0;

  static Vector load(const Word* p) {
    return {vreinterpretq_s8_s32(vld1q_s32(p)), vreinterpretq_s8_s32(vld1q_s32(p + 4))};
  }
  static Sum load_sum(const int32_t* p) { return {vld1q_s32(p), vld1q_s32(p + 4)}; }
  static Sum splat_sum(int32_t x) { return {vdupq_n_s32(x), vdupq_n_s32(x)}; }
#ifdef __ARM_FEATURE_DOTPROD
  using Broadcast = int8x8_t;  // one word: SDOT multiplies all lanes by it
  static Broadcast broadcast(const Word* p) { return vreinterpret_s8_f32(float32x2_t{__builtin_bit_cast(float, *p)}); }
  static Sum multiply_add(Broadcast a, Vector b, Sum sum) {
    return {vdotq_lane_s32(sum.low, b.low, a, 0), vdotq_lane_s32(sum.high, b.high, a, 0)};
  }
#else
  using Broadcast = int8x16_t;
  static Broadcast broadcast(const Word* p) { return vreinterpretq_s8_s32(vld1q_dup_s32(p)); }
  // Magnitudes are at most 127, so the sum of two products fits an int16.
  static Sum multiply_add(Broadcast a, Vector b, Sum sum) {
    const auto add = [a](int32x4_t to, int8x16_t x) {
      const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(x)), high = vmull_high_s8(a, x);
      return vpadalq_s16(to, vpaddq_s16(low, high));
    };
    return {add(sum.low, b.low), add(sum.high, b.high)};
  }
#endif
  static Sum multiply_add(Vector a, Broadcast b, Sum sum) { return multiply_add(b, a, sum); }
  static F to_floats(Sum sum, int /*row*/ = 0) { return {vcvtq_f32_s32(sum.low), vcvtq_f32_s32(sum.high)}; }
  static Sum add_bytes(Vector x, Sum sum) {
    return {vpadalq_s16(sum.low, vpaddlq_s8(x.low)), vpadalq_s16(sum.high, vpaddlq_s8(x.high))};
  }
  static void store_sum(int32_t* p, Sum sum) {
    vst1q_s32(p, sum.low);
    vst1q_s32(p + 4, sum.high);
  }
  static F as_floats(Vector v) { return {vreinterpretq_f32_s8(v.low), vreinterpretq_f32_s8(v.high)}; }
  static void store_bits(Word* p, F bits) {
    vst1q_s32(p, vreinterpretq_s32_f32(bits.low));
    vst1q_s32(p + 4, vreinterpretq_s32_f32(bits.high));
  }

  template <Int8Order order>
  static float round(const F (&v)[8], Word* out) {
    const uint32_t bits = largest_magnitude(v);
    int8_t* const bytes = reinterpret_cast<int8_t*>(out);
    float unit = 0.0f;
    if (is_plain_segment(bits)) [[likely]] {
      const float largest = __builtin_bit_cast(float, bits), inverse = inverse_unit(largest);
      unit = largest / kInt8Largest;
      const auto nearest = [inverse](F x) {
        const auto integers = [inverse](float32x4_t y) { return vcvtnq_s32_f32(vmulq_n_f32(y, inverse)); };
        return vqmovn_high_s32(vqmovn_s32(integers(x.low)), integers(x.high));
      };
      unroll<4>([&](auto i) {
        const int16x8_t low = nearest(v[2 * i.value]), high = nearest(v[2 * i.value + 1]);
        vst1q_s8(bytes + 16 * i.value, in_order<order>(vqmovn_high_s16(vqmovn_s16(low), high)));
      });
    } else {
      float x[kInt8Segment];
      for (int i = 0; i < 8; ++i) panel::store(x + i * kLanes, v[i]);
      unit = round_segment(x, bytes);
      for (int i = 0; i < kInt8Segment; i += 16) vst1q_s8(bytes + i, in_order<order>(vld1q_s8(bytes + i)));
    }
    return unit;
  }

  static float round_to_fractions(const F (&v)[8], int16_t* out) {
    const uint32_t bits = largest_magnitude(v);
    const float largest = __builtin_bit_cast(float, bits);
    const float inverse = has_fractions(bits) ? kMostFraction / largest : 0.0f;
    const auto nearest = [&](float32x4_t x) {
      return vcvtnq_s32_f32(has_fractions(bits) ? vmulq_n_f32(x, inverse) : vdupq_n_f32(0.0f));
    };
    unroll<8>([&](auto i) {
      const int16x4_t low = vqmovn_s32(nearest(v[i.value].low));
      vst1q_s16(out + i.value * 8, vqmovn_high_s32(low, nearest(v[i.value].high)));
    });
    return largest;
  }
  template <int kOfRows = 1>
  static void round_products(const int16_t* rows, const int16_t* scales, int64_t count, Word* out, int64_t stride,
                             float* factors) {
    for (int64_t t = 0; t < count; ++t, rows += kInt8Segment) {
      int16x8_t product[8], most = vdupq_n_s16(0);
      unroll<8>([&](auto i) {
        product[i.value] = vqrdmulhq_s16(vld1q_s16(rows + 8 * i.value), vld1q_s16(scales + 8 * i.value));
        most = vmaxq_s16(most, vabsq_s16(product[i.value]));
      });
      const int32_t largest = vmaxvq_s16(most), factor = largest < kLeastProduct ? 0 : kFactorOfOne / largest;
      int8_t* const to = reinterpret_cast<int8_t*>(out + in_broadcast<kOfRows>(t, 0, stride));
      unroll<4>([&](auto i) {
        const int16x8_t low = vqrdmulhq_n_s16(product[2 * i.value], static_cast<int16_t>(factor));
        const int16x8_t high = vqrdmulhq_n_s16(product[2 * i.value + 1], static_cast<int16_t>(factor));
        if constexpr (kOfRows == 1) {
          vst1q_s8(to + 16 * i.value, vqmovn_high_s16(vqmovn_s16(low), high));
        } else {
          vst1_s8(to + 16 * kOfRows * i.value, vqmovn_s16(low));
          vst1_s8(to + 16 * kOfRows * i.value + 8 * kOfRows, vqmovn_s16(high));
        }
      });
      factors[t] = static_cast<float>(factor);
    }
  }

  using Values = int8x16_t;
  static Values values_of(const Int8CodeTable& codes, int added) {
    return vaddq_s8(vld1q_s8(codes.value), vdupq_n_s8(static_cast<int8_t>(added)));
  }
  static void decode_row(const Values& values, const uint8_t* packed, Word* out) {
    int8_t* const bytes = reinterpret_cast<int8_t*>(out);
    unroll<2>([&](auto half) {
      const uint8x16_t both = vld1q_u8(packed + 16 * half.value);
      const int8x16_t even = vqtbl1q_s8(values, high_nibbles(both)), odd = vqtbl1q_s8(values, low_nibbles(both));
      vst1q_s8(bytes + 32 * half.value, vcombine_s8(vget_low_s8(even), vget_low_s8(odd)));
      vst1q_s8(bytes + 32 * half.value + 16, vcombine_s8(vget_high_s8(even), vget_high_s8(odd)));
    });
  }
  // A group of lanes has 32 columns, so the order with `halves` is the same.
  static void decode_lanes(const Values& values, const uint8_t* const (&packed)[4], bool /*halves*/, Word* out,
                           int64_t tile_stride) {
    unroll<2>([&](auto group) {
      int8x8x4_t words[4];  // vector j has element 4i + j of the group in lane i
      unroll<4>([&](auto row) {
        const Codes codes = load_codes(packed[row.value] + 16 * group.value);
        const int8x16_t even = vqtbl1q_s8(values, high_nibbles(codes)), odd = vqtbl1q_s8(values, low_nibbles(codes));
        words[0].val[row.value] = vget_low_s8(even), words[2].val[row.value] = vget_high_s8(even);
        words[1].val[row.value] = vget_low_s8(odd), words[3].val[row.value] = vget_high_s8(odd);
      });
      Word* const to = out + group.value * 2 * tile_stride;
      unroll<4>([&](auto j) {
        vst4_s8(reinterpret_cast<int8_t*>(to + j.value / 2 * tile_stride + j.value % 2 * kLanes), words[j.value]);
      });
    });
  }

 private:
  static uint32_t largest_magnitude(const F (&v)[8]) {  // as bits
    uint32x4_t most = vdupq_n_u32(0);
    unroll<8>([&](auto i) {
      const auto magnitude = [](float32x4_t x) { return vreinterpretq_u32_f32(vabsq_f32(x)); };
      most = vmaxq_u32(most, vmaxq_u32(magnitude(v[i.value].low), magnitude(v[i.value].high)));
    });
    return vmaxvq_u32(most);
  }
  template <Int8Order order>
  static int8x16_t in_order(int8x16_t bytes) {
    if constexpr (order == Int8Order::kMemory) return bytes;
    static constexpr uint8_t kEvenFirst[16] = {0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15};
    return vqtbl1q_s8(bytes, vld1q_u8(kEvenFirst));
  }
};

#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
inline constexpr bool kHasBf16Words = true;
#else
inline constexpr bool kHasBf16Words = false;
#endif

#ifndef __ARM_FEATURE_MATMUL_INT8  // which has neon_i8mm/bytes.h
inline constexpr int kInt8Height = 3;

template <class Run>
void with_int8_word(const Int8CodeTable&, int /*blocks*/, const Run& run) {
  run(WordInt8());
}
#endif

}  // namespace panel
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
