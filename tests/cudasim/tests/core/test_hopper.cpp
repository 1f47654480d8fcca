// TMA, mbarriers, wgmma and clusters.
#include "gemm_reference.h"
#include "tensor_map.h"

using namespace test;
using cudasim::Fault;

void hopper(const std::string& file) {
  current = file;
  Ptx p(dir + "/" + file);
  if (!p.m) return;
  Rng rng(5);
  auto name = [&](const char* n) { current = file + " " + n; };
  for (const char* k : {"tma_gemm_f16", "tma_gemm_bf16", "tma_gemm_mn", "tma_gemm_ra", "tma_gemm_ws"}) {
    name(k);
    bool bf = k[9] == 'b', mn = std::string(k) == "tma_gemm_mn";
    int M = 200, N = 136, K = 192;
    Buf<uint16_t> A(size_t(M) * K), B(size_t(N) * K);
    Buf<float> C(size_t(M) * N, -1);
    for (size_t i = 0; i < A.n; ++i) A[i] = bf ? to_bf16(rng.f()) : to_f16(rng.f());
    for (size_t i = 0; i < B.n; ++i) B[i] = bf ? to_bf16(rng.f()) : to_f16(rng.f());
    MapArg ma{map2d(A.p, M, K, 64, 64, 2, 3)}, mb{mn ? map2d(B.p, K, N, 64, 64, 2, 3) : map2d(B.p, N, K, 64, 64, 2, 3)};
    uint32_t threads = std::string(k) == "tma_gemm_ws" ? 256 : 128;
    auto r = run(p, k, {{unsigned(N + 63) / 64, unsigned(M + 63) / 64}, {threads}, {}, 4 * 2 * 8192 + 1024}, ma, mb,
                 C.p, M, N, K);
    ok(r);
    auto want = gemm_ref(A.p, B.p, M, N, K, bf, !mn);
    double e = worst(C.p, want);
    check(e < 1e-5, "error " + std::to_string(e));
    {
      Env c("CUDASIM_CHECK", "race,init");
      ok(run(p, k, {{unsigned(N + 63) / 64, unsigned(M + 63) / 64}, {threads}, {}, 4 * 2 * 8192 + 1024}, ma, mb, C.p, M,
             N, K));
    }
    {
      Env c("CUDASIM_SEED", "4");
      ok(run(p, k, {{unsigned(N + 63) / 64, unsigned(M + 63) / 64}, {threads}, {}, 4 * 2 * 8192 + 1024}, ma, mb, C.p, M,
             N, K));
      check(worst(C.p, want) < 1e-5, "seeded error");
    }
  }
  for (const char* k : {"tma_gemm_no_mma_wait", "tma_gemm_no_full_wait", "tma_gemm_early_release"}) {
    name(k);
    int M = 64, N = 64, K = 512;
    Buf<uint16_t> A(size_t(M) * K), B(size_t(N) * K);
    Buf<float> C(size_t(M) * N, -1);
    for (size_t i = 0; i < A.n; ++i) {
      A[i] = to_f16(rng.f());
      B[i] = to_f16(rng.f());
    }
    MapArg ma{map2d(A.p, M, K, 64, 64, 2, 3)}, mb{map2d(B.p, N, K, 64, 64, 2, 3)};
    uint32_t threads = std::string(k) == "tma_gemm_early_release" ? 256 : 128;
    auto r = run(p, k, {{1, 1}, {threads}, {}, 4 * 2 * 8192 + 1024}, ma, mb, C.p, M, N, K);
    check(r.fault == Fault::barrier_deadlock || worst(C.p, gemm_ref(A.p, B.p, M, N, K, false, true)) > 1e-3,
          "the bug must fault or give wrong results");
  }
  {
    name("swizzles");
    // copies a box through shared memory with each swizzle and reads it back by the documented pattern
    for (int sw = 0; sw <= 3; ++sw) {
      int cols = sw == 0 ? 64 : 8 << sw;
      Buf<uint16_t> in(40 * 100), out(64 * cols), back(40 * 100, 0xabcd);
      for (size_t i = 0; i < in.n; ++i) in[i] = uint16_t(i + 1);
      MapArg mi{map2d(in.p, 40, 100, 32, cols, 2, sw)}, mo{map2d(back.p, 40, 100, 32, cols, 2, sw)};
      ok(run(p, "swizzles", {{1}, {64}, {}, 8192 + 1024}, mi, mo, out.p, sw, cols, 80, 20));
      bool same = true, same2 = true;
      for (int r = 0; r < 32; ++r)
        for (int c = 0; c < cols; ++c) {
          bool inside = 20 + r < 40 && 80 + c < 100;
          same &= out[r * cols + c] == (inside ? in[(20 + r) * 100 + 80 + c] : 0);
        }
      for (int r = 0; r < 40; ++r)
        for (int c = 0; c < 100; ++c) {
          bool inside = r >= 20 && c >= 80 && c < 80 + cols && r < 52;
          same2 &= back[r * 100 + c] == (inside ? in[r * 100 + c] : 0xabcd);
        }
      check(same, "load, swizzle " + std::to_string(sw));
      check(same2, "store, swizzle " + std::to_string(sw));
    }
  }
  for (const char* c : {"", "race,init"}) {
    name("bulk_copy");
    Env chk("CUDASIM_CHECK", c);
    Buf<float> in(1024), out(1024, 1.f);
    for (int i = 0; i < 1024; ++i) in[i] = float(i);
    ok(run(p, "bulk_copy", {{1}, {128}}, in.p, out.p));
    bool same = true;
    for (int i = 0; i < 1024; ++i) same &= out[i] == 2.f * i + (i < 512 ? 1 : 0);
    check(same, "values");
  }
  for (const char* c : {"", "race,init"}) {
    name("cluster_ring");
    Env chk("CUDASIM_CHECK", c);
    Buf<int> out(8 * 64);
    ok(run(p, "cluster_ring", {{8}, {64}, {4}}, out.p));
    bool same = true;
    for (int b = 0; b < 8; ++b)
      for (int t = 0; t < 64; ++t) same &= out[b * 64 + t] == ((b / 4 * 4) + (b + 1) % 4) * 1000 + t;
    check(same, "values");
  }
  for (const char* c : {"", "race,init"}) {
    name("multicast");
    Env chk("CUDASIM_CHECK", c);
    Buf<float> in(256), out(2 * 256);
    for (int i = 0; i < 256; ++i) in[i] = float(i);
    const auto r = run(p, "multicast", {{2}, {64}, {2}}, in.p, out.p);
    ok(r);
    check(r.profile.async_sectors_read == 32 && r.profile.async_sectors_received == 64, "sectors of multicast");
    bool same = true;
    for (int i = 0; i < 512; ++i) same &= out[i] == float(i % 256);
    check(same, "values");
  }
  {
    name("wgmma kinds");
    Buf<float> A(64 * 8), B(16 * 8), C(64 * 16);
    for (size_t i = 0; i < A.n; ++i) A[i] = float(int(rng.u() % 65) - 32) / 16;
    for (size_t i = 0; i < B.n; ++i) B[i] = float(int(rng.u() % 65) - 32) / 16;
    ok(run(p, "wgmma_tf32", {{1}, {128}}, A.p, B.p, C.p));
    bool same = true;
    for (int m = 0; m < 64; ++m)
      for (int n = 0; n < 16; ++n) {
        float s = 0;
        for (int k = 0; k < 8; ++k) s += A[m * 8 + k] * B[n * 8 + k];
        same &= s == C[m * 16 + n];
      }
    check(same, "tf32 no swizzle");
    {
      Env c("CUDASIM_CHECK", "race,init");
      ok(run(p, "wgmma_tf32", {{1}, {128}}, A.p, B.p, C.p));
      expect_fault(run(p, "wgmma_no_proxy_fence", {{1}, {128}}, A.p, B.p, C.p), Fault::shared_race);
    }
    Buf<signed char> a8(64 * 32), b8(16 * 32);
    Buf<int> c8(64 * 16);
    for (size_t i = 0; i < a8.n; ++i) a8[i] = char(rng.u());
    for (size_t i = 0; i < b8.n; ++i) b8[i] = char(rng.u());
    ok(run(p, "wgmma_s8", {{1}, {128}}, a8.p, b8.p, c8.p));
    same = true;
    for (int m = 0; m < 64; ++m)
      for (int n = 0; n < 16; ++n) {
        int s = 0;
        for (int k = 0; k < 32; ++k) s += a8[m * 32 + k] * b8[n * 32 + k];
        same &= s == c8[m * 16 + n];
      }
    check(same, "s8 32B swizzle");
  }
  {
    name("mbarrier deadlock");
    expect_fault(run(p, "mbar_deadlock", {{1}, {64}}), Fault::barrier_deadlock);
    name("cp_async_mbar");
    Env chk("CUDASIM_CHECK", "race,init");
    Buf<int> in(128), out(128);
    for (int i = 0; i < 128; ++i) in[i] = i * 3;
    ok(run(p, "cp_async_mbar", {{1}, {64}}, in.p, out.p));
    bool same = true;
    for (int i = 0; i < 64; ++i) same &= out[i] == 3 * (63 - i);
    check(same, "values");
  }
}
