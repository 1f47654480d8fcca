// Loads, stores, atomics and address conversion.
#include "access.h"
#include "numeric.h"
#include "select.h"
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

namespace {

enum : uint32_t {
  M_SIGNED = 1,
  M_VOLATILE = 2,
  M_ACQUIRE = 4,
  M_RELEASE = 8,
  M_CONSTANT = 16,
  M_BLOCK = 32
};  // M_BLOCK: of .cta scope

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

template <class M, class R>
void load_as(uint8_t* const* ptr, uint32_t off, R* d, uint32_t m) {
  if (m == FULL) {
    for (int i = 0; i < 32; ++i) {
      M v;
      memcpy(&v, ptr[i] + off, sizeof v);
      d[i] = R(v);
    }
  } else {
    for (uint32_t t = m; t; t &= t - 1) {
      int i = __builtin_ctz(t);
      M v;
      memcpy(&v, ptr[i] + off, sizeof v);
      d[i] = R(v);
    }
  }
}
void load_element(Warp& w, uint8_t* const* ptr, uint32_t off, uint32_t dst, int reg, int mem, bool sign, uint32_t m) {
  auto to = [&](auto r) {
    using R = decltype(r);
    R* d = w.r<R>(dst);
    switch (mem) {
      case 1:
        sign ? load_as<int8_t>(ptr, off, d, m) : load_as<uint8_t>(ptr, off, d, m);
        break;
      case 2:
        sign ? load_as<int16_t>(ptr, off, d, m) : load_as<uint16_t>(ptr, off, d, m);
        break;
      case 4:
        sign ? load_as<int32_t>(ptr, off, d, m) : load_as<uint32_t>(ptr, off, d, m);
        break;
      default:
        load_as<uint64_t>(ptr, off, d, m);
        break;
    }
  };
  if (mem == 16) {
    auto* d = w.r<uint64_t>(dst);
    for (uint32_t t = m; t; t &= t - 1) {
      int i = __builtin_ctz(t);
      memcpy(d + 2 * i, ptr[i] + off, 16);
    }
  } else if (reg == 4)
    to(uint32_t());
  else if (reg == 8)
    to(uint64_t());
  else
    to(uint16_t());
}
template <class M, class R>
void store_as(uint8_t* const* ptr, uint32_t off, const R* s, uint32_t m) {
  if (m == FULL) {
    for (int i = 0; i < 32; ++i) {
      M v = M(s[i]);
      memcpy(ptr[i] + off, &v, sizeof v);
    }
  } else {
    for (uint32_t t = m; t; t &= t - 1) {
      int i = __builtin_ctz(t);
      M v = M(s[i]);
      memcpy(ptr[i] + off, &v, sizeof v);
    }
  }
}
void store_element(Warp& w, uint8_t* const* ptr, uint32_t off, uint32_t src, int reg, int mem, uint32_t m) {
  auto from = [&](auto r) {
    using R = decltype(r);
    const R* s = w.r<R>(src);
    switch (mem) {
      case 1:
        store_as<uint8_t>(ptr, off, s, m);
        break;
      case 2:
        store_as<uint16_t>(ptr, off, s, m);
        break;
      case 4:
        store_as<uint32_t>(ptr, off, s, m);
        break;
      default:
        store_as<uint64_t>(ptr, off, s, m);
        break;
    }
  };
  if (mem == 16) {
    auto* s = w.r<uint64_t>(src);
    for (uint32_t t = m; t; t &= t - 1) {
      int i = __builtin_ctz(t);
      memcpy(ptr[i] + off, s + 2 * i, 16);
    }
  } else if (reg == 4)
    from(uint32_t());
  else if (reg == 8)
    from(uint64_t());
  else
    from(uint16_t());
}

// op: size = element bytes, d = number of elements, c = register bytes, flags
template <Space S>
void ld(Warp& w, const Op& o, uint32_t m) {
  uint64_t addr[32];
  uint8_t* ptr[32];
  fill_addresses(w, o, addr);
  uint32_t n = o.d, bytes = o.size * n;
  resolve(w, m, S, addr, bytes, Access::read, ptr, true);
  if (S == Space::generic || S == Space::shared)
    check_shadow(w, m, S, addr, bytes, Access::read, o.flags & M_VOLATILE, ptr, nullptr);
  Grid* grid = S == Space::generic || S == Space::global || S == Space::shared ? w.wk->grid : nullptr;
  if (grid && S != Space::shared) check_grid(w, m, S, addr, bytes, grid_kind(o.flags, Grid::Read), nullptr);
  if (n == 1)
    load_element(w, ptr, 0, o.dst, int(o.c), o.size, o.flags & M_SIGNED, m);
  else
    for (uint32_t k = 0; k < n; ++k)
      load_element(w, ptr, k * o.size, o.ext->v[0][k], int(o.ext->v[1][k]), o.size, o.flags & M_SIGNED, m);
  if (o.flags & M_VOLATILE) {
    std::atomic_thread_fence(std::memory_order_acquire);
    if (grid) {
      order_shared(w, m, S, addr, true, false);
      if (uint32_t lanes = o.flags & M_BLOCK ? 0 : global_lanes(m, S, addr); lanes && grid->any_published) {
        std::lock_guard lock(grid->mutex);
        grid->observe(w, lanes, addr, grid_order(o.flags));
      }
    }
  }
}
template <Space S>
void st(Warp& w, const Op& o, uint32_t m) {
  uint64_t addr[32];
  uint8_t* ptr[32];
  fill_addresses(w, o, addr);
  uint32_t n = o.d, bytes = o.size * n;
  resolve(w, m, S, addr, bytes, Access::write, ptr, true);
  if (o.flags & M_VOLATILE) std::atomic_thread_fence(std::memory_order_release);
  Grid* grid = S == Space::generic || S == Space::global || S == Space::shared ? w.wk->grid : nullptr;
  if (((S == Space::generic || S == Space::shared) && w.blk->shadow) || (grid && S != Space::shared)) {
    // gather what will be written, so that equal-valued writes are known
    uint8_t buf[32][32];
    uint8_t* at[32];
    for (int i = 0; i < 32; ++i) at[i] = buf[i];
    for (uint32_t k = 0; k < n; ++k)
      store_element(w, at, k * o.size, n == 1 ? o.dst : o.ext->v[0][k], n == 1 ? int(o.c) : int(o.ext->v[1][k]), o.size,
                    m);
    check_shadow(w, m, S, addr, bytes, Access::write, o.flags & M_VOLATILE, ptr, at);
    if (grid && S != Space::shared) check_grid(w, m, S, addr, bytes, grid_kind(o.flags, Grid::Write), at);
    std::unique_lock<std::mutex> lock;
    if (grid && o.flags & M_VOLATILE) {
      order_shared(w, m, S, addr, false, true);
      if (uint32_t lanes = o.flags & M_BLOCK ? 0 : global_lanes(m, S, addr)) {
        lock = std::unique_lock(grid->mutex);
        grid->publish(w, lanes, addr, grid_order(o.flags));
      }
    }
    for (uint32_t t = m; t; t &= t - 1) {
      int i = __builtin_ctz(t);
      memcpy(ptr[i], buf[i], bytes);
    }
    return;
  }
  if (n == 1)
    store_element(w, ptr, 0, o.dst, int(o.c), o.size, m);
  else
    for (uint32_t k = 0; k < n; ++k) store_element(w, ptr, k * o.size, o.ext->v[0][k], int(o.ext->v[1][k]), o.size, m);
}

// Kernel parameters: the same value for every lane.
void ld_param_kernel(Warp& w, const Op& o, uint32_t m) {
  uint8_t* ptr[32];
  uint8_t* p = w.blk->ls->params.data() + o.imm;
  FOR_LANES ptr[i] = p;
  for (uint32_t k = 0; k < o.d; ++k)
    load_element(w, ptr, k * o.size, o.d == 1 ? o.dst : o.ext->v[0][k], o.d == 1 ? int(o.c) : int(o.ext->v[1][k]),
                 o.size, o.flags & M_SIGNED, m);
}
// .param memory of a call, by offset within the frame.
void param_pointers(Warp& w, const Op& o, uint8_t** ptr) {
  uint8_t* p = w.frame->pmem + o.imm;
  uint32_t stride = w.frame->fn->param_bytes;
  for (uint32_t i = 0; i < 32; ++i) ptr[i] = p + i * stride;
}
void ld_param(Warp& w, const Op& o, uint32_t m) {
  uint8_t* ptr[32];
  param_pointers(w, o, ptr);
  for (uint32_t k = 0; k < o.d; ++k)
    load_element(w, ptr, k * o.size, o.d == 1 ? o.dst : o.ext->v[0][k], o.d == 1 ? int(o.c) : int(o.ext->v[1][k]),
                 o.size, o.flags & M_SIGNED, m);
}
void st_param(Warp& w, const Op& o, uint32_t m) {
  uint8_t* ptr[32];
  param_pointers(w, o, ptr);
  for (uint32_t k = 0; k < o.d; ++k)
    store_element(w, ptr, k * o.size, o.d == 1 ? o.dst : o.ext->v[0][k], o.d == 1 ? int(o.c) : int(o.ext->v[1][k]),
                  o.size, m);
}

}  // namespace

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
    } else {
      op.size2 = 0;
      op.imm += int64_t(s.value);
    }
    return s;
  }
  throw Decoder::Unsupported{"address operand"};
}

