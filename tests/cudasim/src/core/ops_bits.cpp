// Logic, shifts, bit fields, byte permutation and dot products.
#include <utility>

#include "integers.h"

namespace cudasim {

namespace {

struct And {
  template <class T>
  static T f(T a, T b) {
    return a & b;
  }
};
struct Or {
  template <class T>
  static T f(T a, T b) {
    return a | b;
  }
};
struct Xor {
  template <class T>
  static T f(T a, T b) {
    return a ^ b;
  }
};
struct Not {
  template <class T>
  static T f(T a) {
    return T(~a);
  }
};
struct Cnot {
  template <class T>
  static T f(T a) {
    return a == 0;
  }
};
struct Popc {
  template <class T>
  static uint32_t f(T a) {
    return uint32_t(__builtin_popcountll(U<T>(a)));
  }
};
struct Clz {
  template <class T>
  static uint32_t f(T a) {
    return a == 0 ? width<T> : uint32_t(__builtin_clzll(uint64_t(U<T>(a)) << (64 - width<T>)));
  }
};
struct Brev {
  template <class T>
  static T f(T a) {
    uint64_t v = __builtin_bswap64(U<T>(a));
    v = (v >> 4 & 0x0f0f0f0f0f0f0f0full) | (v & 0x0f0f0f0f0f0f0f0full) << 4;
    v = (v >> 2 & 0x3333333333333333ull) | (v & 0x3333333333333333ull) << 2;
    v = (v >> 1 & 0x5555555555555555ull) | (v & 0x5555555555555555ull) << 1;
    return T(v >> (64 - width<T>));
  }
};
struct Bfind {
  template <class T>
  static uint32_t f(T a) {
    U<T> v = U<T>(a);
    if constexpr (std::is_signed_v<T>)
      if (a < 0) v = U<T>(~v);
    return v == 0 ? NONE : uint32_t(63 - __builtin_clzll(v));
  }
};
struct BfindShift {
  template <class T>
  static uint32_t f(T a) {
    uint32_t r = Bfind::f(a);
    return r == NONE ? r : uint32_t(width<T> - 1) - r;
  }
};

// Result type differs from the operand type.
template <class T, class F>
void h1_32(Warp& w, const Op& o, uint32_t m) {
  uint32_t* d = w.r<uint32_t>(o.dst);
  const T* a = w.r<T>(o.a);
  each(d, m, [&](int i) { return F::f(a[i]); });
}

// --- logic on predicates --------------------------------------------------------------------------------

template <class F>
void pred2(Warp& w, const Op& o, uint32_t m) {
  uint32_t a = w.p(o.a), b = w.p(o.b);
  if (o.flags & 1) a = ~a;
  if (o.flags & 2) b = ~b;
  w.p(o.dst) = (w.p(o.dst) & ~m) | (F::f(a, b) & m);
}
void pred_not(Warp& w, const Op& o, uint32_t m) {
  uint32_t a = ~w.p(o.a);
  if (o.flags & 1) a = ~a;
  w.p(o.dst) = (w.p(o.dst) & ~m) | (a & m);
}

template <int L>
inline uint32_t lut3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r = 0;
  if (L & 0x80) r |= a & b & c;
  if (L & 0x40) r |= a & b & ~c;
  if (L & 0x20) r |= a & ~b & c;
  if (L & 0x10) r |= a & ~b & ~c;
  if (L & 0x08) r |= ~a & b & c;
  if (L & 0x04) r |= ~a & b & ~c;
  if (L & 0x02) r |= ~a & ~b & c;
  if (L & 0x01) r |= ~a & ~b & ~c;
  return r;
}
template <int L>
void lop3(Warp& w, const Op& o, uint32_t m) {
  auto* d = w.r<uint32_t>(o.dst);
  auto *a = w.r<uint32_t>(o.a), *b = w.r<uint32_t>(o.b), *c = w.r<uint32_t>(o.c);
  each(d, m, [&](int i) { return lut3<L>(a[i], b[i], c[i]); });
}
template <int... L>
Handler lop3_table(int lut, std::integer_sequence<int, L...>) {
  static const Handler t[] = {lop3<L>...};
  return t[lut & 255];
}
// lop3.BoolOp d|p, a, b, c, lut, q:  p = (d != 0) BoolOp q. The lop3 handler itself is in imm.
void lop3_pred(Warp& w, const Op& o, uint32_t m) {
  reinterpret_cast<Handler>(o.imm)(w, o, m);
  auto* d = w.r<uint32_t>(o.dst);
  uint32_t nz = mask_of([&](int i) { return d[i] != 0; }), q = w.p(o.d);
  if (o.flags & 1) q = ~q;
  uint32_t r = o.size == 0 ? (nz | q) : (nz & q);
  w.p(o.dst2) = (w.p(o.dst2) & ~m) | (r & m);
}

// --- shifts -----------------------------------------------------------------------------------------------

template <class T, bool Left>
void shift(Warp& w, const Op& o, uint32_t m) {
  T* d = w.r<T>(o.dst);
  const T* a = w.r<T>(o.a);
  const uint32_t* b = w.r<uint32_t>(o.b);
  constexpr uint32_t W = width<T>;
  each(d, m, [&](int i) {
    uint32_t s = b[i];
    if constexpr (Left)
      return s >= W ? T(0) : T(U<T>(a[i]) << (s & (W - 1)));
    else if constexpr (std::is_signed_v<T>)
      return T(a[i] >> (s >= W ? W - 1 : s & (W - 1)));
    else
      return s >= W ? T(0) : T(a[i] >> (s & (W - 1)));
  });
}
template <bool Left, bool Wrap>
void shf(Warp& w, const Op& o, uint32_t m) {
  auto* d = w.r<uint32_t>(o.dst);
  auto *a = w.r<uint32_t>(o.a), *b = w.r<uint32_t>(o.b), *c = w.r<uint32_t>(o.c);
  each(d, m, [&](int i) {
    uint32_t n = Wrap ? c[i] & 31 : (c[i] > 32 ? 32 : c[i]);
    uint64_t v = uint64_t(b[i]) << 32 | a[i];
    return Left ? uint32_t((v << n) >> 32) : uint32_t(v >> n);
  });
}

template <class T>
void bfe(Warp& w, const Op& o, uint32_t m) {
  T* d = w.r<T>(o.dst);
  const T* a = w.r<T>(o.a);
  auto *b = w.r<uint32_t>(o.b), *c = w.r<uint32_t>(o.c);
  constexpr uint32_t msb = width<T> - 1;
  each_active(d, m, [&](int i) -> T {
    uint32_t pos = b[i] & 0xff, len = c[i] & 0xff;
    U<T> v = U<T>(a[i]);
    bool sbit = false;
    if (std::is_signed_v<T> && len) sbit = v >> std::min(pos + len - 1, msb) & 1;
    U<T> r = pos > msb ? 0 : U<T>(v >> pos);
    if (len <= msb) {
      U<T> keep = U<T>((U<T>(1) << len) - 1);
      uint32_t avail = pos > msb ? 0 : msb + 1 - pos;
      r &= keep;
      if (sbit) {
        U<T> fill = avail >= len ? U<T>(~keep) : U<T>(~(avail ? U<T>((U<T>(1) << avail) - 1) : U<T>(0)));
        r |= fill;
      }
    } else if (sbit && pos) {
      r |= pos > msb ? U<T>(~U<T>(0)) : U<T>(~(U<T>(~U<T>(0)) >> pos));
    }
    return T(r);
  });
}
template <class T>
void bfi(Warp& w, const Op& o, uint32_t m) {
  T* d = w.r<T>(o.dst);
  const T *a = w.r<T>(o.a), *b = w.r<T>(o.b);
  auto *c = w.r<uint32_t>(o.c), *e = w.r<uint32_t>(o.d);
  constexpr uint32_t W = width<T>;
  each(d, m, [&](int i) -> T {
    uint32_t pos = c[i] & 0xff, len = e[i] & 0xff;
    T field = len >= W ? T(~T(0)) : T((T(1) << (len & (W - 1))) - 1);
    T mask = pos >= W ? T(0) : T(field << (pos & (W - 1)));
    T ins = pos >= W ? T(0) : T(a[i] << (pos & (W - 1)));
    return T((b[i] & ~mask) | (ins & mask));
  });
}

// --- byte permute and dot products ----------------------------------------------------------------------

void prmt(Warp& w, const Op& o, uint32_t m) {
  auto* d = w.r<uint32_t>(o.dst);
  auto *a = w.r<uint32_t>(o.a), *b = w.r<uint32_t>(o.b), *c = w.r<uint32_t>(o.c);
  uint32_t mode = o.flags;
  each(d, m, [&](int i) {
    uint64_t v = uint64_t(b[i]) << 32 | a[i];
    uint32_t sel = c[i], r = 0;
    if (mode == 0) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        uint32_t s = sel >> (4 * k) & 15;
        uint32_t byte = uint32_t(v >> ((s & 7) * 8)) & 0xff;
        uint32_t rep = (s & 8) ? ((byte & 0x80) ? 0xffu : 0u) : byte;
        r |= rep << (8 * k);
      }
      return r;
    }
    uint32_t q = sel & 3;
    for (uint32_t k = 0; k < 4; ++k) {
      uint32_t s = 0;
      switch (mode) {
        case 1:
          s = (q + k) & 7;
          break;  // f4e
        case 2:
          s = (q + 8 - k) & 7;
          break;  // b4e
        case 3:
          s = q;
          break;  // rc8
        case 4:
          s = std::max(q, k);
          break;  // ecl
        case 5:
          s = std::min(q, k);
          break;  // ecr
        case 6:
          s = (q & 1) * 2 + (k & 1);
          break;  // rc16
      }
      r |= (uint32_t(v >> (s * 8)) & 0xff) << (8 * k);
    }
    return r;
  });
}
// flags: 1 a signed, 2 b signed, 4 hi half (dp2a)
template <bool Two>
void dp(Warp& w, const Op& o, uint32_t m) {
  auto* d = w.r<uint32_t>(o.dst);
  auto *a = w.r<uint32_t>(o.a), *b = w.r<uint32_t>(o.b), *c = w.r<uint32_t>(o.c);
  bool sa = o.flags & 1, sb = o.flags & 2, hi = o.flags & 4;
  auto byte = [](uint32_t v, int k, bool s) {
    uint8_t x = uint8_t(v >> (8 * k));
    return s ? int32_t(int8_t(x)) : int32_t(x);
  };
  each_active(d, m, [&](int i) {
    int32_t r = int32_t(c[i]);
    if (Two)
      for (int k = 0; k < 2; ++k) {
        uint16_t x = uint16_t(a[i] >> (16 * k));
        r = int32_t(uint32_t(r) + uint32_t((sa ? int32_t(int16_t(x)) : int32_t(x)) * byte(b[i], k + (hi ? 2 : 0), sb)));
      }
    else
      for (int k = 0; k < 4; ++k) r = int32_t(uint32_t(r) + uint32_t(byte(a[i], k, sa) * byte(b[i], k, sb)));
    return uint32_t(r);
  });
}

