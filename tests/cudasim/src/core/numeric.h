// Scalar number formats: conversions with exact rounding.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace cudasim {

enum class Round : uint8_t { rn, rz, rm, rp, rna };

inline float as_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline uint32_t as_u32(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
inline double as_double(uint64_t u) {
  double f;
  memcpy(&f, &u, 8);
  return f;
}
inline uint64_t as_u64(double f) {
  uint64_t u;
  memcpy(&u, &f, 8);
  return u;
}

inline float ftz(float f) { return (as_u32(f) & 0x7f800000u) == 0 ? as_float(as_u32(f) & 0x80000000u) : f; }

inline float f16_to_f32(uint16_t h) { return _cvtsh_ss(h); }
inline float bf16_to_f32(uint16_t h) { return as_float(uint32_t(h) << 16); }
inline uint16_t f32_to_f16(float f) { return f != f ? 0x7fff : uint16_t(_cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT)); }
inline uint16_t f32_to_bf16(float f) {
  uint32_t u = as_u32(f);
  if (f != f) return 0x7fff;
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

// A small binary format. max_code: largest finite code (sign excluded).
struct Format {
  int exp_bits, man_bits, bias;
  bool has_inf;
  uint32_t max_code, nan_code;
};
constexpr Format kF16{5, 10, 15, true, 0x7bff, 0x7fff};
constexpr Format kBF16{8, 7, 127, true, 0x7f7f, 0x7fff};
constexpr Format kTF32{8, 10, 127, true, 0x7f7fe000u >> 13, 0x7fffffffu >> 13};
constexpr Format kF32{8, 23, 127, true, 0x7f7fffff, 0x7fffffff};
constexpr Format kE4M3{4, 3, 7, false, 0x7e, 0x7f};
constexpr Format kE5M2{5, 2, 15, true, 0x7b, 0x7f};
constexpr Format kE2M1{2, 1, 1, false, 0x7, 0x7};
constexpr Format kE2M3{2, 3, 1, false, 0x1f, 0x1f};
constexpr Format kE3M2{3, 2, 3, false, 0x1f, 0x1f};

// Rounds x (exact) into the format; `finite` saturates overflow to the largest finite value.
inline uint32_t encode(double x, const Format& f, Round r, bool finite = false) {
  const int total = 1 + f.exp_bits + f.man_bits;
  uint64_t u = as_u64(x);
  uint32_t sign = uint32_t(u >> 63) << (total - 1);
  if (x != x) return f.nan_code;
  uint64_t mag = u & 0x7fffffffffffffffull;
  if (mag == 0) return sign;
  auto overflow = [&]() -> uint32_t {
    bool neg = sign != 0;
    if (finite || !f.has_inf) return sign | f.max_code;
    if (r == Round::rz || (r == Round::rm && !neg) || (r == Round::rp && neg)) return sign | f.max_code;
    return sign | (((1u << f.exp_bits) - 1) << f.man_bits);
  };
  int e = int(mag >> 52) - 1023;
  if (e == 1024) {  // infinity
    if (finite || !f.has_inf) return sign | f.max_code;
    return sign | (((1u << f.exp_bits) - 1) << f.man_bits);
  }
  uint64_t man = mag & ((1ull << 52) - 1);
  if (e == -1023)
    e = -1022;
  else
    man |= 1ull << 52;
  int emin = 1 - f.bias;
  int E = e < emin ? emin : e;
  int shift = 52 - f.man_bits + (E - e);
  uint64_t q, rem, half;
  if (shift > 62) {
    q = 0;
    rem = 1;
    half = 2;
  } else {
    q = man >> shift;
    rem = man & ((1ull << shift) - 1);
    half = 1ull << (shift - 1);
  }
  bool up = false;
  switch (r) {
    case Round::rn:
      up = rem > half || (rem == half && (q & 1));
      break;
    case Round::rna:
      up = rem >= half;
      break;
    case Round::rz:
      break;
    case Round::rm:
      up = rem && sign;
      break;
    case Round::rp:
      up = rem && !sign;
      break;
  }
  q += up;
  uint64_t code = q + (uint64_t(E - emin) << f.man_bits);
  if (code > f.max_code) return overflow();
  return sign | uint32_t(code);
}

inline double decode(uint32_t c, const Format& f) {
  int total = 1 + f.exp_bits + f.man_bits;
  bool neg = c >> (total - 1) & 1;
  uint32_t code = c & ((1u << (total - 1)) - 1);
  uint32_t e = code >> f.man_bits, m = code & ((1u << f.man_bits) - 1);
  double v;
  if (f.has_inf && e == (1u << f.exp_bits) - 1)
    v = m ? NAN : INFINITY;
  else if (!f.has_inf && f.nan_code > f.max_code && code == f.nan_code)
    v = NAN;
  else if (e == 0)
    v = std::ldexp(double(m), 1 - f.bias - f.man_bits);
  else
    v = std::ldexp(double(m | 1u << f.man_bits), int(e) - f.bias - f.man_bits);
  return neg ? -v : v;
}

// double -> float with any rounding
inline float round_f32(double x, Round r) {
  if (r == Round::rn) return float(x);
  return as_float(encode(x, kF32, r));
}

}  // namespace cudasim
