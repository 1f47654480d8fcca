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

// --- frames ---------------------------------------------------------------------------------------

Frame::~Frame() {
  free(regs);
  free(pmem);
}

static Frame* new_frame(Frame* parent, const Function* fn) {
  auto* f = new Frame;
  f->parent = parent;
  f->fn = fn;
  f->depth = parent ? parent->depth + 1 : 0;
  f->local_base = parent ? parent->local_base + parent->fn->local_bytes : kLocalBase;
  f->regs = static_cast<uint8_t*>(aligned_alloc(64, fn->frame_bytes + 64));
  // unwritten registers read as junk
  auto* words = reinterpret_cast<uint32_t*>(f->regs);
  for (uint32_t i = 0; i < fn->frame_bytes / 4; ++i) words[i] = 0x7fbadbadu;
  if (fn->param_bytes) f->pmem = static_cast<uint8_t*>(calloc(32, fn->param_bytes));
  for (auto& c : fn->consts) {
    uint8_t* at = f->regs + c.offset;
    switch (c.size) {
      case 0:
        *reinterpret_cast<uint32_t*>(at) = uint32_t(c.value);
        break;
      case 2:
        std::fill_n(reinterpret_cast<uint16_t*>(at), 32, uint16_t(c.value));
        break;
      case 4:
        std::fill_n(reinterpret_cast<uint32_t*>(at), 32, uint32_t(c.value));
        break;
      case 16:
        for (int i = 0; i < 32; ++i) {
          reinterpret_cast<uint64_t*>(at)[2 * i] = c.value;
          reinterpret_cast<uint64_t*>(at)[2 * i + 1] = int64_t(c.value) < 0 ? ~0ull : 0;
        }
        break;
      default:
        std::fill_n(reinterpret_cast<uint64_t*>(at), 32, c.value);
        break;
    }
  }
  return f;
}

static uint64_t now_ns() {
  return uint64_t(
      std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
          .count());
}

