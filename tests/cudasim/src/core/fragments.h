// Element formats of matrix fragments.
#pragma once
#include "ast.h"
#include "numeric.h"

namespace cudasim {
// 16 bytes of f16 or bf16 as 8 floats.
inline __m256 half8(const void* p, bool bf) {
  __m128i h = _mm_loadu_si128(static_cast<const __m128i*>(p));
  return bf ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)) : _mm256_cvtph_ps(h);
}
inline void transpose8(__m256* r) {
  __m256 t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}
int element_bits(Ty t);
const float* fp8_table(Ty t);                      // 256 values of e4m3 or e5m2
void unpack_floats(uint32_t v, Ty t, float* out);  // elements of one register
void unpack_ints(uint32_t v, Ty t, int32_t* out);

struct Shape {
  int m = 0, n = 0, k = 0;
};
bool find_shape(const AInstr& in, Shape* s);  // "m16n8k16" among the qualifiers
}  // namespace cudasim
