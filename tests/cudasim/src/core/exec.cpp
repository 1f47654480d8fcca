// Executes warps, CTAs and clusters.
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <thread>

#include "decode.h"
#include "lanes.h"
#include "numeric.h"
#include "shadow.h"

namespace cudasim {

void fault(Fault f, int lane, const std::string& message) { throw SimFault{f, message, lane}; }
std::string hex(uint64_t v) {
  char b[32];
  snprintf(b, sizeof b, "0x%llx", (unsigned long long)v);
  return b;
}

// --- warps ----------------------------------------------------------------------------------------

void Warp::start(Block* b, uint32_t idx, uint32_t lanes, const Function* fn) {
  blk = b;
  wk = b->wk;
  index = idx;
  live = lanes;
  blocked = bar_lanes = 0;
  stuck = 0;
  finished = bar_arrived = cluster_arrived = timed_out = false;
  cluster_phase = 0;
  mbar_lanes = 0;
  executed = 0;
  ev = 0;
  if (!root || root->fn != fn) root.reset(new_frame(nullptr, fn));
  refresh(root.get());
  grow_local(kLocalBase + fn->local_bytes);
  for (int l = 0; l < 32; ++l) {
    lane_pc[l] = 0;
    lane_frame[l] = root.get();
    wait[l] = Wait::none;
    need[l] = 0;
    copy_group[l] = 0;
    bulk_group[l] = 0;
    bulk[l].clear();
  }
  copies.clear();
  copy_base = 0;
  arrives.clear();
  mma_groups.clear();
  mma_open.ops.clear();
  tensor_loads.clear();
  tensor_stores.clear();
  tensor_clock = 0;
  registers = b->ls->registers;
  fences = 1;
  register_writes.assign(b->ls->image->tracked_registers, {});
  waited_at = 0;
  after_wait = false;
}

// Chooses the lanes to run: the deepest call first, then the lowest pc, so that groups merge again.
bool Warp::select() {
  uint32_t can = live & ~blocked;
  if (!can) return false;
  int best = __builtin_ctz(can);
  bool several = false;
  for (uint32_t t = can & (can - 1); t; t &= t - 1) {
    int l = __builtin_ctz(t);
    if (lane_pc[l] == lane_pc[best] && lane_frame[l] == lane_frame[best]) continue;
    several = true;
    uint32_t dl = lane_frame[l]->depth, db = lane_frame[best]->depth;
    if (dl > db || (dl == db && lane_pc[l] < lane_pc[best])) best = l;
  }
  if (several) {
    // A group that spins must not starve the others.
    bool other = ++stuck > 64;
    if (other) stuck = 0;
    if (wk->ls->seeded && wk->random(16) == 0) other = true;
    if (other) {
      uint32_t skip = wk->random(uint32_t(__builtin_popcount(can)));
      uint32_t t = can;
      while (skip--) t &= t - 1;
      best = __builtin_ctz(t);
    }
  }
  frame = lane_frame[best];
  pc = lane_pc[best];
  R = frame->regs;
  active = 0;
  limit = NONE;
  for (uint32_t t = live; t; t &= t - 1) {
    int l = __builtin_ctz(t);
    if (lane_frame[l] != frame) continue;
    bool joins = !(blocked >> l & 1) || wait[l] == Wait::warp;
    if (!joins) continue;
    if (lane_pc[l] == pc)
      active |= 1u << l;
    else if (lane_pc[l] > pc && lane_pc[l] < limit)
      limit = lane_pc[l];
  }
  blocked &= ~active;
  return true;
}

void Warp::run(int budget) {
  Counters& cnt = wk->count;
  const int start = budget;
  ev = 0;
  while (budget > 0) {
    if (!select()) break;
    const Op* code = frame->fn->code.data();
    ev = 0;
    do {
      const Op& op = code[pc++];
      uint32_t m = active;
      if (op.pred != NONE) m &= op.pred_neg ? ~p(op.pred) : p(op.pred);
      cnt.warp[op.cls]++;
      cnt.threads += uint32_t(__builtin_popcount(m));
      --budget;
      if (m) op.fn(*this, op, m);
    } while (!ev && pc < limit && budget > 0);
    if (!(ev & EV_PARKED)) park(active, pc);
    if (ev & (EV_YIELD | EV_YIELD_BLOCK)) break;
  }
  executed += uint64_t(start - budget);
  blk->group->executed += uint64_t(start - budget);
}

void Warp::exit_lanes(uint32_t m) {
  for (uint32_t t = m; t; t &= t - 1) {
    int l = __builtin_ctz(t);
    if (!bulk[l].empty()) finish_bulk(*this, 1u << l, 0, false);
  }
  live &= ~m;
  blocked &= ~m;
  bar_lanes &= ~m;
  // Lanes that wait for mates check again.
  for (uint32_t t = live & blocked; t; t &= t - 1) {
    int l = __builtin_ctz(t);
    if (wait[l] == Wait::warp || wait[l] == Wait::warp_bar) blocked &= ~(1u << l);
  }
  if (!live) {
    finished = true;
    blk->group->idle_rounds = 0;
    blk->live_warps--;
    blk->group->live_warps--;
    blk->warp_exited();
  } else if (bar_lanes) {
    arrive_if_complete(*this);
  }
}

// --- CTAs and clusters ------------------------------------------------------------------------------

Block::~Block() { free(shared_raw); }

void Group::start(uint32_t cluster_index) {
  LaunchState& ls = *wk->ls;
  serial = ++wk->serial * 64 + wk->id + 1;
  uint32_t gx = ls.grid.x / ls.cluster.x, gy = ls.grid.y / ls.cluster.y;
  uint32_t cx = cluster_index % gx, cy = cluster_index / gx % gy, cz = cluster_index / gx / gy;
  const Function* fn = &ls.image->functions[0];
  uint32_t threads = ls.block.x * ls.block.y * ls.block.z;
  executed = 0;
  idle_rounds = 0;
  mbar_events = 1;
  cluster_arrived = cluster_phase = 0;
  bulk.clear();
  async_clock = 0;
  tensor_work.clear();
  tensor_clock = 0;
  cluster_vc.clear();
  cluster_grid = {};
  shared_grid.clear();
  live_warps = 0;
  blocks.resize(ls.cluster_size);
  order.clear();
  next = 0;
  for (uint32_t r = 0; r < ls.cluster_size; ++r) {
    if (!blocks[r]) blocks[r] = std::make_unique<Block>();
    Block& b = *blocks[r];
    b.group = this;
    b.wk = wk;
    b.ls = &ls;
    b.rank = r;
    b.ctaid[0] = cx * ls.cluster.x + r % ls.cluster.x;
    b.ctaid[1] = cy * ls.cluster.y + r / ls.cluster.x % ls.cluster.y;
    b.ctaid[2] = cz * ls.cluster.z + r / ls.cluster.x / ls.cluster.y;
    b.linear = b.ctaid[0] + ls.grid.x * (b.ctaid[1] + ls.grid.y * b.ctaid[2]);
    b.nthreads = threads;
    b.nwarps = b.live_warps = (threads + 31) / 32;
    if (b.shared_alloc < ls.shared_bytes || !b.shared) {
      free(b.shared_raw);
      b.shared_alloc = (ls.shared_bytes + 1023) / 1024 * 1024 + 1024;
      b.shared_raw = static_cast<uint8_t*>(aligned_alloc(1024, b.shared_alloc));
      b.shared = b.shared_raw;
    }
    b.shared_bytes = ls.shared_bytes;
    memset(b.shared, 0xff, b.shared_bytes);  // reads of unwritten shared memory give NaN / -1
    for (auto& bar : b.bars) bar = Barrier();
    b.tensor_memory.reset();
    b.register_pool = 0;
    b.triggered = false;
    b.visits.assign(ls.cluster_size > 1 && ls.check_race ? ls.cluster_size * b.nwarps : 0, {});
    b.warps.resize(b.nwarps);
    for (uint32_t i = 0; i < b.nwarps; ++i) {
      if (!b.warps[i]) b.warps[i] = std::make_unique<Warp>();
      uint32_t lanes = std::min<uint32_t>(32, threads - i * 32);
      b.warps[i]->start(&b, i, lanes == 32 ? FULL : (1u << lanes) - 1, fn);
      order.push_back(b.warps[i].get());
    }
    live_warps += b.nwarps;
    if (ls.check_race || ls.check_init) {
      if (!b.shadow) b.shadow = std::make_unique<Shadow>();
      b.shadow->reset(b.shared_bytes, ls.cluster_size * b.nwarps, ls.check_race, ls.check_init);
    }
  }
  if (ls.check_race)
    for (auto* w : order) start_clocks(*w, uint32_t(order.size()));
  if (wk->grid)
    for (auto* w : order) wk->grid->start(*w);
  if (ls.seeded) std::shuffle(order.begin(), order.end(), wk->rng);
}

static std::string where(const Warp& w, int lane) {
  const LaunchState& ls = *w.blk->ls;
  std::string s = " block (" + std::to_string(w.blk->ctaid[0]) + "," + std::to_string(w.blk->ctaid[1]) + "," +
                  std::to_string(w.blk->ctaid[2]) + ")";
  if (lane >= 0) {
    uint32_t t = w.thread_number(lane);
    s += " thread (" + std::to_string(t % ls.block.x) + "," + std::to_string(t / ls.block.x % ls.block.y) + "," +
         std::to_string(t / ls.block.x / ls.block.y) + ")";
  } else
    s += " warp " + std::to_string(w.index);
  return s;
}
static std::string op_text(const Op& op) {
  if (!op.src || op.src->text.empty()) return "end of function";
  std::string t(op.src->text.substr(0, 300));
  for (auto& c : t)
    if (c == '\n' || c == '\t') c = ' ';
  return "PTX line " + std::to_string(op.src->line) + ": " + t;
}

void Group::stuck(std::string s) {
  int shown = 0;
  Warp* first = nullptr;
  for (auto* w : order) {
    if (w->finished) {
      continue;
    }
    if (!first) first = w;
    std::map<std::pair<const Op*, int>, uint32_t> at;
    for (uint32_t t = w->live; t; t &= t - 1) {
      int l = __builtin_ctz(t);
      at[{&w->lane_frame[l]->fn->code[w->lane_pc[l]], int(w->wait[l])}] |= 1u << l;
    }
    for (auto& [k, m] : at) {
      if (++shown > 8) break;
      static const char* names[] = {"running",       "warp-wide operation", "bar.warp.sync",
                                    "block barrier", "cluster barrier",     "mbarrier",
                                    "registers"};
      s += "\n  block " + std::to_string(w->blk->linear) + " warp " + std::to_string(w->index) + " lanes " + hex(m) +
           " wait at " + names[k.second] + ", " + op_text(*k.first);
    }
  }
  uint32_t exited = 0;
  for (auto* w : order) exited += w->finished;
  if (exited) s += "\n  " + std::to_string(exited) + " warp(s) have exited";
  throw SimFault{Fault::barrier_deadlock, s + (first ? "\n " + where(*first, -1) : ""), -2};
}

bool Group::run(uint64_t slice) {
  LaunchState& ls = *wk->ls;
  uint64_t stop_at = executed + slice;
  Warp* cur = nullptr;
  try {
    while (live_warps) {
      bool any = false;
      size_t n = order.size();
      for (size_t k = 0; k < n; ++k) {
        Warp* w = order[next];
        next = next + 1 == n ? 0 : next + 1;
        if (w->finished) continue;
        if (w->mbar_lanes && (w->mbar_seen != mbar_events || w->timed_out)) {
          w->blocked &= ~w->mbar_lanes;
          w->mbar_lanes = 0;
        }
        if (!w->runnable()) continue;
        any = true;
        cur = w;
        w->run(ls.seeded ? 1 + int(wk->random(wk->random(4) ? 64 : 600)) : 400 + int(wk->random(200)));
        cur = nullptr;
        if (executed >= stop_at || (w->ev & EV_YIELD_BLOCK)) {
          w->ev = 0;
          if (live_warps) return false;
        }
        if (ls.seeded && wk->random(8) == 0) next = wk->random(uint32_t(n));
      }
      if (ls.stop.load(std::memory_order_relaxed)) return true;
      if (!any && live_warps) {
        // All warps wait. A try_wait may time out. If that never helps, it is a deadlock.
        bool timed = false;
        for (auto* w : order)
          if (!w->finished && w->mbar_lanes) {
            w->timed_out = true;
            timed = true;
          }
        if (!timed || ++idle_rounds > 3000) stuck("deadlock: no thread of the block can make progress");
      }
    }
    return true;
  } catch (SimFault& e) {
    std::lock_guard<std::mutex> lock(ls.mutex);
    if (!ls.stop.exchange(true)) {
      ls.result.fault = e.fault;
      std::string s = "kernel " + ls.kernel->name + ":";
      if (cur) {
        int lane = e.lane >= 0 ? e.lane : cur->active ? __builtin_ctz(cur->active) : 0;
        s += where(*cur, lane) + ": " + e.message;
        if (cur->frame) {
          const Op& op = cur->frame->fn->code[cur->pc ? cur->pc - 1 : 0];
          s += "; at " + op_text(op);
          if (!cur->frame->fn->ast->is_entry) s += " in function " + std::string(cur->frame->fn->ast->name);
        }
      } else
        s += " " + e.message;
      ls.result.message = s;
    }
    return true;
  }
}

}  // namespace cudasim
