// cvt in all its forms.
#include "numeric.h"
#include "select.h"

namespace cudasim {
namespace {

enum : uint32_t {
  F_SAT = 1,
  F_FTZ = 2,
  F_RELU = 4,
  F_FINITE = 8,
  F_INT = 16 /* round to integral */,
  F_ROUND_SHIFT = 8
};
inline Round rounding(uint32_t flags) { return Round(flags >> F_ROUND_SHIFT & 7); }

// --- sources and destinations --------------------------------------------------------------------------------

// f(a value of the C++ type)
template <class F>
void with_integer(Ty t, F f) {
  switch (t) {
    case Ty::s8:
      return f(int8_t());
    case Ty::u8:
    case Ty::b8:
      return f(uint8_t());
    case Ty::s16:
      return f(int16_t());
    case Ty::u16:
    case Ty::b16:
      return f(uint16_t());
    case Ty::s32:
      return f(int32_t());
    case Ty::u32:
    case Ty::b32:
      return f(uint32_t());
    default:
      return f(int64_t());
  }
}
template <class S, class R>
void widen_int(const R* r, int64_t* out) {
  FOR_LANES out[i] = int64_t(S(r[i]));
}
void load_ints(Warp& w, uint32_t off, int reg, Ty t, int64_t* out) {
  auto by_reg = [&](auto s) {
    using S = decltype(s);
    if (reg <= 2)
      widen_int<S>(w.r<uint16_t>(off), out);
    else if (reg == 4)
      widen_int<S>(w.r<uint32_t>(off), out);
    else
      widen_int<S>(w.r<uint64_t>(off), out);
  };
  with_integer(t, by_reg);
}
// Stores the low bytes of v as type t, extended to the register's width.
void store_ints(Warp& w, uint32_t off, int reg, Ty t, const int64_t* v, uint32_t m) {
  auto as = [&](auto s) {
    using S = decltype(s);
    if (reg <= 2)
      each(w.r<uint16_t>(off), m, [&](int i) { return uint16_t(S(v[i])); });
    else if (reg == 4)
      each(w.r<uint32_t>(off), m, [&](int i) { return uint32_t(S(v[i])); });
    else
      each(w.r<uint64_t>(off), m, [&](int i) { return uint64_t(S(v[i])); });
  };
  with_integer(t, as);
}
void load_floats(Warp& w, uint32_t off, Ty t, double* out) {
  switch (t) {
    case Ty::f16: {
      auto* h = w.r<uint16_t>(off);
      FOR_LANES out[i] = f16_to_f32(h[i]);
      break;
    }
    case Ty::bf16: {
      auto* h = w.r<uint16_t>(off);
      FOR_LANES out[i] = bf16_to_f32(h[i]);
      break;
    }
    case Ty::f32:
    case Ty::tf32: {
      auto* f = w.r<float>(off);
      FOR_LANES out[i] = f[i];
      break;
    }
    default: {
      auto* f = w.r<double>(off);
      FOR_LANES out[i] = f[i];
      break;
    }
  }
}
uint32_t encode_as(double x, Ty t, uint32_t fl) {
  if (fl & F_SAT) x = x > 0 ? (x < 1 ? x : 1) : 0;
  if ((fl & F_RELU) && !(x > 0) && x == x) x = 0;
  Round r = rounding(fl);
  switch (t) {
    case Ty::f16:
      return encode(x, kF16, r, fl & F_FINITE);
    case Ty::bf16:
      return encode(x, kBF16, r, fl & F_FINITE);
    case Ty::tf32:
      return encode(x, kTF32, r, fl & F_FINITE) << 13;
    case Ty::e4m3x2:
      return encode(x, kE4M3, r, true);
    case Ty::e5m2x2:
      return encode(x, kE5M2, r, true);
    case Ty::e2m1x2:
      return encode(x, kE2M1, r, true);
    case Ty::e2m3x2:
      return encode(x, kE2M3, r, true);
    case Ty::e3m2x2:
      return encode(x, kE3M2, r, true);
    default:
      return encode(x, kF32, r, false);
  }
}

// --- handlers ---------------------------------------------------------------------------------------------------

template <class D, class S>
void direct(Warp& w, const Op& o, uint32_t m) {
  D* d = w.r<D>(o.dst);
  const S* a = w.r<S>(o.a);
  each(d, m, [&](int i) { return D(a[i]); });
}
inline Ty dst_type(const Op& o) { return Ty(o.imm & 0xff); }
inline Ty src_type(const Op& o) { return Ty(o.imm >> 8 & 0xff); }

void int_to_int(Warp& w, const Op& o, uint32_t m) {
  int64_t v[32];
  Ty d = dst_type(o), s = src_type(o);
  load_ints(w, o.a, o.size2, s, v);
  if (o.flags & F_SAT) {
    int bitsn = ty_size(d) * 8;
    for (int i = 0; i < 32; ++i) {
      if (s == Ty::u64) {
        uint64_t u = uint64_t(v[i]), hi = ty_signed(d)  ? (1ull << (bitsn - 1)) - 1
                                          : bitsn == 64 ? ~0ull
                                                        : (1ull << bitsn) - 1;
        v[i] = int64_t(u > hi ? hi : u);
      } else if (ty_signed(d)) {
        int64_t hi = bitsn == 64 ? INT64_MAX : (1ll << (bitsn - 1)) - 1, lo = -hi - 1;
        v[i] = v[i] < lo ? lo : v[i] > hi ? hi : v[i];
      } else {
        if (v[i] < 0)
          v[i] = 0;
        else if (bitsn < 64 && v[i] > (1ll << bitsn) - 1)
          v[i] = (1ll << bitsn) - 1;
      }
    }
  }
  store_ints(w, o.dst, o.size, d, v, m);
}

void int_to_float(Warp& w, const Op& o, uint32_t m) {
  int64_t v[32];
  Ty d = dst_type(o), s = src_type(o);
  load_ints(w, o.a, o.size2, s, v);
  Round r = rounding(o.flags);
  auto to_double = [&](int i) {  // values of more than 53 bits are rounded to odd
    const bool negative = s != Ty::u64 && v[i] < 0;
    const uint64_t u = negative ? 0 - uint64_t(v[i]) : uint64_t(v[i]);
    const int shift = u >> 53 ? 11 - __builtin_clzll(u) : 0;
    const bool lost = u & ((1ull << shift) - 1);
    const double f = std::ldexp(double(u >> shift | uint64_t(lost)), shift);
    return negative ? -f : f;
  };
  if (d == Ty::f64) {
    double out[32];
    if (s == Ty::u64 || s == Ty::s64) {
      int mode = r == Round::rz ? 0x6000 : r == Round::rm ? 0x2000 : r == Round::rp ? 0x4000 : 0;
      unsigned old = _mm_getcsr();
      _mm_setcsr(0x1f80u | unsigned(mode));
      for (int i = 0; i < 32; ++i) {
        volatile double q = s == Ty::u64 ? double(uint64_t(v[i])) : double(v[i]);
        out[i] = q;
      }
      _mm_setcsr(old);
    } else
      for (int i = 0; i < 32; ++i) out[i] = double(v[i]);
    each(w.r<double>(o.dst), m, [&](int i) { return out[i]; });
  } else if (d == Ty::f32) {
    if (r == Round::rn && s != Ty::u64 && s != Ty::s64)
      each(w.r<float>(o.dst), m, [&](int i) { return float(double(v[i])); });
    else
      each_active(w.r<uint32_t>(o.dst), m, [&](int i) { return encode(to_double(i), kF32, r); });
    if (o.flags & F_SAT)
      each(w.r<float>(o.dst), m, [&](int i) {
        float f = w.r<float>(o.dst)[i];
        return f > 0 ? (f < 1 ? f : 1.f) : 0.f;
      });
  } else {
    each_active(w.r<uint16_t>(o.dst), m, [&](int i) { return uint16_t(encode_as(to_double(i), d, o.flags)); });
  }
}

void round_to_integral(double (&v)[32], Round r) {
  switch (r) {
    case Round::rz:
      for (auto& x : v) x = std::trunc(x);
      break;
    case Round::rm:
      for (auto& x : v) x = std::floor(x);
      break;
    case Round::rp:
      for (auto& x : v) x = std::ceil(x);
      break;
    default:
      for (auto& x : v) x = std::nearbyint(x);
      break;
  }
}

void float_to_int(Warp& w, const Op& o, uint32_t m) {
  double v[32];
  int64_t out[32];
  Ty d = dst_type(o), s = src_type(o);
  load_floats(w, o.a, s, v);
  if ((o.flags & F_FTZ) && s == Ty::f32)
    for (auto& x : v) x = ftz(float(x));
  round_to_integral(v, rounding(o.flags));
  int n = ty_size(d) * 8;
  if (ty_signed(d)) {
    double hi = std::ldexp(1.0, n - 1);
    int64_t max = n == 64 ? INT64_MAX : (1ll << (n - 1)) - 1, min = -max - 1;
    bool nan_min = s == Ty::f64 || n == 64;
    for (int i = 0; i < 32; ++i)
      out[i] = v[i] != v[i] ? (nan_min ? min : 0) : v[i] >= hi ? max : v[i] < -hi ? min : int64_t(v[i]);
  } else {
    double hi = std::ldexp(1.0, n);
    uint64_t max = n == 64 ? ~0ull : (1ull << n) - 1;
    bool nan_top = s == Ty::f64 || n == 64;
    for (int i = 0; i < 32; ++i)
      out[i] = v[i] != v[i] ? (nan_top ? int64_t(1ull << (n - 1)) : 0)
               : v[i] >= hi ? int64_t(max)
               : v[i] <= 0  ? 0
                            : int64_t(uint64_t(v[i]));
  }
  store_ints(w, o.dst, o.size, d, out, m);
}

void float_to_float(Warp& w, const Op& o, uint32_t m) {
  double v[32];
  Ty d = dst_type(o), s = src_type(o);
  load_floats(w, o.a, s, v);
  if ((o.flags & F_FTZ) && s == Ty::f32)
    for (auto& x : v) x = ftz(float(x));
  if (o.flags & F_INT) round_to_integral(v, rounding(o.flags));
  if (d == Ty::f64) {
    if (o.flags & F_SAT)
      for (auto& x : v) x = x > 0 ? (x < 1 ? x : 1) : 0;
    each(w.r<double>(o.dst), m, [&](int i) { return v[i]; });
  } else if (d == Ty::f32 || d == Ty::tf32) {
    each_active(w.r<uint32_t>(o.dst), m, [&](int i) {
      uint32_t r = encode_as(v[i], d, o.flags);
      if ((o.flags & F_FTZ) && (r & 0x7f800000u) == 0) r &= 0x80000000u;
      return r;
    });
  } else {
    each_active(w.r<uint16_t>(o.dst), m, [&](int i) { return uint16_t(encode_as(v[i], d, o.flags)); });
  }
}
void f16_from_f32(Warp& w, const Op& o, uint32_t m) {
  alignas(32) uint16_t t[32];
  const float* a = w.r<float>(o.a);
  for (int i = 0; i < 32; i += 8)
    _mm_store_si128(reinterpret_cast<__m128i*>(t + i),
                    _mm256_cvtps_ph(_mm256_load_ps(a + i), _MM_FROUND_TO_NEAREST_INT));
  FOR_LANES t[i] = a[i] != a[i] ? uint16_t(0x7fff) : t[i];
  blend(w.r<uint16_t>(o.dst), t, m);
}
void f32_from_f16(Warp& w, const Op& o, uint32_t m) {
  alignas(32) float t[32];
  const uint16_t* a = w.r<uint16_t>(o.a);
  for (int i = 0; i < 32; i += 8)
    _mm256_store_ps(t + i, _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(a + i))));
  each(w.r<float>(o.dst), m, [&](int i) { return t[i]; });
}
void f32_from_bf16(Warp& w, const Op& o, uint32_t m) {
  const uint16_t* a = w.r<uint16_t>(o.a);
  each(w.r<uint32_t>(o.dst), m, [&](int i) { return uint32_t(a[i]) << 16; });
}
inline uint16_t bf16_rn(float f) {
  uint32_t u = as_u32(f);
  uint16_t r = uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
  return (u & 0x7fffffffu) > 0x7f800000u ? uint16_t(0x7fff) : r;
}
void bf16_from_f32(Warp& w, const Op& o, uint32_t m) {
  const float* a = w.r<float>(o.a);
  each(w.r<uint16_t>(o.dst), m, [&](int i) { return bf16_rn(a[i]); });
}
void bf16x2_from_f32(Warp& w, const Op& o, uint32_t m) {
  const float *a = w.r<float>(o.a), *b = w.r<float>(o.b);
  each(w.r<uint32_t>(o.dst), m, [&](int i) { return uint32_t(bf16_rn(a[i])) << 16 | bf16_rn(b[i]); });
}
// {f16,bf16,e4m3,...}x2 from two f32: a goes to the upper half
void pair_from_f32(Warp& w, const Op& o, uint32_t m) {
  const float *a = w.r<float>(o.a), *b = w.r<float>(o.b);
  Ty d = dst_type(o), e = d == Ty::f16x2 ? Ty::f16 : d == Ty::bf16x2 ? Ty::bf16 : d;
  int sh = ty_size(d) == 4 ? 16 : ty_size(d) == 2 ? 8 : 4;
  for (uint32_t t = m; t; t &= t - 1) {
    int i = __builtin_ctz(t);
    uint32_t r = encode_as(a[i], e, o.flags) << sh | encode_as(b[i], e, o.flags);
    if (o.size == 4)
      w.r<uint32_t>(o.dst)[i] = r;
    else
      w.r<uint16_t>(o.dst)[i] = uint16_t(r);
  }
}
// e4m3x2 and friends from f16x2 / bf16x2
void fp8_from_half2(Warp& w, const Op& o, uint32_t m) {
  Ty d = dst_type(o);
  bool bf = src_type(o) == Ty::bf16x2;
  int sh = ty_size(d) == 2 ? 8 : 4;
  for (uint32_t t = m; t; t &= t - 1) {
    int i = __builtin_ctz(t);
    uint32_t x = w.r<uint32_t>(o.a)[i];
    double lo = bf ? bf16_to_f32(uint16_t(x)) : f16_to_f32(uint16_t(x)),
           hi = bf ? bf16_to_f32(uint16_t(x >> 16)) : f16_to_f32(uint16_t(x >> 16));
    w.r<uint16_t>(o.dst)[i] = uint16_t(encode_as(hi, d, o.flags) << sh | encode_as(lo, d, o.flags));
  }
}
void half2_from_fp8(Warp& w, const Op& o, uint32_t m) {
  Ty s = src_type(o);
  bool bf = dst_type(o) == Ty::bf16x2;
  const Format& f = s == Ty::e4m3x2   ? kE4M3
                    : s == Ty::e5m2x2 ? kE5M2
                    : s == Ty::e2m1x2 ? kE2M1
                    : s == Ty::e2m3x2 ? kE2M3
                                      : kE3M2;
  int sh = ty_size(s) == 2 ? 8 : 4;
  uint32_t mask = (1u << sh) - 1;
  for (uint32_t t = m; t; t &= t - 1) {
    int i = __builtin_ctz(t);
    uint32_t x = w.r<uint16_t>(o.a)[i];
    uint32_t flags = o.flags & ~(7u << F_ROUND_SHIFT);
    uint32_t lo = encode_as(decode(x & mask, f), bf ? Ty::bf16 : Ty::f16, flags),
             hi = encode_as(decode(x >> sh & mask, f), bf ? Ty::bf16 : Ty::f16, flags);
    w.r<uint32_t>(o.dst)[i] = hi << 16 | lo;
  }
}
// cvt.pack.sat.convertType.abType{.cType} d, a, b{, c}
void cvt_pack(Warp& w, const Op& o, uint32_t m) {
  Ty d = dst_type(o);
  auto *a = w.r<int32_t>(o.a), *b = w.r<int32_t>(o.b);
  const uint32_t* c = o.flags & 1 ? w.r<uint32_t>(o.c) : nullptr;
  int n = int(o.size2);  // bits of one field
  int64_t hi = ty_signed(d) ? (1ll << (n - 1)) - 1 : (1ll << n) - 1, lo = ty_signed(d) ? -(1ll << (n - 1)) : 0;
  uint32_t mask = uint32_t((1ull << n) - 1);
  auto sat = [&](int32_t v) { return uint32_t(v < lo ? lo : v > hi ? hi : v) & mask; };
  each_active(w.r<uint32_t>(o.dst), m, [&](int i) {
    uint32_t r = sat(a[i]) << n | sat(b[i]);
    if (c) r |= c[i] << (2 * n);
    return r;
  });
}

