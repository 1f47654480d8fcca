// The words of the vocabulary panel:: for int8 with SMMLA, which multiplies a 2x8 by an 8x2 matrix of bytes. A register
// holds eight bytes each of two rows, or of two lanes:
//
// clang-format off
//   broadcast   [ 8 bytes of row r     ]     lanes   [ 8 bytes of lane l     ]
//               [ 8 bytes of row r + 1 ]             [ 8 bytes of lane l + 1 ]
//   sums        (r, l)  (r, l + 1)  (r + 1, l)  (r + 1, l + 1)
// clang-format on
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "cpp/cpu/isa/neon/bytes.h"
#include "cpp/cpu/isa/neon/tables.h"
#include "cpp/cpu/isa/panel.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/int8_segment-inl.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/format/code_tables.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace panel {

struct MatrixInt8 : WordInt8 {
  static constexpr int kRows = 2, kPairs = kLanes / 2;
  struct Vector {
    int8x16_t pair[kPairs];
  };
  struct Sum {
    int32x4_t pair[kPairs];
  };

  static Vector load(const Word* p) {
    Vector v;
    unroll<kPairs>([&](auto i) { v.pair[i] = broadcast(p + 4 * i); });
    return v;
  }
  using Broadcast = int8x16_t;
  static Broadcast broadcast(const Word* p) { return vreinterpretq_s8_s32(vld1q_s32(p)); }
  static Sum splat_sum(int32_t x) {
    const int32x4_t v = vdupq_n_s32(x);
    return {{v, v, v, v}};
  }
  static Sum multiply_add(Broadcast a, const Vector& b, Sum sum) {
    unroll<kPairs>([&](auto i) { sum.pair[i] = vmmlaq_s32(sum.pair[i], a, b.pair[i]); });
    return sum;
  }
  static Sum multiply_add(const Vector& a, Broadcast b, Sum sum) { return multiply_add(b, a, sum); }
  static F to_floats(const Sum& sum, int row = 0) { return WordInt8::to_floats(lanes(sum, row)); }
  static Sum add_bytes(const Vector& x, Sum sum) { return multiply_add(vdupq_n_s8(1), x, sum); }
  static void store_sum(int32_t* p, const Sum& sum) { WordInt8::store_sum(p, lanes(sum, 0)); }

  static void round_products(const int16_t* rows, const int16_t* scales, int64_t count, Word* out, int64_t stride,
                             float* factors) {
    WordInt8::round_products<kRows>(rows, scales, count, out, stride, factors);
  }

  static void decode_row(const Values& values, const uint8_t* packed, Word* out) {
    int8_t* const to = reinterpret_cast<int8_t*>(out);
    unroll<2>([&](auto half) {
      const uint8x16_t both = vld1q_u8(packed + 16 * half);
      const int8x16_t even = vqtbl1q_s8(values, high_nibbles(both)), odd = vqtbl1q_s8(values, low_nibbles(both));
      const int8x8_t bytes[4] = {vget_low_s8(even), vget_low_s8(odd), vget_high_s8(even), vget_high_s8(odd)};
      unroll<4>([&](auto i) { vst1_s8(to + 64 * half + 16 * i, bytes[i]); });
    });
  }
  static void decode_lanes(const Values& values, const uint8_t* const (&packed)[8], bool /*halves*/, Word* out,
                           int64_t tile_stride) {
    unroll<2>([&](auto group) {
      int16x8x4_t words[4];  // vector j has bytes of two rows of element 4i + j of the group in lane i
      unroll<4>([&](auto rows) {
        const Codes a = load_codes(packed[2 * rows] + 16 * group), b = load_codes(packed[2 * rows + 1] + 16 * group);
        const int8x16_t even = vqtbl1q_s8(values, high_nibbles(a)), next_even = vqtbl1q_s8(values, high_nibbles(b));
        const int8x16_t odd = vqtbl1q_s8(values, low_nibbles(a)), next_odd = vqtbl1q_s8(values, low_nibbles(b));
        words[0].val[rows] = vreinterpretq_s16_s8(vzip1q_s8(even, next_even));
        words[1].val[rows] = vreinterpretq_s16_s8(vzip1q_s8(odd, next_odd));
        words[2].val[rows] = vreinterpretq_s16_s8(vzip2q_s8(even, next_even));
        words[3].val[rows] = vreinterpretq_s16_s8(vzip2q_s8(odd, next_odd));
      });
      Word* const to = out + group * 2 * tile_stride;
      unroll<4>([&](auto j) {
        vst4q_s16(reinterpret_cast<int16_t*>(to + j / 2 * tile_stride + j % 2 * kRows * kLanes), words[j]);
      });
    });
  }

 private:
  static WordInt8::Sum lanes(const Sum& sum, int row) {
    const auto zip = [row](int32x4_t a, int32x4_t b) {
      const int64x2_t x = vreinterpretq_s64_s32(a), y = vreinterpretq_s64_s32(b);
      return vreinterpretq_s32_s64(row ? vzip2q_s64(x, y) : vzip1q_s64(x, y));
    };
    return {zip(sum.pair[0], sum.pair[1]), zip(sum.pair[2], sum.pair[3])};
  }
};

// Sums of int32 take half of the registers, and those of floats lie in memory meanwhile.
inline constexpr int kInt8Height = 4;

template <class Run>
void with_int8_word(const Int8CodeTable&, int /*blocks*/, const Run& run) {
  run(MatrixInt8());
}

}  // namespace panel
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
