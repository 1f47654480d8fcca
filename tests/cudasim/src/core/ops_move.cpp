// Moves, packing and unpacking.
#include "select.h"

namespace cudasim {

namespace {

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

}  // namespace

void register_move(SelectorMap& m) { m["mov"] = sel_mov; }

}  // namespace cudasim
