// f16, bf16 and their packed forms. Every result is the exact one rounded once.
#include "numeric.h"
#include "select.h"

namespace cudasim {
namespace {

constexpr int N = 64;  // lanes x 2 halves; scalar forms use the first 32

struct F16 {
  static void load(const uint16_t* h, float* f, int n) {
    for (int i = 0; i < n; i += 8)
      _mm256_storeu_ps(f + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(h + i))));
  }
  static void store(const float* f, uint16_t* h, int n) {
    for (int i = 0; i < n; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(h + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(f + i), _MM_FROUND_TO_NEAREST_INT));
    for (int i = 0; i < n; ++i) h[i] = f[i] != f[i] ? uint16_t(0x7fff) : h[i];
  }
  // round-to-odd in f32 keeps enough bits for one correct rounding to f16
  static void fma(const float* a, const float* b, const float* c, float* r, int n) {
    for (int i = 0; i < n; ++i) {
      float p = a[i] * b[i], s = p + c[i], t = s - p, e = (p - (s - t)) + (c[i] - t);
      uint32_t u = as_u32(s);
      bool fix = e != 0 && (u & 1) == 0 && (u & 0x7f800000u) != 0x7f800000u;
      uint32_t step = ((as_u32(e) ^ u) >> 31) ? FULL : 1u;
      r[i] = as_float(fix ? u + step : u);
    }
  }
  static void mul(const float* a, const float* b, float* r, int n) {
    for (int i = 0; i < n; ++i) r[i] = a[i] * b[i];
  }
  static constexpr uint16_t kTiny = 0x7c00;  // exponent mask
};
struct BF16 {
  static void load(const uint16_t* h, float* f, int n) {
    for (int i = 0; i < n; ++i) f[i] = as_float(uint32_t(h[i]) << 16);
  }
  static void store(const float* f, uint16_t* h, int n) {
    for (int i = 0; i < n; ++i) {
      uint32_t u = as_u32(f[i]);
      uint16_t r = uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
      h[i] = (u & 0x7fffffffu) > 0x7f800000u ? uint16_t(0x7fff) : r;
    }
  }
  static float odd(double s) {  // double to float, rounding to odd
    float f = float(s);
    double back = double(f);
    uint32_t u = as_u32(f);
    bool inexact = back != s && s == s;
    uint32_t t = std::fabs(back) > std::fabs(s) ? u - 1 : u;
    return as_float(inexact ? t | 1 : u);
  }
  static void fma(const float* a, const float* b, const float* c, float* r, int n) {
    for (int i = 0; i < n; ++i) {
      double p = double(a[i]) * double(b[i]), s = p + double(c[i]), t = s - p, e = (p - (s - t)) + (double(c[i]) - t);
      uint64_t u = as_u64(s);
      bool fix = e != 0 && (u & 1) == 0 && (u & 0x7ff0000000000000ull) != 0x7ff0000000000000ull;
      uint64_t step = ((as_u64(e) ^ u) >> 63) ? ~0ull : 1ull;
      r[i] = odd(as_double(fix ? u + step : u));
    }
  }
  static void mul(const float* a, const float* b, float* r, int n) {
    for (int i = 0; i < n; ++i) r[i] = odd(double(a[i]) * double(b[i]));
  }
  static constexpr uint16_t kTiny = 0x7f80;
};

enum Kind { ADD, SUB, MUL, FMA, MIN, MAX, EX2, TANH, RCP, SQRT, RSQRT, LG2, SIN, COS };
enum Flags : uint32_t { SAT = 1, RELU = 2, FTZ = 4, NANP = 8, XORSIGN = 16 };

inline float pick(float a, float b, bool max, bool nanp) {
  bool na = a != a, nb = b != b;
  if (na || nb) return nanp || (na && nb) ? NAN : na ? b : a;
  if (a == b) return as_float(max ? as_u32(a) & as_u32(b) : as_u32(a) | as_u32(b));
  return (a < b) != max ? a : b;
}

