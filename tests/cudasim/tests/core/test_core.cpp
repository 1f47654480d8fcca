#include "harness.h"

#include <unistd.h>

#include <algorithm>
#include <cinttypes>

using namespace test;
using cudasim::Fault;
static std::string dir;
void grid(const std::string& dir, const std::string& file);  // test_grid.cpp

struct Pt {
  int a;
  float b;
  long long c;
  char d[5];
};

static void basic(const std::string& file) {
  current = file;
  Ptx p(dir + "/" + file);
  if (!p.m) return;
  Rng rng(7);
  auto name = [&](const char* n) { current = file + " " + n; };
  {
    name("vadd");
    int n = 10007;
    Buf<float> a(n), b(n), c(n);
    for (int i = 0; i < n; ++i) {
      a[i] = rng.f();
      b[i] = rng.f();
    }
    auto r = run(p, "vadd", {{40}, {256}}, a.p, b.p, c.p, n);
    ok(r);
    bool same = true;
    for (int i = 0; i < n; ++i) same &= c[i] == a[i] + b[i];
    check(same, "values");
    check(r.profile.global_sectors_read == 2 * uint64_t((n + 7) / 8),
          "sectors read " + std::to_string(r.profile.global_sectors_read));
    check(r.profile.unique_bytes_written == uint64_t((n + 7) / 8) * 32, "bytes written");
    check(r.profile.load_global >= 2 * 313, "load count");
  }
  {
    name("reduce_shfl");
    int n = 5000;
    Buf<float> a(n), out(4);
    double want = 0;
    for (int i = 0; i < n; ++i) {
      a[i] = float(rng.u() % 16);
      want += a[i];
    }
    ok(run(p, "reduce_shfl", {{4}, {256}}, a.p, out.p, n));
    check(out[0] + out[1] + out[2] + out[3] == want, "sum");
  }
  {
    int n = 128;
    Buf<float> a(n * n), b(n * n);
    for (int i = 0; i < n * n; ++i) a[i] = rng.f();
    for (const char* k : {"transpose_conflict", "transpose_padded"}) {
      name(k);
      auto r = run(p, k, {{4, 4}, {32, 8}}, a.p, b.p, n);
      ok(r);
      bool same = true;
      for (int y = 0; y < n; ++y)
        for (int x = 0; x < n; ++x) same &= b[x * n + y] == a[y * n + x];
      check(same, "values");
      // 16 blocks x 32 rows stored and 32 columns loaded; a column of an unpadded tile is a 32-way conflict
      uint64_t want = 16 * 32 + 16 * 32 * (k[10] == 'c' ? 32 : 1);
      if (file.find("80g") == std::string::npos)
        check(r.profile.shared_wavefronts == want && r.profile.shared_wavefronts_ideal == 1024,
              "wavefronts " + std::to_string(r.profile.shared_wavefronts) + " ideal " +
                  std::to_string(r.profile.shared_wavefronts_ideal));
    }
  }
  {
    name("histogram");
    int n = 20000;
    Buf<unsigned char> a(n);
    Buf<unsigned> h(256);
    std::vector<unsigned> want(256);
    for (int i = 0; i < n; ++i) {
      a[i] = rng.u() & 255;
      want[a[i]]++;
    }
    ok(run(p, "histogram", {{8}, {128}}, a.p, h.p, n));
    check(std::equal(want.begin(), want.end(), h.p), "counts");
  }
  {
    name("collatz");
    int n = 1000;
    Buf<int> a(n), o(n);
    for (int i = 0; i < n; ++i) a[i] = 1 + rng.u() % 100000;
    ok(run(p, "collatz", {{8}, {128}}, a.p, o.p, n));
    bool same = true;
    for (int i = 0; i < n; ++i) {
      long long v = a[i];
      int s = 0;
      while (v != 1) {
        v = v & 1 ? 3 * v + 1 : v >> 1;
        if (++s > 1000) break;
      }
      same &= s == o[i];
    }
    check(same, "steps");
  }
  {
    name("calls");
    Buf<int> o(64);
    Buf<float> f(64);
    Pt pt{3, 2.5f, 100, {1, 2, -3, 4, 5}};
    ok(run(p, "calls", {{1}, {64}}, o.p, f.p, pt));
    bool same = true;
    int fibs[10] = {0, 1, 1, 2, 3, 5, 8, 13, 21, 34};
    for (int t = 0; t < 64; ++t) {
      same &= o[t] == fibs[t % 10] + (t & 1 ? t + 7 : t * 3);
      same &= f[t] == t * 2.5f + 3 - 3 + 100 + ((t * 7) % 16) * t;
    }
    check(same, "values");
  }
  {
    name("jump");
    int n = 50;
    Buf<int> in(n), o(96);
    for (int i = 0; i < n; ++i) in[i] = rng.u() % 1000;
    ok(run(p, "jump", {{1}, {96}}, in.p, o.p, n));
    bool same = true;
    for (int i = 0; i < 96; ++i) {
      int v = i;
      for (int k = 0; k < n; ++k) switch ((in[k] + i) % 12) {
          case 0:
            v += 1;
            break;
          case 1:
            v ^= 5;
            break;
          case 2:
            v = int(unsigned(v) * 3);
            break;
          case 3:
            v -= 9;
            break;
          case 4:
            v = v / 3;
            break;
          case 5:
            v |= 16;
            break;
          case 6:
            v = ~v;
            break;
          case 7:
            v &= 77;
            break;
          case 8:
            v = in[v & 3];
            break;
          case 9:
            v += i * 7;
            break;
          case 10:
            v = __builtin_popcount(v);
            break;
          case 11:
            v = v ? __builtin_clz(v) : 32;
            break;
        }
      same &= v == o[i];
    }
    check(same, "values");
  }
  {
    name("printf");
    fflush(stdout);
    int saved = dup(1);
    FILE* tmp = tmpfile();
    dup2(fileno(tmp), 1);
    auto r = run(p, "hello", {{1}, {32}}, 2);
    fflush(stdout);
    dup2(saved, 1);
    close(saved);
    rewind(tmp);
    char buf[512] = {};
    size_t got = fread(buf, 1, sizeof buf - 1, tmp);
    fclose(tmp);
    ok(r);
    check(std::string(buf, got) ==
              "thread 0 of hello:  0.00 1099511627776 x%\nthread 1 of hello:  1.50 1099511627776 x%\n",
          std::string("output: ") + buf);
  }
  {
    name("asserts");
    ok(run(p, "asserts", {{1}, {32}}, 32));
    auto r = run(p, "asserts", {{1}, {32}}, 31);
    expect_fault(r, Fault::trap);
    check(r.message.find("threadIdx.x < n") != std::string::npos, "assert text: " + r.message);
  }
  for (bool bf : {false, true}) {
    name(bf ? "bf16s" : "halfs");
    int n = 4096;
    Buf<uint16_t> a(2 * n), b(2 * n), c(2 * n), o(16 * n);
    for (int i = 0; i < 2 * n; ++i) {
      // mostly ordinary values, some raw bit patterns (subnormal, huge, special)
      if (i % 4 == 3) {
        a[i] = uint16_t(rng.u());
        b[i] = uint16_t(rng.u());
        c[i] = uint16_t(rng.u());
      } else {
        auto cv = [&](float f) { return bf ? to_bf16(f) : to_f16(f); };
        a[i] = cv(rng.f(-8, 8));
        b[i] = cv(rng.f(-8, 8));
        c[i] = cv(rng.f(-8, 8));
      }
    }
    ok(run(p, bf ? "bf16s" : "halfs", {{32}, {128}}, a.p, b.p, c.p, o.p, n));
    auto F = [&](uint16_t h) { return bf ? from_bf16(h) : from_f16(h); };
    // exact reference with 113-bit arithmetic, rounded once
    auto round = [&](__float128 x) -> uint16_t {
      if (x != x) return 0x7fff;
      int mb = bf ? 7 : 10, emin = bf ? -126 : -14;
      bool neg = x < 0;
      __float128 m = neg ? -x : x;
      uint16_t sign = neg ? 0x8000 : 0;
      if (m == 0) return 0;
      int e = 0;
      __float128 t = m;
      if (m > (__float128)1e300) return uint16_t(sign | (bf ? 0x7f80 : 0x7c00));
      while (t >= 2) {
        t /= 2;
        ++e;
      }
      while (t < 1 && e > -400) {
        t *= 2;
        --e;
      }
      if (e < emin) e = emin;
      __float128 q = m;
      for (int i = 0; i < e - mb; ++i) q /= 2;
      for (int i = 0; i < mb - e; ++i) q *= 2;
      unsigned long long k = (unsigned long long)q;
      __float128 rem = q - k;
      if (rem > (__float128)0.5 || (rem == (__float128)0.5 && (k & 1))) ++k;
      unsigned long long code = k + ((unsigned long long)(e - emin) << mb);
      if (code >= (bf ? 0x7f80u : 0x7c00u)) code = bf ? 0x7f80 : 0x7c00;
      return uint16_t(sign | code);
    };
    auto same = [&](uint16_t x, uint16_t y) {
      return x == y || ((x & 0x7fff) == 0 && (y & 0x7fff) == 0) || (F(x) != F(x) && F(y) != F(y));
    };
    int bad[8] = {};
    for (int i = 0; i < n; ++i)
      for (int h = 0; h < 2; ++h) {
        __float128 x = F(a[2 * i + h]), y = F(b[2 * i + h]), z = F(c[2 * i + h]);
        auto got = [&](int k) { return o[(8 * i + k) * 2 + h]; };
        bad[0] += !same(got(0), round(x + y));
        bad[1] += !same(got(1), round(x - y));
        bad[2] += !same(got(2), round(x * y));
        __float128 prod = x * y, sum = prod + z, t = sum - prod, err = (prod - (sum - t)) + (z - t);
        // 113 bits may be too few for a far smaller addend: keep its sign as a sticky bit
        if (err == err && err != 0) sum = sum + (err > 0 ? 1 : -1) * (sum < 0 ? -sum : sum) * (__float128)0x1p-100;
        bad[3] += !same(got(3), round(sum));
        float fx = F(a[2 * i + h]), fy = F(b[2 * i + h]);
        bad[4] += !same(got(4), round(fx != fx ? fy : fy != fy ? fx : std::max(fx, fy)));
        bad[5] += !same(got(5), round(fx != fx ? fy : fy != fy ? fx : std::min(fx, fy)));
        bad[6] += !same(got(6), round(h ? fy * 0.3f : fx * 1.7f));
        bad[7] += !same(got(7), uint16_t(c[2 * i + h] | 0x8000));
      }
    for (int k = 0; k < 8; ++k)
      check(bad[k] == 0, "operation " + std::to_string(k) + ": " + std::to_string(bad[k]) + " wrong");
  }
  {
    name("nf4_dequant");
    static const float code[16] = {-1.0f,        -0.6961928f, -0.52507305f, -0.3949175f, -0.28444138f, -0.18477343f,
                                   -0.09105004f, 0.0f,        0.0795803f,   0.1609302f,  0.2461123f,   0.33791524f,
                                   0.44070983f,  0.562617f,   0.72295684f,  1.0f};
    int n = 777;
    Buf<unsigned> q(n);
    Buf<float> am((n + 7) / 8), o(n * 8);
    for (int i = 0; i < n; ++i) q[i] = rng.u() * 2654435761u;
    for (int i = 0; i < (n + 7) / 8; ++i) am[i] = rng.f(0.1f, 3);
    ok(run(p, "nf4_dequant", {{7}, {128}}, q.p, am.p, o.p, n));
    bool same = true;
    for (int i = 0; i < n; ++i)
      for (int k = 0; k < 8; ++k) same &= o[i * 8 + k] == code[q[i] >> (4 * k) & 15] * am[i / 8];
    check(same, "values");
  }
  {
    name("prmts");
    Buf<unsigned> a(128), o(512);
    for (int i = 0; i < 128; ++i) a[i] = rng.u() * 2654435761u;
    ok(run(p, "prmts", {{1}, {64}}, a.p, o.p));
    int bad[8] = {};
    for (int i = 0; i < 64; ++i) {
      unsigned x = a[2 * i], y = a[2 * i + 1];
      uint64_t v = uint64_t(y) << 32 | x;
      auto byte = [&](int k) { return unsigned(v >> (8 * (k & 7))) & 255; };
      bad[0] += o[i * 8] != (byte(0) | byte(1) << 8 | byte(4) << 16 | byte(5) << 24);
      unsigned r = 0;
      for (int k = 0; k < 4; ++k) r |= byte(y >> (4 * k) & 7) << (8 * k);
      bad[1] += o[i * 8 + 1] != r;
      unsigned h = (i & 1) ? (x >> 16) : (x & 0xffff);
      bad[2] += o[i * 8 + 2] != (h | h << 16);
      r = 0;
      for (int k = 0; k < 4; ++k) r |= (byte(k) & 0x80 ? 255u : 0u) << (8 * k);
      // selectors 8, 9, a, b replicate the sign of bytes 0..3 (0xba98 selects byte k for result byte k)
      bad[3] += o[i * 8 + 3] != r;
      bad[4] += o[i * 8 + 4] != ((x & y) | unsigned(i * 77));
      bad[5] += o[i * 8 + 5] != unsigned(v >> (i & 31));
      int pos = i % 32, len = i % 11;
      int64_t sx = int64_t(int32_t(x));
      int want = len == 0 ? 0 : int32_t(uint32_t((uint64_t(sx >> pos)) << (32 - len))) >> (32 - len);
      bad[6] += int(o[i * 8 + 6]) != want;
      unsigned mask = unsigned(((1ull << len) - 1) << pos);
      bad[7] += o[i * 8 + 7] != ((y & ~mask) | ((x << pos) & mask));
    }
    for (int k = 0; k < 8; ++k) check(bad[k] == 0, "operation " + std::to_string(k));
  }
  {
    name("int_math");
    int n = 2000;
    Buf<int> a(n), b(n);
    Buf<long long> o(12 * n);
    for (int i = 0; i < n; ++i) {
      a[i] = int(rng.u() * 2654435761u);
      b[i] = int(rng.u() * 40503u) >> (i % 32);
      if (i % 17 == 0) b[i] = -1;
    }
    ok(run(p, "int_math", {{16}, {128}}, a.p, b.p, o.p, n));
    int bad[12] = {};
    for (int i = 0; i < n; ++i) {
      int x = a[i], y = b[i];
      long long lx = (long long)((unsigned long long)(long long)x << 20) | y, ly = y | 1;
      bad[0] += o[12 * i] != (y == -1 ? (long long)int(0u - unsigned(x)) : x / (y ? y : 1));
      bad[1] += o[12 * i + 1] != (y == -1 ? 0 : x % (y ? y : 1));
      bad[2] += o[12 * i + 2] != (long long)((unsigned)x / ((unsigned)y | 1));
      bad[3] += o[12 * i + 3] != lx / ly;
      bad[4] += o[12 * i + 4] != lx % ly;
      bad[5] += o[12 * i + 5] != int(((long long)x * y) >> 32);
      bad[6] += o[12 * i + 6] != (long long)(((unsigned long long)(unsigned)x * (unsigned)y) >> 32);
      bad[7] += o[12 * i + 7] != (long long)(((__int128)lx * ly) >> 64);
      unsigned rev = 0;
      for (int k = 0; k < 32; ++k) rev |= (unsigned(x) >> k & 1) << (31 - k);
      bad[8] += o[12 * i + 8] != (long long)(rev ^ __builtin_popcountll(lx) ^ __builtin_clzll(ly) ^ __builtin_ffs(x));
      int dp = 5;
      for (int k = 0; k < 4; ++k) dp += int(int8_t(x >> (8 * k))) * int(int8_t(y >> (8 * k)));
      unsigned ux = x, uy = y;
      bad[9] += o[12 * i + 9] != (long long)int(dp + int(3 + (ux > uy ? ux - uy : uy - ux)));
      bad[10] += o[12 * i + 10] != (long long)((unsigned long long)lx * 0x9e3779b97f4a7c15ull >> (y & 63));
      bad[11] += o[12 * i + 11] != (long long)int(unsigned(std::min(x, y)) + unsigned(std::max(short(x), short(y))) +
                                                  unsigned(abs(x >> 1)));
    }
    for (int k = 0; k < 12; ++k) check(bad[k] == 0, "operation " + std::to_string(k) + ": " + std::to_string(bad[k]));
  }
  {
    name("fp_math");
    int n = 2000;
    Buf<float> a(n), b(n), o(16 * n);
    Buf<double> d(4 * n);
    for (int i = 0; i < n; ++i) {
      a[i] = rng.f(-3, 3);
      b[i] = rng.f(-3, 3);
    }
    ok(run(p, "fp_math", {{16}, {128}}, a.p, b.p, o.p, d.p, n));
    int bad[20] = {};
    auto close = [](double x, double y, double tol) { return std::fabs(x - y) <= tol * (1 + std::fabs(y)); };
    for (int i = 0; i < n; ++i) {
      float x = a[i], y = b[i];
      double s = double(x) + y;
      float rz = float(s);
      if (std::fabs(double(rz)) > std::fabs(s)) rz = std::nextafterf(rz, 0);
      bad[0] += o[16 * i] != rz;
      double m = double(x) * y;
      float ru = float(m);
      if (double(ru) < m) ru = std::nextafterf(ru, INFINITY);
      bad[1] += o[16 * i + 1] != ru;
      bad[2] += o[16 * i + 2] != std::fma(x, y, 1.5f);
      bad[3] += o[16 * i + 3] != x / y;
      bad[4] += o[16 * i + 4] != std::sqrt(std::fabs(x));
      bad[5] += !close(o[16 * i + 5], std::exp(double(x)), 3e-7);
      bad[6] += !close(o[16 * i + 6], std::log(double(std::fabs(x) + 1e-3f)), 3e-7);
      bad[7] += !close(o[16 * i + 7], std::sin(double(x * 10)), 3e-7);
      bad[8] += !close(o[16 * i + 8], std::tanh(double(y)), 3e-7);
      bad[9] += o[16 * i + 9] != std::nearbyint(x * 100);
      bad[10] += o[16 * i + 10] != float(int(std::nearbyint(x * 1e3f)));
      bad[11] += o[16 * i + 11] != (x < 0 ? 0.f : float(unsigned(x * 1e3f)));
      bad[12] += o[16 * i + 12] != std::fmin(x, y) + std::fmax(x, -y);
      bad[13] += o[16 * i + 13] != std::min(1.f, std::max(0.f, x + y));
      bad[14] += !close(o[16 * i + 14], std::pow(double(std::fabs(x)), double(y)), 1e-6);
      double sq = std::sqrt(double(std::fabs(y)));
      float rd = float(sq);
      if (double(rd) > sq) rd = std::nextafterf(rd, 0);
      bad[15] += o[16 * i + 15] != rd;
      bad[16] += d[4 * i] != std::fma(double(x), double(y), 1.0);
      bad[17] += d[4 * i + 1] != std::sqrt(double(std::fabs(x)));
      bad[18] += !close(d[4 * i + 2], std::exp(double(y)), 1e-15);
      bad[19] += d[4 * i + 3] != double((long long)(x * 1e12)) / 3.0;
    }
    for (int k = 0; k < 20; ++k) check(bad[k] == 0, "operation " + std::to_string(k) + ": " + std::to_string(bad[k]));
  }
  {
    name("warp_ops");
    Buf<unsigned> o(64 * 8);
    ok(run(p, "warp_ops", {{1}, {64}}, o.p));
    int bad[8] = {};
    for (unsigned t = 0; t < 64; ++t) {
      unsigned w = t / 32, base = w * 32, lane = t & 31;
      unsigned ballot = 0, match = 0, sum = 0, mx = 0;
      for (unsigned k = 0; k < 32; ++k) {
        ballot |= unsigned((base + k) % 3 == 0) << k;
        match |= unsigned((base + k) % 5 == t % 5) << k;
        sum += base + k;
        mx = std::max(mx, (base + k) * 7 % 31);
      }
      bad[0] += o[t * 8] != ballot;
      bad[1] += o[t * 8 + 1] != (w == 1 ? 2u : 0u) + 1;
      bad[2] += o[t * 8 + 2] != match;
      bad[3] += o[t * 8 + 3] != 0xffffffffu + 1;
      bad[4] += o[t * 8 + 4] != (sum ^ mx);
      bad[5] += o[t * 8 + 5] != (lane % 8 >= 3 ? t - 3 : t);
      if (lane & 1)
        bad[6] += o[t * 8 + 6] != (t ^ 2) + 0xaaaaaaaau;
      else
        bad[6] += o[t * 8 + 6] != (lane % 16 + 4 < 16 ? t + 4 : t);
      bad[7] += o[t * 8 + 7] != 32 * 4 + 1 + 2;
    }
    for (int k = 0; k < 8; ++k) check(bad[k] == 0, "operation " + std::to_string(k) + ": " + std::to_string(bad[k]));
  }
  {
    name("spin_lock");
    Buf<int> lock(1), counter(1);
    ok(run(p, "spin_lock", {{4}, {64}}, lock.p, counter.p));
    check(counter[0] == 256, "count " + std::to_string(counter[0]));
  }
  {
    name("split_k");
    int tiles = 6, splits = 5, k = 37, bs = 64;
    Buf<float> a(size_t(tiles) * k * bs), out(tiles * bs);
    Buf<int> sem(tiles);
    for (int i = 0; i < tiles * k * bs; ++i) a[i] = float(rng.u() % 8);
    ok(run(p, "split_k", {{unsigned(tiles), unsigned(splits)}, {unsigned(bs)}}, a.p, out.p, sem.p, k, splits));
    bool same = true;
    for (int t = 0; t < tiles; ++t)
      for (int j = 0; j < bs; ++j) {
        float s = 0;
        for (int q = 0; q < k; ++q) s += a[(t * k + q) * bs + j];
        same &= s == out[t * bs + j];
      }
    check(same, "values");
  }
  {
    name("grid_barrier");
    Buf<int> count(1), out(64);
    ok(run(p, "grid_barrier", {{64}, {64}}, count.p, out.p));
    check(std::all_of(out.p, out.p + 64, [](int v) { return v == 64; }), "values");
  }
  {
    name("time limit");
    Env limit("CUDASIM_TIMEOUT", "0.3");
    Buf<int> count(1, -1000), out(4);
    auto r = run(p, "grid_barrier", {{4}, {64}}, count.p, out.p);
    expect_fault(r, Fault::barrier_deadlock);
    check(r.message.find("CUDASIM_TIMEOUT") != std::string::npos, "message: " + r.message);
  }
  {
    name("named_barriers");
    Buf<int> out(128);
    ok(run(p, "named_barriers", {{1}, {128}}, out.p));
    bool same = true;
    for (int t = 0; t < 64; ++t) same &= out[t] == 2 * (63 - t) && out[t + 64] == 2 * t + 1;
    check(same, "values");
  }
  {
    name("early_exit");
    Buf<int> out(128);
    ok(run(p, "early_exit", {{1}, {128}}, out.p, 70));
    bool same = true;
    for (int t = 0; t < 70; ++t) same &= out[t] == (t ^ 1);
    check(same, "values");
  }
  {
    name("float_atomics");
    Buf<float> f(1);
    Buf<double> d(1);
    Buf<uint16_t> h(2);
    Buf<unsigned long long> u(1);
    Buf<int> i(3);
    ok(run(p, "float_atomics", {{4}, {128}}, f.p, d.p, h.p, u.p, i.p));
    check(f[0] == 512 && d[0] == 256 && from_f16(h[0]) == 512 && h[1] == 0 && u[0] == 511 && i[0] == -511 &&
              i[1] == 512 % 100 && i[2] == 0,
          "values");
  }
  {
    name("bump");
    ok(run(p, "bump", {{1}, {1}}));
    size_t size = 0;
    int* v = static_cast<int*>(cudasim::find_global(p.m, "dev_counter", &size));
    check(v && size == 4 && *v == 42, "device variable");
  }
}