// Fills the special registers that a function uses. They depend on CTA, warp and frame.
void Warp::refresh(Frame* f) {
  f->serial = blk->group->serial;
  const LaunchState& ls = *blk->ls;
  const Dim3& nb = ls.block;
  for (auto& s : f->fn->specials) {
    uint64_t v[32];
    auto all = [&](uint64_t x) {
      for (auto& e : v) e = x;
    };
    auto per_lane = [&](auto g) {
      for (uint32_t l = 0; l < 32; ++l) v[l] = g(l);
    };
    uint32_t t0 = index * 32;
    uint32_t cl[3] = {ls.cluster.x, ls.cluster.y, ls.cluster.z};
    using S = Special;
    switch (s.id) {
      case S::tid_x:
        per_lane([&](uint32_t l) { return (t0 + l) % nb.x; });
        break;
      case S::tid_y:
        per_lane([&](uint32_t l) { return (t0 + l) / nb.x % nb.y; });
        break;
      case S::tid_z:
        per_lane([&](uint32_t l) { return (t0 + l) / nb.x / nb.y; });
        break;
      case S::ntid_x:
        all(nb.x);
        break;
      case S::ntid_y:
        all(nb.y);
        break;
      case S::ntid_z:
        all(nb.z);
        break;
      case S::ctaid_x:
        all(blk->ctaid[0]);
        break;
      case S::ctaid_y:
        all(blk->ctaid[1]);
        break;
      case S::ctaid_z:
        all(blk->ctaid[2]);
        break;
      case S::nctaid_x:
        all(ls.grid.x);
        break;
      case S::nctaid_y:
        all(ls.grid.y);
        break;
      case S::nctaid_z:
        all(ls.grid.z);
        break;
      case S::laneid:
        per_lane([](uint32_t l) { return l; });
        break;
      case S::warpid:
        all(index);
        break;
      case S::nwarpid:
        all(blk->nwarps);
        break;
      case S::smid:
        all(blk->linear % 132);
        break;
      case S::nsmid:
        all(132);
        break;
      case S::lanemask_eq:
        per_lane([](uint32_t l) { return 1u << l; });
        break;
      case S::lanemask_lt:
        per_lane([](uint32_t l) { return (1u << l) - 1; });
        break;
      case S::lanemask_le:
        per_lane([](uint32_t l) { return (2u << l) - 1; });
        break;
      case S::lanemask_gt:
        per_lane([](uint32_t l) { return uint32_t(~((2u << l) - 1)); });
        break;
      case S::lanemask_ge:
        per_lane([](uint32_t l) { return uint32_t(~((1u << l) - 1)); });
        break;
      case S::dynamic_smem_size:
        all(ls.dynamic_shared);
        break;
      case S::total_smem_size:
      case S::aggr_smem_size:
        all(ls.shared_bytes);
        break;
      case S::clusterid_x:
        all(blk->ctaid[0] / cl[0]);
        break;
      case S::clusterid_y:
        all(blk->ctaid[1] / cl[1]);
        break;
      case S::clusterid_z:
        all(blk->ctaid[2] / cl[2]);
        break;
      case S::nclusterid_x:
        all(ls.grid.x / cl[0]);
        break;
      case S::nclusterid_y:
        all(ls.grid.y / cl[1]);
        break;
      case S::nclusterid_z:
        all(ls.grid.z / cl[2]);
        break;
      case S::cluster_ctaid_x:
        all(blk->ctaid[0] % cl[0]);
        break;
      case S::cluster_ctaid_y:
        all(blk->ctaid[1] % cl[1]);
        break;
      case S::cluster_ctaid_z:
        all(blk->ctaid[2] % cl[2]);
        break;
      case S::cluster_nctaid_x:
        all(cl[0]);
        break;
      case S::cluster_nctaid_y:
        all(cl[1]);
        break;
      case S::cluster_nctaid_z:
        all(cl[2]);
        break;
      case S::cluster_ctarank:
        all(blk->rank);
        break;
      case S::cluster_nctarank:
        all(ls.cluster_size);
        break;
      case S::is_explicit_cluster:
        all(ls.explicit_cluster ? FULL : 0);
        break;
      case S::clock:
      case S::clock_hi:
      case S::clock64:
        all(0);
        break;
      case S::globaltimer:
      case S::globaltimer_lo:
        all(now_ns());
        break;
      case S::globaltimer_hi:
        all(now_ns() >> 32);
        break;
      case S::grid_workspace_hi:
        all(uint64_t(ls.params.data() + ls.workspace) >> 32);
        break;
      case S::grid_workspace_lo:
        all(uint64_t(ls.params.data() + ls.workspace));
        break;
      case S::local_base:
        all(uint64_t(int64_t(f->local_base) + s.addend));
        break;
      case S::param_base:
        all(uint64_t(ls.params.data()) + uint64_t(s.addend));
        break;
      case S::pmem_base:
        per_lane([&](uint32_t l) { return uint64_t(f->pmem) + l * f->fn->param_bytes + uint64_t(s.addend); });
        break;
      default:
        all(0);
        break;
    }
    uint8_t* at = f->regs + s.offset;
    if (s.size == 0) *reinterpret_cast<uint32_t*>(at) = uint32_t(v[0]);
    for (int l = 0; l < 32; ++l) {
      if (s.size == 2)
        reinterpret_cast<uint16_t*>(at)[l] = uint16_t(v[l]);
      else if (s.size == 4)
        reinterpret_cast<uint32_t*>(at)[l] = uint32_t(v[l]);
      else if (s.size == 8)
        reinterpret_cast<uint64_t*>(at)[l] = v[l];
    }
  }
}

Frame* Warp::enter(Frame* parent, const Function* fn) {
  Frame* f = nullptr;
  for (auto& c : parent->children)
    if (c->fn == fn) {
      f = c.get();
      break;
    }
  if (!f) {
    f = new_frame(parent, fn);
    parent->children.emplace_back(f);
    if (f->depth > 4096) fault(Fault::internal, -1, "call stack overflow (depth 4096)");
  }
  if (f->serial != blk->group->serial) refresh(f);
  grow_local(f->local_base + fn->local_bytes);
  return f;
}

