// wmma, whose fragment layout is ours to choose.
#include <algorithm>

#include "access.h"
#include "collective.h"
#include "fragments.h"
#include "select.h"

namespace cudasim {

namespace {

// Position of element i of a lane in a rows x cols fragment with n elements per lane.
void wmma_position(bool acc, int rows, int cols, int n, int lane, int i, int* r, int* c) {
  if (acc && rows == 16 && cols == 16) {  // as on the hardware: two m16n8 halves side by side
    *r = lane / 4 + 8 * (i >> 1 & 1);
    *c = 2 * (lane & 3) + (i & 1) + 8 * (i >> 2);
    return;
  }
  int linear = (lane * n + i) % (rows * cols);
  *r = linear / cols;
  *c = linear % cols;
}

// ext n: rows, cols, type, row-major, matrix (0 a, 1 b, 2 acc); v[0] registers
void wmma_access(Warp& w, const Op& o, uint32_t m, bool load) {
  if (!whole_warp(w, m)) return;
  const OpExt& e = *o.ext;
  int rows = int(e.n[0]), cols = int(e.n[1]);
  Ty t = Ty(e.n[2]);
  bool row_major = e.n[3], acc = e.n[4] == 2;
  int bytes = std::max(1, element_bits(t) / 8), reg = o.size, per = reg / bytes, n = int(e.v[0].size()) * per;
  uint64_t base[32], addr[32];
  uint8_t* ptr[32];
  fill_addresses(w, o, base);
  Space s = Space(o.flags);
  for (int i = 0; i < n; ++i) {
    for (int l = 0; l < 32; ++l) {
      int r, c;
      wmma_position(acc, rows, cols, n, l, i, &r, &c);
      uint32_t stride = w.r<uint32_t>(o.b)[l];
      addr[l] = base[l] +
                uint64_t(bytes) * (row_major ? uint64_t(r) * stride + uint64_t(c) : uint64_t(c) * stride + uint64_t(r));
    }
    resolve(w, m, s, addr, uint32_t(bytes), load ? Access::read : Access::write, ptr, true);
    check_shadow(w, m, s, addr, uint32_t(bytes), load ? Access::read : Access::write, true, ptr, nullptr);
    for (int l = 0; l < 32; ++l) {
      uint8_t* regp = w.R + e.v[0][size_t(i / per)] + uint32_t(l * reg + (i % per) * bytes);
      if (load)
        memcpy(regp, ptr[l], size_t(bytes));
      else
        memcpy(ptr[l], regp, size_t(bytes));
    }
  }
}
void wmma_load(Warp& w, const Op& o, uint32_t m) { wmma_access(w, o, m, true); }
void wmma_store(Warp& w, const Op& o, uint32_t m) { wmma_access(w, o, m, false); }

double element_value(const uint8_t* p, Ty t) {
  uint16_t h;
  uint32_t u;
  double dv;
  switch (t) {
    case Ty::f16:
      memcpy(&h, p, 2);
      return f16_to_f32(h);
    case Ty::bf16:
      memcpy(&h, p, 2);
      return bf16_to_f32(h);
    case Ty::tf32:
      memcpy(&u, p, 4);
      return as_float(u & 0xffffe000u);
    case Ty::f32:
      memcpy(&u, p, 4);
      return as_float(u);
    case Ty::s32:
      memcpy(&u, p, 4);
      return int32_t(u);
    case Ty::s8:
      return int8_t(*p);
    case Ty::u8:
      return *p;
    default:
      memcpy(&dv, p, 8);
      return dv;
  }
}
// ext n: m, n, k, dtype, atype, btype, ctype, satfinite, reg bytes of a/b, reg bytes of c/d
void wmma_mma(Warp& w, const Op& o, uint32_t m) {
  if (!whole_warp(w, m)) return;
  const OpExt& e = *o.ext;
  int M = int(e.n[0]), N = int(e.n[1]), K = int(e.n[2]);
  auto gather = [&](const std::vector<uint32_t>& v, Ty t, int rows, int cols, bool acc, std::vector<double>& out) {
    int reg = int(acc ? e.n[9] : e.n[8]), bytes = element_bits(t) / 8, per = reg / bytes, n = int(v.size()) * per;
    out.assign(size_t(rows * cols), 0);
    for (int i = 0; i < n; ++i)
      for (int l = 0; l < 32; ++l) {
        int r, c;
        wmma_position(acc, rows, cols, n, l, i, &r, &c);
        out[size_t(r * cols + c)] = element_value(w.R + v[size_t(i / per)] + uint32_t(l * reg + (i % per) * bytes), t);
      }
  };
  std::vector<double> A, B, C;
  Ty td = Ty(e.n[3]);
  gather(e.v[1], Ty(e.n[4]), M, K, false, A);
  gather(e.v[2], Ty(e.n[5]), K, N, false, B);
  gather(e.v[3], Ty(e.n[6]), M, N, true, C);
  bool exact = td == Ty::f64 || td == Ty::s32;
  for (int r = 0; r < M; ++r)
    for (int c = 0; c < N; ++c) {
      double s = C[size_t(r * N + c)];
      float f = float(s);
      for (int k = 0; k < K; ++k) {
        if (exact)
          s = __builtin_fma(A[size_t(r * K + k)], B[size_t(k * N + c)], s);
        else
          f = __builtin_fmaf(float(A[size_t(r * K + k)]), float(B[size_t(k * N + c)]), f);
      }
      C[size_t(r * N + c)] = exact ? s : f;
    }
  int reg = int(e.n[9]), bytes = element_bits(td) / 8, per = reg / bytes, n = int(e.v[0].size()) * per;
  for (int i = 0; i < n; ++i)
    for (int l = 0; l < 32; ++l) {
      int r, c;
      wmma_position(true, M, N, n, l, i, &r, &c);
      uint8_t* p = w.R + e.v[0][size_t(i / per)] + uint32_t(l * reg + (i % per) * bytes);
      double x = C[size_t(r * N + c)];
      if (td == Ty::f16) {
        uint16_t h = f32_to_f16(float(x));
        memcpy(p, &h, 2);
      } else if (td == Ty::f32) {
        float f = float(x);
        memcpy(p, &f, 4);
      } else if (td == Ty::s32) {
        int64_t q = int64_t(x);
        if (e.n[7]) q = std::clamp<int64_t>(q, INT32_MIN, INT32_MAX);
        int32_t z = int32_t(uint32_t(uint64_t(q)));
        memcpy(p, &z, 4);
      } else
        memcpy(p, &x, 8);
    }
  w.wk->count.mma_flops += uint64_t(2) * uint64_t(M * N) * uint64_t(K);
}

bool sel_wmma(Decoder& d, const AInstr& in, Op& op) {
  Shape s;
  if (!find_shape(in, &s)) return false;
  OpExt& e = d.ext(op);
  bool load = in.mods[1] == "load", store = in.mods[1] == "store";
  auto regs = [&](const AOperand& o, std::vector<uint32_t>& v, int size, bool dst) {
    if (o.kind == AOperand::vec)
      for (auto& x : o.elems) v.push_back(dst ? d.dst(x, size) : d.src(x, size));
    else
      v.push_back(dst ? d.dst(o, size) : d.src(o, size));
  };
  if (load || store) {
    Ty t = last_type(in);
    if (element_bits(t) < 8) return false;
    int mat = in.mods[2] == "a" ? 0 : in.mods[2] == "b" ? 1 : 2;
    e.n = {mat == 1 ? s.k : s.m, mat == 0 ? s.k : s.n, int(t), has(in, "row"), mat};
    Space sp = space_of(in);
    op.flags = uint32_t(sp);
    op.cls = sp == Space::shared ? (load ? C_load_shared : C_store_shared) : load ? C_load_global : C_store_global;
    op.size = uint8_t(t == Ty::f64 ? 8 : 4);
    const AOperand &frag = load ? in.ops[0] : in.ops[1], &addr = load ? in.ops[1] : in.ops[0];
    address_operand(d, addr, op);
    regs(frag, e.v[0], op.size, load);
    if (in.ops.size() > 2)
      op.b = d.src(in.ops[2], 4);
    else
      op.b = d.constant(uint64_t(has(in, "row") ? e.n[1] : e.n[0]), 4);
    return done(op, load ? wmma_load : wmma_store);
  }
  op.cls = C_mma;
  std::vector<Ty> t;
  for (size_t i = 1; i < in.mods.size(); ++i) {
    Ty x = parse_type(in.mods[i]);
    if (x != Ty::none) t.push_back(x);
  }
  Ty td, ta, tb, tc;
  if (t.size() == 2) {
    td = t[0];
    tc = t[1];
    ta = tb = Ty::f16;
  } else if (t.size() == 4) {
    td = t[0];
    ta = t[1];
    tb = t[2];
    tc = t[3];
  } else
    return false;
  if (element_bits(ta) < 8 || ta == Ty::b1) return false;
  int sz = ta == Ty::f64 ? 8 : 4;
  e.n = {s.m, s.n, s.k, int(td), int(ta), int(tb), int(tc), has(in, "satfinite"), sz, sz};
  regs(in.ops[0], e.v[0], sz, true);
  regs(in.ops[1], e.v[1], sz, false);
  regs(in.ops[2], e.v[2], sz, false);
  regs(in.ops[3], e.v[3], sz, false);
  return done(op, wmma_mma);
}

}  // namespace

void register_wmma(SelectorMap& m) { m["wmma"] = sel_wmma; }

}  // namespace cudasim
