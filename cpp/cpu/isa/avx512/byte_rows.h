// The words of the vocabulary panel:: for weight rows side by side with AVX-512. scalar/byte_rows.h says what each name
// means.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpp/cpu/isa/bytes.h"
#include "cpp/cpu/isa/panel.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/format/portable.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace panel {

inline constexpr int kRowDwords = 8;
[[gnu::always_inline]] inline void load_rows(const void* p, int64_t stride, F (&out)[kRowDwords]) {
  U v[8];  // the bytes of rows i and 4 + i, then of rows 8 + i and 12 + i
  const char* row = static_cast<const char*>(p);
  unroll<4>([&](auto q) QLORA_INLINE_LAMBDA {
    unroll<4>([&](auto i) QLORA_INLINE_LAMBDA {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + i * stride));
      U& to = v[q / 2 * 4 + i];
      to = q % 2 == 0 ? _mm512_castsi256_si512(bytes) : _mm512_inserti64x4(to, bytes, 1);
    });
    row += 4 * stride;
    asm("" : "+r"(row));  // or GCC keeps 16 addresses, which are too many
  });
  U word[8];  // quarters: dwords j and 4 + j of rows 0 .. 3, then of rows 4 .. 7; the same of rows 8 .. 15
  unroll<2>([&](auto half) QLORA_INLINE_LAMBDA {
    U* const of = v + 4 * half;
    const U low01 = _mm512_unpacklo_epi32(of[0], of[1]), low23 = _mm512_unpacklo_epi32(of[2], of[3]);
    const U high01 = _mm512_unpackhi_epi32(of[0], of[1]), high23 = _mm512_unpackhi_epi32(of[2], of[3]);
    word[4 * half] = _mm512_unpacklo_epi64(low01, low23);
    word[4 * half + 1] = _mm512_unpackhi_epi64(low01, low23);
    word[4 * half + 2] = _mm512_unpacklo_epi64(high01, high23);
    word[4 * half + 3] = _mm512_unpackhi_epi64(high01, high23);
  });
  unroll<4>([&](auto j) QLORA_INLINE_LAMBDA {
    out[j] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(word[j], word[4 + j], 0x88));
    out[4 + j] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(word[j], word[4 + j], 0xDD));
  });
}

// vpermb uses the low six bits of a byte, and a quarter of the values has all of them.
[[gnu::always_inline]] inline void decode_eight(const U& values, const F* packed, U& even, U& odd) {
  const U codes = _mm512_castps_si512(*packed);
  even = _mm512_permutexvar_epi8(_mm512_srli_epi16(codes, 4), values);
  odd = _mm512_permutexvar_epi8(codes, values);
}

}  // namespace panel
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
