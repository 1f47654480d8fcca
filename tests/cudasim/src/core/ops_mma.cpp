// Warp-level matrix instructions: mma.sync, ldmatrix, stmatrix and movmatrix.
//
// Products are exact; sums of f16/bf16/tf32/fp8 inputs are accumulated in f32, in increasing k,
// with fused multiply-adds. CUDASIM_MMA=card adds as cards do: see card_sum.h.
#include <algorithm>

#include "access.h"
#include "card_sum.h"
#include "collective.h"
#include "fragments.h"
#include "numeric.h"
#include "select.h"

namespace cudasim {

const float* fp8_table(Ty t) {
  static const auto tables = [] {
    std::vector<std::vector<float>> v(2, std::vector<float>(256));
    for (uint32_t i = 0; i < 256; ++i) {
      v[0][i] = float(decode(i, kE4M3));
      v[1][i] = float(decode(i, kE5M2));
    }
    return v;
  }();
  return tables[t == Ty::e5m2].data();
}

int element_bits(Ty t) {
  switch (t) {
    case Ty::f64:
      return 64;
    case Ty::tf32:
    case Ty::f32:
    case Ty::s32:
    case Ty::b32:
      return 32;
    case Ty::f16:
    case Ty::bf16:
      return 16;
    case Ty::u4:
    case Ty::s4:
      return 4;
    default:
      return 8;
  }
}

// Elements packed in one 32-bit register, as floats.
void unpack_floats(uint32_t v, Ty t, float* out) {
  switch (t) {
    case Ty::f16:
      out[0] = f16_to_f32(uint16_t(v));
      out[1] = f16_to_f32(uint16_t(v >> 16));
      break;
    case Ty::bf16:
      out[0] = as_float(v << 16);
      out[1] = as_float(v & 0xffff0000u);
      break;
    case Ty::tf32:
      out[0] = as_float(v & 0xffffe000u);
      break;
    default: {
      const float* tab = fp8_table(t);
      for (int k = 0; k < 4; ++k) out[k] = tab[v >> (8 * k) & 255];
    }
  }
}
void unpack_ints(uint32_t v, Ty t, int32_t* out) {
  switch (t) {
    case Ty::s8:
      for (int k = 0; k < 4; ++k) out[k] = int8_t(v >> (8 * k));
      break;
    case Ty::u8:
      for (int k = 0; k < 4; ++k) out[k] = uint8_t(v >> (8 * k));
      break;
    case Ty::s4:
      for (int k = 0; k < 8; ++k) out[k] = int32_t(v << (28 - 4 * k)) >> 28;
      break;
    default:
      for (int k = 0; k < 8; ++k) out[k] = int32_t(v >> (4 * k) & 15);
      break;
  }
}

static bool parse_shape(std::string_view q, Shape* s) {
  return !q.empty() && q[0] == 'm' && isdigit(q[1]) &&
         sscanf(std::string(q).c_str(), "m%dn%dk%d", &s->m, &s->n, &s->k) == 3;
}
bool find_shape(const AInstr& in, Shape* s) {
  for (auto q : in.mods)
    if (parse_shape(q, s)) return true;
  return false;
}

namespace {

// --- mma.sync ------------------------------------------------------------------------------------------------

// ext n: m, n, k, dtype, atype, btype, ctype, satfinite
// v[0] d, v[1] a, v[2] b, v[3] c
template <int M>
void accumulate(const float* A, const float* B, float* acc, int K) {
  __m256 c[M];
  for (int i = 0; i < M; ++i) c[i] = _mm256_loadu_ps(acc + 8 * i);
  for (int k = 0; k < K; ++k) {
    __m256 b = _mm256_loadu_ps(B + 8 * k);
    for (int i = 0; i < M; ++i) c[i] = _mm256_fmadd_ps(_mm256_broadcast_ss(A + i * K + k), b, c[i]);
  }
  for (int i = 0; i < M; ++i) _mm256_storeu_ps(acc + 8 * i, c[i]);
}

void mma_float(Warp& w, const Op& o, uint32_t m) {
  if (!whole_warp(w, m)) return;
  const OpExt& e = *o.ext;
  const int M = int(e.n[0]), K = int(e.n[2]);
  const Ty td = Ty(e.n[3]), ta = Ty(e.n[4]), tb = Ty(e.n[5]), tc = Ty(e.n[6]);
  const int E = 32 / element_bits(ta);
  alignas(32) float A[16 * 32], B[32 * 8], acc[16 * 8];
  for (size_t r = 0; r < e.v[1].size(); ++r) {
    const uint32_t* v = w.r<uint32_t>(e.v[1][r]);
    for (int l = 0; l < 32; ++l)
      unpack_floats(v[l], ta, A + (l / 4 + 8 * (int(r) & 1)) * K + E * (l & 3) + int(r >> 1) * 4 * E);
  }
  for (size_t r = 0; r < e.v[2].size(); ++r) {
    const uint32_t* v = w.r<uint32_t>(e.v[2][r]);
    for (int l = 0; l < 32; ++l) {
      float t[4];
      unpack_floats(v[l], tb, t);
      for (int x = 0; x < E; ++x) B[(E * (l & 3) + int(r) * 4 * E + x) * 8 + l / 4] = t[x];
    }
  }
  for (int i = 0; i < M / 4; ++i)
    for (int l = 0; l < 32; ++l) {
      float& x = acc[(l / 4 + 8 * (i >> 1)) * 8 + 2 * (l & 3) + (i & 1)];
      if (tc == Ty::f32)
        x = w.r<float>(e.v[3][size_t(i)])[l];
      else
        x = f16_to_f32(uint16_t(w.r<uint32_t>(e.v[3][size_t(i >> 1)])[l] >> (16 * (i & 1))));
    }
  if (const LaunchState& ls = *w.blk->ls; ls.card_sums)
    add_as_card(card_sum(ls.arch, false, ta, tb, td, K), M, K, A, B, acc);
  else if (M == 16)
    accumulate<16>(A, B, acc, K);
  else
    accumulate<8>(A, B, acc, K);
  for (int i = 0; i < M / 4; i += 2)
    for (int l = 0; l < 32; ++l) {
      const float* x = acc + (l / 4 + 8 * (i >> 1)) * 8 + 2 * (l & 3);
      if (td == Ty::f32) {
        w.r<float>(e.v[0][size_t(i)])[l] = x[0];
        w.r<float>(e.v[0][size_t(i) + 1])[l] = x[1];
      } else
        w.r<uint32_t>(e.v[0][size_t(i >> 1)])[l] = f32_to_f16(x[0]) | uint32_t(f32_to_f16(x[1])) << 16;
    }
  w.wk->count.mma_flops += uint64_t(2 * M * 8 * K);
}

// m16n8k8 / m16n8k16 of f16 and bf16. Four neighbouring lanes hold eight consecutive k of one row
// of A (or column of B), so registers convert eight values at a time.
void mma_half(Warp& w, const Op& o, uint32_t m) {
  if (w.blk->ls->card_sums) return mma_float(w, o, m);
  if (!whole_warp(w, m)) return;
  const OpExt& e = *o.ext;
  const int K = int(e.n[2]);
  const bool bf = Ty(e.n[4]) == Ty::bf16, df32 = Ty(e.n[3]) == Ty::f32, cf32 = Ty(e.n[6]) == Ty::f32;
  alignas(32) float A[16 * 16];
  __m256 B[16], c[16];
  for (int r = 0; r < K / 4; ++r) {
    const uint32_t* v = w.r<uint32_t>(e.v[1][size_t(r)]);
    float* to = A + 8 * (r & 1) * 16 + (r >> 1) * 8;
    for (int g = 0; g < 8; ++g) _mm256_store_ps(to + g * 16, half8(v + 4 * g, bf));
  }
  for (int r = 0; r < K / 8; ++r) {
    const uint32_t* v = w.r<uint32_t>(e.v[2][size_t(r)]);
    for (int g = 0; g < 8; ++g) B[8 * r + g] = half8(v + 4 * g, bf);
    transpose8(B + 8 * r);
  }
  for (int h = 0; h < 2; ++h) {
    if (cf32) {
      const float *x = w.r<float>(e.v[3][size_t(2 * h)]), *y = w.r<float>(e.v[3][size_t(2 * h) + 1]);
      for (int g = 0; g < 8; ++g) {
        __m128 p = _mm_load_ps(x + 4 * g), q = _mm_load_ps(y + 4 * g);
        c[8 * h + g] = _mm256_set_m128(_mm_unpackhi_ps(p, q), _mm_unpacklo_ps(p, q));
      }
    } else {
      const uint32_t* v = w.r<uint32_t>(e.v[3][size_t(h)]);
      for (int g = 0; g < 8; ++g) c[8 * h + g] = half8(v + 4 * g, false);
    }
  }
  for (int k = 0; k < K; ++k)
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) c[i] = _mm256_fmadd_ps(_mm256_broadcast_ss(A + i * 16 + k), B[k], c[i]);
  for (int h = 0; h < 2; ++h) {
    if (df32) {
      float *x = w.r<float>(e.v[0][size_t(2 * h)]), *y = w.r<float>(e.v[0][size_t(2 * h) + 1]);
      for (int g = 0; g < 8; ++g) {
        __m128 lo = _mm256_castps256_ps128(c[8 * h + g]), hi = _mm256_extractf128_ps(c[8 * h + g], 1);
        _mm_store_ps(x + 4 * g, _mm_shuffle_ps(lo, hi, 0x88));
        _mm_store_ps(y + 4 * g, _mm_shuffle_ps(lo, hi, 0xdd));
      }
    } else {
      uint32_t* v = w.r<uint32_t>(e.v[0][size_t(h)]);
      for (int g = 0; g < 8; ++g)
        _mm_store_si128(reinterpret_cast<__m128i*>(v + 4 * g),
                        _mm256_cvtps_ph(c[8 * h + g], _MM_FROUND_TO_NEAREST_INT));
    }
  }
  w.wk->count.mma_flops += uint64_t(2 * 16 * 8 * K);
}

void mma_int(Warp& w, const Op& o, uint32_t m) {
  if (!whole_warp(w, m)) return;
  const OpExt& e = *o.ext;
  const int M = int(e.n[0]), K = int(e.n[2]);
  const Ty ta = Ty(e.n[4]), tb = Ty(e.n[5]);
  const int E = 32 / element_bits(ta);
  int32_t A[16 * 64], B[64 * 8];
  int64_t acc[16 * 8];
  for (size_t r = 0; r < e.v[1].size(); ++r) {
    const uint32_t* v = w.r<uint32_t>(e.v[1][r]);
    for (int l = 0; l < 32; ++l)
      unpack_ints(v[l], ta, A + (l / 4 + 8 * (int(r) & 1)) * K + E * (l & 3) + int(r >> 1) * 4 * E);
  }
  for (size_t r = 0; r < e.v[2].size(); ++r) {
    const uint32_t* v = w.r<uint32_t>(e.v[2][r]);
    for (int l = 0; l < 32; ++l) {
      int32_t t[8];
      unpack_ints(v[l], tb, t);
      for (int x = 0; x < E; ++x) B[(E * (l & 3) + int(r) * 4 * E + x) * 8 + l / 4] = t[x];
    }
  }
  for (int i = 0; i < M / 4; ++i)
    for (int l = 0; l < 32; ++l)
      acc[(l / 4 + 8 * (i >> 1)) * 8 + 2 * (l & 3) + (i & 1)] = w.r<int32_t>(e.v[3][size_t(i)])[l];
  for (int r = 0; r < M; ++r)
    for (int k = 0; k < K; ++k)
      for (int c = 0; c < 8; ++c) acc[r * 8 + c] += A[r * K + k] * B[k * 8 + c];
  for (int i = 0; i < M / 4; ++i)
    for (int l = 0; l < 32; ++l) {
      int64_t x = acc[(l / 4 + 8 * (i >> 1)) * 8 + 2 * (l & 3) + (i & 1)];
      if (e.n[7]) x = std::clamp<int64_t>(x, INT32_MIN, INT32_MAX);
      w.r<int32_t>(e.v[0][size_t(i)])[l] = int32_t(uint32_t(uint64_t(x)));
    }
  w.wk->count.mma_flops += uint64_t(2 * M * 8 * K);
}

void mma_double(Warp& w, const Op& o, uint32_t m) {
  if (!whole_warp(w, m)) return;
  const OpExt& e = *o.ext;
  const int M = int(e.n[0]), K = int(e.n[2]);
  double A[16 * 16], B[16 * 8], acc[16 * 8];
  const int rows = M / 8;
  for (size_t r = 0; r < e.v[1].size(); ++r)
    for (int l = 0; l < 32; ++l)
      A[(l / 4 + 8 * (rows == 2 ? int(r) & 1 : 0)) * K + (l & 3) + 4 * (rows == 2 ? int(r >> 1) : int(r))] =
          w.r<double>(e.v[1][r])[l];
  for (size_t r = 0; r < e.v[2].size(); ++r)
    for (int l = 0; l < 32; ++l) B[((l & 3) + 4 * int(r)) * 8 + l / 4] = w.r<double>(e.v[2][r])[l];
  for (int i = 0; i < M / 4; ++i)
    for (int l = 0; l < 32; ++l)
      acc[(l / 4 + 8 * (i >> 1)) * 8 + 2 * (l & 3) + (i & 1)] = w.r<double>(e.v[3][size_t(i)])[l];
  for (int r = 0; r < M; ++r)
    for (int k = 0; k < K; ++k)
      for (int c = 0; c < 8; ++c) acc[r * 8 + c] = __builtin_fma(A[r * K + k], B[k * 8 + c], acc[r * 8 + c]);
  for (int i = 0; i < M / 4; ++i)
    for (int l = 0; l < 32; ++l)
      w.r<double>(e.v[0][size_t(i)])[l] = acc[(l / 4 + 8 * (i >> 1)) * 8 + 2 * (l & 3) + (i & 1)];
  w.wk->count.mma_flops += uint64_t(2 * M * 8 * K);
}

bool sel_mma(Decoder& d, const AInstr& in, Op& op) {
  op.cls = C_mma;
  Shape s;
  if (has(in, "sp") || has(in, "sp::ordered_metadata") || !find_shape(in, &s) || in.ops.size() != 4) return false;
  if (!has(in, "row") || !has(in, "col") || has(in, "block_scale")) return false;
  std::vector<Ty> t;
  for (size_t i = 1; i < in.mods.size(); ++i) {
    Ty x = parse_type(in.mods[i]);
    if (x != Ty::none) t.push_back(x);
  }
  if (t.size() != 4 || s.n != 8 || has(in, "xor") || has(in, "and")) return false;
  Ty td = t[0], ta = t[1], tb = t[2], tc = t[3];
  if (ta == Ty::f16 && s.m == 8) return false;  // Volta's m8n8k4
  int eb = element_bits(ta);
  if (element_bits(tb) != eb) return false;
  bool dbl = ta == Ty::f64;
  bool ints = ta == Ty::s8 || ta == Ty::u8 || ta == Ty::s4 || ta == Ty::u4;
  int per = dbl ? 1 : 32 / eb;
  size_t na = size_t(s.m * s.k / 32 / per), nb = size_t(8 * s.k / 32 / per), nc = size_t(s.m * 8 / 32);
  if (na == 0) return false;
  OpExt& e = d.ext(op);
  e.n = {s.m, s.n, s.k, int(td), int(ta), int(tb), int(tc), has(in, "satfinite")};
  auto regs = [&](const AOperand& o, std::vector<uint32_t>& v, size_t n, int size, bool dst) {
    if (o.kind == AOperand::vec)
      for (auto& x : o.elems) v.push_back(dst ? d.dst(x, size) : d.src(x, size));
    else
      v.push_back(dst ? d.dst(o, size) : d.src(o, size));
    if (v.size() != n) throw Decoder::Unsupported{"fragment size"};
  };
  int size = dbl ? 8 : 4;
  regs(in.ops[0], e.v[0], td == Ty::f16 ? nc / 2 : nc, size, true);
  regs(in.ops[1], e.v[1], na, size, false);
  regs(in.ops[2], e.v[2], nb, size, false);
  regs(in.ops[3], e.v[3], tc == Ty::f16 ? nc / 2 : nc, size, false);
  bool fast = (ta == Ty::f16 || ta == Ty::bf16) && ta == tb && s.m == 16 && s.k <= 16;
  return done(op, dbl ? mma_double : ints ? mma_int : fast ? mma_half : mma_float);
}

// --- ldmatrix, stmatrix, movmatrix -----------------------------------------------------------------------------

template <bool Trans>
void ldmatrix(Warp& w, const Op& o, uint32_t m) {
  if (!whole_warp(w, m)) return;
  uint64_t addr[32];
  uint8_t* ptr[32];
  fill_addresses(w, o, addr);
  uint32_t n = o.d, lanes = n == 4 ? FULL : (1u << (8 * n)) - 1;
  resolve(w, lanes, Space(o.flags), addr, 16, Access::read, ptr, true);
  check_shadow(w, lanes, Space(o.flags), addr, 16, Access::read, false, ptr, nullptr);
  for (uint32_t j = 0; j < n; ++j) {
    uint32_t* d = w.r<uint32_t>(o.ext->v[0][j]);
    alignas(16) uint16_t t[8][8];
    for (int r = 0; r < 8; ++r) memcpy(t[r], ptr[8 * j + uint32_t(r)], 16);
    for (int l = 0; l < 32; ++l) {
      int a = l / 4, b = 2 * (l & 3);
      d[l] = Trans ? t[b][a] | uint32_t(t[b + 1][a]) << 16 : t[a][b] | uint32_t(t[a][b + 1]) << 16;
    }
  }
}
template <bool Trans>
void stmatrix(Warp& w, const Op& o, uint32_t m) {
  if (!whole_warp(w, m)) return;
  uint64_t addr[32];
  uint8_t* ptr[32];
  fill_addresses(w, o, addr);
  uint32_t n = o.d, lanes = n == 4 ? FULL : (1u << (8 * n)) - 1;
  resolve(w, lanes, Space(o.flags), addr, 16, Access::write, ptr, true);
  alignas(16) uint16_t t[32][8];
  uint8_t* rows[32];
  for (uint32_t j = 0; j < n; ++j) {
    const uint32_t* s = w.r<uint32_t>(o.ext->v[0][j]);
    for (int l = 0; l < 32; ++l) {
      int a = l / 4, b = 2 * (l & 3);
      uint16_t lo = uint16_t(s[l]), hi = uint16_t(s[l] >> 16);
      if (Trans) {
        t[8 * j + uint32_t(b)][a] = lo;
        t[8 * j + uint32_t(b) + 1][a] = hi;
      } else {
        t[8 * j + uint32_t(a)][b] = lo;
        t[8 * j + uint32_t(a)][b + 1] = hi;
      }
    }
  }
  for (int i = 0; i < 32; ++i) rows[i] = reinterpret_cast<uint8_t*>(t[i]);
  check_shadow(w, lanes, Space(o.flags), addr, 16, Access::write, false, ptr, rows);
  for (uint32_t i = 0; i < 8 * n; ++i) memcpy(ptr[i], t[i], 16);
}
void movmatrix(Warp& w, const Op& o, uint32_t m) {
  if (!whole_warp(w, m)) return;
  uint16_t t[8][8];
  const uint32_t* a = w.r<uint32_t>(o.a);
  for (int l = 0; l < 32; ++l) {
    t[l / 4][2 * (l & 3)] = uint16_t(a[l]);
    t[l / 4][2 * (l & 3) + 1] = uint16_t(a[l] >> 16);
  }
  uint32_t* d = w.r<uint32_t>(o.dst);
  for (int l = 0; l < 32; ++l) d[l] = t[2 * (l & 3)][l / 4] | uint32_t(t[2 * (l & 3) + 1][l / 4]) << 16;
}

bool sel_matrix(Decoder& d, const AInstr& in, Op& op) {
  bool load = in.mods[0] == "ldmatrix";
  op.cls = load ? C_load_shared : C_store_shared;
  if (!has(in, "m8n8") || !has(in, "b16")) return false;
  op.d = has(in, "x4") ? 4 : has(in, "x2") ? 2 : 1;
  Space s = space_of(in);
  const AOperand &regs = load ? in.ops[0] : in.ops[1], &addr = load ? in.ops[1] : in.ops[0];
  address_operand(d, addr, op);
  OpExt& e = d.ext(op);
  if (regs.kind == AOperand::vec)
    for (auto& x : regs.elems) e.v[0].push_back(load ? d.dst(x, 4) : d.src(x, 4));
  else
    e.v[0].push_back(load ? d.dst(regs, 4) : d.src(regs, 4));
  if (e.v[0].size() != op.d) return false;
  op.flags = uint32_t(s);
  bool tr = has(in, "trans");
  return done(op, load ? (tr ? ldmatrix<true> : ldmatrix<false>) : (tr ? stmatrix<true> : stmatrix<false>));
}

}  // namespace

void register_mma(SelectorMap& m) {
  m["mma"] = sel_mma;
  m["ldmatrix"] = m["stmatrix"] = sel_matrix;
  m["movmatrix"] = [](Decoder& d, const AInstr& in, Op& op) {
    op.cls = C_shuffle;
    op.dst = d.dst(in.ops[0], 4);
    op.a = d.src(in.ops[1], 4);
    return done(op, movmatrix);
  };
}

}  // namespace cudasim