void fns(Warp& w, const Op& o, uint32_t m) {
  auto* d = w.r<uint32_t>(o.dst);
  auto *a = w.r<uint32_t>(o.a), *b = w.r<uint32_t>(o.b);
  auto* c = w.r<int32_t>(o.c);
  each_active(d, m, [&](int i) -> uint32_t {
    uint32_t mask = a[i], base = b[i];
    int32_t off = c[i];
    if (off == 0) return base < 32 && (mask >> base & 1) ? base : NONE;
    int step = off > 0 ? 1 : -1;
    int count = std::abs(off);
    for (int pos = int(base); pos >= 0 && pos < 32; pos += step)
      if (mask >> pos & 1)
        if (--count == 0) return uint32_t(pos);
    return NONE;
  });
}
template <bool Wrap>
void bmsk(Warp& w, const Op& o, uint32_t m) {
  auto* d = w.r<uint32_t>(o.dst);
  auto *a = w.r<uint32_t>(o.a), *b = w.r<uint32_t>(o.b);
  each_active(d, m, [&](int i) -> uint32_t {
    uint32_t x = a[i], n = b[i];
    if (Wrap) {
      x &= 31;
      n &= 31;
    }
    uint32_t mask = n >= 32 ? FULL : (1u << n) - 1;
    return x >= 32 ? 0 : mask << x;
  });
}
template <bool Signed, bool Wrap>
void szext(Warp& w, const Op& o, uint32_t m) {
  auto* d = w.r<uint32_t>(o.dst);
  auto *a = w.r<uint32_t>(o.a), *b = w.r<uint32_t>(o.b);
  each_active(d, m, [&](int i) -> uint32_t {
    uint32_t n = Wrap ? b[i] & 31 : b[i];
    if (n >= 32) return a[i];
    if (n == 0) return 0;
    uint32_t mask = (1u << n) - 1, v = a[i] & mask;
    return Signed && (v >> (n - 1) & 1) ? v | ~mask : v;
  });
}