// C = A * B^T or A * B with inputs of 16 bits, in double
static std::vector<double> gemm_ref(const uint16_t* A, const uint16_t* B, int M, int N, int K, bool bf, bool tn) {
  std::vector<double> c(size_t(M) * N), a(size_t(M) * K), b(size_t(N) * K);
  for (int i = 0; i < M * K; ++i) a[i] = bf ? from_bf16(A[i]) : from_f16(A[i]);
  for (int n = 0; n < N; ++n)
    for (int k = 0; k < K; ++k) {
      uint16_t h = tn ? B[size_t(n) * K + k] : B[size_t(k) * N + n];
      b[size_t(n) * K + k] = bf ? from_bf16(h) : from_f16(h);
    }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      double s = 0;
      for (int k = 0; k < K; ++k) s += a[size_t(m) * K + k] * b[size_t(n) * K + k];
      c[size_t(m) * N + n] = s;
    }
  return c;
}
static double worst(const float* got, const std::vector<double>& want) {
  double w = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    double e = std::fabs(got[i] - want[i]) / (1 + std::fabs(want[i]));
    if (!(e <= w)) w = e;
    if (e != e) return 1e30;
  }
  return w;
}

static void gemm(const std::string& file) {
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

static cudasim::TensorMap map2d(void* p, int rows, int cols, int box_rows, int box_cols, int bytes, int swizzle) {
  cudasim::TensorMap t;
  t.global_address = uint64_t(p);
  t.global_dim[0] = uint32_t(cols);
  t.global_dim[1] = uint32_t(rows);
  t.global_stride_bytes[0] = uint64_t(cols) * bytes;
  t.box_dim[0] = uint16_t(box_cols);
  t.box_dim[1] = uint16_t(box_rows);
  t.element_stride[0] = t.element_stride[1] = 1;
  t.rank = 2;
  t.element_bytes = uint8_t(bytes);
  t.swizzle = uint8_t(swizzle);
  t.dtype = bytes == 2 ? 6 : 7;
  return t;
}
struct alignas(64) MapArg {
  cudasim::TensorMap t;
  char pad[128 - sizeof(cudasim::TensorMap)] = {};
};

static void hopper(const std::string& file) {
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
    ok(run(p, "multicast", {{2}, {64}, {2}}, in.p, out.p));
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

static void library(const std::string& file) {
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

static void bugs(const std::string& file) {
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

// Instructions that nvcc seldom emits, from hand-written PTX.
static void handwritten() {
  current = "handwritten";
  static const char text[] = R"(
.version 8.6
.target sm_90
.address_size 64
.global .align 16 .b32 cell[4] = {7, 8, -1, 0x10};
.global .align 8 .u64 ptrs[2] = {generic(cell), generic(cell)+4};
.global .f32 fl[2] = {1.5, 0f40000000};
.visible .entry odd(.param .u64 out, .param .u32 n)
{
  .reg .pred %p<8>;
  .reg .b16 %h<8>;
  .reg .b32 %r<40>;
  .reg .b64 %rd<20>;
  .reg .b128 %q<3>;
  .reg .f32 %f<10>;
  ld.param.u64 %rd1, [out];
  ld.param.u32 %r1, [n];
  mov.u32 %r2, %tid.x;
  mul.wide.u32 %rd2, %r2, 256;
  add.s64 %rd3, %rd1, %rd2;
  // jump table
  and.b32 %r3, %r2, 3;
table: .branchtargets L0, L1, L2, L3;
  brx.idx %r3, table;
L0: mov.u32 %r4, 100; bra.uni JOIN;
L1: mov.u32 %r4, 101; bra.uni JOIN;
L2: mov.u32 %r4, 102; bra.uni JOIN;
L3: mov.u32 %r4, 103;
JOIN:
  st.global.u32 [%rd3], %r4;
  // 96-bit addition with carries: {-1, -1, tid} + {1, 0, 5}
  mov.u32 %r5, 0xffffffff;
  add.cc.u32 %r6, %r5, 1;
  addc.cc.u32 %r7, %r5, 0;
  addc.u32 %r8, %r2, 5;
  st.global.v2.u32 [%rd3+8], {%r6, %r7};
  st.global.u32 [%rd3+4], %r8;
  sub.cc.u32 %r6, %r2, 1;
  subc.u32 %r7, 0, 0;
  st.global.u32 [%rd3+16], %r7;
  mad.lo.cc.u32 %r6, %r5, 2, 2;
  madc.hi.u32 %r7, %r5, 2, 0;
  st.global.u32 [%rd3+20], %r7;
  bfind.u32 %r6, %r2;
  bfind.shiftamt.s32 %r7, -8;
  st.global.v2.u32 [%rd3+24], {%r6, %r7};
  szext.clamp.s32 %r6, 0xf5, 4;
  bmsk.clamp.b32 %r7, 4, 8;
  st.global.v2.u32 [%rd3+32], {%r6, %r7};
  fns.b32 %r6, 0xf0f0, 0, 3;
  dp2a.lo.s32.u32 %r7, 0x00020003, 0x0000ff05, 1;
  st.global.v2.u32 [%rd3+40], {%r6, %r7};
  { .reg .b32 %r6; .reg .pred p; mov.u32 %r6, 77; setp.eq.u32 p, %r6, 77; @p bra INNER; mov.u32 %r6, 0; INNER: st.global.u32 [%rd3+48], %r6; }
  { .reg .b32 %r6; .reg .pred p; mov.u32 %r6, 78; setp.ne.u32 p, %r6, 78; @p bra INNER; add.u32 %r6, %r6, 1; INNER: st.global.u32 [%rd3+52], %r6; }
  setp.lt.u32 %p1, %r2, 16;
  setp.gt.and.s32 %p2|%p3, %r2, 7, !%p1;
  selp.u32 %r6, 1, 0, %p2;
  selp.u32 %r7, 1, 0, %p3;
  st.global.v2.u32 [%rd3+56], {%r6, %r7};
  set.gt.u32.u32 %r6, %r2, 3;
  set.le.f32.s32 %f1, %r2, 3;
  mov.b32 %r7, %f1;
  st.global.v2.u32 [%rd3+64], {%r6, %r7};
  sad.s32 %r6, %r2, 10, 1000;
  mul24.lo.s32 %r7, 0xffffff, 3;
  st.global.v2.u32 [%rd3+72], {%r6, %r7};
  prmt.b32.f4e %r6, 0x03020100, 0x07060504, %r2;
  prmt.b32.ecl %r7, 0x03020100, 0, %r2;
  st.global.v2.u32 [%rd3+80], {%r6, %r7};
  ld.global.u64 %rd4, [ptrs+8];
  ld.u32 %r6, [%rd4];
  ld.global.u64 %rd5, [ptrs];
  ld.u32 %r7, [%rd5+12];
  st.global.v2.u32 [%rd3+88], {%r6, %r7};
  mov.b64 %rd6, {%r2, 9};
  mov.b128 %q1, {%rd6, %rd6};
  mov.b128 {%rd7, %rd8}, %q1;
  st.global.v2.u64 [%rd3+96], {%rd7, %rd8};
  mov.f32 %f2, 0f3f000000;
  atom.global.v2.f32.add {%f3, %f4}, [%rd3+96], {%f2, %f2};
  testp.subnormal.f32 %p4, 0f00000001;
  testp.infinite.f32 %p5, 0fff800000;
  and.pred %p6, %p4, %p5;
  selp.u32 %r6, 5, 6, %p6;
  copysign.f32 %f5, -1.0, 2.5;
  mov.b32 %r7, %f5;
  st.global.v2.u32 [%rd3+112], {%r6, %r7};
  cvt.pack.sat.u8.s32.b32 %r6, 300, -5, 0x1234;
  isspacep.global %p1, %rd3;
  selp.u32 %r7, 3, 4, %p1;
  st.global.v2.u32 [%rd3+120], {%r6, %r7};
  ld.global.f32 %f6, [fl];
  ld.global.f32 %f7, [fl+4];
  add.f32 %f6, %f6, %f7;
  cvt.rzi.s32.f32 %r6, %f6;
  cvt.rni.ftz.sat.f32.f32 %f8, %f6;
  mov.b32 %r7, %f8;
  st.global.v2.u32 [%rd3+128], {%r6, %r7};
  cvt.u8.s32 %r6, 511;
  cvt.s8.s32 %r7, 0x1ff;
  st.global.v2.u32 [%rd3+136], {%r6, %r7};
  shf.l.wrap.b32 %r6, 0x80000000, 1, 33;
  shf.r.clamp.b32 %r7, 5, 0xffff0000, 40;
  st.global.v2.u32 [%rd3+144], {%r6, %r7};
  slct.u32.s32 %r6, 11, 22, -1;
  cnot.b32 %r7, 0;
  st.global.v2.u32 [%rd3+152], {%r6, %r7};
  ret;
}
)";
  std::string err;
  cudasim::Module* m = cudasim::load_module(text, sizeof text, &err);
  if (!check(m != nullptr, err)) return;
  {
    Buf<uint32_t> o(32 * 64);
    uint64_t out = uint64_t(o.p);
    uint32_t n = 3;
    void* args[] = {&out, &n};
    cudasim::LaunchConfig lc;
    lc.block.x = 32;
    lc.args = args;
    ok(cudasim::launch(cudasim::find_kernel(m, "odd"), lc));
    for (uint32_t t : {0u, 5u, 18u, 31u}) {
      auto is = [&](int word, uint32_t want) {
        check(o[t * 64 + word] == want, "thread " + std::to_string(t) + " word " + std::to_string(word) + ": got " +
                                            std::to_string(o[t * 64 + word]) + ", want " + std::to_string(want));
      };
      is(0, 100 + t % 4);
      is(1, t + 6);
      is(2, 0);
      is(3, 0);
      is(4, t == 0 ? 0xffffffffu : 0);
      is(5, 2);  // 0xffffffff * 2 = 0x1fffffffe: low + 2 carries, high is 1
      is(6, t ? 31 - __builtin_clz(t) : 0xffffffffu);
      is(7, 29);
      is(8, 5);
      is(9, 0xff0);
      is(10, 6);
      is(11, 3 * 5 + 2 * 255 + 1);
      is(12, 77);
      is(13, 79);
      is(14, t >= 16);
      is(15, t <= 7 && t >= 16);
      is(16, t > 3 ? 0xffffffffu : 0);
      is(17, t <= 3 ? 0x3f800000u : 0);
      is(18, 1000 + (t > 10 ? t - 10 : 10 - t));
      is(19, uint32_t(-3));
      uint32_t f4 = 0, ecl = 0;
      for (uint32_t k = 0; k < 4; ++k) {
        f4 |= (t % 4 + k) << (8 * k);
        ecl |= std::max(t % 4, k) << (8 * k);
      }
      is(20, f4);
      is(21, ecl);
      is(22, 8);
      is(23, 16);
      float a, b;
      uint32_t half = 0x3f000000u, ub = 9;
      memcpy(&a, &t, 4);
      memcpy(&b, &ub, 4);
      float hf;
      memcpy(&hf, &half, 4);
      float sa = a + hf, sb = b + hf;
      uint32_t ua, ubb;
      memcpy(&ua, &sa, 4);
      memcpy(&ubb, &sb, 4);
      is(24, ua);
      is(25, ubb);
      is(26, t);
      is(27, 9);
      is(28, 5);
      is(29, 0xc0200000u);
      is(30, 0x1234u << 16 | 255 << 8 | 0);
      is(31, 3);
      is(32, 3);
      is(33, 0x3f800000u);
      is(34, 255);
      is(35, 0xffffffffu);
      is(36, 3);
      is(37, 0xffff0000u);
      is(38, 22);
      is(39, 1);
    }
  }
  cudasim::unload_module(m);
  check(cudasim::load_module("garbage", 7, &err) == nullptr && !err.empty(), "malformed text is refused");
  static const char unknown[] =
      ".version 8.0\n.target sm_90\n.address_size 64\n.visible .entry k(.param .u32 n)\n{ .reg .b32 %r<3>; .reg .pred "
      "%p; ld.param.u32 %r1, [n]; setp.eq.u32 %p, %r1, 0; @%p ret; frobnicate.b32 %r2, %r1; ret; }\n";
  m = cudasim::load_module(unknown, sizeof unknown - 1, &err);
  if (!check(m != nullptr, "unknown instructions parse: " + err)) return;
  for (uint32_t n : {0u, 1u}) {
    void* args[] = {&n};
    cudasim::LaunchConfig lc;
    lc.args = args;
    auto r = cudasim::launch(cudasim::find_kernel(m, "k"), lc);
    check(r.fault == (n ? Fault::unsupported_instruction : Fault::none), "fault only when executed: " + r.message);
    if (n) check(r.message.find("frobnicate.b32 %r2, %r1") != std::string::npos, "message names the instruction");
  }
  cudasim::unload_module(m);
}

static void speed(const std::string& file) {
  current = "speed";
  Ptx p(dir + "/" + file);
  Buf<float> out(256 * 64);
  Env one("CUDASIM_THREADS", "1");
  auto r = run(p, "alu_speed", {{64}, {256}}, out.p, 200);
  ok(r);
  std::printf("alu_speed: %.1f M lane-instructions/s on one thread (%.1f ns per warp instruction)\n",
              r.profile.thread_instructions / r.profile.seconds / 1e6,
              r.profile.seconds * 1e9 / r.profile.warp_instructions);
}

int main(int argc, char** argv) {
  dir = argc > 1 ? argv[1] : "build/tests";
  for (const char* v : {"basic.80.ptx", "basic.80g.ptx", "basic.90a.ptx"}) basic(v);
  {
    Env seed("CUDASIM_SEED", "12345");
    basic("basic.80.ptx");
  }
  {
    Env c("CUDASIM_CHECK", "race,init");
    basic("basic.80.ptx");
  }
  handwritten();
  for (const char* v : {"gemm.80.ptx", "gemm.80g.ptx", "gemm.90a.ptx"}) gemm(v);
  {
    Env seed("CUDASIM_SEED", "99");
    gemm("gemm.80.ptx");
  }
  for (const char* v : {"bugs.80.ptx", "bugs.80g.ptx", "bugs.90a.ptx"}) bugs(v);
  for (const char* v : {"library.80.ptx", "library.90a.ptx", "library.80g.ptx"}) library(v);
  {
    Env c("CUDASIM_CHECK", "race,init");
    library("library.80.ptx");
    library("library.90a.ptx");
  }
  {
    Env seed("CUDASIM_SEED", "31");
    library("library.90a.ptx");
  }
  for (const char* v : {"hopper_sm90.90a.ptx"}) hopper(v);
  for (const char* v : {"grid.80.ptx", "grid.80g.ptx", "grid.90a.ptx"}) grid(dir, v);
  {
    Env c("CUDASIM_CHECK", "grid");  // nothing here is wrong
    basic("basic.80.ptx");
    basic("basic.90a.ptx");
    library("library.90a.ptx");
    gemm("gemm.90a.ptx");
    hopper("hopper_sm90.90a.ptx");
  }
  speed("basic.80.ptx");
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
