// What libraries of kernels use, and bugs that must be found.
#include <algorithm>

#include "harness.h"

using namespace test;
using cudasim::Fault;

void library(const std::string& file) {
  current = file;
  Ptx p(dir + "/" + file);
  if (!p.m) return;
  Rng rng(11);
  auto name = [&](const char* n) { current = file + " " + n; };
  {
    name("cub_reduce");
    int n = 1000;
    Buf<float> a(n), out(8);
    for (int i = 0; i < n; ++i) a[i] = float(rng.u() % 100);
    ok(run(p, "cub_reduce", {{4}, {256}}, a.p, out.p, n));
    bool same = true;
    for (int b = 0; b < 4; ++b) {
      float s = 0, m = 0;
      for (int i = b * 256; i < std::min(n, b * 256 + 256); ++i) {
        s += a[i];
        m = std::max(m, a[i]);
      }
      same &= out[2 * b] == s && out[2 * b + 1] == m;
    }
    check(same, "values");
  }
  {
    name("cub_scan_sort");
    Buf<int> a(512), scan(512), sorted(512);
    std::vector<int> v(512);
    for (int i = 0; i < 512; ++i) v[i] = a[i] = int(rng.u() % 2000) - 1000;
    ok(run(p, "cub_scan_sort", {{1}, {128}}, a.p, scan.p, sorted.p));
    bool same = true;
    int s = 0;
    for (int i = 0; i < 512; ++i) {
      s += v[i];
      same &= scan[i] == s;
    }
    check(same, "scan");
    std::sort(v.begin(), v.end());
    check(std::equal(v.begin(), v.end(), sorted.p), "sort");
  }
  {
    name("groups");
    Buf<int> a(96), out(96 * 3);
    for (int i = 0; i < 96; ++i) a[i] = int(rng.u() % 50);
    ok(run(p, "groups", {{1}, {96}}, a.p, out.p));
    bool same = true;
    for (int t = 0; t < 96; ++t) {
      int s = 0, odd = 0, rank = 0, both = 0, lab = 0;
      for (int k = t / 8 * 8; k < t / 8 * 8 + 8; ++k) s += a[k];
      for (int k = t / 32 * 32; k < t / 32 * 32 + 32; ++k) {
        odd += a[k] & 1;
        rank += (a[k] & 1) && k < t;
        both += (a[k] & 3) == 3;
        if (a[k] % 3 == a[t] % 3) lab += a[k];
      }
      int bits = a[t] & 1 ? odd * 100 + rank : 0;
      if ((a[t] & 3) == 3) bits += both * 10000;
      same &= out[3 * t] == s && out[3 * t + 1] == bits && out[3 * t + 2] == lab;
    }
    check(same, "values");
  }
  {
    name("grid_sync");
    Buf<int> a(41);
    ok(run(p, "grid_sync", {{40}, {64}}, a.p, 5));
    bool same = a[40] == 0;
    for (int i = 0; i < 40; ++i) same &= a[i] == 5;
    check(same, "values");
  }
  {
    name("async_pipeline");
    Buf<int> a(128 * 7), out(128);
    for (int i = 0; i < 128 * 7; ++i) a[i] = int(rng.u());
    ok(run(p, "async_pipeline", {{1}, {128}}, a.p, out.p, 7));
    bool same = true;
    for (int t = 0; t < 128; ++t) {
      unsigned s = 0;
      for (int k = 0; k < 7; ++k) s += unsigned(a[k * 128 + 127 - t]);
      same &= int(s) == out[t];
    }
    check(same, "values");
  }
  {
    name("block_barrier");
    Buf<int> out(64);
    ok(run(p, "block_barrier", {{1}, {64}}, out.p));
    bool same = true;
    for (int t = 0; t < 64; ++t) same &= out[t] == 63 - t + 2;
    check(same, "values");
  }
  {
    name("fp8");
    int n = 2000;
    Buf<float> a(n), back(2 * n);
    Buf<unsigned char> o(2 * n);
    for (int i = 0; i < n; ++i) a[i] = std::ldexp(rng.f(), int(rng.u() % 26) - 12);
    ok(run(p, "fp8", {{16}, {128}}, a.p, o.p, back.p, n));
    // nearest representable value, by search
    auto value = [](int c, bool e5) {
      int e = e5 ? c >> 2 & 31 : c >> 3 & 15, m = e5 ? c & 3 : c & 7, b = e5 ? 15 : 7, mb = e5 ? 2 : 3;
      double v = e ? std::ldexp(1 + double(m) / (1 << mb), e - b) : std::ldexp(double(m), 1 - b - mb);
      return c & 128 ? -v : v;
    };
    int bad = 0;
    for (int i = 0; i < n; ++i)
      for (int f = 0; f < 2; ++f) {
        int best = 0, last = f ? 0x7b : 0x7e;
        double bd = 1e30, x = std::fabs(a[i]);
        for (int c = 0; c <= last; ++c) {
          double d = std::fabs(value(c, f) - x);
          if (d < bd || (d == bd && !(c & 1))) {
            bd = d;
            best = c;
          }
        }
        if (a[i] < 0) best |= 128;
        bad += o[2 * i + f] != best || back[2 * i + f] != float(value(best, f));
      }
    check(bad == 0, std::to_string(bad) + " wrong");
  }
}