template <class T, Kind K, bool Packed>
void half_op(Warp& w, const Op& o, uint32_t m) {
  constexpr int n = Packed ? 64 : 32;
  alignas(32) float a[N], b[N], c[N], r[N];
  alignas(32) uint16_t out[N];
  uint32_t fl = o.flags;
  auto load = [&](uint32_t off, float* f) {
    if (fl & FTZ) {
      uint16_t t[N];
      const uint16_t* h = w.r<uint16_t>(off);
      for (int i = 0; i < n; ++i) t[i] = (h[i] & T::kTiny) ? h[i] : h[i] & 0x8000;
      T::load(t, f, n);
    } else
      T::load(w.r<uint16_t>(off), f, n);
  };
  load(o.a, a);
  if constexpr (K <= MAX) load(o.b, b);
  if constexpr (K == FMA) load(o.c, c);
  if constexpr (K == ADD)
    for (int i = 0; i < n; ++i) r[i] = a[i] + b[i];
  if constexpr (K == SUB)
    for (int i = 0; i < n; ++i) r[i] = a[i] - b[i];
  if constexpr (K == MUL) T::mul(a, b, r, n);
  if constexpr (K == FMA) T::fma(a, b, c, r, n);
  if constexpr (K == MIN || K == MAX) {
    for (int i = 0; i < n; ++i) {
      if (fl & XORSIGN) {
        uint32_t s = (as_u32(a[i]) ^ as_u32(b[i])) & 0x80000000u;
        r[i] = as_float(as_u32(pick(std::fabs(a[i]), std::fabs(b[i]), K == MAX, fl & NANP)) ^ s);
      } else
        r[i] = pick(a[i], b[i], K == MAX, fl & NANP);
    }
  }
  if constexpr (K >= EX2) {
    for (int i = 0; i < n; ++i) {
      double x = a[i];
      double y = K == EX2     ? std::exp2(x)
                 : K == TANH  ? std::tanh(x)
                 : K == RCP   ? 1.0 / x
                 : K == SQRT  ? std::sqrt(x)
                 : K == RSQRT ? 1.0 / std::sqrt(x)
                 : K == LG2   ? std::log2(x)
                 : K == SIN   ? std::sin(x)
                              : std::cos(x);
      r[i] = BF16::odd(y);
    }
  }
  if (fl & SAT)
    for (int i = 0; i < n; ++i) r[i] = r[i] > 0 ? (r[i] < 1 ? r[i] : 1.f) : 0.f;
  if (fl & RELU)
    for (int i = 0; i < n; ++i) r[i] = r[i] != r[i] ? r[i] : r[i] > 0 ? r[i] : 0.f;
  T::store(r, out, n);
  if (fl & FTZ)
    for (int i = 0; i < n; ++i) out[i] = (out[i] & T::kTiny) ? out[i] : out[i] & 0x8000;
  if constexpr (Packed)
    blend(w.r<uint32_t>(o.dst), reinterpret_cast<uint32_t*>(out), m);
  else
    blend(w.r<uint16_t>(o.dst), out, m);
}

// neg / abs: sign bit operations. imm: xor mask, d: and-not mask
template <class U>
void sign_op(Warp& w, const Op& o, uint32_t m) {
  U* d = w.r<U>(o.dst);
  const U* a = w.r<U>(o.a);
  U keep = U(o.imm), flip = U(o.d);
  each(d, m, [&](int i) { return U((a[i] & keep) ^ flip); });
}

template <Kind K>
Handler by_type(Ty t) {
  switch (t) {
    case Ty::f16:
      return half_op<F16, K, false>;
    case Ty::f16x2:
      return half_op<F16, K, true>;
    case Ty::bf16:
      return half_op<BF16, K, false>;
    case Ty::bf16x2:
      return half_op<BF16, K, true>;
    default:
      return nullptr;
  }
}

}  // namespace

bool select_half(Decoder& d, const AInstr& in, Op& op) {
  Ty t = last_type(in);
  op.cls = C_half;
  auto n = in.mods[0];
  op.flags = (has(in, "sat") ? SAT : 0) | (has(in, "relu") ? RELU : 0) | (has(in, "ftz") ? FTZ : 0) |
             (has(in, "NaN") ? NANP : 0) | (has(in, "xorsign") ? XORSIGN : 0);
  size_t count = n == "fma" || n == "mad"                                             ? 3
                 : n == "add" || n == "sub" || n == "mul" || n == "min" || n == "max" ? 2
                                                                                      : 1;
  if (!operands(d, in, op, t, count)) return false;
  if (n == "add") return done(op, by_type<ADD>(t));
  if (n == "sub") return done(op, by_type<SUB>(t));
  if (n == "mul") return done(op, by_type<MUL>(t));
  if (n == "fma" || n == "mad") return done(op, by_type<FMA>(t));
  if (n == "min") return done(op, by_type<MIN>(t));
  if (n == "max") return done(op, by_type<MAX>(t));
  if (n == "abs" || n == "neg") {
    op.imm = n == "abs" ? 0x7fff7fff : -1;
    op.d = n == "neg" ? 0x80008000u : 0;
    return done(op, ty_size(t) == 4 ? sign_op<uint32_t> : sign_op<uint16_t>);
  }
  op.cls = C_special;
  if (n == "ex2") return done(op, by_type<EX2>(t));
  if (n == "tanh") return done(op, by_type<TANH>(t));
  return false;
}

void register_half(SelectorMap&) {}

}  // namespace cudasim