bool sel_cvt(Decoder& d, const AInstr& in, Op& op) {
  op.cls = C_convert;
  if (has(in, "pack")) {
    Ty t = first_type(in);
    op.imm = int64_t(t);
    // u2/s2/u4/s4 are not in Ty's arithmetic set: read the width from the qualifier
    std::string_view q;
    for (size_t i = 1; i < in.mods.size(); ++i)
      if (in.mods[i].size() >= 2 && (in.mods[i][0] == 'u' || in.mods[i][0] == 's') && isdigit(in.mods[i][1])) {
        q = in.mods[i];
        break;
      }
    if (q.empty()) return false;
    op.size2 = uint8_t(atoi(std::string(q.substr(1)).c_str()));
    op.imm = int64_t(q[0] == 's' ? Ty::s32 : Ty::u32);
    op.dst = d.dst(in.ops[0], 4);
    op.a = d.src(in.ops[1], 4);
    op.b = d.src(in.ops[2], 4);
    if (in.ops.size() == 4) {
      op.c = d.src(in.ops[3], 4);
      op.flags = 1;
    }
    return done(op, cvt_pack);
  }
  Ty t = first_type(in), s = last_type(in);
  if (has(in, "rs")) return false;
  Round r = Round::rn;
  bool integral = false;
  for (auto q : in.mods) {
    if (q == "rz" || q == "rzi") r = Round::rz;
    if (q == "rm" || q == "rmi") r = Round::rm;
    if (q == "rp" || q == "rpi") r = Round::rp;
    if (q == "rna") r = Round::rna;
    if (q == "rni" || q == "rzi" || q == "rmi" || q == "rpi") integral = true;
  }
  op.flags = (has(in, "sat") ? F_SAT : 0) | (has(in, "ftz") ? F_FTZ : 0) | (has(in, "relu") ? F_RELU : 0) |
             (has(in, "satfinite") ? F_FINITE : 0) | (integral ? F_INT : 0) | uint32_t(r) << F_ROUND_SHIFT;
  op.imm = int64_t(t) | int64_t(s) << 8;
  bool plain = !(op.flags & (F_SAT | F_FTZ | F_RELU | F_FINITE | F_INT)) && r == Round::rn;

  if (t == Ty::f16x2 || t == Ty::bf16x2 || ty_size(t) == 0 ||
      (int(t) >= int(Ty::e4m3x2) && int(t) <= int(Ty::e3m2x2))) {
    bool narrow = !(t == Ty::f16x2 || t == Ty::bf16x2);
    op.size = uint8_t(narrow ? 2 : 4);
    if (s == Ty::f32) {
      if (in.ops.size() != 3) return false;
      op.dst = d.dst(in.ops[0], op.size);
      op.a = d.src(in.ops[1], Ty::f32);
      op.b = d.src(in.ops[2], Ty::f32);
      return done(op, t == Ty::bf16x2 && plain ? bf16x2_from_f32 : pair_from_f32);
    }
    if (narrow && (s == Ty::f16x2 || s == Ty::bf16x2)) {
      op.dst = d.dst(in.ops[0], 2);
      op.a = d.src(in.ops[1], 4);
      return done(op, fp8_from_half2);
    }
    if (!narrow && int(s) >= int(Ty::e4m3x2) && int(s) <= int(Ty::e3m2x2)) {
      op.dst = d.dst(in.ops[0], 4);
      op.a = d.src(in.ops[1], 2);
      return done(op, half2_from_fp8);
    }
    return false;
  }

  const AOperand &to = in.ops[0], &from = in.ops[1];
  bool fd = ty_float(t), fs = ty_float(s);
  // register widths may exceed the type's for integers
  int rs = fs ? ty_size(s) : d.reg_size(from) ? d.reg_size(from) : ty_size(s);
  int rd = to.kind == AOperand::reg ? d.reg_size(to) : ty_size(t);
  if (rs == 1) rs = 2;
  if (rs < ty_size(s) || rd < (ty_size(t) == 1 ? 2 : ty_size(t)))
    throw Decoder::Unsupported{"register narrower than the type"};
  op.size = uint8_t(rd);
  op.size2 = uint8_t(rs);
  op.dst = d.dst(to, rd);
  op.a = d.src(from, rs, s);
  if (fd && rd != (t == Ty::tf32 ? 4 : ty_size(t))) {
    throw Decoder::Unsupported{"float destination width"};
  }

  if (!fd && !fs) {
    if (!(op.flags & F_SAT)) {
      if (rs == 4 && rd == 8 && t != Ty::u8 && ty_size(t) == 8) {
        if (s == Ty::u32) return done(op, direct<uint64_t, uint32_t>);
        if (s == Ty::s32) return done(op, direct<int64_t, int32_t>);
      }
      if (rs == 8 && rd == 4 && ty_size(t) == 4 && ty_size(s) == 8) return done(op, direct<uint32_t, uint64_t>);
      if (rs == 4 && rd == 2 && ty_size(t) == 2 && ty_size(s) == 4) return done(op, direct<uint16_t, uint32_t>);
      if (rs == 2 && rd == 4 && ty_size(t) == 4) {
        if (s == Ty::u16) return done(op, direct<uint32_t, uint16_t>);
        if (s == Ty::s16) return done(op, direct<int32_t, int16_t>);
      }
    }
    return done(op, int_to_int);
  }
  if (fd && !fs) {
    if (plain && t == Ty::f32 && rs == 4 && s == Ty::s32) return done(op, direct<float, int32_t>);
    if (plain && t == Ty::f64 && rs == 4 && s == Ty::s32) return done(op, direct<double, int32_t>);
    return done(op, int_to_float);
  }
  if (!fd) return done(op, float_to_int);
  if (plain) {
    if (t == Ty::f16 && s == Ty::f32) return done(op, f16_from_f32);
    if (t == Ty::bf16 && s == Ty::f32) return done(op, bf16_from_f32);
    if (t == Ty::f32 && s == Ty::f16) return done(op, f32_from_f16);
    if (t == Ty::f32 && s == Ty::bf16) return done(op, f32_from_bf16);
    if (t == Ty::f64 && s == Ty::f32) return done(op, direct<double, float>);
    if (t == Ty::f32 && s == Ty::f64) return done(op, direct<float, double>);
  }
  return done(op, float_to_float);
}

}  // namespace

void register_convert(SelectorMap& m) { m["cvt"] = sel_cvt; }

}  // namespace cudasim
