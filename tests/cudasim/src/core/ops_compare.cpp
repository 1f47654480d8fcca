// Selection and comparison.
#include "numeric.h"
#include "select.h"

namespace cudasim {

namespace {

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

void register_compare(SelectorMap& m) {
  m["selp"] = sel_selp;
  m["slct"] = sel_slct;
  m["setp"] = m["set"] = sel_setp;
}

}  // namespace cudasim
