// wgmma: warpgroup matrix multiply (sm_90a).
//
// Each of the four warps computes its own 16 rows of the 64 x N result, so the warps exchange nothing. An instruction
// only queues the work. It executes when the warp waits for its group, and reads shared memory, A registers and
// accumulators at that moment. Missing waits, and buffers that are overwritten too early, therefore give visibly wrong
// results.
#include <algorithm>

#include "access.h"
#include "card_sum.h"
#include "collective.h"
#include "select.h"
#include "shadow.h"
#include "shared_matrix.h"

namespace cudasim {
namespace {

// ext n: N, K, dtype, atype, btype, A in registers, scale-a, scale-b, trans-a, trans-b, satfinite; v[0] d, v[1] a,
// v[2] the numbers of both (track_registers)
template <class T>
void load_operands(Warp& w, const PendingMma& p, const uint8_t* R, std::vector<T>& A, std::vector<T>& B) {
  const OpExt& e = *p.op->ext;
  const uint32_t N = uint32_t(e.n[0]), K = uint32_t(e.n[1]);
  const Ty ta = Ty(e.n[3]), tb = Ty(e.n[4]);
  A.resize(16 * K);
  B.resize(size_t(K) * N);
  const auto granule = [&](uint32_t addr) {
    const uint32_t off = granule_offset(*w.blk, addr, "wgmma");
    if (w.blk->shadow) w.blk->shadow->read(w, 0, off, 16, false, true);
    return w.blk->shared + off;
  };
  const auto descriptor = [&](uint64_t bits, bool mn_major) {
    const MatrixDescriptor d(bits, uint32_t(4 - (bits >> 62)) & 3);
    if (!mn_major) check_mask(w, d, "wgmma");
    return d;
  };
  if (e.n[5]) {
    const uint32_t E = uint32_t(32 / element_bits(ta));  // elements per register
    for (uint32_t r = 0; r < 4; ++r) {
      const uint32_t* v = reinterpret_cast<const uint32_t*>(R + e.v[1][r]);
      for (uint32_t l = 0; l < 32; ++l) {
        T* to = &A[(l / 4 + 8 * (r & 1)) * K + E * (l & 3) + (r >> 1) * 4 * E];
        if constexpr (std::is_same_v<T, float>)
          unpack_floats(v[l], ta, to);
        else
          unpack_ints(v[l], ta, to);
      }
    }
  } else
    load_rows(descriptor(p.desc_a, e.n[8]), e.n[8], ta, 16 * (w.index & 3), 16, granule, A.data());
  load_groups(descriptor(p.desc_b, e.n[9]), e.n[9], tb, N, granule, B.data());
  if (e.n[6] < 0)
    for (auto& x : A) x = -x;
  if (e.n[7] < 0)
    for (auto& x : B) x = -x;
}

}  // namespace

void run_wgmma(Warp& w, const PendingMma& p) {
  const OpExt& e = *p.op->ext;
  const uint32_t N = uint32_t(e.n[0]), K = uint32_t(e.n[1]);
  const Ty td = Ty(e.n[2]);
  uint8_t* R = p.frame->regs;
  w.wk->count.mma_flops += 2ull * 16 * N * K;
  if (td == Ty::s32) {
    std::vector<int32_t> A, B;
    load_operands(w, p, R, A, B);
    for (uint32_t j = 0; j < N / 8; ++j)
      for (uint32_t i = 0; i < 4; ++i)
        for (uint32_t l = 0; l < 32; ++l) {
          int32_t* d = reinterpret_cast<int32_t*>(R + e.v[0][4 * j + i]);
          uint32_t r = l / 4 + 8 * (i >> 1), c = 2 * (l & 3) + (i & 1);
          int64_t s = p.scale_d ? d[l] : 0;
          for (uint32_t k = 0; k < K; ++k) s += int64_t(A[r * K + k]) * B[j * K * 8 + k * 8 + c];
          if (e.n[10]) s = std::clamp<int64_t>(s, INT32_MIN, INT32_MAX);
          d[l] = int32_t(uint32_t(uint64_t(s)));
        }
    return;
  }
  thread_local std::vector<float> A, B;
  load_operands(w, p, R, A, B);
  const bool f16 = td == Ty::f16;
  const LaunchState& ls = *w.blk->ls;
  const CardSum card = card_sum(ls.arch, true, Ty(e.n[3]), Ty(e.n[4]), td, int(K));
  for (uint32_t j = 0; j < N / 8; ++j) {
    alignas(32) float acc[16 * 8];
    auto at = [&](uint32_t i, uint32_t l) -> float& { return acc[(l / 4 + 8 * (i >> 1)) * 8 + 2 * (l & 3) + (i & 1)]; };
    if (!p.scale_d)
      std::fill(acc, acc + 128, 0.f);
    else
      for (uint32_t i = 0; i < 4; ++i)
        for (uint32_t l = 0; l < 32; ++l)
          at(i, l) =
              f16 ? f16_to_f32(uint16_t(reinterpret_cast<uint32_t*>(R + e.v[0][2 * j + (i >> 1)])[l] >> (16 * (i & 1))))
                  : reinterpret_cast<float*>(R + e.v[0][4 * j + i])[l];
    const float* b = &B[j * K * 8];
    if (ls.card_sums)
      add_as_card(card, 16, int(K), A.data(), b, acc);
    else
      add_in_order(16, int(K), A.data(), b, acc);
    for (uint32_t i = 0; i < 4; ++i)
      for (uint32_t l = 0; l < 32; ++l) {
        if (f16) {
          if (!(i & 1))
            reinterpret_cast<uint32_t*>(R + e.v[0][2 * j + (i >> 1)])[l] =
                f32_to_f16(at(i, l)) | uint32_t(f32_to_f16(at(i + 1, l))) << 16;
        } else
          reinterpret_cast<float*>(R + e.v[0][4 * j + i])[l] = at(i, l);
      }
  }
}

void run_pending_mma(Warp& w, size_t keep) {
  while (w.mma_groups.size() > keep) {
    for (auto& p : w.mma_groups.front().ops) run_wgmma(w, p);
    w.mma_groups.pop_front();
  }
}

namespace {

// wgmma may not use a register that an ordinary instruction has written since the last wgmma.fence.
void check_registers(Warp& w, const OpExt& e) {
  if (w.fences == 1) fault(Fault::registers, 0, "wgmma before the first wgmma.fence of the warp");
  for (const uint32_t number : e.v[2])
    if (const Warp::RegisterWrite& x = w.register_writes[number]; x.fences == w.fences)
      fault(Fault::registers, 0,
            "wgmma uses a register that was written at PTX line " + std::to_string(x.line) +
                ", without a wgmma.fence in between");
}

void wgmma(Warp& w, const Op& o, uint32_t m) {
  if (!whole_warp(w, m)) return;
  const OpExt& e = *o.ext;
  PendingMma p;
  p.op = &o;
  p.frame = w.frame;
  if (!e.n[5]) p.desc_a = w.r<uint64_t>(o.a)[0];
  p.desc_b = w.r<uint64_t>(o.b)[0];
  p.scale_d = (w.p(o.c) ^ (o.flags & 1 ? FULL : 0)) & 1;
  check_registers(w, e);
  w.mma_open.ops.push_back(p);
}
void wgmma_commit(Warp& w, const Op&, uint32_t m) {
  if (!whole_warp(w, m)) return;
  w.mma_groups.push_back(std::move(w.mma_open));
  w.mma_open = {};
}
void wgmma_wait(Warp& w, const Op& o, uint32_t m) {
  if (!whole_warp(w, m)) return;
  run_pending_mma(w, size_t(o.imm));
}
void wgmma_fence(Warp& w, const Op&, uint32_t m) {
  if (whole_warp(w, m)) w.fences++;
}
bool sel_wgmma(Decoder& d, const AInstr& in, Op& op) {
  op.cls = C_mma;
  if (in.mods.size() < 2) return false;
  if (in.mods[1] == "fence") {
    op.cls = C_barrier;
    return done(op, wgmma_fence);
  }
  if (in.mods[1] == "commit_group") {
    op.cls = C_barrier;
    return done(op, wgmma_commit);
  }
  if (in.mods[1] == "wait_group") {
    op.cls = C_barrier;
    op.imm = in.ops[0].imm;
    return done(op, wgmma_wait);
  }
  if (in.mods[1] != "mma_async" || has(in, "sp")) return false;
  int M = 0, N = 0, K = 0;
  for (auto q : in.mods)
    if (!q.empty() && q[0] == 'm' && q.size() > 1 && isdigit(q[1]))
      sscanf(std::string(q).c_str(), "m%dn%dk%d", &M, &N, &K);
  std::vector<Ty> t;
  for (size_t i = 1; i < in.mods.size(); ++i) {
    Ty x = parse_type(in.mods[i]);
    if (x != Ty::none) t.push_back(x);
  }
  if (M != 64 || t.size() != 3 || in.ops.size() < 4) return false;
  Ty td = t[0], ta = t[1], tb = t[2];
  OpExt& e = d.ext(op);
  bool regs = in.ops[1].kind == AOperand::vec, half = ta == Ty::f16 || ta == Ty::bf16;
  auto number = [&](size_t i, int64_t dflt) {
    return i < in.ops.size() && in.ops[i].kind == AOperand::num ? in.ops[i].imm : dflt;
  };
  bool ints = td == Ty::s32;
  int64_t sa = ints ? 1 : number(4, 1), sb = ints ? 1 : number(5, 1);
  int64_t tra = half && !regs ? number(6, 0) : 0, trb = half ? number(regs ? 6 : 7, 0) : 0;
  e.n = {N, K, int(td), int(ta), int(tb), regs, sa, sb, tra, trb, has(in, "satfinite")};
  if (in.ops[0].kind != AOperand::vec) return false;
  for (auto& x : in.ops[0].elems) e.v[0].push_back(d.dst(x, 4));
  if (e.v[0].size() != size_t(td == Ty::f16 ? N / 4 : N / 2)) throw Decoder::Unsupported{"accumulator size"};
  if (regs) {
    for (auto& x : in.ops[1].elems) e.v[1].push_back(d.src(x, 4));
    if (e.v[1].size() != 4) return false;
  } else
    op.a = d.src(in.ops[1], 8);
  op.b = d.src(in.ops[2], 8);
  bool neg;
  op.c = d.pred(in.ops[3], &neg);
  op.flags = neg;
  return done(op, wgmma);
}

}  // namespace

void register_wgmma(SelectorMap& m) { m["wgmma"] = sel_wgmma; }

}  // namespace cudasim
