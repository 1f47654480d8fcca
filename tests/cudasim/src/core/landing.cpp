// When asynchronous copies take effect (async.h).
#include <algorithm>

#include "async.h"
#include "shadow.h"

namespace cudasim {

void land_copy(Warp& w, PendingCopy& c, uint32_t lanes) {
  for (uint32_t t = lanes; t; t &= t - 1) {
    int l = __builtin_ctz(t);
    if (c.bytes == 16)
      memcpy(w.blk->shared + c.dst[l], c.data[l], 16);
    else
      memcpy(w.blk->shared + c.dst[l], c.data[l], c.bytes);
    if (w.blk->shadow) w.blk->shadow->land(w, l, c.dst[l], c.bytes, c.op->src->line);
  }
  c.mask &= ~lanes;
}
static void pop_copies(Warp& w) { w.copies.pop_finished(&w.copy_base); }

void land_bulk(Group& g, BulkCopy& c) {
  Block& b = *g.blocks[c.dst_cta];
  for (size_t i = 0; i < c.data.size(); i += 16) {
    uint32_t n = uint32_t(std::min<size_t>(16, c.data.size() - i));
    uint32_t at = c.dst + uint32_t(i);
    if (c.swizzle) at = swizzled(at + kSharedBase, c.swizzle) - kSharedBase;
    memcpy(b.shared + at, c.data.data() + i, n);
    if (b.shadow) b.shadow->land_async(g, at, n, sync_key(c.mbar_cta, c.mbar));
  }
  uint8_t* p = g.blocks[c.mbar_cta]->shared + c.mbar;
  Mbar m = load_mbar(p);
  need_valid(m, -1, c.mbar);
  if (g.blocks[c.mbar_cta]->shadow && g.blocks[c.mbar_cta]->shadow->race && c.mbar_cta != c.dst_cta) {
    auto& v = g.blocks[c.mbar_cta]->shadow->sync[sync_key(c.mbar_cta, c.mbar)];
    if (v.size() <= g.order.size()) v.resize(g.order.size() + 1, 0);
    v[g.order.size()] = g.async_clock;
  }
  m.tx -= int32_t(c.data.size());
  settle(g, m);
  store_mbar(p, m);
}

static void land_arrive(Group& g, Warp& w, const PendingArrive& a) {
  for (size_t i = 0; i < w.copies.size() && w.copy_base + i < a.seq; ++i) {
    PendingCopy& c = w.copies[i];
    if (!(c.mask >> a.lane & 1)) continue;
    memcpy(w.blk->shared + c.dst[a.lane], c.data[a.lane], c.bytes);
    if (w.blk->shadow) w.blk->shadow->land_async(g, c.dst[a.lane], c.bytes, sync_key(a.cta, a.mbar));
    c.mask &= ~(1u << a.lane);
  }
  uint8_t* p = g.blocks[a.cta]->shared + a.mbar;
  Mbar m = load_mbar(p);
  need_valid(m, int(a.lane), a.mbar);
  arrive(g, m, 1, int(a.lane), a.mbar);
  store_mbar(p, m);
}

void complete_copies(Warp& w, uint32_t m, uint32_t keep, bool all) {
  for (size_t i = 0; i < w.copies.size(); ++i) {
    PendingCopy& c = w.copies[i];
    uint32_t lanes = 0;
    for (uint32_t t = c.mask & m; t; t &= t - 1) {
      int l = __builtin_ctz(t);
      if (all || c.group[l] + keep < w.copy_group[l]) lanes |= 1u << l;
    }
    if (lanes) land_copy(w, c, lanes);
  }
  pop_copies(w);
}

// Lands everything in flight that completes on this mbarrier.
bool deliver_to_mbar(Warp& self, uint32_t cta, uint32_t mbar) {
  Group& g = *self.blk->group;
  bool any = false;
  for (auto* w : g.order) {
    if (w->arrives.empty()) continue;
    std::vector<PendingArrive> keep, go;
    for (auto& a : w->arrives) (a.cta == cta && a.mbar == mbar ? go : keep).push_back(a);
    w->arrives = keep;
    for (auto& a : go) {
      land_arrive(g, *w, a);
      any = true;
    }
    pop_copies(*w);
  }
  for (size_t i = 0; i < g.bulk.size();) {
    if (g.bulk[i].mbar_cta == cta && g.bulk[i].mbar == mbar) {
      BulkCopy c = std::move(g.bulk[i]);
      g.bulk.erase(g.bulk.begin() + long(i));
      land_bulk(g, c);
      any = true;
    } else
      ++i;
  }
  return any;
}

void finish_bulk(Warp& w, uint32_t m, uint32_t keep, bool all_now) {
  for (uint32_t t = m; t; t &= t - 1) {
    int l = __builtin_ctz(t);
    auto& q = w.bulk[l];
    size_t out = 0;
    for (auto& s : q) {
      if (all_now || s.group + keep < w.bulk_group[l])
        s.run();
      else
        q[out++] = std::move(s);
    }
    q.resize(out);
  }
}

}  // namespace cudasim
