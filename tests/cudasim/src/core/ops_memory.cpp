// Loads, stores, fences and address conversion.
#include "access.h"
#include "select.h"
#include "shadow.h"

namespace cudasim {

namespace {

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
  if (S == Space::constant || S == Space::param) count_constant(w, m, addr);
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
  if (s == Space::generic && sym.space == Space::shared) s = Space::shared;
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
        v = win == kSharedWindow && uint32_t(a[i]) >> 24 == w.blk->rank;
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
  each(d, m, [&](int i) { return T((a[i] & ~T(0xff000000u)) | T(uint64_t(b[i]) << 24)); });
}
template <class T>
void getctarank(Warp& w, const Op& o, uint32_t m) {
  auto* d = w.r<uint32_t>(o.dst);
  const T* a = w.r<T>(o.a);
  each(d, m, [&](int i) { return uint32_t(a[i]) >> 24; });
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
