// mbarriers: objects and instructions.
#include "access.h"
#include "async.h"
#include "select.h"
#include "shadow.h"

namespace cudasim {

namespace {

// --- mbarrier objects ------------------------------------------------------------------------------------------
// 64 bits in shared memory: pending arrivals [0,20), arrivals per phase [20,40), tx-count (signed)
// [40,61), a mark [61,63) and the phase [63].

constexpr uint64_t kMark = 1ull << 62;
Mbar unpack(uint64_t v) {
  return {uint32_t(v & 0xfffff), uint32_t(v >> 20 & 0xfffff), int32_t(uint32_t(v >> 40 & 0x1fffff) << 11) >> 11,
          bool(v >> 63), (v >> 61 & 3) == 2};
}
uint64_t pack(const Mbar& b) {
  return uint64_t(b.pending & 0xfffff) | uint64_t(b.expected & 0xfffff) << 20 |
         uint64_t(uint32_t(b.tx) & 0x1fffff) << 40 | kMark | uint64_t(b.phase) << 63;
}
uint64_t load64(const uint8_t* p) {
  uint64_t v;
  memcpy(&v, p, 8);
  return v;
}
void store64(uint8_t* p, uint64_t v) { memcpy(p, &v, 8); }

}  // namespace

Mbar load_mbar(const uint8_t* p) { return unpack(load64(p)); }
void store_mbar(uint8_t* p, const Mbar& b) { store64(p, pack(b)); }
uint8_t* mbar_pointer(Warp& w, int lane, uint64_t addr, Block** blk, uint32_t* off, bool synchronous) {
  if (addr & kWindowMask) {
    if ((addr & kWindowMask) != kSharedWindow)
      fault(Fault::shared_out_of_bounds, lane, "mbarrier address " + hex(addr) + " is not in shared memory");
  }
  uint32_t a = uint32_t(addr);
  Block* b = shared_target(w, a, off);
  if (!b || uint64_t(*off) + 8 > b->shared_bytes)
    fault(Fault::shared_out_of_bounds, lane,
          "mbarrier at shared address " + hex(a) + " is outside the block's shared memory");
  if (*off & 7) fault(Fault::misaligned, lane, "mbarrier at shared address " + hex(a) + " is not aligned to 8 bytes");
  if (b != w.blk) reach_peer(w, lane, *b, synchronous);
  *blk = b;
  return b->shared + *off;
}
void need_valid(const Mbar& b, int lane, uint32_t off) {
  if (!b.valid)
    fault(
        Fault::uninitialized_shared, lane,
        "mbarrier at shared address " + hex(off + kSharedBase) + " is not initialized (or its memory was overwritten)");
}
void settle(Group& g, Mbar& b) {
  if (b.pending == 0 && b.tx == 0) {
    b.phase = !b.phase;
    b.pending = b.expected;
    g.mbar_events++;
    g.idle_rounds = 0;
  }
}
void arrive(Group& g, Mbar& b, uint32_t count, int lane, uint32_t off) {
  if (count > b.pending) {
    bool flying = false;
    for (auto& c : g.bulk) flying |= c.mbar == off;
    for (auto& c : g.tensor_work) flying |= c.commit && c.mbar == off;
    fault(Fault::barrier_deadlock, lane,
          "mbarrier at shared address " + hex(off + kSharedBase) + ": " + std::to_string(count) +
              " arrival(s), but the phase expects only " + std::to_string(b.pending) + " more" +
              (flying ? " (the phase is open because nobody has waited for the copies or the tcgen05.commit that "
                        "complete it)"
                      : ""));
  }
  b.pending -= count;
  settle(g, b);
}

namespace {

// --- mbarrier instructions ---------------------------------------------------------------------------------------

enum MbarOp : uint8_t { MB_INIT, MB_INVAL, MB_ARRIVE, MB_DROP, MB_EXPECT, MB_COMPLETE, MB_TEST, MB_TRY };
enum : uint32_t { MB_HAS_DST = 1, MB_HAS_COUNT = 2, MB_EXPECT_TX = 4, MB_PARITY = 8 };

// op: size = MbarOp, dst state or predicate, b count / tx / state / parity
void mbar_update(Warp& w, const Op& o, uint32_t m) {
  uint64_t addr[32];
  fill_addresses(w, o, addr);
  Group& g = *w.blk->group;
  for (uint32_t t = m; t; t &= t - 1) {
    int l = __builtin_ctz(t);
    Block* b;
    uint32_t off;
    uint8_t* p = mbar_pointer(w, l, addr[l], &b, &off);
    uint32_t v = o.flags & MB_HAS_COUNT ? w.r<uint32_t>(o.b)[l] : 1;
    if (o.size == MB_INIT) {
      if (v == 0 || v > 0xfffff) fault(Fault::barrier_deadlock, l, "mbarrier.init with count " + std::to_string(v));
      store_mbar(p, {v, v, 0, false, true});
      if (b->shadow) {
        b->shadow->write(w, l, off, 8, true, nullptr, p);
        b->shadow->sync.erase(sync_key(b->rank, off));
      }
      g.shared_grid.erase(sync_key(b->rank, off));
      continue;
    }
    uint64_t old = load64(p);
    if (o.size == MB_INVAL) {
      store64(p, ~0ull);
      continue;
    }
    Mbar x = unpack(old);
    need_valid(x, l, off);
    if (b->shadow && b->shadow->race) b->shadow->release(w, sync_key(b->rank, off));
    if (w.wk->grid) w.wk->grid->hand_over(w, g.shared_grid[sync_key(b->rank, off)]);
    switch (o.size) {
      case MB_ARRIVE:
      case MB_DROP:
        if (o.flags & MB_EXPECT_TX) {
          x.tx += int32_t(v);
          v = 1;
        }
        if (o.size == MB_DROP) x.expected -= 1;
        arrive(g, x, v, l, off);
        break;
      case MB_EXPECT:
        x.tx += int32_t(v);
        break;
      case MB_COMPLETE:
        x.tx -= int32_t(v);
        settle(g, x);
        break;
    }
    store_mbar(p, x);
    if (o.flags & MB_HAS_DST) w.r<uint64_t>(o.dst)[l] = old;
  }
}
void mbar_wait(Warp& w, const Op& o, uint32_t m) {
  uint64_t addr[32];
  fill_addresses(w, o, addr);
  uint32_t ok = 0;
  bool delivered = false;
  for (uint32_t t = m; t; t &= t - 1) {
    int l = __builtin_ctz(t);
    Block* b;
    uint32_t off;
    uint8_t* p = mbar_pointer(w, l, addr[l], &b, &off);
    bool want = o.flags & MB_PARITY ? w.r<uint32_t>(o.b)[l] & 1 : w.r<uint64_t>(o.b)[l] >> 63;
    Mbar x = load_mbar(p);
    need_valid(x, l, off);
    if (x.phase == want && deliver_to_mbar(w, b->rank, off)) {
      delivered = true;
      x = load_mbar(p);
    }
    while (x.phase == want && complete_commit(*w.blk->group, b->rank, off)) {
      delivered = true;
      x = load_mbar(p);
    }
    if (x.phase != want) {
      ok |= 1u << l;
      if (b->shadow) b->shadow->acquire(w, sync_key(b->rank, off));
      if (w.wk->grid) w.wk->grid->take_over(w, w.blk->group->shared_grid[sync_key(b->rank, off)]);
    }
  }
  bool timed_out = w.timed_out;
  w.timed_out = false;
  if (o.size == MB_TRY && ok == 0 && !timed_out) {
    w.block_lanes(m, Wait::mbar);
    w.mbar_lanes |= m;
    w.mbar_seen = w.blk->group->mbar_events;
    w.park(w.active & ~m, w.pc);
    w.ev |= EV_RESCHED | EV_PARKED;
    return;
  }
  w.p(o.dst) = (w.p(o.dst) & ~m) | ok;
  // What is delivered takes its time on a card: the other warps go on first.
  if (ok != m || delivered) w.ev |= EV_YIELD;
}
void mbar_pending(Warp& w, const Op& o, uint32_t m) {
  auto* a = w.r<uint64_t>(o.a);
  each(w.r<uint32_t>(o.dst), m, [&](int i) { return uint32_t(a[i] & 0xfffff); });
}

bool sel_mbarrier(Decoder& d, const AInstr& in, Op& op) {
  op.cls = C_barrier;
  if (in.mods.size() < 2) return false;
  auto k = in.mods[1];
  if (k == "pending_count") {
    op.dst = d.dst(in.ops[0], 4);
    op.a = d.src(in.ops[1], 8);
    return done(op, mbar_pending);
  }
  if (k == "init" || k == "inval" || k == "expect_tx" || k == "complete_tx") {
    op.size = k == "init" ? MB_INIT : k == "inval" ? MB_INVAL : k == "expect_tx" ? MB_EXPECT : MB_COMPLETE;
    address_operand(d, in.ops[0], op);
    if (k != "inval") {
      op.b = d.src(in.ops[1], 4);
      op.flags = MB_HAS_COUNT;
    }
    return done(op, mbar_update);
  }
  if (k == "arrive" || k == "arrive_drop") {
    op.size = k == "arrive" ? MB_ARRIVE : MB_DROP;
    size_t i = 0;
    if (in.ops[0].kind != AOperand::addr) {
      if (in.ops[0].kind == AOperand::reg) {
        op.dst = d.dst(in.ops[0], 8);
        op.flags |= MB_HAS_DST;
      }
      i = 1;
    }
    address_operand(d, in.ops[i], op);
    if (has(in, "expect_tx")) op.flags |= MB_EXPECT_TX;
    if (in.ops.size() > i + 1) {
      op.b = d.src(in.ops[i + 1], 4);
      op.flags |= MB_HAS_COUNT;
    }
    return done(op, mbar_update);
  }
  if (k == "test_wait" || k == "try_wait") {
    op.size = k == "test_wait" ? MB_TEST : MB_TRY;
    op.dst = d.pred_dst(in.ops[0]);
    address_operand(d, in.ops[1], op);
    bool par = has(in, "parity");
    op.b = d.src(in.ops[2], par ? 4 : 8);
    op.flags = par ? MB_PARITY : 0;
    return done(op, mbar_wait);
  }
  return false;
}

}  // namespace

void register_mbarrier(SelectorMap& m) { m["mbarrier"] = sel_mbarrier; }

}  // namespace cudasim
