// Loads, stores, barriers, shuffles, votes, atomics, calls and printf.
#include <algorithm>

#include "harness.h"

using namespace test;
using cudasim::Fault;

struct Pt {
  int a;
  float b;
  long long c;
  char d[5];
};

void basic(const std::string& file) {
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
