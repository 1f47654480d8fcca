// cp.async: copies of up to 16 bytes per lane.
#include "access.h"
#include "async.h"
#include "select.h"
#include "shadow.h"

namespace cudasim {

namespace {

// a/size2/imm: destination; ext n: {src imm, src reg size, kind of 4th operand: 0 none 1 src-size 2 ignore-src, negate}
void cp_async(Warp& w, const Op& o, uint32_t m) {
  const OpExt& e = *o.ext;
  uint64_t dst[32], src[32];
  uint8_t *dp[32], *sp[32];
  fill_addresses(w, o, dst);
  uint32_t bytes = o.size;
  for (int i = 0; i < 32; ++i)
    src[i] = (e.n[1] == 8 ? w.r<uint64_t>(o.b)[i] : e.n[1] == 4 ? w.r<uint32_t>(o.b)[i] : 0) + uint64_t(e.n[0]);
  shared_pointers(w, m, dst, bytes, Access::write, dp, &o);
  uint32_t size[32];
  for (int i = 0; i < 32; ++i) size[i] = bytes;
  if (e.n[2] == 1)
    for (int i = 0; i < 32; ++i) size[i] = w.r<uint32_t>(o.c)[i];
  if (e.n[2] == 2) {
    uint32_t ign = w.p(o.c) ^ (e.n[3] ? FULL : 0);
    for (int i = 0; i < 32; ++i)
      if (ign >> i & 1) size[i] = 0;
  }
  uint32_t full = 0, part = 0;
  for (uint32_t t = m; t; t &= t - 1) {
    int l = __builtin_ctz(t);
    if (size[l] > bytes)
      fault(Fault::bad_launch, l,
            "cp.async src-size " + std::to_string(size[l]) + " is larger than cp-size " + std::to_string(bytes));
    if (size[l] == bytes)
      full |= 1u << l;
    else if (size[l])
      part |= 1u << l;
  }
  if (full) {
    global_pointers(w, full, src, bytes, Access::read, sp);
    const uint64_t before = w.wk->count.sectors_read;
    count_global(w, full, src, bytes, false);
    w.wk->count.async_sectors_read += w.wk->count.sectors_read - before;
    w.wk->count.async_sectors_received += w.wk->count.sectors_read - before;
    if (w.wk->grid) w.wk->grid->access(w, full, src, bytes, Grid::Read, nullptr);
  }
  PendingCopy& c = w.copies.push();
  c.mask = m;
  c.bytes = uint8_t(bytes);
  c.op = &o;
  for (uint32_t t = m; t; t &= t - 1) {
    int l = __builtin_ctz(t);
    c.dst[l] = uint32_t(dp[l] - w.blk->shared);
    c.group[l] = w.copy_group[l];
    if (full >> l & 1) {
      if (bytes == 16)
        memcpy(c.data[l], sp[l], 16);
      else
        memcpy(c.data[l], sp[l], bytes);
    } else {
      memset(c.data[l], 0, bytes);
      if (part >> l & 1) {
        if (src[l] & (bytes - 1)) fault(Fault::misaligned, l, "misaligned cp.async source " + hex(src[l]));
        if (!global_ok(*w.wk, src[l], size[l])) {
          uint64_t a[32];
          a[l] = src[l];
          for (auto& x : a) x = src[l];
          global_pointers(w, 1u << l, a, 1, Access::read, sp);
          fault(Fault::global_out_of_bounds, l, "cp.async reads past the end of an allocation at " + hex(src[l]));
        }
        if (w.wk->grid) w.wk->grid->access_range(w, l, src[l], size[l], Grid::Read);
        memcpy(c.data[l], reinterpret_cast<void*>(src[l]), size[l]);
      }
    }
  }
  count_shared(w, m, dst, bytes);
  if (w.blk->shadow)
    for (uint32_t t = m; t; t &= t - 1) {
      int l = __builtin_ctz(t);
      w.blk->shadow->issue(w, l, c.dst[l], bytes, false);
    }
  if (w.wk->ls->seeded && !w.blk->shadow && w.wk->random(4) == 0) {
    land_copy(w, c, m);
    w.copies.pop_finished(&w.copy_base);
  }
}
void cp_commit(Warp& w, const Op&, uint32_t m) {
  for (uint32_t t = m; t; t &= t - 1) w.copy_group[__builtin_ctz(t)]++;
}
void cp_wait(Warp& w, const Op& o, uint32_t m) { complete_copies(w, m, uint32_t(o.imm), o.flags & 1); }
void cp_mbar_arrive(Warp& w, const Op& o, uint32_t m) {
  uint64_t addr[32];
  fill_addresses(w, o, addr);
  for (uint32_t t = m; t; t &= t - 1) {
    int l = __builtin_ctz(t);
    Block* b;
    uint32_t off;
    uint8_t* p = mbar_pointer(w, l, addr[l], &b, &off);
    Mbar x = load_mbar(p);
    need_valid(x, l, off);
    if (!(o.flags & 1)) {
      x.pending++;
      store_mbar(p, x);
    }
    if (b->shadow) b->shadow->release(w, sync_key(b->rank, off));
    if (w.wk->grid) w.wk->grid->hand_over(w, w.blk->group->shared_grid[sync_key(b->rank, off)]);
    w.arrives.push_back({b->rank, off, uint32_t(l), w.copy_base + w.copies.size()});
  }
  w.blk->group->mbar_events++;
}

bool sel_cp(Decoder& d, const AInstr& in, Op& op) {
  op.cls = C_async;
  if (has(in, "bulk")) return select_bulk(d, in, op);
  if (in.mods.size() < 2 || in.mods[1] != "async") return false;
  if (has(in, "commit_group")) return done(op, cp_commit);
  if (has(in, "wait_all")) {
    op.flags = 1;
    return done(op, cp_wait);
  }
  if (has(in, "wait_group")) {
    op.imm = in.ops[0].imm;
    return done(op, cp_wait);
  }
  if (has(in, "mbarrier")) {
    address_operand(d, in.ops[0], op);
    op.flags = has(in, "noinc");
    return done(op, cp_mbar_arrive);
  }
  if (in.ops.size() < 3 || in.ops[2].kind != AOperand::num) return false;
  OpExt& e = d.ext(op);
  Op s;
  address_operand(d, in.ops[1], s);
  address_operand(d, in.ops[0], op);
  op.b = s.a;
  e.n = {s.imm, s.size2, 0, 0};
  op.size = uint8_t(in.ops[2].imm);
  if (in.ops.size() > 3) {
    const AOperand& x = in.ops[3];
    int sz = x.kind == AOperand::reg ? d.reg_size(x) : 4;
    if (x.kind == AOperand::reg && sz == 0) {
      bool neg;
      op.c = d.pred(x, &neg);
      e.n[2] = 2;
      e.n[3] = neg;
    } else if (sz == 4) {
      op.c = d.src(x, 4);
      e.n[2] = 1;
    }
    // a 64-bit register is a cache policy
  }
  return done(op, cp_async);
}

}  // namespace

void register_async(SelectorMap& m) {
  m["cp"] = sel_cp;
  m["tensormap"] = [](Decoder&, const AInstr&, Op&) { return false; };
}

}  // namespace cudasim