template <class F>
bool sel_logic(Decoder& d, const AInstr& in, Op& op) {
  Ty t = last_type(in);
  if (t == Ty::pred) {
    bool na, nb;
    op.dst = d.pred_dst(in.ops[0]);
    op.a = d.pred(in.ops[1], &na);
    op.b = d.pred(in.ops[2], &nb);
    op.flags = uint32_t(na) | uint32_t(nb) << 1;
    return done(op, pred2<F>);
  }
  return sel_plain<F, 2>(d, in, op);
}
bool sel_not(Decoder& d, const AInstr& in, Op& op) {
  if (last_type(in) == Ty::pred) {
    bool n;
    op.dst = d.pred_dst(in.ops[0]);
    op.a = d.pred(in.ops[1], &n);
    op.flags = n;
    return done(op, pred_not);
  }
  return sel_plain<Not, 1>(d, in, op);
}
bool sel_lop3(Decoder& d, const AInstr& in, Op& op) {
  bool with_pred = in.ops.size() == 6;
  const AOperand& to = with_pred && in.ops[0].kind == AOperand::pair ? in.ops[0].elems[0] : in.ops[0];
  op.dst = d.dst(to, 4);
  for (int i = 0; i < 3; ++i) (i == 0 ? op.a : i == 1 ? op.b : op.c) = d.src(in.ops[i + 1], Ty::b32);
  if (in.ops.size() < 5 || in.ops[4].kind != AOperand::num) return false;
  Handler h = lop3_table(int(in.ops[4].imm), std::make_integer_sequence<int, 256>());
  if (!with_pred) return done(op, h);
  bool neg;
  op.dst2 = d.pred_dst(in.ops[0].elems[1]);
  op.d = d.pred(in.ops[5], &neg);
  op.flags = neg;
  op.size = has(in, "and") ? 1 : 0;
  op.imm = reinterpret_cast<int64_t>(h);
  return done(op, lop3_pred);
}
bool sel_shift(Decoder& d, const AInstr& in, Op& op) {
  Ty t = last_type(in);
  bool left = in.mods[0] == "shl";
  op.dst = d.dst(in.ops[0], ty_size(t));
  op.a = d.src(in.ops[1], t);
  op.b = d.src(in.ops[2], 4);
  switch (t) {
    case Ty::b16:
    case Ty::u16:
      return done(op, left ? shift<uint16_t, true> : shift<uint16_t, false>);
    case Ty::s16:
      return done(op, left ? shift<uint16_t, true> : shift<int16_t, false>);
    case Ty::b32:
    case Ty::u32:
      return done(op, left ? shift<uint32_t, true> : shift<uint32_t, false>);
    case Ty::s32:
      return done(op, left ? shift<uint32_t, true> : shift<int32_t, false>);
    case Ty::b64:
    case Ty::u64:
      return done(op, left ? shift<uint64_t, true> : shift<uint64_t, false>);
    case Ty::s64:
      return done(op, left ? shift<uint64_t, true> : shift<int64_t, false>);
    default:
      return false;
  }
}
bool sel_shf(Decoder& d, const AInstr& in, Op& op) {
  if (!operands(d, in, op, Ty::b32, 3)) return false;
  bool l = has(in, "l"), wr = has(in, "wrap");
  return done(op, l ? (wr ? shf<true, true> : shf<true, false>) : (wr ? shf<false, true> : shf<false, false>));
}
bool sel_bits(Decoder& d, const AInstr& in, Op& op) {  // popc clz bfind brev
  Ty t = last_type(in);
  auto n = in.mods[0];
  if (n == "brev") return sel_plain<Brev, 1>(d, in, op);
  op.dst = d.dst(in.ops[0], 4);
  op.a = d.src(in.ops[1], t);
  if (n == "popc") return done(op, PICK_INT(h1_32, Popc, t));
  if (n == "clz") return done(op, PICK_INT(h1_32, Clz, t));
  return done(op, has(in, "shiftamt") ? PICK_INT(h1_32, BfindShift, t) : PICK_INT(h1_32, Bfind, t));
}
bool sel_bfe(Decoder& d, const AInstr& in, Op& op) {
  Ty t = last_type(in);
  op.dst = d.dst(in.ops[0], ty_size(t));
  op.a = d.src(in.ops[1], t);
  op.b = d.src(in.ops[2], 4);
  op.c = d.src(in.ops[3], 4);
  switch (t) {
    case Ty::u32:
      return done(op, bfe<uint32_t>);
    case Ty::s32:
      return done(op, bfe<int32_t>);
    case Ty::u64:
      return done(op, bfe<uint64_t>);
    case Ty::s64:
      return done(op, bfe<int64_t>);
    default:
      return false;
  }
}
bool sel_bfi(Decoder& d, const AInstr& in, Op& op) {
  Ty t = last_type(in);
  op.dst = d.dst(in.ops[0], ty_size(t));
  op.a = d.src(in.ops[1], t);
  op.b = d.src(in.ops[2], t);
  op.c = d.src(in.ops[3], 4);
  op.d = d.src(in.ops[4], 4);
  return done(op, t == Ty::b32 ? bfi<uint32_t> : t == Ty::b64 ? bfi<uint64_t> : nullptr);
}
bool sel_prmt(Decoder& d, const AInstr& in, Op& op) {
  if (!operands(d, in, op, Ty::b32, 3)) return false;
  static const char* modes[] = {"", "f4e", "b4e", "rc8", "ecl", "ecr", "rc16"};
  for (uint32_t i = 1; i < 7; ++i)
    if (has(in, modes[i])) op.flags = i;
  return done(op, prmt);
}
bool sel_dp(Decoder& d, const AInstr& in, Op& op) {
  if (!operands(d, in, op, Ty::b32, 3)) return false;
  op.flags =
      uint32_t(first_type(in) == Ty::s32) | uint32_t(first_type(in, 1) == Ty::s32) << 1 | uint32_t(has(in, "hi")) << 2;
  return done(op, in.mods[0] == "dp2a" ? dp<true> : dp<false>);
}

}  // namespace

