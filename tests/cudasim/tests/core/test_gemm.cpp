// Matrix instructions, as matmuls that use them.
#include "gemm_reference.h"

using namespace test;
using cudasim::Fault;

void gemm(const std::string& file) {
  current = file;
  Ptx p(dir + "/" + file);
  if (!p.m) return;
  Rng rng(3);
  const uint32_t smem = 3 * (128 * 32 + 128 * 32) * 2;
  struct {
    const char* name;
    bool bf, tn;
    int M, N, K;
  } cases[] = {{"gemm_f16_tn", false, true, 256, 128, 256},
               {"gemm_bf16_tn", true, true, 200, 136, 104},
               {"gemm_f16_nn", false, false, 136, 264, 96}};
  for (auto& c : cases) {
    current = file + " " + c.name;
    Buf<uint16_t> A(size_t(c.M) * c.K), B(size_t(c.N) * c.K);
    Buf<float> C(size_t(c.M) * c.N, -1);
    for (size_t i = 0; i < A.n; ++i) A[i] = c.bf ? to_bf16(rng.f()) : to_f16(rng.f());
    for (size_t i = 0; i < B.n; ++i) B[i] = c.bf ? to_bf16(rng.f()) : to_f16(rng.f());
    auto r = run(p, c.name, {{unsigned(c.N + 127) / 128, unsigned(c.M + 127) / 128}, {128}, {}, smem}, A.p, B.p, C.p,
                 c.M, c.N, c.K);
    ok(r);
    double e = worst(C.p, gemm_ref(A.p, B.p, c.M, c.N, c.K, c.bf, c.tn));
    check(e < 1e-5, "error " + std::to_string(e));
    if (file.find("80g") == std::string::npos) {
      // swizzled tiles: stores, ldmatrix and cp.async are free of bank conflicts
      check(r.profile.shared_wavefronts == r.profile.shared_wavefronts_ideal,
            "bank conflicts: " + std::to_string(r.profile.shared_wavefronts) + " of " +
                std::to_string(r.profile.shared_wavefronts_ideal));
      uint64_t tiles = uint64_t((c.N + 127) / 128) * uint64_t((c.M + 127) / 128), steps = uint64_t((c.K + 31) / 32);
      check(r.profile.mma_flops == tiles * steps * 2 * 128 * 128 * 32, "flops");
    }
  }
  {
    Buf<uint16_t> A(128 * 128), B(128 * 128);
    Buf<float> C(128 * 128);
    for (size_t i = 0; i < A.n; ++i) {
      A[i] = to_f16(rng.f());
      B[i] = to_f16(rng.f());
    }
    auto want = gemm_ref(A.p, B.p, 128, 128, 128, false, true);
    current = file + " gemm_no_wait";
    auto r = run(p, "gemm_no_wait", {{1}, {128}, {}, smem}, A.p, B.p, C.p, 128, 128, 128);
    ok(r);
    check(worst(C.p, want) > 1e-3, "a missing cp.async wait must give wrong results");
    Env c("CUDASIM_CHECK", "race,init");
    expect_fault(run(p, "gemm_no_wait", {{1}, {128}, {}, smem}, A.p, B.p, C.p, 128, 128, 128), Fault::shared_race);
    current = file + " gemm_no_barrier";
    expect_fault(run(p, "gemm_no_barrier", {{1}, {128}, {}, smem}, A.p, B.p, C.p, 128, 128, 128), Fault::shared_race);
    current = file + " gemm checked";
    ok(run(p, "gemm_f16_tn", {{1}, {128}, {}, smem}, A.p, B.p, C.p, 128, 128, 128));
    check(worst(C.p, want) < 1e-5, "values");
  }
  {
    current = file + " mma kinds";
    Buf<float> A(128), B(64), C(128);
    auto tf = [](float x) {
      uint32_t u;
      memcpy(&u, &x, 4);
      u = (u + 0x1000) & 0xffffe000u;
      memcpy(&x, &u, 4);
      return x;
    };
    for (size_t i = 0; i < 128; ++i) A[i] = rng.f();
    for (size_t i = 0; i < 64; ++i) B[i] = rng.f();
    ok(run(p, "mma_tf32", {{1}, {32}}, A.p, B.p, C.p));
    double e = 0;
    for (int m = 0; m < 16; ++m)
      for (int n = 0; n < 8; ++n) {
        double s = 0;
        for (int k = 0; k < 8; ++k) s += double(tf(A[m * 8 + k])) * tf(B[k * 8 + n]);
        e = std::max(e, std::fabs(s - C[m * 8 + n]));
      }
    check(e < 1e-6, "tf32 error " + std::to_string(e));
    Buf<signed char> a8(512), b8(256);
    Buf<int> c8(128);
    for (size_t i = 0; i < 512; ++i) a8[i] = char(rng.u());
    for (size_t i = 0; i < 256; ++i) b8[i] = char(rng.u());
    ok(run(p, "mma_s8", {{1}, {32}}, a8.p, b8.p, c8.p));
    bool same = true;
    for (int m = 0; m < 16; ++m)
      for (int n = 0; n < 8; ++n) {
        int s = 1 + (n & 1) + (m >= 8) * 2;
        for (int k = 0; k < 32; ++k) s += a8[m * 32 + k] * b8[k * 8 + n];
        same &= s == c8[m * 8 + n];
      }
    check(same, "s8 values");
    Buf<double> ad(32), bd(32), cd(64);
    for (size_t i = 0; i < 32; ++i) {
      ad[i] = rng.f();
      bd[i] = rng.f();
    }
    ok(run(p, "mma_f64", {{1}, {32}}, ad.p, bd.p, cd.p));
    e = 0;
    for (int m = 0; m < 8; ++m)
      for (int n = 0; n < 8; ++n) {
        double s = 0;
        for (int k = 0; k < 4; ++k) s += ad[m * 4 + k] * bd[k * 8 + n];
        e = std::max(e, std::fabs(s - cd[m * 8 + n]));
      }
    check(e < 1e-14, "f64 error");
    Buf<uint16_t> ah(128), bh(64), ch(128);
    for (size_t i = 0; i < 128; ++i) ah[i] = to_f16(float(int(rng.u() % 17) - 8));
    for (size_t i = 0; i < 64; ++i) bh[i] = to_f16(float(int(rng.u() % 17) - 8));
    ok(run(p, "mma_f16acc", {{1}, {32}}, ah.p, bh.p, ch.p));
    same = true;
    for (int m = 0; m < 16; ++m)
      for (int n = 0; n < 8; ++n) {
        float s = 0;
        for (int k = 0; k < 8; ++k) s += from_f16(ah[m * 8 + k]) * from_f16(bh[k * 8 + n]);
        same &= s == from_f16(ch[m * 8 + n]);
      }
    check(same, "f16 accumulator values");
    Buf<uint16_t> wa(512), wb(512), wd(256);
    Buf<float> wc(256);
    for (size_t i = 0; i < 512; ++i) {
      wa[i] = to_f16(float(int(rng.u() % 9) - 4));
      wb[i] = to_f16(float(int(rng.u() % 9) - 4));
    }
    ok(run(p, "wmma_gemm", {{1}, {32}}, wa.p, wb.p, wc.p, wd.p));
    same = true;
    for (int m = 0; m < 16; ++m)
      for (int n = 0; n < 16; ++n) {
        float s = 0;
        for (int k = 0; k < 32; ++k) s += from_f16(wa[m * 32 + k]) * from_f16(wb[n * 32 + k]);
        same &= 2 * s == wc[m * 16 + n] && s == from_f16(wd[n * 16 + m]);
      }
    check(same, "wmma values");
  }
}
