// Tensor memory and tcgen05.
#include "blackwell_sm100.h"
#include "harness.h"
#include "tensor_map.h"

using namespace test;
using cudasim::Fault;

namespace {

// How rows of K 16-bit elements lie in shared memory: swizzled over `swizzle` bytes (0: not), along K or along the
// rows.
struct Layout {
  int swizzle;
  bool mn_major;
  int k() const { return swizzle && !mn_major ? swizzle / 2 : 48; }  // one swizzled tile
  int leading() const { return mn_major && swizzle ? k() * swizzle : 128; }
  int stride() const { return swizzle ? 8 * swizzle : k() / 8 * 128; }
  int step() const { return !swizzle ? 256 : mn_major ? 16 * swizzle : 32; }
  int offset(int r, int k) const {
    if (!swizzle)
      return mn_major ? r / 8 * stride() + k / 8 * 128 + k % 8 * 16 + r % 8 * 2
                      : r / 8 * stride() + k / 8 * 128 + r % 8 * 16 + k % 8 * 2;
    const int per = swizzle / 2;
    const int at = mn_major ? r / per * leading() + k * swizzle + r % per * 2 : r * swizzle + k * 2;
    return at ^ ((at >> 7 & (swizzle / 16 - 1)) << 4);
  }
  uint64_t descriptor() const {
    const uint64_t mode = swizzle == 128 ? 2 : swizzle == 64 ? 4 : swizzle == 32 ? 6 : 0;
    return uint64_t(leading() / 16) << 16 | uint64_t(stride() / 16) << 32 | 1ull << 46 | mode << 61;
  }
};

struct Matrix {
  int rows, k;
  bool bf16;
  std::vector<uint16_t> bits;
  Matrix(int rows, int k, bool bf16, Rng& rng) : rows(rows), k(k), bf16(bf16), bits(size_t(rows * k)) {
    for (auto& x : bits) x = bf16 ? to_bf16(rng.f()) : to_f16(rng.f());
  }
  uint16_t& at(int r, int c) { return bits[size_t(r * k + c)]; }
  float value(int r, int c) const {
    const uint16_t x = bits[size_t(r * k + c)];
    return bf16 ? from_bf16(x) : from_f16(x);
  }
};
// Several parts (of a pair of CTAs), one behind the other.
struct Image {
  Buf<uint8_t> buf;
  Operand operand;
  Image(const Matrix& x, const Layout& l, int parts = 1) : buf(size_t(x.rows * x.k * 2)) {
    const int rows = x.rows / parts;
    for (int r = 0; r < x.rows; ++r)
      for (int k = 0; k < x.k; ++k)
        memcpy(buf.p + r / rows * rows * x.k * 2 + l.offset(r % rows, k), &x.bits[size_t(r * x.k + k)], 2);
    operand = {buf.p, rows * x.k * 2, l.descriptor(), l.step()};
  }
  // Of tensor memory: two elements in each column.
  explicit Image(const Matrix& x) : buf(size_t(128 * x.k * 2)), operand{buf.p} {
    for (int r = 0; r < x.rows; ++r)
      memcpy(buf.p + (x.rows == 64 ? r / 16 * 32 + r % 16 : r) * x.k * 2, &x.bits[size_t(r * x.k)], size_t(x.k * 2));
  }
};
uint32_t descriptor(int m, int n, const Matrix& a, const Matrix& b, bool f32 = true) {
  return uint32_t(f32) << 4 | uint32_t(a.bf16) << 7 | uint32_t(b.bf16) << 10 | uint32_t(n / 8) << 17 |
         uint32_t(m / 16) << 24;
}
constexpr uint32_t kNegateA = 1 << 13, kNegateB = 1 << 14, kTransposeA = 1 << 15, kTransposeB = 1 << 16;

float as_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
float product(const Matrix& a, const Matrix& b, int m, int n, float sum, float sign = 1) {
  for (int k = 0; k < a.k; ++k) sum = std::fma(sign * a.value(m, k), b.value(n, k), sum);
  return sum;
}

struct Case {
  int m, n;
  Layout a, b;
  bool a_bf16 = true, b_bf16 = true, a_in_tensor_memory = false, initial = false;
  uint32_t flags = 0;
};

cudasim::LaunchResult launch(Ptx& p, const Operand& a, const Operand& b, uint32_t idesc, int steps, int columns,
                             const uint32_t* initial, uint32_t disabled, uint32_t* out, int bug) {
  return run(p, "product", {{1}, {128}, {}, 64 << 10}, a, b, idesc, steps, columns, initial, disabled, out, bug);
}

void check_case(Ptx& p, const Case& c, Rng& rng) {
  const int k = c.b.k(), lanes = 128;
  const Matrix a(c.m, k, c.a_bf16, rng), b(c.n, k, c.b_bf16, rng);
  const Image ia = c.a_in_tensor_memory ? Image(a) : Image(a, c.a), ib(b, c.b);
  Buf<uint32_t> out(size_t(lanes * c.n)), initial(size_t(lanes * c.n));
  for (size_t i = 0; i < initial.n; ++i) {
    const float x = rng.f();
    memcpy(&initial[i], &x, 4);
  }
  const uint32_t idesc = descriptor(c.m, c.n, a, b) | c.flags |
                         (c.a.mn_major && !c.a_in_tensor_memory ? kTransposeA : 0) | (c.b.mn_major ? kTransposeB : 0);
  const auto r = launch(p, ia.operand, ib.operand, idesc, k / 16, c.n, c.initial ? initial.p : nullptr, 0, out.p, NONE);
  if (!ok(r)) return;
  const float sign = (c.flags & kNegateA ? -1.f : 1.f) * (c.flags & kNegateB ? -1.f : 1.f);
  int wrong = 0;
  for (int m = 0; m < c.m; ++m)
    for (int n = 0; n < c.n; ++n) {
      const size_t at = size_t((c.m == 64 ? m / 16 * 32 + m % 16 : m) * c.n + n);
      wrong += as_float(out[at]) != product(a, b, m, n, c.initial ? as_float(initial[at]) : 0, sign);
    }
  check(wrong == 0, std::to_string(wrong) + " elements of M " + std::to_string(c.m) + " N " + std::to_string(c.n) +
                        " swizzles " + std::to_string(c.a.swizzle) + " " + std::to_string(c.b.swizzle));
  const uint64_t flops = 2ull * c.m * c.n * k, read = uint64_t(c.n + (c.a_in_tensor_memory ? 0 : c.m)) * k * 2 / 128;
  check(r.profile.mma_flops == flops && r.profile.tcgen05_flops == flops && r.profile.tcgen05_wavefronts == read,
        "profile");
}

const Layout kPlain{0, false}, kK32{32, false}, kK64{64, false}, kK128{128, false}, kMn{0, true}, kMn32{32, true},
    kMn64{64, true}, kMn128{128, true};

void products(Ptx& p) {
  Rng rng(11);
  const Case cases[] = {
      {128, 64, kK128, kK128},
      {128, 256, kK64, kK64, false, false},
      {128, 48, kK32, kK32, true, false},
      {128, 32, kPlain, kPlain},
      {128, 128, kMn128, kMn128, true, true, false, true},
      {128, 64, kMn64, kMn32},
      {128, 64, kMn, kMn128},
      {64, 40, kMn, kMn},
      {64, 24, kK128, kK128, true, true, false, true, kNegateA},
      {128, 64, kK128, kK128, true, true, true, false},
      {128, 128, kK128, kMn64, false, true, true, true, kNegateB},
      {64, 64, kK128, kK64, true, true, true, true},
  };
  for (const Case& c : cases) check_case(p, c, rng);
}

void half_results_and_disabled_lanes(Ptx& p) {
  current += " float16";
  Rng rng(12);
  const Matrix a(128, 64, false, rng), b(16, 64, false, rng);
  const Image columns(a);
  const Image ib(b, kK128);
  Buf<uint32_t> out(128 * 16), initial(128 * 16, 0x3c00u);
  ok(launch(p, columns.operand, ib.operand, descriptor(128, 16, a, b, false), 4, 16, initial.p, 0xf0f0u, out.p, NONE));
  int wrong = 0;
  for (int m = 0; m < 128; ++m)
    for (int n = 0; n < 16; ++n) {
      uint16_t want = 0x3c00;
      for (int s = 0; s < 4; ++s) {
        float sum = from_f16(want);
        for (int k = 16 * s; k < 16 * s + 16; ++k) sum = std::fma(a.value(m, k), b.value(n, k), sum);
        want = to_f16(sum);
      }
      if (m < 32 && 0xf0f0u >> m & 1) want = 0x3c00;
      wrong += out[size_t(m * 16 + n)] != want;
    }
  check(wrong == 0, std::to_string(wrong) + " elements");
}

void card(Ptx& p) {
  current += " card";
  Env mma("CUDASIM_MMA", "card");
  Rng rng(13);
  Matrix a(128, 64, true, rng), b(16, 64, true, rng);
  for (int r = 0; r < 128; ++r)
    for (int k = 0; k < 64; ++k) a.at(r, k) = to_bf16(k == 0 ? 1.f : k < 16 ? -0x1p-25f : 0.f);
  for (auto& x : b.bits) x = to_bf16(1);
  Buf<uint32_t> out(128 * 16);
  const Image columns(a);
  ok(launch(p, columns.operand, Image(b, kK128).operand, descriptor(128, 16, a, b), 4, 16, nullptr, 0, out.p, NONE));
  check(as_float(out[0]) == 1 - 0x1p-21f, "15 terms of -2^-25 are added to 1 before the sum is cut");
}

void faults(Ptx& p) {
  Rng rng(14);
  const Matrix a(128, 64, true, rng), b(64, 64, true, rng);
  const Image ia(a, kK128), ib(b, kK128);
  const Image columns(a);
  Buf<uint32_t> out(128 * 64), zero(128 * 64, 0u);
  const uint32_t idesc = descriptor(128, 64, a, b);
  const std::string name = current;
  const auto with = [&](const Operand& x, uint32_t d, const uint32_t* initial, int bug) {
    current = name + " bug " + std::to_string(bug);
    return launch(p, x, ib.operand, d, 4, 64, initial, 0, out.p, bug);
  };
  const auto is_right = [&] {
    int wrong = 0;
    for (int m = 0; m < 128; ++m)
      for (int n = 0; n < 64; ++n) wrong += as_float(out[size_t(m * 64 + n)]) != product(a, b, m, n, 0);
    return wrong == 0;
  };
  // Visible without any check.
  with(ia.operand, idesc, zero.p, NO_COMMIT_WAIT);
  check(!is_right(), "stale results");
  with(ia.operand, idesc, zero.p, OVERWRITE);
  check(!is_right(), "B of the future");
  for (const Bug bug : {NO_DEALLOC, COLUMN, QUARTER, DEALLOC_EARLY, ODD_COLUMNS, AFTER_RELINQUISH, UNEVEN_ADDRESS})
    expect_fault(with(ia.operand, idesc, zero.p, bug), Fault::tensor_memory);
  expect_fault(with(columns.operand, idesc, nullptr, NO_STORE_WAIT), Fault::tensor_memory);
  expect_fault(with(ia.operand, idesc, nullptr, TF32), Fault::unsupported_instruction);
  expect_fault(with(ia.operand, idesc | 1 << 29, nullptr, NONE), Fault::tensor_memory);
  expect_fault(with(ia.operand, idesc + (96 << 20), nullptr, NONE), Fault::tensor_memory);  // M = 224
  Operand hopper = ia.operand;
  hopper.descriptor ^= 1ull << 46;
  expect_fault(with(hopper, idesc, nullptr, NONE), Fault::tensor_memory);
  Operand far = ia.operand;
  far.descriptor += 60 << 6;  // 60 KiB further
  expect_fault(with(far, idesc, nullptr, NONE), Fault::shared_out_of_bounds);
  {
    Env checks("CUDASIM_CHECK", "race,init");
    ok(with(ia.operand, idesc, zero.p, NONE));
    check(is_right(), "values");
    ok(with(columns.operand, idesc, nullptr, NONE));
    check(is_right(), "values");
    for (const Bug bug : {NO_COMMIT_WAIT, NO_PROXY_FENCE, OVERWRITE})
      expect_fault(with(ia.operand, idesc, zero.p, bug), Fault::shared_race);
    expect_fault(with(columns.operand, idesc, nullptr, NO_SYNC), Fault::shared_race);
    expect_fault(with(ia.operand, idesc + (1 << 17), nullptr, NONE), Fault::tensor_memory);  // N = 72
    current = name + " unwritten";
    const Image small(Matrix(64, 64, true, rng), kK128);  // leaves half of the lanes
    expect_fault(launch(p, small.operand, ib.operand, descriptor(64, 64, a, b), 4, 64, nullptr, 0, out.p, NONE),
                 Fault::uninitialized_shared);
  }
  ok(with(ia.operand, idesc, zero.p, NO_LOAD_WAIT));
  check(is_right(), "the use of a register waits for it");
  {
    Env checks("CUDASIM_CHECK", "fence");
    with(ia.operand, idesc, zero.p, NO_LOAD_WAIT);
    check(!is_right(), "stale registers");
  }
  for (const Bug bug : {NO_FENCE_BEFORE, NO_FENCE_AFTER}) {
    {
      Env checks("CUDASIM_CHECK", "race,init");
      ok(with(columns.operand, idesc, nullptr, bug));
    }
    Env checks("CUDASIM_CHECK", "fence,init");
    expect_fault(with(columns.operand, idesc, nullptr, bug), Fault::shared_race);
    ok(with(columns.operand, idesc, nullptr, NONE));
  }
  for (const char* seed : {"1", "2", "3", "4"}) {
    Env s("CUDASIM_SEED", seed), checks("CUDASIM_CHECK", "race,init");
    ok(with(columns.operand, idesc, nullptr, NONE));
    check(is_right(), "seeded values");
  }
  current = name + " on another device";
  arch = 90;
  expect_fault(with(ia.operand, idesc, zero.p, NONE), Fault::unsupported_instruction);
  arch = 100;
}

void shapes(Ptx& p) {
  current += " shapes";
  Rng rng(15);
  Buf<uint32_t> in(6 * 128 * 4), out(6 * 128 * 8), back(6 * 128 * 4);
  for (size_t i = 0; i < in.n; ++i) in[i] = rng.u() | 1;
  ok(run(p, "shapes", {{1}, {128}}, in.p, out.p, back.p));
  int wrong = 0, other = 0;
  for (int shape = 0; shape < 6; ++shape)
    for (int t = 0; t < 128; ++t)
      for (int i = 0; i < 4; ++i) {
        const int l = t % 32;
        int lane = l, column = i;
        if (shape == 0) lane = l / 4 + l % 2 * 8, column = 2 * i + l / 2 % 2;
        if (shape == 1) lane = l / 4 + i % 2 * 8, column = i / 2 * 4 + l % 4;
        if (shape == 2) lane = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;  // as an accumulator of mma.sync
        if (shape == 3) lane = l % 16, column = i + (l < 16 ? 0 : 4);
        const uint32_t* row = &out[size_t((shape * 128 + t / 32 * 32 + lane) * 8)];
        const uint32_t got = shape == 5 ? row[2 * i] | row[2 * i + 1] << 16 : row[column],
                       want = in[size_t((shape * 128 + t) * 4 + i)];
        wrong += got != want;
        other += back[size_t((shape * 128 + t) * 4 + i)] != want;
      }
  check(wrong == 0, std::to_string(wrong) + " elements stored in other places");
  check(other == 0, std::to_string(other) + " elements loaded from other places");
}

void pairs(Ptx& p) {
  Rng rng(16);
  const std::string name = current;
  for (const int m : {256, 128}) {
    current = name + " pair of M " + std::to_string(m);
    const int n = 64, k = 64, columns = m == 256 ? n : n / 2;
    const Matrix a(m, k, true, rng), b(n, k, true, rng);
    const Image ia(a, kK128, 2), ib(b, kK128, 2);
    Buf<uint32_t> out(size_t(2 * 128 * columns));
    for (const char* checks : {"", "race,init"}) {
      Env c("CUDASIM_CHECK", checks);
      ok(run(p, "pair", {{2}, {128}, {2}, 64 << 10}, ia.operand, ib.operand, descriptor(m, n, a, b), k / 16, columns,
             out.p));
      int wrong = 0;
      for (int i = 0; i < m; ++i)
        for (int j = 0; j < n; ++j) {
          const int rows = m / 2, lane = i % rows + (j >= columns ? 64 : 0);
          wrong += as_float(out[size_t((i / rows * 128 + lane) * columns + j % columns)]) != product(a, b, i, j, 0);
        }
      check(wrong == 0, std::to_string(wrong) + " elements");
    }
  }
}

void pair_copies(Ptx& p) {
  current += " pair_copies";
  Buf<int> in(64 * 16), out(2 * 48 * 16);
  for (int i = 0; i < 64 * 16; ++i) in[size_t(i)] = i;
  const MapArg map{map2d(in.p, 64, 16, 16, 16, 4, 0)};
  for (const char* checks : {"", "race,init"}) {
    Env c("CUDASIM_CHECK", checks);
    ok(run(p, "pair_copies", {{2}, {128}, {2}}, map, out.p));
    int wrong = 0;
    for (int rank = 0; rank < 2; ++rank)
      for (int i = 0; i < 48 * 16; ++i) {
        const int row = i / 16, from = row < 16 ? 16 * rank + row : row + 16;
        wrong += out[size_t(rank * 48 * 16 + i)] != from * 16 + i % 16;
      }
    check(wrong == 0, std::to_string(wrong) + " elements");
  }
}

}  // namespace

void blackwell(const std::string& file) {
  current = file;
  Ptx p(dir + "/" + file);
  if (!p.m) return;
  arch = 100;
  for (const auto test : {products, half_results_and_disabled_lanes, card, faults, shapes, pairs, pair_copies}) {
    current = file;
    test(p);
  }
  arch = 90;
}
