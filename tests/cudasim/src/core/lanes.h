// Loops over the 32 lanes of a warp.
#pragma once
#include "machine.h"

namespace cudasim {

#define FOR_LANES _Pragma("GCC ivdep") for (int i = 0; i < 32; ++i)
#define EACH_LANE(l, m) for (uint32_t m_##l = (m); m_##l && ((l = __builtin_ctz(m_##l)), true); m_##l &= m_##l - 1)

template <class T>
inline __attribute__((always_inline)) void blend(T* d, const T* t, uint32_t m) {
  FOR_LANES d[i] = (m >> i & 1) ? t[i] : d[i];
}

// d[i] = f(i) for the lanes of m. f must be safe to evaluate for every lane.
template <class D, class F>
inline __attribute__((always_inline)) void each(D* d, uint32_t m, F f) {
  if (m == FULL) {
    FOR_LANES d[i] = f(i);
  } else {
    alignas(64) D t[32];
    FOR_LANES t[i] = f(i);
    blend(d, t, m);
  }
}

// As each, but evaluates f only for the lanes of m (for slow or partial functions).
template <class D, class F>
inline void each_active(D* d, uint32_t m, F f) {
  for (uint32_t t = m; t; t &= t - 1) {
    int i = __builtin_ctz(t);
    d[i] = f(i);
  }
}

// Lane mask of a boolean function.
template <class F>
inline __attribute__((always_inline)) uint32_t mask_of(F f) {
  alignas(32) uint8_t b[32];
  FOR_LANES b[i] = f(i) ? 0xff : 0;
  uint32_t m = 0;
  // the compiler turns this into a vector move-mask
#if defined(__AVX2__)
  m = uint32_t(__builtin_ia32_pmovmskb256(*(const __attribute__((vector_size(32))) char*)b));
#else
  for (int i = 0; i < 32; ++i) m |= uint32_t(b[i] & 1) << i;
#endif
  return m;
}

template <class T, class U>
inline T bits(U u) {
  static_assert(sizeof(T) == sizeof(U));
  T t;
  memcpy(&t, &u, sizeof t);
  return t;
}

}  // namespace cudasim