void Warp::grow_local(uint32_t bytes) {
  if (bytes <= local_stride) return;
  uint32_t stride = std::max(bytes, local_stride * 2);
  stride = (stride + 255) / 256 * 256;
  std::vector<uint8_t> n(size_t(stride) * 32, 0xff);
  for (int l = 0; l < 32 && local_stride; ++l)
    memcpy(&n[size_t(l) * stride], &local[size_t(l) * local_stride], local_stride);
  local.swap(n);
  local_stride = stride;
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
                                    "block barrier", "cluster barrier",     "mbarrier"};
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

// --- launch -------------------------------------------------------------------------------------------

static void work(Worker& wk) {
  LaunchState& ls = *wk.ls;
  std::vector<std::unique_ptr<Group>> resident;
  size_t target = ls.cluster_size > 1 ? 1 : 2;
  // CTAs may wait for CTAs that are not running yet. If no CTA finishes, admit more, faster and faster.
  uint64_t patience = 400000, since = 0;
  for (;;) {
    while (resident.size() < target && !ls.stop) {
      uint64_t i = ls.next_group.fetch_add(1);
      if (i >= ls.group_count) break;
      std::unique_ptr<Group> g;
      if (!wk.pool.empty()) {
        g = std::move(wk.pool.back());
        wk.pool.pop_back();
      } else {
        g = std::make_unique<Group>();
        g->wk = &wk;
      }
      g->start(uint32_t(i));
      resident.push_back(std::move(g));
    }
    if (resident.empty()) return;
    bool finished = false;
    uint64_t slice = resident.size() > 8 ? 3000 : 20000;
    for (size_t i = 0; i < resident.size() && !ls.stop;) {
      uint64_t before = resident[i]->executed;
      bool done = resident[i]->run(ls.seeded ? 1 + wk.random(uint32_t(slice)) : slice);
      since += resident[i]->executed - before;
      if (ls.time_limit > 0 &&
          std::chrono::duration<double>(std::chrono::steady_clock::now() - ls.started).count() > ls.time_limit &&
          !ls.stop)
        resident[i]->stuck("time limit: the kernel did not finish within CUDASIM_TIMEOUT seconds");
      if (done) {
        finished = true;
        wk.pool.push_back(std::move(resident[i]));
        resident.erase(resident.begin() + long(i));
      } else
        ++i;
    }
    if (ls.stop) return;
    if (finished) {
      since = 0;
      patience = 400000;
    } else if (since > patience * resident.size() || (since == 0)) {
      since = 0;
      patience = std::max<uint64_t>(patience / 2, 2000);
      if (ls.next_group < ls.group_count) target = resident.size() + 1;
    }
    if (resident.size() > 16 && !finished) std::this_thread::yield();
  }
}

static uint32_t worker_count() {
  if (const char* e = getenv("CUDASIM_THREADS")) return uint32_t(std::max(1, atoi(e)));
  return std::max(1u, std::thread::hardware_concurrency());
}

std::shared_ptr<const std::vector<Range>> current_ranges();

