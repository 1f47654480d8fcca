// The race and initialization checks of shared memory. shadow.h explains them.
#include "shadow.h"

#include <algorithm>

namespace cudasim {

uint32_t warp_number(const Warp& w) { return w.blk->rank * w.blk->nwarps + w.index; }

void start_clocks(Warp& w, uint32_t nwarps) {
  w.clock = 1;
  w.vc.assign(3 * (nwarps + Shadow::kAgents), 0);
  w.tensor_seen.assign(nwarps + Shadow::kAgents, 0);
  w.lane_known.assign(32 * 32, 0);
}

void join_clocks(std::vector<uint32_t>& into, const std::vector<uint32_t>& from) {
  if (into.size() < from.size()) into.resize(from.size(), 0);
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

// All lanes of the warp now know each other's past.
static void join_lanes(Warp& w) { std::fill(w.lane_known.begin(), w.lane_known.end(), w.clock); }

void note_barrier(Block& b, const std::vector<uint32_t>& arrived, const std::vector<uint32_t>& released) {
  if (!b.shadow || !b.shadow->race) return;
  std::vector<uint32_t> all;
  for (uint32_t i : arrived) {
    Warp& w = *b.warps[i];
    w.vc[warp_number(w)] = w.clock;
    join_clocks(all, w.vc);
  }
  for (uint32_t i : released) {
    Warp& w = *b.warps[i];
    join_clocks(w.vc, all);
    join_lanes(w);
  }
  for (uint32_t i : arrived) b.warps[i]->clock++;
}

void note_syncwarp(Warp& w, uint32_t m) {
  if (!w.blk->shadow || !w.blk->shadow->race) return;
  for (uint32_t t = m; t; t &= t - 1) {
    int l = __builtin_ctz(t);
    for (uint32_t u = m; u; u &= u - 1) w.lane_known[size_t(l) * 32 + size_t(__builtin_ctz(u))] = w.clock;
  }
  // what one lane knew of others, the others now know
  for (int k = 0; k < 32; ++k) {
    uint32_t best = 0;
    for (uint32_t t = m; t; t &= t - 1) best = std::max(best, w.lane_known[size_t(__builtin_ctz(t)) * 32 + size_t(k)]);
    for (uint32_t t = m; t; t &= t - 1) w.lane_known[size_t(__builtin_ctz(t)) * 32 + size_t(k)] = best;
  }
  w.clock++;
}

void Shadow::reset(uint32_t n, uint32_t warps, bool r, bool i) {
  bytes = n;
  nwarps = warps;
  race = r;
  init = i;
  valid.assign(n, 0);
  flight.assign(n, 0);
  sync.clear();
  if (race) {
    writes.assign(n, {});
    readers.assign(n, 0);
    read_clock.assign(size_t(n) * (warps + kAgents), 0);
    read_lanes.assign(size_t(n) * (warps + kAgents), 0);
    read_line.assign(n, 0);
  }
}

static std::string thread_name(const Warp& w, uint32_t warp, uint32_t lane) {
  if (warp == tensor_core(*w.blk->group)) return "a tcgen05.mma whose tcgen05.commit has not been waited for";
  if (warp >= w.blk->group->order.size()) return "the bulk copy engine";
  const Block& b = *w.blk->group->blocks[warp / w.blk->nwarps];
  uint32_t t = (warp % w.blk->nwarps) * 32 + lane;
  const Dim3& d = b.ls->block;
  std::string s = "thread (" + std::to_string(t % d.x) + "," + std::to_string(t / d.x % d.y) + "," +
                  std::to_string(t / d.x / d.y) + ")";
  if (b.group->blocks.size() > 1) s += " of block " + std::to_string(b.linear);
  return s;
}
[[noreturn]] static void race_fault(Warp& w, int lane, uint32_t off, const char* now, const char* before,
                                    uint32_t other_warp, uint32_t other_lane, uint32_t line) {
  fault(Fault::shared_race, lane,
        std::string("shared memory race: ") + now + " of shared address " + hex(off + kSharedBase) + " (byte " +
            std::to_string(off) + " of the block's shared memory) is not ordered after a " + before + " by " +
            thread_name(w, other_warp, other_lane) + (line ? " at PTX line " + std::to_string(line) : std::string()));
}
static uint32_t line_of(const Warp& w) {
  if (!w.frame || !w.pc) return 0;
  const AInstr* i = w.frame->fn->code[w.pc - 1].src;
  return i ? i->line : 0;
}

static bool ordered(const Warp& w, int lane, uint32_t me, uint32_t other, uint32_t other_lane, uint32_t clock) {
  if (other != me) return clock <= w.vc[other];  // another warp, or the copy engine
  if (int(other_lane) == lane) return true;
  return clock <= w.lane_known[size_t(lane) * 32 + other_lane];
}

void note_proxy_fence(Warp& w) {
  if (!w.blk->shadow || !w.blk->shadow->race) return;
  size_t n = clock_count(w);
  w.vc[warp_number(w)] = w.clock;
  for (size_t i = 0; i < n; ++i) w.vc[n + i] = std::max(w.vc[n + i], w.vc[i]);
  w.clock++;
}

void note_tensor_fence(Warp& w, bool after_sync) {
  if (!w.blk->ls->check_race) return;
  const auto published = w.vc.begin() + long(2 * clock_count(w));
  if (after_sync)
    std::copy(published, w.vc.end(), w.tensor_seen.begin());
  else
    published[warp_number(w)] = w.clock++;
}

void Shadow::proxy_fault(Warp& w, int lane, uint32_t i, const char* access) const {
  const Write& wr = writes[i];
  fault(Fault::shared_race, lane,
        std::string("the async proxy ") + access + " shared address " + hex(i + kSharedBase) +
            ", written by an ordinary store of " + thread_name(w, wr.warp, wr.lane) + " at PTX line " +
            std::to_string(wr.line) + ", without a fence.proxy.async in between");
}

void Shadow::read(Warp& w, int lane, uint32_t off, uint32_t n, bool is_atomic, bool via_async, uint32_t tensor_clock) {
  uint32_t me = race ? warp_number(w) : 0, line = line_of(w);
  const uint32_t reader = tensor_clock ? tensor_core(*w.blk->group) : me, clock = tensor_clock ? tensor_clock : w.clock;
  for (uint32_t i = off; i < off + n; ++i) {
    if (init && !valid[i])
      fault(flight[i] ? Fault::shared_race : Fault::uninitialized_shared, lane,
            flight[i] ? "read of shared address " + hex(i + kSharedBase) +
                            " while an asynchronous copy to it is in flight (missing wait)"
                      : "read of uninitialized shared address " + hex(i + kSharedBase) + " (byte " + std::to_string(i) +
                            " of the block's shared memory)");
    if (!race) continue;
    if (flight[i])
      fault(Fault::shared_race, lane,
            "read of shared address " + hex(i + kSharedBase) +
                " while an asynchronous copy to it is in flight (missing wait)");
    const Write& wr = writes[i];
    if (wr.clock && !(is_atomic && wr.kind == atomic) && !ordered(w, lane, me, wr.warp, wr.lane, wr.clock))
      race_fault(w, lane, i, "read", wr.kind == async ? "asynchronous copy" : "write", wr.warp, wr.lane, wr.line);
    if (via_async && hidden_from_async(w, i)) proxy_fault(w, lane, i, "reads");
    if (is_atomic) continue;  // an atomic is remembered as a write
    size_t k = size_t(reader) * bytes + i;
    if (read_clock[k] != clock) {
      readers[i] |= 1ull << (reader & 63);
      read_clock[k] = clock;
      read_lanes[k] = 0;
    }
    read_lanes[k] |= 1u << lane;
    read_line[i] = line;
  }
}

void Shadow::write(Warp& w, int lane, uint32_t off, uint32_t n, bool is_atomic, const uint8_t* data,
                   const uint8_t* old) {
  uint32_t me = race ? warp_number(w) : 0, line = line_of(w);
  for (uint32_t i = off; i < off + n; ++i) {
    if (race) {
      if (flight[i])
        fault(Fault::shared_race, lane,
              "write of shared address " + hex(i + kSharedBase) +
                  " while an asynchronous copy to it is in flight (missing wait)");
      Write& wr = writes[i];
      bool same = data && data[i - off] == old[i - off];
      if (wr.clock && !same && !(is_atomic && wr.kind == atomic) && !ordered(w, lane, me, wr.warp, wr.lane, wr.clock))
        race_fault(w, lane, i, "write", wr.kind == async ? "asynchronous copy" : "write", wr.warp, wr.lane, wr.line);
      each_read(i, [&](uint32_t k, uint32_t c) {
        uint32_t lanes = read_lanes[size_t(k) * bytes + i];
        if (k != me) {
          if (c > w.vc[k]) race_fault(w, lane, i, "write", "read", k, uint32_t(__builtin_ctz(lanes)), read_line[i]);
        } else {
          for (uint32_t t = lanes & ~(1u << lane); t; t &= t - 1) {
            uint32_t l = uint32_t(__builtin_ctz(t));
            if (!ordered(w, lane, me, me, l, c)) race_fault(w, lane, i, "write", "read", me, l, read_line[i]);
          }
        }
      });
      wr = {w.clock, uint16_t(me), uint8_t(lane), uint8_t(is_atomic ? atomic : plain), line};
    }
    valid[i] = 1;
  }
}

void Shadow::issue(Warp& w, int lane, uint32_t off, uint32_t n, bool bulk) {
  uint32_t me = race ? warp_number(w) : 0;
  for (uint32_t i = off; i < off + n; ++i) {
    if (race) {
      const Write& wr = writes[i];
      if (wr.clock && !ordered(w, lane, me, wr.warp, wr.lane, wr.clock))
        race_fault(w, lane, i, "asynchronous write", "write", wr.warp, wr.lane, wr.line);
      if (bulk && hidden_from_async(w, i)) proxy_fault(w, lane, i, "writes");
      each_read(i, [&](uint32_t k, uint32_t c) {
        uint32_t lanes = read_lanes[size_t(k) * bytes + i];
        if (k != me) {
          if (c > w.vc[k])
            race_fault(w, lane, i, "asynchronous write", "read", k, uint32_t(__builtin_ctz(lanes)), read_line[i]);
          return;
        }
        for (uint32_t t = lanes & ~(1u << lane); t; t &= t - 1) {
          uint32_t l = uint32_t(__builtin_ctz(t));
          if (!ordered(w, lane, me, me, l, c))
            race_fault(w, lane, i, "asynchronous write", "read", me, l, read_line[i]);
        }
      });
    }
    if (flight[i] < 255) flight[i]++;
  }
}

void Shadow::land(Warp& w, int lane, uint32_t off, uint32_t n, uint32_t line) {
  uint32_t me = race ? warp_number(w) : 0;
  for (uint32_t i = off; i < off + n; ++i) {
    if (flight[i]) flight[i]--;
    if (race) writes[i] = {w.clock, uint16_t(me), uint8_t(lane), uint8_t(async), line};
    valid[i] = 1;
  }
}

void Shadow::land_async(Group& g, uint32_t off, uint32_t n, uint64_t key) {
  uint32_t agent = uint32_t(g.order.size());
  g.async_clock++;
  for (uint32_t i = off; i < off + n; ++i) {
    if (flight[i]) flight[i]--;
    if (race) writes[i] = {g.async_clock, uint16_t(agent), 0, uint8_t(async), 0};
    valid[i] = 1;
  }
  if (race) {
    auto& v = sync[key];
    if (v.size() <= agent) v.resize(agent + 1, 0);
    v[agent] = g.async_clock;
  }
}

void Shadow::release(Warp& w, uint64_t key) {
  if (!race) return;
  w.vc[warp_number(w)] = w.clock;
  join_clocks(sync[key], w.vc);
  w.clock++;
}
void Shadow::acquire(Warp& w, uint64_t key) {
  if (!race) return;
  auto it = sync.find(key);
  if (it != sync.end()) join_clocks(w.vc, it->second);
}

}  // namespace cudasim
