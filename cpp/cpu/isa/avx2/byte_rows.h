// The words of the vocabulary panel:: for weight rows side by side with AVX2. scalar/byte_rows.h says what each name
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

inline constexpr int kRowDwords = 4;
[[gnu::always_inline]] inline void load_rows(const void* p, int64_t stride, F (&out)[kRowDwords]) {
  const char* const row = static_cast<const char*>(p);
  U v[4];  // rows i and 4 + i
  unroll<4>([&](auto i) QLORA_INLINE_LAMBDA {
    const auto at = [&](int r) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + (i + r) * stride)); };
    v[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(at(0)), at(4), 1);
  });
  const U low01 = _mm256_unpacklo_epi32(v[0], v[1]), low23 = _mm256_unpacklo_epi32(v[2], v[3]);
  const U high01 = _mm256_unpackhi_epi32(v[0], v[1]), high23 = _mm256_unpackhi_epi32(v[2], v[3]);
  out[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi64(low01, low23));
  out[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi64(low01, low23));
  out[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi64(high01, high23));
  out[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi64(high01, high23));
}

[[gnu::always_inline]] inline void decode_eight(const U& values, const F* packed, U& even, U& odd) {
  const U codes = _mm256_castps_si256(*packed), low = _mm256_set1_epi8(15);
  even = _mm256_shuffle_epi8(values, _mm256_and_si256(_mm256_srli_epi16(codes, 4), low));
  odd = _mm256_shuffle_epi8(values, _mm256_and_si256(codes, low));
}

}  // namespace panel
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
