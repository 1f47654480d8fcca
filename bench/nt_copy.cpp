// The ceiling of bench/cpu_codec.py: a copy whose stores bypass the caches, on the threads of the OpenMP runtime that
// torch has loaded. Pointers are aligned to 64 bytes.
#include <emmintrin.h>

#include <cstdint>

extern "C" void nt_copy(const void* from, void* to, int64_t bytes) {
#pragma omp parallel for schedule(static)
  for (int64_t line = 0; line < bytes / 64; ++line) {
    const __m128i* source = static_cast<const __m128i*>(from) + 4 * line;
    __m128i* target = static_cast<__m128i*>(to) + 4 * line;
    const __m128i a = _mm_load_si128(source), b = _mm_load_si128(source + 1);
    const __m128i c = _mm_load_si128(source + 2), d = _mm_load_si128(source + 3);
    _mm_stream_si128(target, a);
    _mm_stream_si128(target + 1, b);
    _mm_stream_si128(target + 2, c);
    _mm_stream_si128(target + 3, d);
  }
  _mm_sfence();
}
