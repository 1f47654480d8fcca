// Instructions in which the lanes of a warp exchange data: shfl, vote, match, redux, elect,
// activemask and bar.warp.sync. Lanes wait for every live lane of their membermask.
#include "collective.h"
#include "numeric.h"
#include "select.h"
#include "shadow.h"

namespace cudasim {

void collective_wait(Warp& w, uint32_t wait) {
  w.block_lanes(wait, Wait::warp);
  // Mates that wait at this instruction join when it is executed again: a group that arrived by a backward branch has
  // not passed them.
  for (uint32_t t = w.live & w.blocked & ~wait; t; t &= t - 1) {
    int l = __builtin_ctz(t);
    if (w.wait[l] == Wait::warp && w.lane_pc[l] == w.pc - 1 && w.lane_frame[l] == w.frame) w.blocked &= ~(1u << l);
  }
  w.park(w.active & ~wait, w.pc);
  w.ev |= EV_RESCHED | EV_PARKED;
}

namespace {

// Runs f(group) for every set of lanes that share a membermask and have all arrived.
template <class F>
void collective(Warp& w, uint32_t m, const uint32_t* masks, F f) {
  uint32_t wait = 0;
  for (uint32_t left = m; left;) {
    int l = __builtin_ctz(left);
    uint32_t mask = masks[l], same = 0;
    for (uint32_t t = left; t; t &= t - 1) {
      int k = __builtin_ctz(t);
      same |= uint32_t(masks[k] == mask) << k;
    }
    left &= ~same;
    if (same & ~mask)
      fault(Fault::trap, __builtin_ctz(same & ~mask), "lane is not named in its own membermask " + hex(mask));
    if ((mask & w.live) & ~same) {
      wait |= same;
      continue;
    }
    f(same);
  }
  if (wait) {
    for (uint32_t t = wait; t; t &= t - 1) w.need[__builtin_ctz(t)] = masks[__builtin_ctz(t)];
    collective_wait(w, wait);
  }
}

template <int Mode>
void shfl_group(Warp& w, const Op& o, uint32_t g) {
  uint32_t* d = w.r<uint32_t>(o.dst);
  const uint32_t *a = w.r<uint32_t>(o.a), *b = w.r<uint32_t>(o.b), *c = w.r<uint32_t>(o.c);
  uint32_t src[32], ok = 0;
  alignas(32) uint32_t out[32];
  for (uint32_t l = 0; l < 32; ++l) {
    uint32_t bv = b[l] & 31, clamp = c[l] & 31, seg = c[l] >> 8 & 31;
    uint32_t hi = (l & seg) | (clamp & ~seg), lo = l & seg;
    int j;
    bool p;
    if (Mode == 0) {
      j = int(l) - int(bv);
      p = j >= int(hi);
    } else if (Mode == 1) {
      j = int(l + bv);
      p = j <= int(hi);
    } else if (Mode == 2) {
      j = int(l ^ bv);
      p = j <= int(hi);
    } else {
      j = int(lo | (bv & ~seg));
      p = j <= int(hi);
    }
    if (!p) j = int(l);
    src[l] = uint32_t(j) & 31;
    ok |= uint32_t(p) << l;
  }
  for (int l = 0; l < 32; ++l)
    out[l] = (g >> src[l] & 1) ? a[src[l]] : 0x7fbadbadu;  // a lane that takes no part: undefined
  blend(d, out, g);
  if (o.dst2) w.p(o.dst2) = (w.p(o.dst2) & ~g) | (ok & g);
}
template <int Mode>
void shfl(Warp& w, const Op& o, uint32_t m) {
  collective(w, m, w.r<uint32_t>(o.d), [&](uint32_t g) { shfl_group<Mode>(w, o, g); });
}
template <int Mode>
void shfl_old(Warp& w, const Op& o, uint32_t m) {
  shfl_group<Mode>(w, o, m);
}

enum { V_ALL, V_ANY, V_UNI, V_BALLOT };
void vote_group(Warp& w, const Op& o, uint32_t g) {
  uint32_t p = (w.p(o.a) ^ (o.flags & 1 ? FULL : 0)) & g;
  uint32_t kind = o.flags >> 1;
  if (kind == V_BALLOT) {
    each(w.r<uint32_t>(o.dst), g, [&](int) { return p; });
    return;
  }
  bool r = kind == V_ALL ? p == g : kind == V_ANY ? p != 0 : p == g || p == 0;
  w.p(o.dst) = r ? w.p(o.dst) | g : w.p(o.dst) & ~g;
}
void vote(Warp& w, const Op& o, uint32_t m) {
  collective(w, m, w.r<uint32_t>(o.b), [&](uint32_t g) { vote_group(w, o, g); });
}

template <class T, bool All>
void match(Warp& w, const Op& o, uint32_t m) {
  collective(w, m, w.r<uint32_t>(o.b), [&](uint32_t g) {
    const T* a = w.r<T>(o.a);
    uint32_t* d = w.r<uint32_t>(o.dst);
    if (All) {
      bool same = true;
      T v = a[__builtin_ctz(g)];
      for (uint32_t t = g; t; t &= t - 1) same &= a[__builtin_ctz(t)] == v;
      each(d, g, [&](int) { return same ? g : 0u; });
      if (o.dst2) w.p(o.dst2) = same ? w.p(o.dst2) | g : w.p(o.dst2) & ~g;
    } else {
      uint32_t out[32];
      for (uint32_t t = g; t; t &= t - 1) {
        int l = __builtin_ctz(t);
        uint32_t r = 0;
        for (uint32_t u = g; u; u &= u - 1) {
          int k = __builtin_ctz(u);
          r |= uint32_t(a[k] == a[l]) << k;
        }
        out[l] = r;
      }
      each_active(d, g, [&](int i) { return out[i]; });
    }
  });
}

enum { R_ADD, R_MIN, R_MAX, R_AND, R_OR, R_XOR };
void redux(Warp& w, const Op& o, uint32_t m) {  // flags: op | signed << 4
  collective(w, m, w.r<uint32_t>(o.b), [&](uint32_t g) {
    const uint32_t* a = w.r<uint32_t>(o.a);
    uint32_t op = o.flags & 15;
    bool s = o.flags & 16;
    uint32_t r = a[__builtin_ctz(g)];
    for (uint32_t t = g & (g - 1); t; t &= t - 1) {
      uint32_t v = a[__builtin_ctz(t)];
      switch (op) {
        case R_ADD:
          r += v;
          break;
        case R_MIN:
          r = s ? uint32_t(std::min(int32_t(r), int32_t(v))) : std::min(r, v);
          break;
        case R_MAX:
          r = s ? uint32_t(std::max(int32_t(r), int32_t(v))) : std::max(r, v);
          break;
        case R_AND:
          r &= v;
          break;
        case R_OR:
          r |= v;
          break;
        case R_XOR:
          r ^= v;
          break;
      }
    }
    each(w.r<uint32_t>(o.dst), g, [&](int) { return r; });
  });
}
void redux_f32(Warp& w, const Op& o, uint32_t m) {  // flags: op | abs << 4 | NaN << 5
  collective(w, m, w.r<uint32_t>(o.b), [&](uint32_t g) {
    const float* a = w.r<float>(o.a);
    bool any_nan = false, have = false;
    float r = 0;
    for (uint32_t t = g; t; t &= t - 1) {
      float v = a[__builtin_ctz(t)];
      if (o.flags & 16) v = std::fabs(v);
      if (v != v) {
        any_nan = true;
        continue;
      }
      if (!have)
        r = v;
      else
        r = (o.flags & 15) == R_MIN ? std::min(r, v) : std::max(r, v);
      have = true;
    }
    if (!have || ((o.flags & 32) && any_nan)) r = as_float(0x7fffffffu);
    each(w.r<float>(o.dst), g, [&](int) { return r; });
  });
}

void activemask(Warp& w, const Op& o, uint32_t m) {
  each(w.r<uint32_t>(o.dst), m, [&](int) { return m; });
}

void elect(Warp& w, const Op& o, uint32_t m) {
  collective(w, m, w.r<uint32_t>(o.a), [&](uint32_t g) {
    uint32_t leader = uint32_t(__builtin_ctz(g));
    each(w.r<uint32_t>(o.dst), g, [&](int) { return leader; });
    w.p(o.dst2) = (w.p(o.dst2) & ~g) | 1u << leader;
  });
}

// Lanes may wait in different bar.warp.sync instructions for one another.
void warp_sync(Warp& w, const Op& o, uint32_t m) {
  const uint32_t* masks = w.r<uint32_t>(o.a);
  uint32_t blocked_now = 0;
  for (uint32_t left = m; left;) {
    int l = __builtin_ctz(left);
    uint32_t mask = masks[l], same = 0;
    for (uint32_t t = left; t; t &= t - 1) {
      int k = __builtin_ctz(t);
      same |= uint32_t(masks[k] == mask) << k;
    }
    left &= ~same;
    if (same & ~mask)
      fault(Fault::trap, __builtin_ctz(same & ~mask), "lane is not named in its own membermask " + hex(mask));
    uint32_t waiting = 0;
    for (uint32_t t = w.live & w.blocked & mask; t; t &= t - 1) {
      int k = __builtin_ctz(t);
      if (w.wait[k] == Wait::warp_bar && w.need[k] == mask) waiting |= 1u << k;
    }
    if ((mask & w.live) & ~(same | waiting)) {
      for (uint32_t t = same; t; t &= t - 1) w.need[__builtin_ctz(t)] = mask;
      blocked_now |= same;
      continue;
    }
    note_syncwarp(w, same | waiting);
    for (uint32_t t = waiting; t; t &= t - 1) {
      int k = __builtin_ctz(t);
      w.lane_pc[k]++;
      w.wait[k] = Wait::none;
    }
    w.blocked &= ~waiting;
    if (waiting) {
      w.park(w.active & ~blocked_now, w.pc);
      w.ev |= EV_RESCHED | EV_PARKED;
    }
  }
  if (blocked_now) {
    w.block_lanes(blocked_now, Wait::warp_bar);
    w.park(w.active & ~blocked_now, w.pc);
    w.ev |= EV_RESCHED | EV_PARKED;
  }
}

bool sel_shfl(Decoder& d, const AInstr& in, Op& op) {
  op.cls = C_shuffle;
  bool sync = has(in, "sync");
  const AOperand& o = in.ops[0];
  op.dst = d.dst(o.kind == AOperand::pair ? o.elems[0] : o, 4);
  if (o.kind == AOperand::pair) op.dst2 = d.pred_dst(o.elems[1]);
  op.a = d.src(in.ops[1], 4);
  op.b = d.src(in.ops[2], 4);
  op.c = d.src(in.ops[3], 4);
  if (sync) op.d = d.src(in.ops[4], 4);
  int mode = has(in, "up") ? 0 : has(in, "down") ? 1 : has(in, "bfly") ? 2 : 3;
  static const Handler s[] = {shfl<0>, shfl<1>, shfl<2>, shfl<3>},
                       u[] = {shfl_old<0>, shfl_old<1>, shfl_old<2>, shfl_old<3>};
  return done(op, sync ? s[mode] : u[mode]);
}

}  // namespace

void register_warp(SelectorMap& m) {
  m["shfl"] = sel_shfl;
  m["vote"] = [](Decoder& d, const AInstr& in, Op& op) {
    op.cls = C_shuffle;
    bool neg;
    uint32_t kind = has(in, "ballot") ? V_BALLOT : has(in, "all") ? V_ALL : has(in, "any") ? V_ANY : V_UNI;
    op.dst = kind == V_BALLOT ? d.dst(in.ops[0], 4) : d.pred_dst(in.ops[0]);
    op.a = d.pred(in.ops[1], &neg);
    op.flags = uint32_t(neg) | kind << 1;
    if (!has(in, "sync")) return done(op, vote_group);
    op.b = d.src(in.ops[2], 4);
    return done(op, vote);
  };
  m["match"] = [](Decoder& d, const AInstr& in, Op& op) {
    op.cls = C_shuffle;
    Ty t = last_type(in);
    bool all = has(in, "all");
    const AOperand& o = in.ops[0];
    op.dst = d.dst(o.kind == AOperand::pair ? o.elems[0] : o, 4);
    if (o.kind == AOperand::pair) op.dst2 = d.pred_dst(o.elems[1]);
    op.a = d.src(in.ops[1], t);
    op.b = d.src(in.ops[2], 4);
    if (ty_size(t) == 4) return done(op, all ? match<uint32_t, true> : match<uint32_t, false>);
    return done(op, all ? match<uint64_t, true> : match<uint64_t, false>);
  };
  m["redux"] = [](Decoder& d, const AInstr& in, Op& op) {
    op.cls = C_shuffle;
    uint32_t k = has(in, "add")   ? R_ADD
                 : has(in, "min") ? R_MIN
                 : has(in, "max") ? R_MAX
                 : has(in, "and") ? R_AND
                 : has(in, "or")  ? R_OR
                                  : R_XOR;
    op.dst = d.dst(in.ops[0], 4);
    op.a = d.src(in.ops[1], 4);
    op.b = d.src(in.ops[2], 4);
    Ty t = last_type(in);
    if (t == Ty::f32) {
      op.flags = k | (has(in, "abs") ? 16 : 0) | (has(in, "NaN") ? 32 : 0);
      return done(op, redux_f32);
    }
    op.flags = k | (t == Ty::s32 ? 16 : 0);
    return done(op, redux);
  };
  m["activemask"] = [](Decoder& d, const AInstr& in, Op& op) {
    op.cls = C_shuffle;
    op.dst = d.dst(in.ops[0], 4);
    return done(op, activemask);
  };
  m["elect"] = [](Decoder& d, const AInstr& in, Op& op) {
    op.cls = C_shuffle;
    const AOperand& o = in.ops[0];
    if (o.kind != AOperand::pair) return false;
    op.dst = d.dst(o.elems[0], 4);
    op.dst2 = d.pred_dst(o.elems[1]);
    op.a = d.src(in.ops[1], 4);
    return done(op, elect);
  };
  m["bar.warp.sync"] = [](Decoder& d, const AInstr& in, Op& op) {
    op.cls = C_barrier;
    op.a = d.src(in.ops[0], 4);
    return done(op, warp_sync);
  };
}

}  // namespace cudasim