namespace {

uint32_t vector_count(const AInstr& in) {
  for (auto q : in.mods)
    if (q.size() == 2 && q[0] == 'v' && (q[1] == '2' || q[1] == '4' || q[1] == '8')) return uint32_t(q[1] - '0');
  return 1;
}

Class memory_class(Space s, bool load) {
  switch (s) {
    case Space::shared:
    case Space::shared_cluster:
      return load ? C_load_shared : C_store_shared;
    case Space::local:
      return load ? C_load_local : C_store_local;
    case Space::constant:
    case Space::param:
      return load ? C_load_const : C_store_local;
    default:
      return load ? C_load_global : C_store_global;
  }
}

bool sel_ldst(Decoder& d, const AInstr& in, Op& op) {
  bool load = in.mods[0] != "st";
  if (in.mods[0] == "ld" && (has(in, "multimem"))) return false;
  Ty t = last_type(in);
  Space s = space_of(in);
  op.size = uint8_t(ty_size(t));
  op.d = vector_count(in);
  op.cls = memory_class(s, load);
  op.flags = (ty_signed(t) ? M_SIGNED : 0) | order_flags(d, in) | (has(in, "nc") ? M_CONSTANT : 0);
  if (in.ops.size() < 2) return false;
  const AOperand &data = load ? in.ops[0] : in.ops[1], &addr = load ? in.ops[1] : in.ops[0];
  Decoder::Sym sym = address_operand(d, addr, op);
  auto one = [&](const AOperand& o, uint32_t* off, uint32_t* reg) {
    int r = d.reg_size(o);
    if (r == 0) r = op.size == 1 ? 2 : op.size;
    if (load) {
      if (o.kind != AOperand::sink && r < (op.size == 1 ? 2 : op.size))
        throw Decoder::Unsupported{"register narrower than the type"};
      *off = d.dst(o, r);
    } else
      *off = d.src(o, r, t);
    *reg = uint32_t(r);
  };
  if (op.d > 1) {
    OpExt& e = d.ext(op);
    if (data.kind != AOperand::vec || data.elems.size() != op.d) return false;
    e.v[0].resize(op.d);
    e.v[1].resize(op.d);
    for (uint32_t k = 0; k < op.d; ++k) one(data.elems[k], &e.v[0][k], &e.v[1][k]);
    op.ext = &e;
  } else {
    const AOperand& x = data.kind == AOperand::vec && data.elems.size() == 1 ? data.elems[0] : data;
    one(x, &op.dst, &op.c);
  }
  if (s == Space::param && sym.kind == Decoder::Sym::param) {
    bool entry = d.ast->is_entry && addr.elems[0].var_id < 0;
    if (entry && !load) return false;
    return done(op, entry ? ld_param_kernel : load ? ld_param : st_param);
  }
  // a generic access to a named shared variable
  if (s == Space::generic && op.size2 == 0 && sym.space == Space::shared) s = Space::shared;
  switch (s) {
    case Space::generic:
      return done(op, load ? ld<Space::generic> : st<Space::generic>);
    case Space::global:
      return done(op, load ? ld<Space::global> : st<Space::global>);
    case Space::constant:
      return done(op, load ? ld<Space::constant> : nullptr);
    case Space::shared:
      return done(op, load ? ld<Space::shared> : st<Space::shared>);
    case Space::local:
      return done(op, load ? ld<Space::local> : st<Space::local>);
    case Space::param:
      return done(op, load ? ld<Space::param> : st<Space::param>);
    default:
      return false;
  }
}

// --- atomics --------------------------------------------------------------------------------------------------

enum AtomOp : uint8_t { A_ADD, A_AND, A_OR, A_XOR, A_MIN, A_MAX, A_EXCH, A_CAS, A_INC, A_DEC };

template <class U, class F>
U rmw(uint8_t* p, F f) {
  U* q = reinterpret_cast<U*>(p);
  U old = __atomic_load_n(q, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(q, &old, f(old), false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED)) {
  }
  return old;
}
uint16_t half_combine(uint16_t x, uint16_t y, Ty t, AtomOp op) {
  bool bf = t == Ty::bf16 || t == Ty::bf16x2;
  float a = bf ? bf16_to_f32(x) : f16_to_f32(x), b = bf ? bf16_to_f32(y) : f16_to_f32(y), r;
  if (op == A_ADD)
    r = a + b;
  else if (op == A_MIN)
    r = a != a ? b : b != b ? a : a < b ? a : b;
  else
    r = a != a ? b : b != b ? a : a > b ? a : b;
  return bf ? f32_to_bf16(r) : f32_to_f16(r);
}
// One atomic operation on the value at p; returns the old bits.
uint64_t atomic_apply(uint8_t* p, AtomOp op, Ty t, uint64_t b, uint64_t c) {
  switch (t) {
    case Ty::f32: {
      return rmw<uint32_t>(p, [&](uint32_t o) {
        float x = as_float(o), y = as_float(uint32_t(b));
        float r = op == A_ADD ? x + y : op == A_MIN ? std::fmin(x, y) : op == A_MAX ? std::fmax(x, y) : y;
        return as_u32(r);
      });
    }
    case Ty::f64:
      return rmw<uint64_t>(p, [&](uint64_t o) { return op == A_ADD ? as_u64(as_double(o) + as_double(b)) : b; });
    case Ty::f16:
    case Ty::bf16:
      return rmw<uint16_t>(p, [&](uint16_t o) { return half_combine(o, uint16_t(b), t, op); });
    case Ty::f16x2:
    case Ty::bf16x2:
      return rmw<uint32_t>(p, [&](uint32_t o) {
        return uint32_t(half_combine(uint16_t(o), uint16_t(b), t, op)) |
               uint32_t(half_combine(uint16_t(o >> 16), uint16_t(b >> 16), t, op)) << 16;
      });
    default:
      break;
  }
  auto integer = [&](auto u, auto s) -> uint64_t {
    using UT = decltype(u);
    using ST = decltype(s);
    UT y = UT(b);
    UT* q = reinterpret_cast<UT*>(p);
    switch (op) {
      case A_ADD:
        return __atomic_fetch_add(q, y, __ATOMIC_SEQ_CST);
      case A_AND:
        return __atomic_fetch_and(q, y, __ATOMIC_SEQ_CST);
      case A_OR:
        return __atomic_fetch_or(q, y, __ATOMIC_SEQ_CST);
      case A_XOR:
        return __atomic_fetch_xor(q, y, __ATOMIC_SEQ_CST);
      case A_EXCH:
        return __atomic_exchange_n(q, y, __ATOMIC_SEQ_CST);
      case A_CAS: {
        UT expect = y;
        __atomic_compare_exchange_n(q, &expect, UT(c), false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
        return expect;
      }
      case A_MIN:
        return rmw<UT>(p, [&](UT o) { return ty_signed(t) ? UT(ST(o) < ST(y) ? o : y) : (o < y ? o : y); });
      case A_MAX:
        return rmw<UT>(p, [&](UT o) { return ty_signed(t) ? UT(ST(o) > ST(y) ? o : y) : (o > y ? o : y); });
      case A_INC:
        return rmw<UT>(p, [&](UT o) { return UT(o >= y ? 0 : o + 1); });
      case A_DEC:
        return rmw<UT>(p, [&](UT o) { return UT(o == 0 || o > y ? y : o - 1); });
    }
    return 0;
  };
  switch (ty_size(t)) {
    case 2:
      return integer(uint16_t(), int16_t());
    case 4:
      return integer(uint32_t(), int32_t());
    default:
      return integer(uint64_t(), int64_t());
  }
}

uint64_t lane_value(Warp& w, uint32_t off, int size, int lane) {
  switch (size) {
    case 1:
    case 2:
      return w.r<uint16_t>(off)[lane];
    case 4:
      return w.r<uint32_t>(off)[lane];
    default:
      return w.r<uint64_t>(off)[lane];
  }
}
void set_lane(Warp& w, uint32_t off, int size, int lane, uint64_t v) {
  switch (size) {
    case 1:
    case 2:
      w.r<uint16_t>(off)[lane] = uint16_t(v);
      break;
    case 4:
      w.r<uint32_t>(off)[lane] = uint32_t(v);
      break;
    default:
      w.r<uint64_t>(off)[lane] = v;
      break;
  }
}

// flags: space, then the order; ext: n = {op, type, count, has_dst}; v[0] destinations, v[1] b operands, v[2] c
// operands
void atom(Warp& w, const Op& o, uint32_t m) {
  uint64_t addr[32];
  uint8_t* ptr[32];
  fill_addresses(w, o, addr);
  Space s = Space(o.flags & 15);
  const OpExt& e = *o.ext;
  AtomOp op = AtomOp(e.n[0]);
  Ty t = Ty(e.n[1]);
  uint32_t n = uint32_t(e.n[2]), bytes = o.size * n;
  resolve(w, m, s, addr, bytes, Access::atomic, ptr, true);
  check_shadow(w, m, s, addr, bytes, Access::atomic, true, ptr, nullptr);
  std::unique_lock<std::mutex> grid_lock;
  if (Grid* grid = w.wk->grid) {
    const uint32_t order = o.flags >> 4;
    check_grid(w, m, s, addr, bytes, grid_kind(order | M_VOLATILE, Grid::Write | Grid::Atomic), nullptr);
    order_shared(w, m, s, addr, true, true);
    if (uint32_t lanes = order & M_BLOCK ? 0 : global_lanes(m, s, addr); lanes && grid->orders) {
      grid_lock = std::unique_lock(grid->mutex);  // until the atomic is complete
      grid->observe(w, lanes, addr, grid_order(order));
      grid->publish(w, lanes, addr, grid_order(order) | Grid::Modify);
    }
  }
  if (o.size == 16) {  // b128: exch and cas only
    static std::mutex big;
    std::lock_guard<std::mutex> lock(big);
    for (uint32_t k = m; k; k &= k - 1) {
      int l = __builtin_ctz(k);
      uint64_t old[2];
      memcpy(old, ptr[l], 16);
      const uint64_t* b = w.r<uint64_t>(e.v[1][0]) + 2 * l;
      const uint64_t* nv = op == A_CAS ? w.r<uint64_t>(e.v[2][0]) + 2 * l : b;
      if (op == A_EXCH || (old[0] == b[0] && old[1] == b[1])) memcpy(ptr[l], nv, 16);
      if (e.n[3]) memcpy(w.r<uint64_t>(e.v[0][0]) + 2 * l, old, 16);
    }
    return;
  }
  for (uint32_t k = m; k; k &= k - 1) {
    int l = __builtin_ctz(k);
    for (uint32_t x = 0; x < n; ++x) {
      uint64_t b = lane_value(w, e.v[1][x], o.size, l), c = op == A_CAS ? lane_value(w, e.v[2][x], o.size, l) : 0;
      uint64_t old = atomic_apply(ptr[l] + x * o.size, op, t, b, c);
      if (e.n[3]) set_lane(w, e.v[0][x], o.size, l, old);
    }
  }
}

bool sel_atom(Decoder& d, const AInstr& in, Op& op) {
  bool red = in.mods[0] == "red";
  if (has(in, "async")) return false;
  static const std::pair<const char*, AtomOp> names[] = {
      {"add", A_ADD}, {"and", A_AND},   {"or", A_OR},   {"xor", A_XOR}, {"min", A_MIN},
      {"max", A_MAX}, {"exch", A_EXCH}, {"cas", A_CAS}, {"inc", A_INC}, {"dec", A_DEC}};
  int k = -1;
  for (auto& [n, o] : names)
    if (has(in, n)) k = o;
  if (k < 0) return false;
  Ty t = last_type(in);
  op.cls = C_atomic;
  op.size = uint8_t(ty_size(t));
  uint32_t n = vector_count(in);
  OpExt& e = d.ext(op);
  e.n = {k, int(t), n, 0};
  size_t at = 0;
  auto operands_of = [&](const AOperand& o, std::vector<uint32_t>& v, bool dst) {
    if (n > 1) {
      for (auto& x : o.elems) v.push_back(dst ? d.dst(x, op.size) : d.src(x, t));
      if (v.size() != n) throw Decoder::Unsupported{"vector length"};
    } else
      v.push_back(dst ? d.dst(o, op.size) : d.src(o, t));
  };
  if (!red) {
    if (in.ops[0].kind != AOperand::sink) {
      operands_of(in.ops[0], e.v[0], true);
      e.n[3] = 1;
    }
    at = 1;
  }
  if (in.ops.size() < at + 2) return false;
  address_operand(d, in.ops[at], op);
  operands_of(in.ops[at + 1], e.v[1], false);
  if (k == A_CAS) {
    if (in.ops.size() < at + 3) return false;
    operands_of(in.ops[at + 2], e.v[2], false);
  }
  op.flags = uint32_t(space_of(in)) | order_flags(d, in) << 4;
  return done(op, atom);
}

// --- address conversion -----------------------------------------------------------------------------------------

void cvta_to(Warp& w, const Op& o, uint32_t m) {  // generic -> window: keep the low 32 bits
  auto* d = w.r<uint64_t>(o.dst);
  auto* a = w.r<uint64_t>(o.a);
  each(d, m, [&](int i) { return a[i] & 0xffffffffull; });
}
void cvta_from(Warp& w, const Op& o, uint32_t m) {
  auto* d = w.r<uint64_t>(o.dst);
  auto* a = w.r<uint64_t>(o.a);
  uint64_t win = uint64_t(o.imm);
  each(d, m, [&](int i) { return (a[i] & 0xffffffffull) | win; });
}
void copy64(Warp& w, const Op& o, uint32_t m) {
  auto* d = w.r<uint64_t>(o.dst);
  auto* a = w.r<uint64_t>(o.a);
  each(d, m, [&](int i) { return a[i]; });
}
void isspacep(Warp& w, const Op& o, uint32_t m) {
  auto* a = w.r<uint64_t>(o.a);
  uint32_t r = 0;
  for (uint32_t t = m; t; t &= t - 1) {
    int i = __builtin_ctz(t);
    uint64_t win = a[i] & kWindowMask;
    bool v = false;
    switch (o.flags) {
      case 0:
        v = win == 0;
        break;
      case 1:
        v = win == kSharedWindow && (uint32_t(a[i]) >> 24 == 0 || uint32_t(a[i]) >> 24 == w.blk->rank + 1);
        break;
      case 2:
        v = win == kSharedWindow;
        break;
      case 3:
        v = win == kLocalWindow;
        break;
      default:
        v = false;
    }
    r |= uint32_t(v) << i;
  }
  w.p(o.dst) = (w.p(o.dst) & ~m) | (r & m);
}
template <class T>
void mapa(Warp& w, const Op& o, uint32_t m) {
  T* d = w.r<T>(o.dst);
  const T* a = w.r<T>(o.a);
  auto* b = w.r<uint32_t>(o.b);
  each(d, m, [&](int i) { return T((a[i] & ~T(0xff000000u)) | T(uint64_t(b[i] + 1) << 24)); });
}
template <class T>
void getctarank(Warp& w, const Op& o, uint32_t m) {
  auto* d = w.r<uint32_t>(o.dst);
  const T* a = w.r<T>(o.a);
  each(d, m, [&](int i) {
    uint32_t r = uint32_t(a[i]) >> 24;
    return r ? r - 1 : w.blk->rank;
  });
}
void nothing(Warp&, const Op&, uint32_t) {}
// flags: 1 orders memory between CTAs, 2 as fence.sc
void fence(Warp& w, const Op& o, uint32_t) {
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (o.flags & 1 && w.wk->grid) w.wk->grid->fence(w, o.flags & 2);
}
void proxy_fence(Warp& w, const Op&, uint32_t) { note_proxy_fence(w); }
void zero64(Warp& w, const Op& o, uint32_t m) {
  each(w.r<uint64_t>(o.dst), m, [](int) { return uint64_t(0); });
}

bool sel_cvta(Decoder& d, const AInstr& in, Op& op) {
  op.cls = C_integer;
  bool to = has(in, "to");
  Space s = space_of(in);
  if (last_type(in) != Ty::u64) return false;
  op.dst = d.dst(in.ops[0], 8);
  op.a = d.src(in.ops[1], 8);
  if (s == Space::shared || s == Space::local) {
    op.imm = int64_t(s == Space::shared ? kSharedWindow : kLocalWindow);
    return done(op, to ? cvta_to : cvta_from);
  }
  return done(op, copy64);
}

}  // namespace

void register_memory(SelectorMap& m) {
  m["ld"] = m["st"] = m["ldu"] = sel_ldst;
  m["atom"] = m["red"] = sel_atom;
  m["cvta"] = sel_cvta;
  m["isspacep"] = [](Decoder& d, const AInstr& in, Op& op) {
    op.dst = d.pred_dst(in.ops[0]);
    op.a = d.src(in.ops[1], 8);
    op.flags = has(in, "global")                             ? 0
               : has(in, "shared::cluster")                  ? 2
               : has(in, "shared") || has(in, "shared::cta") ? 1
               : has(in, "local")                            ? 3
                                                             : 4;
    return done(op, isspacep);
  };
  m["mapa"] = [](Decoder& d, const AInstr& in, Op& op) {
    int s = ty_size(last_type(in));
    op.dst = d.dst(in.ops[0], s);
    op.a = d.src(in.ops[1], s);
    op.b = d.src(in.ops[2], 4);
    return done(op, s == 4 ? mapa<uint32_t> : mapa<uint64_t>);
  };
  m["getctarank"] = [](Decoder& d, const AInstr& in, Op& op) {
    int s = ty_size(last_type(in));
    op.dst = d.dst(in.ops[0], 4);
    op.a = d.src(in.ops[1], s);
    return done(op, s == 4 ? getctarank<uint32_t> : getctarank<uint64_t>);
  };
  for (auto n : {"prefetch", "prefetchu", "discard", "applypriority"})
    m[n] = [](Decoder&, const AInstr&, Op& op) {
      op.cls = C_other;
      return done(op, nothing);
    };
  m["createpolicy"] = [](Decoder& d, const AInstr& in, Op& op) {
    op.dst = d.dst(in.ops[0], 8);
    op.cls = C_other;
    return done(op, zero64);
  };
  m["membar"] = m["fence"] = [](Decoder& d, const AInstr& in, Op& op) {
    op.cls = C_other;
    // membar is fence.sc of the same scope. A fence of CTA scope orders nothing between CTAs.
    if (!has(in, "cta") && !has(in, "proxy") && !has(in, "mbarrier_init") && !has(in, "sync_restrict::shared::cta")) {
      op.flags = 1 | (in.mods[0] == "membar" || has(in, "sc") ? 2 : 0);
      d.image->has_fences = true;
    }
    return done(op, has(in, "proxy") && has(in, "async") && !has(in, "global") ? proxy_fence : fence);
  };
}

}  // namespace cudasim
