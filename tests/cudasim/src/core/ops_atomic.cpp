// Atomic operations.
#include "access.h"
#include "numeric.h"
#include "select.h"

namespace cudasim {

namespace {

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

}  // namespace

void register_atomic(SelectorMap& m) { m["atom"] = m["red"] = sel_atom; }

}  // namespace cudasim
