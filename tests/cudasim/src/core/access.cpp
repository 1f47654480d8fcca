// Memory accesses: addresses, checks and counters, and what orders them.
#include "access.h"

#include "lanes.h"
#include "shadow.h"

namespace cudasim {

void fill_addresses(Warp& w, const Op& o, uint64_t* out) {
  int64_t off = o.imm;
  if (o.size2 == 8) {
    auto* a = w.r<uint64_t>(o.a);
    FOR_LANES out[i] = a[i] + uint64_t(off);
  } else if (o.size2 == 4) {
    auto* a = w.r<uint32_t>(o.a);
    FOR_LANES out[i] = uint32_t(a[i] + uint32_t(off));
  } else
    FOR_LANES out[i] = uint64_t(off);
}

static void shadow_lanes(Warp& w, uint32_t m, const uint64_t* addr, uint32_t bytes, Access a, bool atomic,
                         uint8_t* const* ptr, const uint8_t* const* data) {
  for (uint32_t t = m; t; t &= t - 1) {
    int l = __builtin_ctz(t);
    uint32_t off;
    Block* b = shared_target(w, uint32_t(addr[l]), &off);
    if (!b || !b->shadow) continue;
    Shadow& s = *b->shadow;
    uint64_t key = uint64_t(b->rank) << 32 | off;
    if (atomic && s.race) s.acquire(w, key);
    if (a == Access::read)
      s.read(w, l, off, bytes, atomic);
    else if (a == Access::write) {
      s.write(w, l, off, bytes, atomic, data ? data[l] : nullptr, ptr[l]);
      if (data) memcpy(ptr[l], data[l], bytes);  // now, so that a later lane compares with it
    } else {
      s.read(w, l, off, bytes, true);
      s.write(w, l, off, bytes, true, nullptr, ptr[l]);
    }
    if (atomic && a != Access::read && s.race) s.release(w, key);
  }
}

// Pointers of one request in any space, with checks and counters.
void resolve(Warp& w, uint32_t m, Space space, const uint64_t* addr, uint32_t bytes, Access a, uint8_t** ptr,
             bool count) {
  switch (space) {
    case Space::global:
    case Space::constant:
      global_pointers(w, m, addr, bytes, a, ptr);
      if (count && space == Space::global) {
        if (a != Access::write) count_global(w, m, addr, bytes, false);
        if (a != Access::read) count_global(w, m, addr, bytes, true);
      }
      break;
    case Space::shared:
    case Space::shared_cluster:
      shared_pointers(w, m, addr, bytes, a, ptr, nullptr);
      if (count) count_shared(w, m, addr, bytes);
      break;
    case Space::local:
      local_pointers(w, m, addr, bytes, ptr);
      break;
    case Space::param:
      FOR_LANES ptr[i] = reinterpret_cast<uint8_t*>(addr[i]);
      break;
    default: {
      uint32_t ms = mask_of([&](int i) { return (addr[i] & kWindowMask) == kSharedWindow; }) & m;
      uint32_t ml = mask_of([&](int i) { return (addr[i] & kWindowMask) == kLocalWindow; }) & m;
      uint8_t* tmp[32];
      for (auto [sm, sp] :
           {std::pair{ms, Space::shared}, std::pair{ml, Space::local}, std::pair{m & ~ms & ~ml, Space::global}}) {
        if (!sm) continue;
        if (sp == Space::global && sm == m) {
          resolve(w, sm, sp, addr, bytes, a, ptr, count);
          return;
        }
        resolve(w, sm, sp, addr, bytes, a, tmp, count);
        for (uint32_t t = sm; t; t &= t - 1) {
          int l = __builtin_ctz(t);
          ptr[l] = tmp[l];
        }
      }
    }
  }
}
void check_shadow(Warp& w, uint32_t m, Space space, const uint64_t* addr, uint32_t bytes, Access a, bool atomic,
                  uint8_t* const* ptr, const uint8_t* const* data) {
  if (!w.blk->shadow) return;
  if (space == Space::generic)
    m &= mask_of([&](int i) { return (addr[i] & kWindowMask) == kSharedWindow; });
  else if (space != Space::shared && space != Space::shared_cluster)
    return;
  if (m) shadow_lanes(w, m, addr, bytes, a, atomic, ptr, data);
}

uint32_t global_lanes(uint32_t m, Space space, const uint64_t* addr) {
  if (space == Space::global) return m;
  return space == Space::generic ? m & mask_of([&](int i) { return (addr[i] & kWindowMask) == 0; }) : 0;
}
void check_grid(Warp& w, uint32_t m, Space space, const uint64_t* addr, uint32_t bytes, uint32_t kind,
                const uint8_t* const* data) {
  if (uint32_t lanes = global_lanes(m, space, addr)) w.wk->grid->access(w, lanes, addr, bytes, kind, data);
}
void order_shared(Warp& w, uint32_t m, Space space, const uint64_t* addr, bool read, bool write) {
  Grid& g = *w.wk->grid;
  if (!g.orders) return;
  if (space == Space::generic)
    m &= mask_of([&](int i) { return (addr[i] & kWindowMask) == kSharedWindow; });
  else if (space != Space::shared && space != Space::shared_cluster)
    return;
  auto& at = w.blk->group->shared_grid;
  for (uint32_t t = m; t; t &= t - 1) {
    uint32_t off;
    Block* b = shared_target(w, uint32_t(addr[__builtin_ctz(t)]), &off);
    if (!b) continue;
    uint64_t key = uint64_t(b->rank) << 32 | off;
    if (read)
      if (auto it = at.find(key); it != at.end()) g.take_over(w, it->second);
    if (write) g.hand_over(w, at[key]);
  }
}

// The properties of an access that the check of races between CTAs needs.
uint32_t grid_kind(uint32_t flags, uint32_t kind) {
  return kind | (flags & M_VOLATILE && !(flags & M_BLOCK) ? uint32_t(Grid::Strong) : 0u) |
         (flags & M_CONSTANT ? uint32_t(Grid::Constant) : 0u);
}
uint32_t grid_order(uint32_t flags) {
  return (flags & M_ACQUIRE ? uint32_t(Grid::Acquire) : 0u) | (flags & M_RELEASE ? uint32_t(Grid::Release) : 0u);
}
// Reads the ordering and scope of a ld, st, atom or red.
uint32_t order_flags(Decoder& d, const AInstr& in) {
  uint32_t f = has(in, "volatile") || has(in, "relaxed") || has(in, "acquire") || has(in, "release") ||
                       has(in, "acq_rel") || has(in, "mmio")
                   ? M_VOLATILE
                   : 0u;
  if (has(in, "cta")) return f | M_BLOCK;
  if (has(in, "acquire") || has(in, "acq_rel")) f |= M_ACQUIRE;
  if (has(in, "release") || has(in, "acq_rel")) f |= M_RELEASE;
  if (f & (M_ACQUIRE | M_RELEASE)) d.image->has_fences = true;
  return f;
}

uint32_t vector_count(const AInstr& in) {
  for (auto q : in.mods)
    if (q.size() == 2 && q[0] == 'v' && (q[1] == '2' || q[1] == '4' || q[1] == '8')) return uint32_t(q[1] - '0');
  return 1;
}

Space space_of(const AInstr& in) {
  for (size_t i = 1; i < in.mods.size(); ++i) {
    auto q = in.mods[i];
    if (q == "global") return Space::global;
    if (q == "shared" || q == "shared::cta") return Space::shared;
    if (q == "shared::cluster") return Space::shared;  // the address says which CTA
    if (q == "local") return Space::local;
    if (q == "const") return Space::constant;
    if (q == "param" || q == "param::entry" || q == "param::func") return Space::param;
  }
  return Space::generic;
}

// Sets op.a / size2 / imm from an address operand. Returns the symbol's kind for .param handling.
Decoder::Sym address_operand(Decoder& d, const AOperand& o, Op& op) {
  if (o.kind != AOperand::addr) throw Decoder::Unsupported{"address expected"};
  op.imm = o.imm;
  Decoder::Sym none;
  if (o.elems.empty()) {
    op.size2 = 0;
    return none;
  }
  const AOperand& b = o.elems[0];
  if (b.kind == AOperand::reg || b.kind == AOperand::special) {
    int sz = d.reg_size(b);
    if (sz != 4 && sz != 8) throw Decoder::Unsupported{"address register width"};
    op.a = d.src(b, sz);
    op.size2 = uint8_t(sz);
    return none;
  }
  if (b.kind == AOperand::sym) {
    Decoder::Sym s = d.symbol(b);
    if (s.kind == Decoder::Sym::none) throw Decoder::Unsupported{"unknown symbol " + std::string(b.name)};
    if (s.kind == Decoder::Sym::local) {
      op.a = d.special(Special::local_base, 8, int64_t(s.value));
      op.size2 = 8;
    } else if (s.space == Space::shared) {
      op.a = d.special(Special::shared_base, 4, int64_t(s.value));
      op.size2 = 4;
    } else {
      op.size2 = 0;
      op.imm += int64_t(s.value);
    }
    return s;
  }
  throw Decoder::Unsupported{"address operand"};
}

}  // namespace cudasim