void bugs(const std::string& file) {
  Ptx p(dir + "/" + file);
  if (!p.m) return;
  Buf<int> o(128), a(128);
  Buf<float> f(160);
  auto name = [&](const char* n) { current = file + " " + n; };
  auto mentions = [&](const cudasim::LaunchResult& r, const char* s) {
    check(r.message.find(s) != std::string::npos, std::string("message lacks '") + s + "': " + r.message);
  };
  {
    name("oob_global");
    ok(run(p, "oob_global", {{1}, {64}}, o.p, 0));
    auto r = run(p, "oob_global", {{1}, {64}}, o.p, 100000);
    expect_fault(r, Fault::global_out_of_bounds);
    mentions(r, "thread (37,0,0)");
    mentions(r, "oob_global");
    mentions(r, "PTX line");
    expect_fault(run(p, "oob_read", {{1}, {32}}, a.p, o.p, 128), Fault::global_out_of_bounds);
    ok(run(p, "oob_read", {{1}, {32}}, a.p, o.p, 127));
  }
  {
    name("oob_shared");
    ok(run(p, "oob_shared", {{1}, {64}}, o.p, 0));
    expect_fault(run(p, "oob_shared", {{1}, {64}}, o.p, 1), Fault::shared_out_of_bounds);
    ok(run(p, "oob_dynamic", {{1}, {64}, {}, 256}, o.p, 0));
    expect_fault(run(p, "oob_dynamic", {{1}, {64}, {}, 256}, o.p, 1), Fault::shared_out_of_bounds);
    expect_fault(run(p, "oob_dynamic", {{1}, {64}, {}, 256}, o.p, -1), Fault::shared_out_of_bounds);
  }
  name("misaligned_v4");
  expect_fault(run(p, "misaligned_v4", {{1}, {8}}, f.p, f.p), Fault::misaligned);
  name("traps");
  expect_fault(run(p, "traps", {{1}, {64}}, 40), Fault::trap);
  name("bad launch");
  expect_fault(run(p, "traps", {{1}, {2048}}, 40), Fault::bad_launch);
  expect_fault(run(p, "oob_dynamic", {{1}, {32}, {}, 256 * 1024}, o.p, 0), Fault::bad_launch);
  name("divergent_sync");
  expect_fault(run(p, "divergent_sync", {{1}, {64}}, o.p), Fault::barrier_deadlock);
  name("missing_sync_warp");
  expect_fault(run(p, "missing_sync_warp", {{1}, {96}}, o.p, 5), Fault::barrier_deadlock);
  name("half_warp_shfl");
  expect_fault(run(p, "half_warp_shfl", {{1}, {32}}, o.p), Fault::barrier_deadlock);
  {
    Env c("CUDASIM_CHECK", "race");
    name("races");
    expect_fault(run(p, "no_sync", {{1}, {128}}, o.p), Fault::shared_race);
    ok(run(p, "with_sync", {{1}, {128}}, o.p));
    expect_fault(run(p, "no_second_sync", {{1}, {128}}, o.p), Fault::shared_race);
    expect_fault(run(p, "no_syncwarp", {{1}, {32}}, o.p), Fault::shared_race);
    ok(run(p, "with_syncwarp", {{1}, {32}}, o.p));
    ok(run(p, "byte_neighbours", {{1}, {128}}, o.p));
    ok(run(p, "same_value", {{1}, {128}}, o.p));
    expect_fault(run(p, "named_wrong", {{1}, {128}}, o.p), Fault::barrier_deadlock);
  }
  {
    Env c("CUDASIM_CHECK", "init");
    name("uninit");
    ok(run(p, "uninit", {{1}, {64}}, o.p, 64));
    expect_fault(run(p, "uninit", {{1}, {64}}, o.p, 63), Fault::uninitialized_shared);
  }
}
