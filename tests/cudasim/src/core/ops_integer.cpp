// Integer arithmetic.
#include "integers.h"

namespace cudasim {

namespace {

template <class T>
using Wide =
    std::conditional_t<sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>,
                       std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>,
                                          std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>>>;

struct Add {
  template <class T>
  static T f(T a, T b) {
    return T(U<T>(a) + U<T>(b));
  }
};
struct Sub {
  template <class T>
  static T f(T a, T b) {
    return T(U<T>(a) - U<T>(b));
  }
};
struct MulLo {
  template <class T>
  static T f(T a, T b) {
    return T(uint64_t(U<T>(a)) * uint64_t(U<T>(b)));
  }
};
struct MulHi {
  template <class T>
  static T f(T a, T b) {
    return T((Wide<T>(a) * Wide<T>(b)) >> width<T>);
  }
};
struct MadLo {
  template <class T>
  static T f(T a, T b, T c) {
    return T(MulLo::f(a, b) + uint64_t(c));
  }
};
struct MadHi {
  template <class T>
  static T f(T a, T b, T c) {
    return T(uint64_t(MulHi::f(a, b)) + uint64_t(c));
  }
};
struct AddSat {
  static int32_t f(int32_t a, int32_t b) {
    int64_t r = int64_t(a) + b;
    return int32_t(std::clamp<int64_t>(r, INT32_MIN, INT32_MAX));
  }
};
struct SubSat {
  static int32_t f(int32_t a, int32_t b) {
    int64_t r = int64_t(a) - b;
    return int32_t(std::clamp<int64_t>(r, INT32_MIN, INT32_MAX));
  }
};
struct MadHiSat {
  static int32_t f(int32_t a, int32_t b, int32_t c) {
    int64_t r = int64_t(MulHi::f(a, b)) + c;
    return int32_t(std::clamp<int64_t>(r, INT32_MIN, INT32_MAX));
  }
};
struct Mul24Lo {
  template <class T>
  static T f(T a, T b) {
    return T(uint32_t(ext(a) * ext(b)));
  }
  static int64_t ext(int32_t a) { return int64_t(int32_t(uint32_t(a) << 8) >> 8); }
  static uint64_t ext(uint32_t a) { return a & 0xffffff; }
};
struct Mul24Hi {
  template <class T>
  static T f(T a, T b) {
    return T(uint32_t((Mul24Lo::ext(a) * Mul24Lo::ext(b)) >> 16));
  }
};
struct Mad24Lo {
  template <class T>
  static T f(T a, T b, T c) {
    return T(uint32_t(Mul24Lo::f(a, b)) + uint32_t(c));
  }
};
struct Mad24Hi {
  template <class T>
  static T f(T a, T b, T c) {
    return T(uint32_t(Mul24Hi::f(a, b)) + uint32_t(c));
  }
};
struct Sad {
  template <class T>
  static T f(T a, T b, T c) {
    return T(U<T>(c) + (a < b ? U<T>(b) - U<T>(a) : U<T>(a) - U<T>(b)));
  }
};
struct Div {
  template <class T>
  static T f(T a, T b) {
    if (b == 0) return T(~T(0));
    if constexpr (std::is_signed_v<T>)
      if (b == T(-1)) return T(U<T>(0) - U<T>(a));
    return T(a / b);
  }
};
struct Rem {
  template <class T>
  static T f(T a, T b) {
    if (b == 0) return a;
    if constexpr (std::is_signed_v<T>)
      if (b == T(-1)) return 0;
    return T(a % b);
  }
};
struct Abs {
  template <class T>
  static T f(T a) {
    return a < 0 ? T(U<T>(0) - U<T>(a)) : a;
  }
};
struct Neg {
  template <class T>
  static T f(T a) {
    return T(U<T>(0) - U<T>(a));
  }
};
struct Min {
  template <class T>
  static T f(T a, T b) {
    return a < b ? a : b;
  }
};
struct Max {
  template <class T>
  static T f(T a, T b) {
    return a > b ? a : b;
  }
};
struct MinRelu {
  template <class T>
  static T f(T a, T b) {
    return std::max<T>(std::min(a, b), 0);
  }
};
struct MaxRelu {
  template <class T>
  static T f(T a, T b) {
    return std::max<T>(std::max(a, b), 0);
  }
};
template <class F, class H>
struct Pair16 {  // two 16-bit halves of a word
  static uint32_t f(uint32_t a, uint32_t b) {
    return uint32_t(uint16_t(F::f(H(a), H(b)))) | uint32_t(uint16_t(F::f(H(a >> 16), H(b >> 16)))) << 16;
  }
};
template <class T>
void mul_wide(Warp& w, const Op& o, uint32_t m) {
  auto* d = w.r<Wide<T>>(o.dst);
  const T *a = w.r<T>(o.a), *b = w.r<T>(o.b);
  each(d, m, [&](int i) { return Wide<T>(a[i]) * Wide<T>(b[i]); });
}
template <class T>
void mad_wide(Warp& w, const Op& o, uint32_t m) {
  auto* d = w.r<Wide<T>>(o.dst);
  const T *a = w.r<T>(o.a), *b = w.r<T>(o.b);
  const auto* c = w.r<Wide<T>>(o.c);
  each(d, m, [&](int i) { return Wide<T>(U<Wide<T>>(Wide<T>(a[i]) * Wide<T>(b[i])) + U<Wide<T>>(c[i])); });
}

// --- carries ------------------------------------------------------------------------------------------

// flags: 1 use carry in, 2 set carry out
template <class T>
void add_carry(Warp& w, const Op& o, uint32_t m) {
  T* d = w.r<T>(o.dst);
  const T *a = w.r<T>(o.a), *b = w.r<T>(o.b);
  uint32_t cc = w.cc;
  for (uint32_t t = m; t; t &= t - 1) {
    int i = __builtin_ctz(t);
    unsigned __int128 r = (unsigned __int128)a[i] + b[i] + ((o.flags & 1) ? (w.cc >> i & 1) : 0);
    d[i] = T(r);
    cc = (cc & ~(1u << i)) | uint32_t(r >> width<T> & 1) << i;
  }
  if (o.flags & 2) w.cc = cc;
}
template <class T>
void sub_carry(Warp& w, const Op& o, uint32_t m) {  // the flag holds a borrow
  T* d = w.r<T>(o.dst);
  const T *a = w.r<T>(o.a), *b = w.r<T>(o.b);
  uint32_t cc = w.cc;
  for (uint32_t t = m; t; t &= t - 1) {
    int i = __builtin_ctz(t);
    unsigned __int128 s = (unsigned __int128)b[i] + ((o.flags & 1) ? (w.cc >> i & 1) : 0);
    d[i] = T(a[i] - T(s));
    cc = (cc & ~(1u << i)) | uint32_t((unsigned __int128)a[i] < s) << i;
  }
  if (o.flags & 2) w.cc = cc;
}
template <class T>
void mad_carry(Warp& w, const Op& o, uint32_t m) {  // flags 4: hi, 8: signed
  T* d = w.r<T>(o.dst);
  const T *a = w.r<T>(o.a), *b = w.r<T>(o.b), *c = w.r<T>(o.c);
  uint32_t cc = w.cc;
  for (uint32_t t = m; t; t &= t - 1) {
    int i = __builtin_ctz(t);
    T p;
    if (!(o.flags & 4))
      p = T(a[i] * b[i]);
    else if (o.flags & 8)
      p = T(MulHi::f(std::make_signed_t<T>(a[i]), std::make_signed_t<T>(b[i])));
    else
      p = MulHi::f(a[i], b[i]);
    unsigned __int128 r = (unsigned __int128)p + c[i] + ((o.flags & 1) ? (w.cc >> i & 1) : 0);
    d[i] = T(r);
    cc = (cc & ~(1u << i)) | uint32_t(r >> width<T> & 1) << i;
  }
  if (o.flags & 2) w.cc = cc;
}

bool floating(const AInstr& in, Decoder& d, Op& op, bool* result) {
  Ty t = last_type(in);
  if (is_half(t)) {
    *result = select_half(d, in, op);
    return true;
  }
  if (ty_float(t)) {
    *result = select_float(d, in, op);
    return true;
  }
  return false;
}

bool sel_addsub(Decoder& d, const AInstr& in, Op& op) {
  bool r;
  if (floating(in, d, op, &r)) return r;
  Ty t = last_type(in);
  bool is_add = in.mods[0] == "add" || in.mods[0] == "addc";
  bool carry_in = in.mods[0].back() == 'c', carry_out = has(in, "cc");
  if (t == Ty::u16x2 || t == Ty::s16x2) {
    if (!operands(d, in, op, Ty::b32, 2)) return false;
    return done(op, is_add ? h2<uint32_t, Pair16<Add, uint16_t>> : h2<uint32_t, Pair16<Sub, uint16_t>>);
  }
  if (!operands(d, in, op, t, 2)) return false;
  if (carry_in || carry_out) {
    op.flags = uint32_t(carry_in) | uint32_t(carry_out) << 1;
    if (ty_size(t) == 4) return done(op, is_add ? add_carry<uint32_t> : sub_carry<uint32_t>);
    return done(op, is_add ? add_carry<uint64_t> : sub_carry<uint64_t>);
  }
  if (has(in, "sat")) return done(op, is_add ? h2<int32_t, AddSat> : h2<int32_t, SubSat>);
  return done(op, is_add ? PICK_INT(h2, Add, t) : PICK_INT(h2, Sub, t));
}

bool sel_mul(Decoder& d, const AInstr& in, Op& op) {
  bool r;
  if (floating(in, d, op, &r)) return r;
  Ty t = last_type(in);
  if (has(in, "wide")) {
    int s = ty_size(t);
    op.dst = d.dst(in.ops[0], 2 * s);
    op.a = d.src(in.ops[1], t);
    op.b = d.src(in.ops[2], t);
    switch (t) {
      case Ty::u16:
        return done(op, mul_wide<uint16_t>);
      case Ty::s16:
        return done(op, mul_wide<int16_t>);
      case Ty::u32:
        return done(op, mul_wide<uint32_t>);
      case Ty::s32:
        return done(op, mul_wide<int32_t>);
      default:
        return false;
    }
  }
  if (!operands(d, in, op, t, 2)) return false;
  if (has(in, "hi")) return done(op, PICK_INT(h2, MulHi, t));
  return done(op, PICK_INT(h2, MulLo, t));
}

bool sel_mad(Decoder& d, const AInstr& in, Op& op) {
  bool r;
  if (floating(in, d, op, &r)) return r;
  Ty t = last_type(in);
  if (in.ops.size() != 4) return false;
  if (has(in, "wide")) {
    int s = ty_size(t);
    op.dst = d.dst(in.ops[0], 2 * s);
    op.a = d.src(in.ops[1], t);
    op.b = d.src(in.ops[2], t);
    op.c = d.src(in.ops[3], 2 * s);
    switch (t) {
      case Ty::u16:
        return done(op, mad_wide<uint16_t>);
      case Ty::s16:
        return done(op, mad_wide<int16_t>);
      case Ty::u32:
        return done(op, mad_wide<uint32_t>);
      case Ty::s32:
        return done(op, mad_wide<int32_t>);
      default:
        return false;
    }
  }
  if (!operands(d, in, op, t, 3)) return false;
  bool hi = has(in, "hi");
  if (in.mods[0] == "madc" || has(in, "cc")) {
    op.flags =
        uint32_t(in.mods[0] == "madc") | uint32_t(has(in, "cc")) << 1 | uint32_t(hi) << 2 | uint32_t(ty_signed(t)) << 3;
    return done(op, ty_size(t) == 4 ? mad_carry<uint32_t> : mad_carry<uint64_t>);
  }
  if (hi && has(in, "sat")) return done(op, h3<int32_t, MadHiSat>);
  return done(op, hi ? PICK_INT(h3, MadHi, t) : PICK_INT(h3, MadLo, t));
}

bool sel_24(Decoder& d, const AInstr& in, Op& op) {
  Ty t = last_type(in);
  bool mad = in.mods[0] == "mad24", hi = has(in, "hi"), s = t == Ty::s32;
  if (!operands(d, in, op, t, mad ? 3 : 2)) return false;
  if (mad)
    return done(
        op,
        hi ? (s ? h3<int32_t, Mad24Hi> : h3<uint32_t, Mad24Hi>) : (s ? h3<int32_t, Mad24Lo> : h3<uint32_t, Mad24Lo>));
  return done(
      op, hi ? (s ? h2<int32_t, Mul24Hi> : h2<uint32_t, Mul24Hi>) : (s ? h2<int32_t, Mul24Lo> : h2<uint32_t, Mul24Lo>));
}

bool sel_div(Decoder& d, const AInstr& in, Op& op) {
  bool r;
  if (floating(in, d, op, &r)) return r;
  return in.mods[0] == "div" ? sel_plain<Div, 2>(d, in, op) : sel_plain<Rem, 2>(d, in, op);
}
bool sel_absneg(Decoder& d, const AInstr& in, Op& op) {
  bool r;
  if (floating(in, d, op, &r)) return r;
  return in.mods[0] == "abs" ? sel_plain<Abs, 1>(d, in, op) : sel_plain<Neg, 1>(d, in, op);
}
bool sel_minmax(Decoder& d, const AInstr& in, Op& op) {
  bool r;
  if (floating(in, d, op, &r)) return r;
  Ty t = last_type(in);
  bool mn = in.mods[0] == "min", relu = has(in, "relu");
  if (t == Ty::u16x2 || t == Ty::s16x2) {
    if (!operands(d, in, op, Ty::b32, 2)) return false;
    if (t == Ty::u16x2) return done(op, mn ? h2<uint32_t, Pair16<Min, uint16_t>> : h2<uint32_t, Pair16<Max, uint16_t>>);
    if (relu) return done(op, mn ? h2<uint32_t, Pair16<MinRelu, int16_t>> : h2<uint32_t, Pair16<MaxRelu, int16_t>>);
    return done(op, mn ? h2<uint32_t, Pair16<Min, int16_t>> : h2<uint32_t, Pair16<Max, int16_t>>);
  }
  if (!operands(d, in, op, t, 2)) return false;
  if (relu) return done(op, mn ? h2<int32_t, MinRelu> : h2<int32_t, MaxRelu>);
  return done(op, mn ? PICK_INT(h2, Min, t) : PICK_INT(h2, Max, t));
}

}  // namespace

void register_integer(SelectorMap& m) {
  m["add"] = m["sub"] = m["addc"] = m["subc"] = sel_addsub;
  m["mul"] = sel_mul;
  m["mad"] = m["madc"] = sel_mad;
  m["mul24"] = m["mad24"] = sel_24;
  m["sad"] = sel_plain<Sad, 3>;
  m["div"] = m["rem"] = sel_div;
  m["abs"] = m["neg"] = sel_absneg;
  m["min"] = m["max"] = sel_minmax;
}

}  // namespace cudasim
