// Bulk copies: cp.async.bulk of ranges and of tensors, and cp.reduce.async.bulk.
#include <algorithm>

#include "access.h"
#include "async.h"
#include "numeric.h"
#include "select.h"
#include "shadow.h"

namespace cudasim {

namespace {

uint64_t operand_address(Warp& w, uint32_t off, int64_t size, int64_t imm, int lane) {
  return (size == 8 ? w.r<uint64_t>(off)[lane] : size == 4 ? uint64_t(w.r<uint32_t>(off)[lane]) : 0) + uint64_t(imm);
}
struct Addr {
  uint32_t off = 0;
  int64_t size = 0, imm = 0;
};
uint64_t address_of(Warp& w, const OpExt& e, int k, int lane) {  // k-th {off, size, imm} triple in n
  return operand_address(w, uint32_t(e.n[size_t(3 * k)]), e.n[size_t(3 * k + 1)], e.n[size_t(3 * k + 2)], lane);
}
uint32_t shared_offset(Warp& w, int lane, uint64_t addr, uint64_t bytes, uint32_t align, Block** blk) {
  uint32_t off;
  Block* b = shared_target(w, uint32_t(addr), &off);
  if (!b || off + bytes > b->shared_bytes)
    fault(Fault::shared_out_of_bounds, lane,
          "bulk copy of " + std::to_string(bytes) + " bytes at shared address " + hex(uint32_t(addr)) +
              " is outside the block's " + std::to_string(w.blk->shared_bytes) + " bytes");
  if (uint32_t(addr) & (align - 1))
    fault(Fault::misaligned, lane,
          "bulk copy at shared address " + hex(uint32_t(addr)) + " is not aligned to " + std::to_string(align) +
              " bytes");
  *blk = b;
  return off;
}
void check_global(Warp& w, int lane, uint64_t addr, uint64_t bytes, bool write) {
  if (bytes && !global_ok(*w.wk, addr, bytes))
    fault(Fault::global_out_of_bounds, lane,
          std::string("bulk copy ") + (write ? "writes " : "reads ") + std::to_string(bytes) + " bytes at " +
              hex(addr) + " outside every allocation");
}
// `copies`: how many blocks receive what is read.
void count_bulk(Warp& w, uint64_t addr, uint64_t bytes, bool write, uint32_t copies = 0) {
  if (!bytes) return;
  uint64_t s = ((addr + bytes - 1) >> 5) - (addr >> 5) + 1;
  Counters& c = w.wk->count;
  (write ? c.sectors_written : c.sectors_read) += s;
  (write ? c.sectors_written_ideal : c.sectors_read_ideal) += (bytes + 31) / 32;
  if (!write) {
    c.async_sectors_read += s;
    c.async_sectors_received += s * copies;
  }
  (write ? w.wk->written : w.wk->read).add(addr, uint32_t(bytes));
}

void issue_bulk(Warp& w, int lane, std::vector<uint8_t> data, uint32_t dst_cta, uint32_t dst, uint32_t mbar_cta,
                uint32_t mbar, uint8_t swizzle) {
  Group& g = *w.blk->group;
  BulkCopy c;
  c.dst_cta = dst_cta;
  c.dst = dst;
  c.mbar_cta = mbar_cta;
  c.mbar = mbar;
  c.swizzle = swizzle;
  c.data = std::move(data);
  Block& b = *g.blocks[dst_cta];
  if (&b != w.blk) reach_peer(w, lane, b, false);
  if (b.shadow) {
    if (c.swizzle) {
      for (size_t i = 0; i < c.data.size(); i += 16)
        b.shadow->issue(w, lane, swizzled(dst + uint32_t(i) + kSharedBase, swizzle) - kSharedBase, 16, true);
    } else
      b.shadow->issue(w, lane, dst, uint32_t(c.data.size()), true);
  }
  if (w.wk->ls->seeded && w.wk->random(4) == 0)
    land_bulk(g, c);
  else
    g.bulk.push_back(std::move(c));
  g.mbar_events++;  // sleepers check again
}

uint32_t receivers(Warp& w, const OpExt& e, int lane, bool multicast) {
  return multicast ? uint32_t(__builtin_popcount(w.r<uint16_t>(e.v[1][0])[lane])) : 1;
}
// multicast: one copy per CTA of the mask, at the same offsets
template <class F>
void each_target(Warp& w, const OpExt& e, int lane, bool multicast, uint32_t own, F f) {
  if (!multicast) {
    f(own);
    return;
  }
  uint32_t mask = w.r<uint16_t>(e.v[1][0])[lane];
  for (uint32_t r = 0; r < 16; ++r)
    if (mask >> r & 1) {
      if (r >= w.blk->group->blocks.size())
        fault(Fault::shared_out_of_bounds, lane, "multicast mask " + hex(mask) + " names a CTA outside the cluster");
      f(r);
    }
}

// The CTA whose mbarrier a copy to CTA `target` completes on. With cta_group::2, a pair has one, which the parity of
// the given mbarrier's CTA chooses.
uint32_t signalled(const Op& o, uint32_t target, const Block& mbar) {
  if (!(o.flags & 1)) return mbar.rank;
  return o.flags & 8 ? (target & ~1u) | (mbar.rank & 1) : target;
}

// ext n: dst, src, mbar triples; v[0] {size}; v[1] {mask}; flags: 1 multicast, 2 source is shared, 8 cta_group::2
void bulk_load(Warp& w, const Op& o, uint32_t m) {
  const OpExt& e = *o.ext;
  for (uint32_t t = m; t; t &= t - 1) {
    int l = __builtin_ctz(t);
    uint64_t dst = address_of(w, e, 0, l), src = address_of(w, e, 1, l), mb = address_of(w, e, 2, l);
    uint32_t size = w.r<uint32_t>(e.v[0][0])[l];
    if (size % 16) fault(Fault::misaligned, l, "bulk copy size " + std::to_string(size) + " is not a multiple of 16");
    Block *b, *mbb;
    uint32_t off = shared_offset(w, l, dst, size, 16, &b), moff;
    mbar_pointer(w, l, mb, &mbb, &moff, false);
    std::vector<uint8_t> data(size);
    if (o.flags & 2) {
      Block* sb;
      uint32_t so = shared_offset(w, l, src, size, 16, &sb);
      if (sb != w.blk) reach_peer(w, l, *sb, true);
      if (sb->shadow) sb->shadow->read(w, l, so, size, false, true);
      memcpy(data.data(), sb->shared + so, size);
    } else {
      if (src & 15) fault(Fault::misaligned, l, "bulk copy source " + hex(src) + " is not aligned to 16 bytes");
      check_global(w, l, src, size, false);
      count_bulk(w, src, size, false, receivers(w, e, l, o.flags & 1));
      if (w.wk->grid) w.wk->grid->access_range(w, l, src, size, Grid::Read);
      memcpy(data.data(), reinterpret_cast<void*>(src), size);
    }
    each_target(w, e, l, o.flags & 1, b->rank,
                [&](uint32_t r) { issue_bulk(w, l, data, r, off, signalled(o, r, *mbb), moff, 0); });
  }
}

void reduce_bytes(uint8_t* to, const uint8_t* from, size_t n, int op, Ty t);
uint32_t bulk_kind(bool reduce) { return reduce ? Grid::Write | Grid::Atomic | Grid::Strong : uint32_t(Grid::Write); }

// flags: 4 reduce (imm op, d type)
void bulk_store(Warp& w, const Op& o, uint32_t m) {
  const OpExt& e = *o.ext;
  for (uint32_t t = m; t; t &= t - 1) {
    int l = __builtin_ctz(t);
    uint64_t dst = address_of(w, e, 0, l), src = address_of(w, e, 1, l);
    uint32_t size = w.r<uint32_t>(e.v[0][0])[l];
    if (size % 16) fault(Fault::misaligned, l, "bulk copy size " + std::to_string(size) + " is not a multiple of 16");
    if (dst & 15) fault(Fault::misaligned, l, "bulk copy destination " + hex(dst) + " is not aligned to 16 bytes");
    Block* b;
    uint32_t off = shared_offset(w, l, src, size, 16, &b);
    check_global(w, l, dst, size, true);
    count_bulk(w, dst, size, true);
    if (b->shadow) b->shadow->read(w, l, off, size, false, true);
    bool red = o.flags & 4;
    if (w.wk->grid) w.wk->grid->access_range(w, l, dst, size, bulk_kind(red));
    int rop = int(o.imm);
    Ty rt = Ty(o.d);
    w.bulk[l].push_back({w.bulk_group[l], [=] {
                           if (red)
                             reduce_bytes(reinterpret_cast<uint8_t*>(dst), b->shared + off, size, rop, rt);
                           else
                             memcpy(reinterpret_cast<void*>(dst), b->shared + off, size);
                         }});
  }
}
void bulk_commit(Warp& w, const Op&, uint32_t m) {
  for (uint32_t t = m; t; t &= t - 1) w.bulk_group[__builtin_ctz(t)]++;
}
void bulk_wait(Warp& w, const Op& o, uint32_t m) { finish_bulk(w, m, uint32_t(o.imm), false); }

// --- tensor copies ------------------------------------------------------------------------------------------------

TensorMap tensor_map(Warp& w, int lane, uint64_t addr) {
  TensorMap tm;
  if (addr & 63) fault(Fault::misaligned, lane, "tensor map at " + hex(addr) + " is not aligned to 64 bytes");
  memcpy(static_cast<void*>(&tm), generic_pointer(w, lane, addr, sizeof tm, Access::read), sizeof tm);
  if (tm.magic != TensorMap().magic)
    fault(Fault::internal, lane, "the memory at " + hex(addr) + " does not hold a tensor map");
  if (tm.interleave) fault(Fault::unsupported_instruction, lane, "interleaved tensor maps are not supported");
  if (tm.swizzle > 3) fault(Fault::unsupported_instruction, lane, "this tensor map swizzle is not supported");
  return tm;
}

// Calls f(global address or 0, shared offset, bytes) for every run of elements along dimension 0.
template <class F>
void walk_box(const TensorMap& tm, const int32_t* c, F f) {
  int rank = tm.rank;
  uint32_t es[5], n[5];
  for (int i = 0; i < 5; ++i) {
    es[i] = i < rank && tm.element_stride[i] > 1 ? tm.element_stride[i] : 1;
    n[i] = i < rank ? (tm.box_dim[i] + es[i] - 1) / es[i] : 1;
  }
  uint32_t eb = tm.element_bytes, row = n[0] * eb, off = 0;
  uint32_t i[5] = {};
  for (i[4] = 0; i[4] < n[4]; ++i[4])
    for (i[3] = 0; i[3] < n[3]; ++i[3])
      for (i[2] = 0; i[2] < n[2]; ++i[2])
        for (i[1] = 0; i[1] < n[1]; ++i[1]) {
          uint64_t base = tm.global_address;
          bool in = true;
          for (int d = 1; d < rank; ++d) {
            int64_t x = int64_t(c[d]) + int64_t(i[d]) * es[d];
            in = in && x >= 0 && x < int64_t(tm.global_dim[d]);
            base += uint64_t(x) * tm.global_stride_bytes[d - 1];
          }
          if (es[0] == 1) {
            int64_t lo = std::clamp<int64_t>(-int64_t(c[0]), 0, n[0]),
                    hi = std::clamp<int64_t>(int64_t(tm.global_dim[0]) - c[0], 0, n[0]);
            if (!in || hi <= lo)
              f(0, off, row);
            else {
              if (lo) f(0, off, uint32_t(lo) * eb);
              f(base + uint64_t(int64_t(c[0]) + lo) * eb, off + uint32_t(lo) * eb, uint32_t(hi - lo) * eb);
              if (hi < n[0]) f(0, off + uint32_t(hi) * eb, (n[0] - uint32_t(hi)) * eb);
            }
          } else {
            for (uint32_t x = 0; x < n[0]; ++x) {
              int64_t q = int64_t(c[0]) + int64_t(x) * es[0];
              f(in && q >= 0 && q < int64_t(tm.global_dim[0]) ? base + uint64_t(q) * eb : 0, off + x * eb, eb);
            }
          }
          off += row;
        }
}
uint32_t box_bytes(const TensorMap& tm) {
  uint32_t n = tm.element_bytes;
  for (int i = 0; i < tm.rank; ++i) {
    uint32_t s = tm.element_stride[i] > 1 ? tm.element_stride[i] : 1;
    n *= (tm.box_dim[i] + s - 1) / s;
  }
  return n;
}
void coordinates(Warp& w, const OpExt& e, const TensorMap& tm, int lane, int32_t* c) {
  if (e.v[2].size() != tm.rank)
    fault(Fault::internal, lane,
          "the instruction has " + std::to_string(e.v[2].size()) + " coordinates, the tensor map has rank " +
              std::to_string(tm.rank));
  for (size_t i = 0; i < 5; ++i) c[i] = i < e.v[2].size() ? w.r<int32_t>(e.v[2][i])[lane] : 0;
}

void tensor_load(Warp& w, const Op& o, uint32_t m) {
  const OpExt& e = *o.ext;
  for (uint32_t t = m; t; t &= t - 1) {
    int l = __builtin_ctz(t);
    uint64_t dst = address_of(w, e, 0, l), map = address_of(w, e, 1, l), mb = address_of(w, e, 2, l);
    TensorMap tm = tensor_map(w, l, map);
    int32_t c[5];
    coordinates(w, e, tm, l, c);
    uint32_t size = box_bytes(tm);
    Block *b, *mbb;
    uint32_t off = shared_offset(w, l, dst, size, 128, &b), moff;
    mbar_pointer(w, l, mb, &mbb, &moff, false);
    std::vector<uint8_t> data(size);
    walk_box(tm, c, [&](uint64_t src, uint32_t at, uint32_t n) {
      if (src) {
        check_global(w, l, src, n, false);
        count_bulk(w, src, n, false, receivers(w, e, l, o.flags & 1));
        if (w.wk->grid) w.wk->grid->access_range(w, l, src, n, Grid::Read);
        memcpy(&data[at], reinterpret_cast<void*>(src), n);
      } else if (tm.oob_fill)
        memset(&data[at], 0xff, n);
    });
    each_target(w, e, l, o.flags & 1, b->rank,
                [&](uint32_t r) { issue_bulk(w, l, data, r, off, signalled(o, r, *mbb), moff, tm.swizzle); });
  }
}
void tensor_store(Warp& w, const Op& o, uint32_t m) {
  const OpExt& e = *o.ext;
  for (uint32_t t = m; t; t &= t - 1) {
    int l = __builtin_ctz(t);
    uint64_t map = address_of(w, e, 0, l), src = address_of(w, e, 1, l);
    TensorMap tm = tensor_map(w, l, map);
    std::vector<int32_t> c(5);
    coordinates(w, e, tm, l, c.data());
    uint32_t size = box_bytes(tm);
    Block* b;
    uint32_t off = shared_offset(w, l, src, size, 128, &b);
    if (b->shadow) b->shadow->read(w, l, off, size, false, true);
    bool red = o.flags & 4;
    walk_box(tm, c.data(), [&](uint64_t g, uint32_t, uint32_t n) {
      if (!g) return;
      check_global(w, l, g, n, true);
      count_bulk(w, g, n, true);
      if (w.wk->grid) w.wk->grid->access_range(w, l, g, n, bulk_kind(red));
    });
    int rop = int(o.imm);
    // CUtensorMapDataType
    static const Ty types[] = {Ty::u8,  Ty::u16, Ty::u32,  Ty::s32, Ty::u64, Ty::s64, Ty::f16,
                               Ty::f32, Ty::f64, Ty::bf16, Ty::f32, Ty::f32, Ty::f32};
    Ty rt = tm.dtype < 13 ? types[tm.dtype] : Ty::u32;
    w.bulk[l].push_back({w.bulk_group[l], [=] {
                           std::vector<uint8_t> data(size);
                           for (uint32_t i = 0; i < size; i += 16)
                             memcpy(&data[i], b->shared + (swizzled(off + i + kSharedBase, tm.swizzle) - kSharedBase),
                                    std::min<uint32_t>(16, size - i));
                           walk_box(tm, c.data(), [&](uint64_t g, uint32_t at, uint32_t n) {
                             if (!g) return;
                             if (red)
                               reduce_bytes(reinterpret_cast<uint8_t*>(g), &data[at], n, rop, rt);
                             else
                               memcpy(reinterpret_cast<void*>(g), &data[at], n);
                           });
                         }});
  }
}

template <class T, class F>
void reduce_as(uint8_t* to, const uint8_t* from, size_t n, F f) {
  for (size_t i = 0; i + sizeof(T) <= n; i += sizeof(T)) {
    T v, old, now;
    memcpy(&v, from + i, sizeof v);
    T* p = reinterpret_cast<T*>(to + i);
    __atomic_load(p, &old, __ATOMIC_RELAXED);
    do now = f(old, v);
    while (!__atomic_compare_exchange(p, &old, &now, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED));
  }
}
// op: 0 add 1 min 2 max 3 and 4 or 5 xor 6 inc 7 dec
void reduce_bytes(uint8_t* to, const uint8_t* from, size_t n, int op, Ty t) {
  auto generic = [&](auto z) {
    using T = decltype(z);
    reduce_as<T>(to, from, n, [&](T a, T b) -> T {
      if (op == 1) return b < a ? b : a;
      if (op == 2) return b > a ? b : a;
      if constexpr (std::is_integral_v<T>) {
        if (op == 3) return a & b;
        if (op == 4) return a | b;
        if (op == 5) return a ^ b;
        if (op == 6) return a >= b ? T(0) : T(a + 1);
        if (op == 7) return a == 0 || a > b ? b : T(a - 1);
        return T(std::make_unsigned_t<T>(a) + std::make_unsigned_t<T>(b));
      } else
        return a + b;
    });
  };
  auto half = [&](auto dec, auto enc) {
    reduce_as<uint16_t>(to, from, n, [&](uint16_t a, uint16_t b) -> uint16_t {
      float x = dec(a), y = dec(b);
      return enc(op == 1 ? std::fmin(x, y) : op == 2 ? std::fmax(x, y) : x + y);
    });
  };
  switch (t) {
    case Ty::f32:
      generic(float());
      break;
    case Ty::f64:
      generic(double());
      break;
    case Ty::s32:
      generic(int32_t());
      break;
    case Ty::s64:
      generic(int64_t());
      break;
    case Ty::u64:
    case Ty::b64:
      generic(uint64_t());
      break;
    case Ty::f16:
      half(f16_to_f32, f32_to_f16);
      break;
    case Ty::bf16:
      half(bf16_to_f32, f32_to_bf16);
      break;
    default:
      generic(uint32_t());
      break;
  }
}

void nothing(Warp&, const Op&, uint32_t) {}

void push_address(Decoder& d, const AOperand& o, OpExt& e) {
  Op t;
  address_operand(d, o, t);
  e.n.push_back(t.a);
  e.n.push_back(t.size2);
  e.n.push_back(t.imm);
}

}  // namespace

bool select_bulk(Decoder& d, const AInstr& in, Op& op) {
  op.cls = C_async;
  if (has(in, "commit_group")) return done(op, bulk_commit);
  if (has(in, "wait_group")) {
    op.imm = in.ops[0].imm;
    return done(op, bulk_wait);
  }
  if (has(in, "prefetch")) return done(op, nothing);
  bool tensor = has(in, "tensor"), reduce = in.mods[1] == "reduce", mc = has(in, "multicast::cluster");
  if (has(in, "cta_group::2")) op.flags |= 8;
  if (has(in, "im2col") || has(in, "im2col_no_offs") || has(in, "tile::gather4") || has(in, "tile::scatter4") ||
      has(in, "cp_mask"))
    return false;
  if (reduce) {
    static const char* ops[] = {"add", "min", "max", "and", "or", "xor", "inc", "dec"};
    int k = -1;
    for (int i = 0; i < 8; ++i)
      if (has(in, ops[i])) k = i;
    if (k < 0) return false;
    op.imm = k;
    op.flags |= 4;
    op.d = uint32_t(last_type(in));
  }
  OpExt& e = d.ext(op);
  // the first state space is the destination
  std::string_view first, second;
  for (size_t i = 1; i < in.mods.size(); ++i)
    if (in.mods[i] == "global" || in.mods[i].substr(0, 6) == "shared") {
      if (first.empty())
        first = in.mods[i];
      else if (second.empty())
        second = in.mods[i];
    }
  bool to_shared = first != "global";
  if (tensor) {
    const AOperand& mapop = to_shared ? in.ops[1] : in.ops[0];
    if (mapop.kind != AOperand::addr || mapop.elems.size() != 2) return false;
    AOperand base = mapop;
    base.elems.resize(1);
    if (to_shared) {
      push_address(d, in.ops[0], e);
      push_address(d, base, e);
      push_address(d, in.ops[2], e);
    } else {
      push_address(d, base, e);
      push_address(d, in.ops[1], e);
    }
    const AOperand& cs = mapop.elems[1];
    if (cs.kind == AOperand::vec)
      for (auto& x : cs.elems) e.v[2].push_back(d.src(x, 4));
    else
      e.v[2].push_back(d.src(cs, 4));
    if (mc) {
      if (in.ops.size() < 4) return false;
      op.flags |= 1;
      e.v[1].push_back(d.src(in.ops[3], 2));
    }
    return done(op, to_shared ? tensor_load : tensor_store);
  }
  push_address(d, in.ops[0], e);
  push_address(d, in.ops[1], e);
  e.v[0].push_back(d.src(in.ops[2], 4));
  if (to_shared) {
    if (reduce || in.ops.size() < 4) return false;
    push_address(d, in.ops[3], e);
    if (second != "global") op.flags |= 2;
    if (mc) {
      if (in.ops.size() < 5) return false;
      op.flags |= 1;
      e.v[1].push_back(d.src(in.ops[4], 2));
    }
    return done(op, bulk_load);
  }
  return done(op, bulk_store);
}

}  // namespace cudasim