void register_bits(SelectorMap& m) {
  m["and"] = sel_logic<And>;
  m["or"] = sel_logic<Or>;
  m["xor"] = sel_logic<Xor>;
  m["not"] = sel_not;
  m["cnot"] = sel_plain<Cnot, 1>;
  m["lop3"] = sel_lop3;
  m["shl"] = m["shr"] = sel_shift;
  m["shf"] = sel_shf;
  m["popc"] = m["clz"] = m["bfind"] = m["brev"] = sel_bits;
  m["bfe"] = sel_bfe;
  m["bfi"] = sel_bfi;
  m["prmt"] = sel_prmt;
  m["dp4a"] = m["dp2a"] = sel_dp;
  m["fns"] = [](Decoder& d, const AInstr& in, Op& op) { return operands(d, in, op, Ty::b32, 3) && done(op, fns); };
  m["bmsk"] = [](Decoder& d, const AInstr& in, Op& op) {
    return operands(d, in, op, Ty::b32, 2) && done(op, has(in, "wrap") ? bmsk<true> : bmsk<false>);
  };
  m["szext"] = [](Decoder& d, const AInstr& in, Op& op) {
    if (!operands(d, in, op, Ty::b32, 2)) return false;
    bool s = last_type(in) == Ty::s32, wr = has(in, "wrap");
    return done(op,
                s ? (wr ? szext<true, true> : szext<true, false>) : (wr ? szext<false, true> : szext<false, false>));
  };
}

}  // namespace cudasim