LaunchResult launch(Kernel* k, const LaunchConfig& cfg) {
  auto t0 = std::chrono::steady_clock::now();
  LaunchState ls;
  ls.kernel = k;
  LaunchResult bad;
  bad.fault = Fault::bad_launch;
  bad.profile.kernel = k ? k->name : "";
  if (!k) {
    bad.message = "no kernel";
    return bad;
  }
  {
    std::lock_guard<std::mutex> lock(k->mutex);
    if (!k->image) k->image.reset(decode_kernel(k->module, k->ast, nullptr));
  }
  ls.image = k->image.get();
  ls.grid = cfg.grid;
  ls.block = cfg.block;
  ls.cluster = cfg.cluster;
  if (k->ast->cluster[0]) {
    ls.cluster = {k->ast->cluster[0], k->ast->cluster[1], k->ast->cluster[2]};
    ls.explicit_cluster = true;
  }
  ls.explicit_cluster |= ls.cluster.x * ls.cluster.y * ls.cluster.z > 1;
  ls.cluster_size = ls.cluster.x * ls.cluster.y * ls.cluster.z;
  auto check = [&](bool ok, const std::string& what) {
    if (ok) return true;
    bad.message = "kernel " + k->name + ": bad launch: " + what;
    return false;
  };
  uint64_t threads = uint64_t(cfg.block.x) * cfg.block.y * cfg.block.z;
  uint64_t nblocks = uint64_t(cfg.grid.x) * cfg.grid.y * cfg.grid.z;
  if (!check(threads >= 1 && threads <= 1024, "block of " + std::to_string(threads) + " threads") ||
      !check(cfg.block.z <= 64, "block.z above 64") || !check(nblocks >= 1, "empty grid") ||
      !check(cfg.grid.y <= 65535 && cfg.grid.z <= 65535, "grid.y or grid.z above 65535") ||
      !check(!k->ast->maxntid || threads <= k->ast->maxntid,
             "block exceeds __launch_bounds__ of " + std::to_string(k->ast->maxntid)) ||
      !check(!k->ast->reqntid || threads == k->ast->reqntid, "block differs from the required block size") ||
      !check(ls.cluster_size >= 1 && ls.cluster_size <= 16 && cfg.grid.x % ls.cluster.x == 0 &&
                 cfg.grid.y % ls.cluster.y == 0 && cfg.grid.z % ls.cluster.z == 0,
             "grid is not a multiple of the cluster") ||
      !check(cfg.args || k->ast->params.empty(), "no arguments"))
    return bad;
  uint32_t stat = ls.image->static_shared;
  if (cfg.dynamic_shared_bytes)
    stat = (stat + ls.image->dynamic_align - 1) / ls.image->dynamic_align * ls.image->dynamic_align;
  ls.dynamic_shared = cfg.dynamic_shared_bytes;
  ls.shared_bytes = stat + cfg.dynamic_shared_bytes;
  if (!check(ls.shared_bytes <= 227 * 1024,
             std::to_string(ls.shared_bytes) + " bytes of shared memory exceed 227 KiB") ||
      !check(ls.image->static_shared <= 48 * 1024, "static shared memory exceeds 48 KiB"))
    return bad;
  ls.workspace = (ls.image->param_bytes + 63) / 64 * 64;
  ls.params.resize(ls.workspace + 64);
  for (size_t i = 0; i < k->ast->params.size(); ++i)
    memcpy(ls.params.data() + ls.image->param_offset[i], cfg.args[i], k->ast->params[i].size);
  ls.ranges = current_ranges();
  ls.group_count = nblocks / ls.cluster_size;
  if (const char* e = getenv("CUDASIM_CHECK")) {
    std::string s(e);
    ls.check_race = s.find("race") != s.npos;
    ls.check_init = s.find("init") != s.npos;
    if (s.find("grid") != s.npos) ls.grid_check = std::make_unique<Grid>(ls, s.find("benign") != s.npos);
  }
  ls.started = t0;
  if (const char* e = getenv("CUDASIM_TIMEOUT")) ls.time_limit = atof(e);
  if (const char* e = getenv("CUDASIM_SEED")) {
    ls.seed = strtoull(e, nullptr, 0);
    ls.seeded = *e != 0;
  }

  uint32_t n = uint32_t(std::min<uint64_t>(worker_count(), ls.group_count));
  std::vector<std::unique_ptr<Worker>> workers;
  for (uint32_t i = 0; i < n; ++i) {
    workers.push_back(std::make_unique<Worker>());
    workers[i]->ls = &ls;
    workers[i]->grid = ls.grid_check.get();
    for (auto& p : workers[i]->grid_pages) p.first = ~0ull;
    workers[i]->id = i;
    workers[i]->rng.seed(uint32_t(ls.seed * 2654435761u + i * 40503u + 12345u));
  }
  auto guarded = [&](Worker& w) {
    // the host program may have changed the rounding mode or flush-to-zero
    struct Csr {
      unsigned old = _mm_getcsr();
      Csr() { _mm_setcsr(0x1f80); }
      ~Csr() { _mm_setcsr(old); }
    } csr;
    try {
      work(w);
    } catch (const std::exception& e) {
      std::lock_guard<std::mutex> lock(ls.mutex);
      if (!ls.stop.exchange(true)) {
        ls.result.fault = Fault::internal;
        ls.result.message = "kernel " + k->name + ": simulator error: " + e.what();
      }
    } catch (const SimFault& e) {
      std::lock_guard<std::mutex> lock(ls.mutex);
      if (!ls.stop.exchange(true)) {
        ls.result.fault = e.fault;
        ls.result.message = "kernel " + k->name + ": " + e.message;
      }
    }
  };
  std::vector<std::thread> threads_v;
  for (uint32_t i = 1; i < n; ++i) threads_v.emplace_back([&, i] { guarded(*workers[i]); });
  guarded(*workers[0]);
  for (auto& t : threads_v) t.join();

  Profile& p = ls.result.profile;
  p.kernel = k->name;
  p.grid = cfg.grid;
  p.block = cfg.block;
  Counters sum;
  for (auto& w : workers) {
    const Counters& c = w->count;
    for (int i = 0; i < C_count; ++i) sum.warp[i] += c.warp[i];
    sum.threads += c.threads;
    sum.mma_flops += c.mma_flops;
    sum.sectors_read += c.sectors_read;
    sum.sectors_written += c.sectors_written;
    sum.sectors_read_ideal += c.sectors_read_ideal;
    sum.sectors_written_ideal += c.sectors_written_ideal;
    sum.wavefronts += c.wavefronts;
    sum.wavefronts_ideal += c.wavefronts_ideal;
    if (w != workers[0]) {
      workers[0]->read.merge_from(w->read);
      workers[0]->written.merge_from(w->written);
    }
  }
  for (int i = 0; i < C_count; ++i) p.warp_instructions += sum.warp[i];
  p.thread_instructions = sum.threads;
  p.integer = sum.warp[C_integer];
  p.fp32 = sum.warp[C_fp32];
  p.half = sum.warp[C_half];
  p.convert = sum.warp[C_convert];
  p.special = sum.warp[C_special];
  p.control = sum.warp[C_control];
  p.mma = sum.warp[C_mma];
  p.load_global = sum.warp[C_load_global];
  p.store_global = sum.warp[C_store_global];
  p.load_shared = sum.warp[C_load_shared];
  p.store_shared = sum.warp[C_store_shared];
  p.load_local = sum.warp[C_load_local];
  p.store_local = sum.warp[C_store_local];
  p.load_const = sum.warp[C_load_const];
  p.async_copy = sum.warp[C_async];
  p.barrier = sum.warp[C_barrier];
  p.shuffle = sum.warp[C_shuffle];
  p.atomic = sum.warp[C_atomic];
  p.mma_flops = sum.mma_flops;
  p.global_sectors_read = sum.sectors_read;
  p.global_sectors_written = sum.sectors_written;
  p.global_sectors_read_ideal = sum.sectors_read_ideal;
  p.global_sectors_written_ideal = sum.sectors_written_ideal;
  p.unique_bytes_read = workers[0]->read.sectors() * 32;
  p.unique_bytes_written = workers[0]->written.sectors() * 32;
  p.shared_wavefronts = sum.wavefronts;
  p.shared_wavefronts_ideal = sum.wavefronts_ideal;
  p.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - t0).count();
  return std::move(ls.result);
}

}  // namespace cudasim
