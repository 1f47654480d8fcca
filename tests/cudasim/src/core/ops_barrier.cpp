// Barriers of CTAs and clusters, and what orders the launches of a stream.
#include <algorithm>

#include "decode.h"
#include "select.h"
#include "shadow.h"

namespace cudasim {

// Lanes of the running group that are not in m continue after the current instruction.
static void park_rest(Warp& w, uint32_t m) {
  w.park(w.active & ~m, w.pc);
  w.ev |= EV_RESCHED | EV_PARKED;
}

// --- CTA barriers -----------------------------------------------------------------------------------------------

namespace {

enum : uint32_t {
  B_SYNC = 0,
  B_ARRIVE = 1,
  B_RED = 2,
  B_KIND = 3,
  B_ALIGNED = 4,
  B_NEG = 8,
  B_COUNT = 16,
  B_AND = 32,
  B_OR = 64,
  B_POPC = 128
};

void op_barrier(Warp& w, const Op& o, uint32_t m) {
  int first = __builtin_ctz(m);
  uint32_t id = w.r<uint32_t>(o.a)[first], count = 0;
  if (id >= 16) fault(Fault::barrier_deadlock, first, "barrier number " + std::to_string(id) + " is above 15");
  if (o.flags & B_COUNT) {
    count = w.r<uint32_t>(o.b)[first];
    if (count % 32 || count == 0)
      fault(Fault::barrier_deadlock, first,
            "barrier thread count " + std::to_string(count) + " is not a positive multiple of 32");
  }
  Block& b = *w.blk;
  Barrier& bar = b.bars[id];
  if (count) {
    if (bar.expected && bar.expected != count && bar.arrived)
      fault(Fault::barrier_deadlock, first,
            "barrier " + std::to_string(id) + " is used with thread counts " + std::to_string(bar.expected) + " and " +
                std::to_string(count));
    bar.expected = count;
  }
  uint32_t kind = o.flags & B_KIND;
  if (kind == B_ARRIVE) {
    if (std::find(bar.arrivals.begin(), bar.arrivals.end(), w.index) != bar.arrivals.end())
      fault(Fault::barrier_deadlock, first,
            "warp arrives twice at barrier " + std::to_string(id) + " before it completes");
    bar.arrived += 32;
    bar.arrivals.push_back(w.index);
    if (w.active != m) park_rest(w, m);
    b.check_barrier(id);
    if (w.blk->group->idle_rounds) w.blk->group->idle_rounds = 0;
    return;
  }
  if (kind == B_RED) {
    uint32_t p = w.p(o.c) ^ (o.flags & B_NEG ? FULL : 0);
    bar.red_count += uint32_t(__builtin_popcount(p & m));
    bar.red_and = bar.red_and && (p & m) == m;
    bar.red_or = bar.red_or || (p & m);
  }
  w.block_lanes(m, Wait::block_bar);
  if (w.bar_lanes && w.bar_id != id)
    fault(Fault::barrier_deadlock, first,
          "lanes of one warp wait at different barriers (" + std::to_string(w.bar_id) + " and " + std::to_string(id) +
              ")");
  if (w.bar_lanes && (o.flags & B_ALIGNED)) {
    int l = __builtin_ctz(w.bar_lanes);
    if (w.lane_pc[l] != w.pc - 1 || w.lane_frame[l] != w.frame)
      fault(Fault::barrier_deadlock, first,
            "divergent barrier: lanes of one warp reached different aligned barriers (the others wait at PTX line " +
                std::to_string(w.lane_frame[l]->fn->code[w.lane_pc[l]].src->line) + ")");
  }
  w.bar_lanes |= m;
  w.bar_id = id;
  park_rest(w, m);
  arrive_if_complete(w);
}

}  // namespace

void arrive_if_complete(Warp& w) {
  if (!w.bar_lanes || w.bar_arrived || (w.bar_lanes & w.live) != w.live) return;
  Block& b = *w.blk;
  Barrier& bar = b.bars[w.bar_id];
  w.bar_arrived = true;
  bar.arrived += 32;
  bar.waiting.push_back(w.index);
  b.check_barrier(w.bar_id);
}

void Block::check_barrier(uint32_t id) {
  Barrier& bar = bars[id];
  if (!bar.arrived) return;
  uint32_t need = bar.expected ? bar.expected : live_warps * 32;
  if (bar.arrived < need) return;
  std::vector<uint32_t> all = bar.waiting;
  all.insert(all.end(), bar.arrivals.begin(), bar.arrivals.end());
  note_barrier(*this, all, bar.waiting);
  if (wk->grid) wk->grid->barrier(*this, all, bar.waiting);
  Barrier old = std::move(bar);
  bar = Barrier();
  group->idle_rounds = 0;
  for (uint32_t i : old.waiting) {
    Warp& w = *warps[i];
    for (uint32_t t = w.bar_lanes; t; t &= t - 1) {
      int l = __builtin_ctz(t);
      const Op& o = w.lane_frame[l]->fn->code[w.lane_pc[l]];
      if ((o.flags & B_KIND) == B_RED) {
        uint8_t* R = w.lane_frame[l]->regs;
        if (o.flags & B_POPC)
          reinterpret_cast<uint32_t*>(R + o.dst)[l] = old.red_count;
        else {
          uint32_t& p = *reinterpret_cast<uint32_t*>(R + o.dst);
          bool v = o.flags & B_AND ? old.red_and : old.red_or;
          p = v ? p | 1u << l : p & ~(1u << l);
        }
      }
      w.lane_pc[l]++;
      w.wait[l] = Wait::none;
    }
    w.blocked &= ~w.bar_lanes;
    w.bar_lanes = 0;
    w.bar_arrived = false;
  }
}

static void cluster_check(Group& g) {
  if (g.cluster_arrived && g.cluster_arrived >= g.live_warps) {
    g.cluster_arrived = 0;
    g.cluster_phase++;
    g.idle_rounds = 0;
    for (auto* w : g.order) {
      w->cluster_arrived = false;
      for (uint32_t t = w->live & w->blocked; t; t &= t - 1) {
        int l = __builtin_ctz(t);
        if (w->wait[l] == Wait::cluster_bar) w->blocked &= ~(1u << l);
      }
    }
  }
}

void Block::warp_exited() {
  for (uint32_t i = 0; i < 16; ++i)
    if (!bars[i].expected) check_barrier(i);
  if (group->blocks.size() > 1 || group->cluster_arrived) cluster_check(*group);
  if (!live_warps) end_block(*this);
}

namespace {

void cluster_arrive(Warp& w, const Op&, uint32_t) {
  Group& g = *w.blk->group;
  if (w.cluster_arrived) return;  // other lanes of this warp
  w.cluster_arrived = true;
  w.cluster_phase = g.cluster_phase;
  g.cluster_arrived++;
  if (w.blk->shadow && w.blk->shadow->race) {
    w.vc[warp_number(w)] = w.clock;
    join_clocks(g.cluster_vc, w.vc);
    w.clock++;
  }
  if (w.wk->grid) w.wk->grid->hand_over(w, g.cluster_grid);
  cluster_check(g);
}
void cluster_wait(Warp& w, const Op&, uint32_t m) {
  Group& g = *w.blk->group;
  if (g.cluster_phase == w.cluster_phase) {
    w.block_lanes(m, Wait::cluster_bar);
    park_rest(w, m);
    return;
  }
  if (w.blk->shadow && w.blk->shadow->race) {
    join_clocks(w.vc, g.cluster_vc);
    std::fill(w.lane_known.begin(), w.lane_known.end(), w.clock - 1);
  }
  if (w.wk->grid) w.wk->grid->take_over(w, g.cluster_grid);
}

// --- dependent launches -----------------------------------------------------------------------------------------

// The launches before have ended by now (launch() runs whole grids), so nothing has to wait.
void grid_wait(Warp& w, const Op&, uint32_t) {
  LaunchState& ls = *w.blk->ls;
  ls.waited = true;
  if (!w.blk->triggered) ls.waited_first = true;
  if (!w.waited_at) w.waited_at = w.clock;
  w.after_wait = true;
}
void grid_launch_dependents(Warp& w, const Op&, uint32_t) { w.blk->triggered = true; }

bool sel_griddepcontrol(Decoder&, const AInstr& in, Op& op) {
  op.cls = C_control;
  if (has(in, "wait")) return done(op, grid_wait);
  return has(in, "launch_dependents") && done(op, grid_launch_dependents);
}

// --- selection --------------------------------------------------------------------------------------------------

bool sel_barrier(Decoder& d, const AInstr& in, Op& op) {
  op.cls = C_barrier;
  if (has(in, "warp")) return selectors().at("bar.warp.sync")(d, in, op);
  if (has(in, "cluster")) {
    d.image->has_fences = true;
    if (has(in, "arrive")) return done(op, cluster_arrive);
    return has(in, "wait") && done(op, cluster_wait);
  }
  uint32_t fl = 0;
  // bar.* and barrier.*.aligned are aligned
  if (in.mods[0] == "bar" || has(in, "aligned")) fl |= B_ALIGNED;
  size_t i = 0;
  if (has(in, "red")) {
    fl |= B_RED;
    if (has(in, "popc")) {
      fl |= B_POPC;
      op.dst = d.dst(in.ops[0], 4);
    } else {
      fl |= has(in, "and") ? B_AND : B_OR;
      op.dst = d.pred_dst(in.ops[0]);
    }
    bool neg;
    op.c = d.pred(in.ops.back(), &neg);
    if (neg) fl |= B_NEG;
    i = 1;
  } else if (has(in, "arrive"))
    fl |= B_ARRIVE;
  size_t last = in.ops.size() - (has(in, "red") ? 1 : 0);
  if (i >= last) return false;
  op.a = d.src(in.ops[i], 4);
  if (i + 1 < last) {
    op.b = d.src(in.ops[i + 1], 4);
    fl |= B_COUNT;
  }
  op.flags = fl;
  return done(op, op_barrier);
}

}  // namespace

// Has the warp, or one whose past it knows, executed griddepcontrol.wait? Without the race check, which keeps the
// clocks, any warp of the CTA counts.
bool ordered_after_wait(Warp& w) {
  if (w.after_wait) return true;
  const bool clocks = w.blk->ls->check_race;
  for (const Warp* other : w.blk->group->order)
    if (other->waited_at && (clocks ? w.vc[warp_number(*other)] >= other->waited_at : other->blk == w.blk))
      w.after_wait = true;
  return w.after_wait;
}

void register_barrier(SelectorMap& m) {
  m["bar"] = m["barrier"] = sel_barrier;
  m["griddepcontrol"] = sel_griddepcontrol;
}

}  // namespace cudasim
