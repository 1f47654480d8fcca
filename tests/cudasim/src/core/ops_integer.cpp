// Integer, logic, shift, bit-field, comparison and move instructions.
#include <algorithm>
#include <utility>

#include "numeric.h"
#include "select.h"

namespace cudasim {
namespace {

template <class T>
using U = std::make_unsigned_t<T>;
template <class T>
constexpr int width = int(sizeof(T) * 8);
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

// --- select and compare ---------------------------------------------------------------------------------

template <class T>
void selp(Warp& w, const Op& o, uint32_t m) {
  T* d = w.r<T>(o.dst);
  const T *a = w.r<T>(o.a), *b = w.r<T>(o.b);
  uint32_t p = w.p(o.c) ^ (o.flags & 1 ? FULL : 0);
  each(d, m, [&](int i) { return (p >> i & 1) ? a[i] : b[i]; });
}
void selp_pred(Warp& w, const Op& o, uint32_t m) {
  uint32_t p = w.p(o.c) ^ (o.flags & 1 ? FULL : 0);
  uint32_t r = (w.p(o.a) & p) | (w.p(o.b) & ~p);
  w.p(o.dst) = (w.p(o.dst) & ~m) | (r & m);
}
template <class T, class C>
void slct(Warp& w, const Op& o, uint32_t m) {
  T* d = w.r<T>(o.dst);
  const T *a = w.r<T>(o.a), *b = w.r<T>(o.b);
  const C* c = w.r<C>(o.c);
  each(d, m, [&](int i) { return c[i] >= 0 ? a[i] : b[i]; });
}

template <class T, Cmp C>
uint32_t cmp_mask(const T* a, const T* b) {
  return mask_of([&](int i) { return compare<T>(C, a[i], b[i]); });
}
template <class T, Cmp C>
uint32_t cmp_ftz(const T* a, const T* b) {
  float x[32], y[32];
  FOR_LANES {
    x[i] = ftz(float(a[i]));
    y[i] = ftz(float(b[i]));
  }
  return cmp_mask<float, C>(x, y);
}

// flags: 1 negate c, 2..3 bool op (0 none, 1 and, 2 or, 3 xor)
inline void store_pred(Warp& w, const Op& o, uint32_t m, uint32_t r) {
  uint32_t q = ~r;
  if (uint32_t bop = o.flags >> 1 & 3) {
    uint32_t c = w.p(o.c) ^ (o.flags & 1 ? FULL : 0);
    r = bop == 1 ? r & c : bop == 2 ? r | c : r ^ c;
    q = bop == 1 ? q & c : bop == 2 ? q | c : q ^ c;
  }
  w.p(o.dst) = (w.p(o.dst) & ~m) | (r & m);
  if (o.dst2) w.p(o.dst2) = (w.p(o.dst2) & ~m) | (q & m);
}
template <class T, Cmp C>
struct SetpPlain {
  static void run(Warp& w, const Op& o, uint32_t m) { store_pred(w, o, m, cmp_mask<T, C>(w.r<T>(o.a), w.r<T>(o.b))); }
};
template <class T, Cmp C>
struct SetpFtz {
  static void run(Warp& w, const Op& o, uint32_t m) { store_pred(w, o, m, cmp_ftz<T, C>(w.r<T>(o.a), w.r<T>(o.b))); }
};
// set: destination is u32/s32 (-1/0), f32 (1.0/0) or 16-bit; o.size holds which
inline void store_set(Warp& w, const Op& o, uint32_t m, uint32_t r) {
  if (uint32_t bop = o.flags >> 1 & 3) {
    uint32_t c = w.p(o.c) ^ (o.flags & 1 ? FULL : 0);
    r = bop == 1 ? r & c : bop == 2 ? r | c : r ^ c;
  }
  if (o.size == 2) {
    auto* d = w.r<uint16_t>(o.dst);
    uint16_t one = uint16_t(o.imm);
    each(d, m, [&](int i) -> uint16_t { return (r >> i & 1) ? one : 0; });
  } else {
    auto* d = w.r<uint32_t>(o.dst);
    uint32_t one = uint32_t(o.imm);
    each(d, m, [&](int i) { return (r >> i & 1) ? one : 0u; });
  }
}
template <class T, Cmp C>
struct SetPlain {
  static void run(Warp& w, const Op& o, uint32_t m) { store_set(w, o, m, cmp_mask<T, C>(w.r<T>(o.a), w.r<T>(o.b))); }
};
template <class T, Cmp C>
struct SetFtz {
  static void run(Warp& w, const Op& o, uint32_t m) { store_set(w, o, m, cmp_ftz<T, C>(w.r<T>(o.a), w.r<T>(o.b))); }
};

template <template <class, Cmp> class H, class T>
Handler by_cmp(Cmp c) {
  switch (c) {
    case EQ:
      return H<T, EQ>::run;
    case NE:
      return H<T, NE>::run;
    case LT:
      return H<T, LT>::run;
    case LE:
      return H<T, LE>::run;
    case GT:
      return H<T, GT>::run;
    case GE:
      return H<T, GE>::run;
    default:
      break;
  }
  if constexpr (std::is_floating_point_v<T>) switch (c) {
      case EQU:
        return H<T, EQU>::run;
      case NEU:
        return H<T, NEU>::run;
      case LTU:
        return H<T, LTU>::run;
      case LEU:
        return H<T, LEU>::run;
      case GTU:
        return H<T, GTU>::run;
      case GEU:
        return H<T, GEU>::run;
      case NUM:
        return H<T, NUM>::run;
      case NAN_:
        return H<T, NAN_>::run;
      default:
        break;
    }
  return nullptr;
}
template <template <class, Cmp> class H, template <class, Cmp> class HF>
Handler by_type_cmp(Ty t, Cmp c, bool uns, bool flush) {
  switch (t) {
    case Ty::b16:
    case Ty::u16:
      return by_cmp<H, uint16_t>(c);
    case Ty::s16:
      return uns ? by_cmp<H, uint16_t>(c) : by_cmp<H, int16_t>(c);
    case Ty::b32:
    case Ty::u32:
      return by_cmp<H, uint32_t>(c);
    case Ty::s32:
      return uns ? by_cmp<H, uint32_t>(c) : by_cmp<H, int32_t>(c);
    case Ty::b64:
    case Ty::u64:
      return by_cmp<H, uint64_t>(c);
    case Ty::s64:
      return uns ? by_cmp<H, uint64_t>(c) : by_cmp<H, int64_t>(c);
    case Ty::f32:
      return flush ? by_cmp<HF, float>(c) : by_cmp<H, float>(c);
    case Ty::f64:
      return by_cmp<H, double>(c);
    default:
      return nullptr;
  }
}

// Half-precision comparisons: widen, then compare as floats. imm = Cmp, size2: 1 bf16, 2 packed.
uint32_t half_cmp(Cmp c, const float* x, const float* y) {
  uint32_t r = 0;
  for (int i = 0; i < 32; ++i) r |= uint32_t(compare<float>(c, x[i], y[i])) << i;
  return r;
}
void widen(Warp& w, uint32_t off, bool bf, bool packed, bool high, float* out) {
  for (int i = 0; i < 32; ++i) {
    uint16_t h = packed ? uint16_t(w.r<uint32_t>(off)[i] >> (high ? 16 : 0)) : w.r<uint16_t>(off)[i];
    out[i] = bf ? bf16_to_f32(h) : f16_to_f32(h);
  }
}
void setp_half(Warp& w, const Op& o, uint32_t m) {
  float x[32], y[32];
  bool bf = o.size2 & 1, packed = o.size2 & 2;
  widen(w, o.a, bf, packed, false, x);
  widen(w, o.b, bf, packed, false, y);
  uint32_t lo = half_cmp(Cmp(o.imm), x, y);
  if (!packed) {
    store_pred(w, o, m, lo);
    return;
  }
  widen(w, o.a, bf, true, true, x);
  widen(w, o.b, bf, true, true, y);
  uint32_t hi = half_cmp(Cmp(o.imm), x, y);
  if (uint32_t bop = o.flags >> 1 & 3) {
    uint32_t c = w.p(o.c) ^ (o.flags & 1 ? FULL : 0);
    lo = bop == 1 ? lo & c : bop == 2 ? lo | c : lo ^ c;
    hi = bop == 1 ? hi & c : bop == 2 ? hi | c : hi ^ c;
  }
  w.p(o.dst) = (w.p(o.dst) & ~m) | (lo & m);
  w.p(o.dst2) = (w.p(o.dst2) & ~m) | (hi & m);
}
// set.cmp.{f16,f16x2,u32,...}.{f16,f16x2,...}: ext n = {cmp, packed result kind, one-value}
void set_half(Warp& w, const Op& o, uint32_t m) {
  float x[32], y[32];
  bool bf = o.size2 & 1, packed = o.size2 & 2;
  Cmp c = Cmp(o.ext->n[0]);
  uint32_t r[2] = {0, 0};
  for (int h = 0; h < (packed ? 2 : 1); ++h) {
    widen(w, o.a, bf, packed, h, x);
    widen(w, o.b, bf, packed, h, y);
    r[h] = half_cmp(c, x, y);
    if (uint32_t bop = o.flags >> 1 & 3) {
      uint32_t q = w.p(o.c) ^ (o.flags & 1 ? FULL : 0);
      r[h] = bop == 1 ? r[h] & q : bop == 2 ? r[h] | q : r[h] ^ q;
    }
  }
  uint32_t one = uint32_t(o.ext->n[1]);
  if (!packed) {
    if (o.size == 2) {
      auto* d = w.r<uint16_t>(o.dst);
      each(d, m, [&](int i) -> uint16_t { return (r[0] >> i & 1) ? uint16_t(one) : 0; });
    } else {
      auto* d = w.r<uint32_t>(o.dst);
      each(d, m, [&](int i) { return (r[0] >> i & 1) ? one : 0u; });
    }
  } else {
    auto* d = w.r<uint32_t>(o.dst);
    each(d, m, [&](int i) {
      return ((r[0] >> i & 1) ? (one & 0xffff) : 0u) | ((r[1] >> i & 1) ? (one & 0xffff) << 16 : 0u);
    });
  }
}

// --- moves --------------------------------------------------------------------------------------------------

template <class T>
void mov(Warp& w, const Op& o, uint32_t m) {
  T* d = w.r<T>(o.dst);
  const T* a = w.r<T>(o.a);
  each(d, m, [&](int i) { return a[i]; });
}
void mov128(Warp& w, const Op& o, uint32_t m) {
  auto* d = w.r<uint64_t>(o.dst);
  auto* a = w.r<uint64_t>(o.a);
  for (uint32_t t = m; t; t &= t - 1) {
    int i = __builtin_ctz(t);
    d[2 * i] = a[2 * i];
    d[2 * i + 1] = a[2 * i + 1];
  }
}
void mov_pred(Warp& w, const Op& o, uint32_t m) {
  uint32_t a = w.p(o.a) ^ (o.flags & 1 ? FULL : 0);
  w.p(o.dst) = (w.p(o.dst) & ~m) | (a & m);
}
void mov_clock(Warp& w, const Op& o, uint32_t m) {
  uint64_t t = 0;
  switch (Special(o.imm)) {
    case Special::clock:
    case Special::clock64:
      t = w.blk->group->executed * 8 + uint64_t(w.pc);
      t += w.wk->count.threads / 4;
      break;
    case Special::clock_hi:
      t = w.wk->count.threads >> 34;
      break;
    default: {
      timespec ts;
      clock_gettime(CLOCK_REALTIME, &ts);
      t = uint64_t(ts.tv_sec) * 1000000000ull + uint64_t(ts.tv_nsec);
      if (Special(o.imm) == Special::globaltimer_hi) t >>= 32;
    }
  }
  if (o.size == 8)
    each(w.r<uint64_t>(o.dst), m, [&](int) { return t; });
  else
    each(w.r<uint32_t>(o.dst), m, [&](int) { return uint32_t(t); });
}
template <class D, class E, int N, int Bits>
void pack(Warp& w, const Op& o, uint32_t m) {
  D* d = w.r<D>(o.dst);
  const E* e[N];
  for (int k = 0; k < N; ++k) e[k] = w.r<E>(o.ext->v[0][k]);
  each(d, m, [&](int i) {
    D r = 0;
    for (int k = 0; k < N; ++k)
      r |= D(D(e[k][i]) & (Bits == 64 ? ~D(0) : D((1ull << (Bits & 63)) - 1))) << (k * Bits % (8 * sizeof(D)));
    return r;
  });
}
template <class D, class E, int N, int Bits>
void unpack(Warp& w, const Op& o, uint32_t m) {
  D a[32];
  memcpy(a, w.r<D>(o.a), sizeof a);
  for (int k = 0; k < N; ++k) {
    E* d = w.r<E>(o.ext->v[0][k]);
    each(d, m, [&](int i) { return E(D(a[i] >> (k * Bits)) & (Bits == 64 ? ~D(0) : D((1ull << (Bits & 63)) - 1))); });
  }
}
void pack128(Warp& w, const Op& o, uint32_t m) {
  auto* d = w.r<uint64_t>(o.dst);
  auto *a = w.r<uint64_t>(o.ext->v[0][0]), *b = w.r<uint64_t>(o.ext->v[0][1]);
  for (uint32_t t = m; t; t &= t - 1) {
    int i = __builtin_ctz(t);
    d[2 * i] = a[i];
    d[2 * i + 1] = b[i];
  }
}
void unpack128(Warp& w, const Op& o, uint32_t m) {
  auto* a = w.r<uint64_t>(o.a);
  auto *d = w.r<uint64_t>(o.ext->v[0][0]), *e = w.r<uint64_t>(o.ext->v[0][1]);
  for (uint32_t t = m; t; t &= t - 1) {
    int i = __builtin_ctz(t);
    d[i] = a[2 * i];
    e[i] = a[2 * i + 1];
  }
}

bool sel_mov(Decoder& d, const AInstr& in, Op& op) {
  Ty t = last_type(in);
  int size = ty_size(t);
  op.cls = C_integer;
  if (in.ops.size() != 2) return false;
  const AOperand &to = in.ops[0], &from = in.ops[1];
  if (t == Ty::pred) {
    bool neg;
    op.dst = d.pred_dst(to);
    op.a = d.pred(from, &neg);
    op.flags = neg;
    return done(op, mov_pred);
  }
  if (from.kind == AOperand::special) {
    Special s;
    int sz;
    if (!d.is_special(from.name, &s, &sz))
      throw Decoder::Unsupported{"unknown special register " + std::string(from.name)};
    if (s >= Special::clock && s <= Special::globaltimer_hi) {
      op.imm = int(s);
      op.size = uint8_t(size);
      op.dst = d.dst(to, size);
      return done(op, mov_clock);
    }
  }
  if (from.kind == AOperand::vec || to.kind == AOperand::vec) {
    bool packing = from.kind == AOperand::vec;
    const AOperand& v = packing ? from : to;
    int n = int(v.elems.size());
    if (n == 1) {  // {%r} is just %r
      op.dst = d.dst(packing ? to : v.elems[0], size);
      op.a = d.src(packing ? v.elems[0] : from, size);
    } else {
      int each_bytes = size / n;
      OpExt& e = d.ext(op);
      for (auto& x : v.elems) e.v[0].push_back(packing ? d.src(x, each_bytes) : d.dst(x, each_bytes));
      if (packing)
        op.dst = d.dst(to, size);
      else
        op.a = d.src(from, size);
      if (size == 4 && n == 2)
        return done(op, packing ? pack<uint32_t, uint16_t, 2, 16> : unpack<uint32_t, uint16_t, 2, 16>);
      if (size == 8 && n == 2)
        return done(op, packing ? pack<uint64_t, uint32_t, 2, 32> : unpack<uint64_t, uint32_t, 2, 32>);
      if (size == 8 && n == 4)
        return done(op, packing ? pack<uint64_t, uint16_t, 4, 16> : unpack<uint64_t, uint16_t, 4, 16>);
      if (size == 4 && n == 4)
        return done(op, packing ? pack<uint32_t, uint16_t, 4, 8> : unpack<uint32_t, uint16_t, 4, 8>);
      if (size == 8 && n == 8)
        return done(op, packing ? pack<uint64_t, uint16_t, 8, 8> : unpack<uint64_t, uint16_t, 8, 8>);
      if (size == 2 && n == 2)
        return done(op, packing ? pack<uint16_t, uint16_t, 2, 8> : unpack<uint16_t, uint16_t, 2, 8>);
      if (size == 16 && n == 2) return done(op, packing ? pack128 : unpack128);
      return false;
    }
  } else {
    op.dst = d.dst(to, size);
    op.a = d.src(from, t);
  }
  switch (size) {
    case 2:
      return done(op, mov<uint16_t>);
    case 4:
      return done(op, mov<uint32_t>);
    case 8:
      return done(op, mov<uint64_t>);
    case 16:
      return done(op, mov128);
    default:
      return false;
  }
}

// --- selectors ------------------------------------------------------------------------------------------------

template <class F, int N>
bool sel_plain(Decoder& d, const AInstr& in, Op& op) {
  Ty t = last_type(in);
  if (!operands(d, in, op, t, N)) return false;
  if constexpr (N == 1)
    return done(op, PICK_INT(h1, F, t));
  else if constexpr (N == 2)
    return done(op, PICK_INT(h2, F, t));
  else
    return done(op, PICK_INT(h3, F, t));
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

bool sel_selp(Decoder& d, const AInstr& in, Op& op) {
  Ty t = last_type(in);
  bool neg;
  if (t == Ty::pred) {
    bool x;
    op.dst = d.pred_dst(in.ops[0]);
    op.a = d.pred(in.ops[1], &x);
    op.b = d.pred(in.ops[2], &x);
    op.c = d.pred(in.ops[3], &neg);
    op.flags = neg;
    return done(op, selp_pred);
  }
  op.dst = d.dst(in.ops[0], ty_size(t));
  op.a = d.src(in.ops[1], t);
  op.b = d.src(in.ops[2], t);
  op.c = d.pred(in.ops[3], &neg);
  op.flags = neg;
  switch (ty_size(t)) {
    case 2:
      return done(op, selp<uint16_t>);
    case 4:
      return done(op, selp<uint32_t>);
    case 8:
      return done(op, selp<uint64_t>);
    default:
      return false;
  }
}
bool sel_slct(Decoder& d, const AInstr& in, Op& op) {
  Ty t = first_type(in), c = last_type(in);
  op.dst = d.dst(in.ops[0], ty_size(t));
  op.a = d.src(in.ops[1], t);
  op.b = d.src(in.ops[2], t);
  op.c = d.src(in.ops[3], c);
  bool f = c == Ty::f32;
  switch (ty_size(t)) {
    case 2:
      return done(op, f ? slct<uint16_t, float> : slct<uint16_t, int32_t>);
    case 4:
      return done(op, f ? slct<uint32_t, float> : slct<uint32_t, int32_t>);
    case 8:
      return done(op, f ? slct<uint64_t, float> : slct<uint64_t, int32_t>);
    default:
      return false;
  }
}

bool sel_setp(Decoder& d, const AInstr& in, Op& op) {
  bool is_setp = in.mods[0] == "setp";
  Ty t = last_type(in);
  Cmp c = EQ;
  bool uns = false, found = false;
  for (size_t i = 1; i < in.mods.size() && !found; ++i) found = parse_cmp(in.mods[i], &c, &uns);
  if (!found) return false;
  uint32_t bop = has(in, "and") ? 1 : has(in, "or") ? 2 : has(in, "xor") ? 3 : 0;
  size_t want = bop ? 4 : 3;
  if (in.ops.size() != want) return false;
  if (uns && ty_float(t)) {
    c = c == LT ? LTU : c == LE ? LEU : c == GT ? GTU : c;
  }
  op.a = d.src(in.ops[1], t);
  op.b = d.src(in.ops[2], t);
  bool neg = false;
  if (bop) op.c = d.pred(in.ops[3], &neg);
  op.flags = uint32_t(neg) | bop << 1;
  if (is_setp) {
    const AOperand& o = in.ops[0];
    bool two = o.kind == AOperand::pair;
    op.dst = d.pred_dst(two ? o.elems[0] : o);
    if (two) op.dst2 = d.pred_dst(o.elems[1]);
    if (is_half(t)) {
      op.imm = c;
      op.size2 = uint8_t((t == Ty::bf16 || t == Ty::bf16x2 ? 1 : 0) | (t == Ty::f16x2 || t == Ty::bf16x2 ? 2 : 0));
      if (op.size2 & 2 && !two) return false;
      return done(op, setp_half);
    }
    return done(op, by_type_cmp<SetpPlain, SetpFtz>(t, c, uns, has(in, "ftz")));
  }
  Ty r = first_type(in);
  op.size = uint8_t(ty_size(r));
  op.dst = d.dst(in.ops[0], op.size);
  uint32_t one = r == Ty::f32                       ? 0x3f800000u
                 : r == Ty::f16 || r == Ty::f16x2   ? 0x3c00u
                 : r == Ty::bf16 || r == Ty::bf16x2 ? 0x3f80u
                                                    : FULL;
  op.imm = one;
  if (is_half(t)) {
    op.size2 = uint8_t((t == Ty::bf16 || t == Ty::bf16x2 ? 1 : 0) | (t == Ty::f16x2 || t == Ty::bf16x2 ? 2 : 0));
    OpExt& e = d.ext(op);
    e.n = {c, one};
    return done(op, set_half);
  }
  return done(op, by_type_cmp<SetPlain, SetFtz>(t, c, uns, has(in, "ftz")));
}

}  // namespace

bool parse_cmp(std::string_view s, Cmp* c, bool* uns) {
  struct E {
    const char* n;
    Cmp c;
    bool u;
  };
  static const E t[] = {{"eq", EQ, false},   {"ne", NE, false},   {"lt", LT, false},   {"le", LE, false},
                        {"gt", GT, false},   {"ge", GE, false},   {"lo", LT, true},    {"ls", LE, true},
                        {"hi", GT, true},    {"hs", GE, true},    {"equ", EQU, false}, {"neu", NEU, false},
                        {"ltu", LTU, false}, {"leu", LEU, false}, {"gtu", GTU, false}, {"geu", GEU, false},
                        {"num", NUM, false}, {"nan", NAN_, false}};
  for (auto& e : t)
    if (s == e.n) {
      *c = e.c;
      *uns = e.u;
      return true;
    }
  return false;
}

void register_integer(SelectorMap& m) {
  m["add"] = m["sub"] = m["addc"] = m["subc"] = sel_addsub;
  m["mul"] = sel_mul;
  m["mad"] = m["madc"] = sel_mad;
  m["mul24"] = m["mad24"] = sel_24;
  m["sad"] = sel_plain<Sad, 3>;
  m["div"] = m["rem"] = sel_div;
  m["abs"] = m["neg"] = sel_absneg;
  m["min"] = m["max"] = sel_minmax;
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
  m["selp"] = sel_selp;
  m["slct"] = sel_slct;
  m["setp"] = m["set"] = sel_setp;
  m["mov"] = sel_mov;
}

}  // namespace cudasim
