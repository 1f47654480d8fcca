// f32 and f64 arithmetic. Compiled with -ffp-contract=off; rounding modes and .ftz are applied by
// running the plain handler under another MXCSR.
#include "numeric.h"
#include "select.h"

namespace cudasim {
namespace {

inline float canon(float f) { return f != f ? as_float(0x7fffffffu) : f; }
inline double canon(double d) { return d; }
template <class T>
inline T saturate(T x) {
  return x > T(0) ? (x < T(1) ? x : T(1)) : T(0);
}  // NaN -> 0

struct FAdd {
  template <class T>
  static T f(T a, T b) {
    return canon(T(a + b));
  }
};
struct FSub {
  template <class T>
  static T f(T a, T b) {
    return canon(T(a - b));
  }
};
struct FMul {
  template <class T>
  static T f(T a, T b) {
    return canon(T(a * b));
  }
};
struct FDiv {
  template <class T>
  static T f(T a, T b) {
    return canon(T(a / b));
  }
};
struct FFma {
  static float f(float a, float b, float c) { return canon(__builtin_fmaf(a, b, c)); }
  static double f(double a, double b, double c) { return __builtin_fma(a, b, c); }
};
struct FSqrt {
  static float f(float a) { return canon(__builtin_sqrtf(a)); }
  static double f(double a) { return __builtin_sqrt(a); }
};
struct FRcp {
  template <class T>
  static T f(T a) {
    return canon(T(T(1) / a));
  }
};
template <class F>
struct Sat1 {
  template <class T>
  static T f(T a) {
    return saturate(F::f(a));
  }
};
template <class F>
struct Sat2 {
  template <class T>
  static T f(T a, T b) {
    return saturate(F::f(a, b));
  }
};
template <class F>
struct Sat3 {
  template <class T>
  static T f(T a, T b, T c) {
    return saturate(F::f(a, b, c));
  }
};

constexpr unsigned kCsr[] = {0, 0x6000, 0x2000, 0x4000};  // rn rz rm rp
constexpr unsigned kFlush = 0x8040;                       // FTZ | DAZ

template <Handler H, unsigned CSR>
void with_csr(Warp& w, const Op& o, uint32_t m) {
  unsigned old = _mm_getcsr();
  _mm_setcsr(0x1f80 | CSR);
  asm volatile("" ::: "memory");
  H(w, o, m);
  asm volatile("" ::: "memory");
  _mm_setcsr(old);
}
template <Handler H>
Handler rounded(const AInstr& in) {
  int r = has(in, "rz") ? 1 : has(in, "rm") ? 2 : has(in, "rp") ? 3 : 0;
  bool f = has(in, "ftz");
  static const Handler t[8] = {H,
                               with_csr<H, kCsr[1]>,
                               with_csr<H, kCsr[2]>,
                               with_csr<H, kCsr[3]>,
                               with_csr<H, kFlush>,
                               with_csr<H, kFlush | kCsr[1]>,
                               with_csr<H, kFlush | kCsr[2]>,
                               with_csr<H, kFlush | kCsr[3]>};
  return t[r + 4 * f];
}
template <class F>
Handler pick2(const AInstr& in, Ty t) {
  bool sat = has(in, "sat");
  if (t == Ty::f64) return rounded<h2<double, F>>(in);
  return sat ? rounded<h2<float, Sat2<F>>>(in) : rounded<h2<float, F>>(in);
}

// --- min, max and sign manipulation -------------------------------------------------------------------------

template <class T>
using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
template <bool Max, bool Nan, bool Abs, bool Ftz>
struct MinMax {
  template <class T>
  static T f(T a, T b) {
    if constexpr (Ftz && sizeof(T) == 4) {
      a = ftz(a);
      b = ftz(b);
    }
    using B = Bits<T>;
    constexpr B sign = B(1) << (8 * sizeof(T) - 1);
    B s = 0;
    if constexpr (Abs) {
      s = (bits<B>(a) ^ bits<B>(b)) & sign;
      a = bits<T>(B(bits<B>(a) & ~sign));
      b = bits<T>(B(bits<B>(b) & ~sign));
    }
    T tie = Max ? bits<T>(B(bits<B>(a) & bits<B>(b))) : bits<T>(B(bits<B>(a) | bits<B>(b)));
    bool first = Max ? a > b : a < b, second = Max ? b > a : b < a;
    T r = first ? a : second ? b : tie;
    bool na = a != a, nb = b != b;
    T nan = sizeof(T) == 4 ? T(as_float(0x7fffffffu)) : T(as_double(0x7fffffffffffffffull));
    if constexpr (Nan)
      r = (na || nb) ? nan : r;
    else
      r = na ? (nb ? nan : b) : nb ? a : r;
    if constexpr (Abs) r = bits<T>(B(bits<B>(r) ^ s));
    return r;
  }
};
template <class T, class F>
void h3_minmax(Warp& w, const Op& o, uint32_t m) {
  T* d = w.r<T>(o.dst);
  const T *a = w.r<T>(o.a), *b = w.r<T>(o.b), *c = w.r<T>(o.c);
  each(d, m, [&](int i) { return F::f(F::f(a[i], b[i]), c[i]); });
}
template <bool Max>
Handler pick_minmax(const AInstr& in, Ty t, bool three) {
  bool nan = has(in, "NaN"), xs = has(in, "xorsign"), fz = has(in, "ftz");
  if (t == Ty::f64) return h2<double, MinMax<Max, false, false, false>>;
#define MM(N, X, F) (three ? h3_minmax<float, MinMax<Max, N, X, F>> : h2<float, MinMax<Max, N, X, F>>)
  if (nan)
    return xs ? (fz ? MM(true, true, true) : MM(true, true, false))
              : (fz ? MM(true, false, true) : MM(true, false, false));
  return xs ? (fz ? MM(false, true, true) : MM(false, true, false))
            : (fz ? MM(false, false, true) : MM(false, false, false));
#undef MM
}
struct FAbs {
  template <class T>
  static T f(T a) {
    return bits<T>(Bits<T>(bits<Bits<T>>(a) & ~(Bits<T>(1) << (8 * sizeof(T) - 1))));
  }
};
struct FNeg {
  template <class T>
  static T f(T a) {
    return bits<T>(Bits<T>(bits<Bits<T>>(a) ^ (Bits<T>(1) << (8 * sizeof(T) - 1))));
  }
};
template <class F>
struct Ftz1 {
  static float f(float a) { return F::f(ftz(a)); }
};
struct Copysign {
  template <class T>
  static T f(T a, T b) {
    constexpr Bits<T> s = Bits<T>(1) << (8 * sizeof(T) - 1);
    return bits<T>(Bits<T>((bits<Bits<T>>(a) & s) | (bits<Bits<T>>(b) & ~s)));
  }
};

template <class T>
void testp(Warp& w, const Op& o, uint32_t m) {
  const T* a = w.r<T>(o.a);
  uint32_t r = 0;
  for (int i = 0; i < 32; ++i) {
    int c = std::fpclassify(a[i]);
    bool v = false;
    switch (o.imm) {
      case 0:
        v = c != FP_INFINITE && c != FP_NAN;
        break;
      case 1:
        v = c == FP_INFINITE;
        break;
      case 2:
        v = c != FP_NAN;
        break;
      case 3:
        v = c == FP_NAN;
        break;
      case 4:
        v = c == FP_NORMAL;
        break;
      case 5:
        v = c == FP_SUBNORMAL;
        break;
    }
    r |= uint32_t(v) << i;
  }
  w.p(o.dst) = (w.p(o.dst) & ~m) | (r & m);
}

// --- approximate functions: computed in double, rounded to float ----------------------------------------------

inline double exp2_poly(double x) {  // |error| < 1e-13 relative, for x in [-160, 160]
  double n = std::nearbyint(x);
  double f = (x - n) * 0.69314718055994530942;
  double p = 1.0 / 39916800;
  p = p * f + 1.0 / 3628800;
  p = p * f + 1.0 / 362880;
  p = p * f + 1.0 / 40320;
  p = p * f + 1.0 / 5040;
  p = p * f + 1.0 / 720;
  p = p * f + 1.0 / 120;
  p = p * f + 1.0 / 24;
  p = p * f + 1.0 / 6;
  p = p * f + 0.5;
  p = p * f + 1.0;
  p = p * f + 1.0;
  return p * as_double(uint64_t(int64_t(int32_t(n)) + 1023) << 52);
}
template <bool Ftz>
struct Ex2 {
  static float f(float a) {
    if (Ftz) a = ftz(a);
    float c = a < -160.f ? -160.f : a > 160.f ? 160.f : a;
    c = a != a ? 0.f : c;
    float r = float(exp2_poly(double(c)));
    if (Ftz) r = ftz(r);
    return a != a ? as_float(0x7fffffffu) : r;
  }
};
template <bool Ftz>
struct Lg2 {
  static float f(float a) {
    if (Ftz) a = ftz(a);
    float r = float(std::log2(double(a)));
    return canon(Ftz ? ftz(r) : r);
  }
};
template <bool Ftz>
struct Sin {
  static float f(float a) {
    if (Ftz) a = ftz(a);
    float r = float(std::sin(double(a)));
    return canon(Ftz ? ftz(r) : r);
  }
};
template <bool Ftz>
struct Cos {
  static float f(float a) {
    if (Ftz) a = ftz(a);
    return canon(float(std::cos(double(a))));
  }
};
struct Tanh {
  static float f(float a) { return canon(float(std::tanh(double(a)))); }
};
template <bool Ftz>
struct Rsqrt {
  static float f(float a) {
    if (Ftz) a = ftz(a);
    if (a == 0) return as_float(0x7f800000u | (as_u32(a) & 0x80000000u));
    float r = float(1.0 / std::sqrt(double(a)));
    return canon(Ftz ? ftz(r) : r);
  }
};
struct RsqrtD {
  static double f(double a) { return a == 0 ? std::copysign(INFINITY, a) : 1.0 / std::sqrt(a); }
};
struct RcpD {
  static double f(double a) { return 1.0 / a; }
};
struct DivApprox {
  static float f(float a, float b) {
    float m = std::fabs(b);
    if (m > 8.507059e37f && m < INFINITY)
      return std::isinf(a) ? as_float(0x7fffffffu) : std::copysign(0.f, as_float(as_u32(a) ^ as_u32(b)));
    return canon(a / b);
  }
};

// Slow functions run only for the active lanes.
template <class T, class F>
void h1_active(Warp& w, const Op& o, uint32_t m) {
  T* d = w.r<T>(o.dst);
  const T* a = w.r<T>(o.a);
  each_active(d, m, [&](int i) { return T(F::f(a[i])); });
}

bool sel_special(Decoder& d, const AInstr& in, Op& op) {
  Ty t = last_type(in);
  if (is_half(t)) return select_half(d, in, op);
  if (!operands(d, in, op, t, 1)) return false;
  op.cls = C_special;
  auto n = in.mods[0];
  bool fz = has(in, "ftz"), approx = has(in, "approx");
  if (n == "sqrt") {
    if (t == Ty::f64) return done(op, rounded<h1<double, FSqrt>>(in));
    return done(op, rounded<h1<float, FSqrt>>(in));
  }
  if (n == "rcp") {
    if (t == Ty::f64) return done(op, approx ? h1<double, RcpD> : rounded<h1<double, FRcp>>(in));
    return done(op, rounded<h1<float, FRcp>>(in));
  }
  if (n == "rsqrt")
    return done(op, t == Ty::f64 ? h1<double, RsqrtD> : fz ? h1<float, Rsqrt<true>> : h1<float, Rsqrt<false>>);
  if (t != Ty::f32) return false;
  if (n == "ex2") return done(op, fz ? h1<float, Ex2<true>> : h1<float, Ex2<false>>);
  if (n == "lg2") return done(op, fz ? h1_active<float, Lg2<true>> : h1_active<float, Lg2<false>>);
  if (n == "sin") return done(op, fz ? h1_active<float, Sin<true>> : h1_active<float, Sin<false>>);
  if (n == "cos") return done(op, fz ? h1_active<float, Cos<true>> : h1_active<float, Cos<false>>);
  if (n == "tanh") return done(op, h1_active<float, Tanh>);
  return false;
}

}  // namespace

bool select_float(Decoder& d, const AInstr& in, Op& op) {
  Ty t = last_type(in);
  if (t != Ty::f32 && t != Ty::f64) return false;
  op.cls = C_fp32;
  auto n = in.mods[0];
  bool sat = has(in, "sat");
  if (n == "fma" || n == "mad") {
    if (!operands(d, in, op, t, 3)) return false;
    if (t == Ty::f64) return done(op, rounded<h3<double, FFma>>(in));
    return done(op, sat ? rounded<h3<float, Sat3<FFma>>>(in) : rounded<h3<float, FFma>>(in));
  }
  if (n == "abs" || n == "neg") {
    if (!operands(d, in, op, t, 1)) return false;
    if (t == Ty::f64) return done(op, n == "abs" ? h1<double, FAbs> : h1<double, FNeg>);
    bool fz = has(in, "ftz");
    return done(
        op,
        n == "abs" ? (fz ? h1<float, Ftz1<FAbs>> : h1<float, FAbs>) : (fz ? h1<float, Ftz1<FNeg>> : h1<float, FNeg>));
  }
  if (n == "min" || n == "max") {
    bool three = in.ops.size() == 4;
    if (!operands(d, in, op, t, three ? 3 : 2)) return false;
    return done(op, n == "max" ? pick_minmax<true>(in, t, three) : pick_minmax<false>(in, t, three));
  }
  if (!operands(d, in, op, t, 2)) return false;
  if (n == "add") return done(op, pick2<FAdd>(in, t));
  if (n == "sub") return done(op, pick2<FSub>(in, t));
  if (n == "mul") return done(op, pick2<FMul>(in, t));
  if (n == "div") {
    op.cls = C_special;
    if (has(in, "approx")) return done(op, rounded<h2<float, DivApprox>>(in));
    return done(op, pick2<FDiv>(in, t));
  }
  if (n == "copysign") return done(op, t == Ty::f64 ? h2<double, Copysign> : h2<float, Copysign>);
  return false;
}

void register_float(SelectorMap& m) {
  m["fma"] = [](Decoder& d, const AInstr& in, Op& op) {
    return is_half(last_type(in)) ? select_half(d, in, op) : select_float(d, in, op);
  };
  m["copysign"] = select_float;
  for (auto n : {"sqrt", "rcp", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh"}) m[n] = sel_special;
  m["testp"] = [](Decoder& d, const AInstr& in, Op& op) {
    static const char* names[] = {"finite", "infinite", "number", "notanumber", "normal", "subnormal"};
    Ty t = last_type(in);
    for (int i = 0; i < 6; ++i)
      if (has(in, names[i])) op.imm = i;
    op.dst = d.pred_dst(in.ops[0]);
    op.a = d.src(in.ops[1], t);
    op.cls = C_fp32;
    return done(op, t == Ty::f64 ? testp<double> : testp<float>);
  };
}

}  // namespace cudasim
