// stream::'s words for SMMLA, which multiplies a 2x8 by an 8x2 matrix of bytes. A 16-bit number is two signed digits of
// eight bits, so that the look-ups of codes, one for each digit, need not be zipped to words:
//
// clang-format off
//   one matrix     [ 8 codes of row n                ]   the upper digits of w; another matrix has the lower ones
//                  [ the same codes of row n + 1     ]
//   the other      [ upper digits of the same 8 x    ]   in memory as MatrixOrder writes a token
//                  [ lower digits                    ]
//   lanes          n · upper x, n · lower x, (n + 1) · upper x, (n + 1) · lower x
// clang-format on
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "cpp/cpu/isa/neon_i8mm/stream.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/format/packing.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace stream {

inline constexpr int kMaxMatrixTokens = 6;
inline constexpr int kLargestOfDigits = 127 * 256 + 127;

// x = 256 * upper_digit(x) + lower_digit(x)
inline int8_t upper_digit(int x) { return static_cast<int8_t>((x + 128) >> 8); }
inline int8_t lower_digit(int x) { return static_cast<int8_t>(x - 256 * upper_digit(x)); }

struct DigitCodebook {
  uint8x16_t upper, lower;
  explicit DigitCodebook(const int16_t* value) {
    int8_t digits[2][kCodes];
    for (int i = 0; i < kCodes; ++i) digits[0][i] = upper_digit(value[i]), digits[1][i] = lower_digit(value[i]);
    upper = vreinterpretq_u8_s8(vld1q_s8(digits[0])), lower = vreinterpretq_u8_s8(vld1q_s8(digits[1]));
  }
};

// Matrix i has weights 16 (i / 2) + 1, + 3, .. of both rows if i is even, and 16 (i / 2), + 2, .. if it is odd.
inline constexpr int kMatrices = kChunk / 8;
struct MatrixOrder {
  static constexpr int weight(int matrix, int column) { return 16 * (matrix / 2) + 2 * column + 1 - matrix % 2; }
};
inline void store_in_code_order(const Ints (&value)[8], int16_t* out, MatrixOrder) {
  int32_t weight[kChunk];
  __builtin_memcpy(weight, value, sizeof(weight));
  int8_t* digits = reinterpret_cast<int8_t*>(out);
  for (int matrix = 0; matrix < kMatrices; ++matrix, digits += 16) {
    for (int column = 0; column < 8; ++column) {
      const int x = weight[MatrixOrder::weight(matrix, column)];
      digits[column] = upper_digit(x), digits[8 + column] = lower_digit(x);
    }
  }
}

struct RowPair {
  int8x16_t upper[kMatrices], lower[kMatrices];
};
inline RowPair decode(Chunk row, Chunk next, const DigitCodebook& book) {
  RowPair out;
  const auto words = [](uint8x16_t x) { return vreinterpretq_u64_u8(x); };
  const uint64x2_t bytes[4] = {vzip1q_u64(words(row.low), words(next.low)), vzip2q_u64(words(row.low), words(next.low)),
                               vzip1q_u64(words(row.high), words(next.high)),
                               vzip2q_u64(words(row.high), words(next.high))};
  unroll<kMatrices>([&](auto i) {
    const uint8x16_t both = vreinterpretq_u8_u64(bytes[i / 2]), codes = i % 2 ? high_nibbles(both) : low_nibbles(both);
    out.upper[i] = vreinterpretq_s8_u8(vqtbl1q_u8(book.upper, codes));
    out.lower[i] = vreinterpretq_s8_u8(vqtbl1q_u8(book.lower, codes));
  });
  return out;
}

// sums[w] += scale[w] * the products of both rows with eight x of each matrix, in the lanes above: 256 * (products with
// upper digits of w) + products with lower digits. The lanes of a chunk have the same scale.
template <int kRows>
inline void multiply_add(const RowPair& rows, const int16_t* x, const Floats (&scale)[kRows], Floats (&sums)[kRows]) {
  int32x4_t upper = vdupq_n_s32(0), lower = upper;
  unroll<kMatrices>([&](auto i) {
    const int8x16_t digits = vld1q_s8(reinterpret_cast<const int8_t*>(x) + 16 * i);
    upper = vmmlaq_s32(upper, rows.upper[i], digits);
    lower = vmmlaq_s32(lower, rows.lower[i], digits);
  });
  const float32x4_t products = vcvtq_f32_s32(vaddq_s32(vshlq_n_s32(upper, 8), lower));
  unroll<kRows>([&](auto w) { sums[w].low = vfmaq_f32(sums[w].low, products, scale[w].low); });
}
// The lanes of `sums` that belong to one row of a pair, as lanes whose sum is that of the row.
template <int row>
inline Floats lanes_of_row(Floats sums) {
  const float32x2_t of_row = row ? vget_high_f32(sums.low) : vget_low_f32(sums.low);
  return {vcombine_f32(vmul_f32(of_row, float32x2_t{256.0f, 1.0f}), vdup_n_f32(0.0f)), vdupq_n_f32(0.0f)};
}

}  // namespace stream
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
