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
#include "fragments.h"
#include "select.h"
#include "shadow.h"

namespace cudasim {
namespace {

// A matrix descriptor: where the 16-byte granule `c` of row `r` lies (see the PTX ISA's canonical
// layouts). In the K-major form rows are M or N and granules run along K; in the MN-major form
// rows are K and granules run along M or N.
struct Descriptor {
  uint32_t start, lbo, sbo, base, mode;  // mode: 0 none, 1 32B, 2 64B, 3 128B
  explicit Descriptor(uint64_t d)
      : start(uint32_t(d & 0x3fff) << 4),
        lbo(uint32_t(d >> 16 & 0x3fff) << 4),
        sbo(uint32_t(d >> 32 & 0x3fff) << 4),
        base(uint32_t(d >> 49 & 7)),
        mode(uint32_t(4 - (d >> 62)) & 3) {}
  uint32_t swizzle(uint32_t a) const {
    if (!mode) return a;
    uint32_t row = (a >> 7) - base;
    return a ^ ((row & ((1u << mode) - 1)) << 4);
  }
  uint32_t k_major(uint32_t row, uint32_t c) const {
    uint32_t pitch = 16u << mode;
    return swizzle(start + (row & 7) * pitch + (row >> 3) * sbo + c * (mode ? 16 : lbo));
  }
  uint32_t mn_major(uint32_t k, uint32_t c) const {
    if (!mode) return start + c * sbo + (k & 7) * 16 + (k >> 3) * lbo;
    uint32_t per = 1u << mode;
    return swizzle(start + (c & (per - 1)) * 16 + (c >> mode) * lbo + (k & 7) * (16u << mode) + (k >> 3) * sbo);
  }
};

// A descriptor takes (address & 0x3FFFF) >> 4. In a cluster, bits 24.. of the address hold the rank of the CTA. Without
// the mask they reach the leading dimension: swizzled K-major layouts ignore it, so that no result shows the mistake.
void check_mask(Warp& w, const Descriptor& d) {
  const uint32_t rank = w.blk->rank;
  if (rank && d.mode && d.lbo >> 8 == rank)
    fault(Fault::shared_out_of_bounds, 0,
          "wgmma descriptor with the rank of the block, " + std::to_string(rank) +
              ", in its leading dimension: the shared address has to be masked with 0x3FFFF before >> 4");
}

const uint8_t* granule(Warp& w, uint32_t addr) {
  uint32_t off = addr - kSharedBase;
  if (uint64_t(off) + 16 > w.blk->shared_bytes)
    fault(Fault::shared_out_of_bounds, 0,
          "wgmma descriptor reaches shared address " + hex(addr) + ", outside the block's " +
              std::to_string(w.blk->shared_bytes) + " bytes");
  if (w.blk->shadow) w.blk->shadow->read(w, 0, off, 16, false, true);
  return w.blk->shared + off;
}

// 16 bytes of elements as floats or ints; returns how many.
template <class T>
int expand(const uint8_t* p, Ty t, T* out) {
  int n = 0;
  if constexpr (std::is_same_v<T, float>)
    if (t == Ty::f16 || t == Ty::bf16) {
      _mm256_storeu_ps(out, half8(p, t == Ty::bf16));
      return 8;
    }
  for (int i = 0; i < 4; ++i) {
    uint32_t v;
    memcpy(&v, p + 4 * i, 4);
    if constexpr (std::is_same_v<T, float>)
      unpack_floats(v, t, out + n);
    else
      unpack_ints(v, t, out + n);
    n += 32 / element_bits(t);
  }
  return n;
}

// ext n: N, K, dtype, atype, btype, A in registers, scale-a, scale-b, trans-a, trans-b, satfinite; v[0] d, v[1] a,
// v[2] the numbers of both (track_registers)
template <class T>
void load_operands(Warp& w, const PendingMma& p, const uint8_t* R, std::vector<T>& A, std::vector<T>& B) {
  const OpExt& e = *p.op->ext;
  const uint32_t N = uint32_t(e.n[0]), K = uint32_t(e.n[1]);
  Ty ta = Ty(e.n[3]), tb = Ty(e.n[4]);
  const uint32_t E = uint32_t(32 / element_bits(ta)), per = 4 * E;  // elements per register / granule
  T t[16];
  A.resize(16 * K);
  B.resize(size_t(K) * N);
  const uint32_t row0 = 16 * (w.index & 3);
  if (e.n[5]) {
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
  } else {
    Descriptor d(p.desc_a);
    if (!e.n[8]) check_mask(w, d);
    if (!e.n[8])
      for (uint32_t r = 0; r < 16; ++r)
        for (uint32_t c = 0; c < 2; ++c) expand(granule(w, d.k_major(row0 + r, c)), ta, &A[r * K + c * per]);
    else
      for (uint32_t k = 0; k < K; ++k)
        for (uint32_t c = 0; c < 16 / per; ++c) {
          expand(granule(w, d.mn_major(k, row0 / per + c)), ta, t);
          for (uint32_t i = 0; i < per; ++i) A[(c * per + i) * K + k] = t[i];
        }
  }
  // B is stored in groups of 8 columns, each K x 8.
  Descriptor d(p.desc_b);
  if (!e.n[9]) check_mask(w, d);
  const bool halves = tb == Ty::f16 || tb == Ty::bf16;
  if (!e.n[9] && halves) {
    if constexpr (std::is_same_v<T, float>)
      for (uint32_t j = 0; j < N / 8; ++j)
        for (uint32_t c = 0; c < 2; ++c) {
          __m256 v[8];
          for (uint32_t i = 0; i < 8; ++i) v[i] = half8(granule(w, d.k_major(8 * j + i, c)), tb == Ty::bf16);
          transpose8(v);
          for (uint32_t i = 0; i < 8; ++i) _mm256_storeu_ps(&B[(j * K + 8 * c + i) * 8], v[i]);
        }
  } else if (!e.n[9])
    for (uint32_t n = 0; n < N; ++n)
      for (uint32_t c = 0; c < 2; ++c) {
        expand(granule(w, d.k_major(n, c)), tb, t);
        T* to = &B[(n / 8) * K * 8 + (c * per) * 8 + n % 8];
        for (uint32_t i = 0; i < per; ++i) to[i * 8] = t[i];
      }
  else
    for (uint32_t k = 0; k < K; ++k)
      for (uint32_t c = 0; c < N / per; ++c) expand(granule(w, d.mn_major(k, c)), tb, &B[c * K * 8 + k * 8]);
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
    if (ls.card_sums) {
      add_as_card(card, 16, int(K), A.data(), b, acc);
    } else {
      __m256 c[16];
      for (int i = 0; i < 16; ++i) c[i] = _mm256_load_ps(acc + 8 * i);
      for (uint32_t k = 0; k < K; ++k) {
        __m256 x = _mm256_loadu_ps(b + 8 * k);
        for (uint32_t i = 0; i < 16; ++i) c[i] = _mm256_fmadd_ps(_mm256_broadcast_ss(&A[i * K + k]), x, c[i]);
      }
      for (int i = 0; i < 16; ++i) _mm256_store_ps(acc + 8 * i, c[i]);
    }
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
