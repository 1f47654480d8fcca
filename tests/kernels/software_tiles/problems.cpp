// Runs the kernels for tiles on many problems and compares them with plain float64 loops. The problems test layouts,
// the ends of every dimension, dropout, and that results do not depend on the number of threads. In int8, they have the
// same bits as the vector unit's, but for low-rank products in bfloat16. The program is compiled for a vocabulary,
// TILES: software_tiles, on any machine and with sanitizers, or a real one on a machine that has it.
//
//   problems [seed]    prints the number of problems, or the first wrong one and ends with 1
#define QLORA_ISA TILES

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpp/cpu/float64/linear.h"
#include "cpp/cpu/isa/isa.h"
#include "cpp/cpu/many_tokens_tiles/linear-inl.h"
#include "cpp/cpu/many_tokens_tiles/linear_int8-inl.h"
#include "cpp/cpu/shared/scratch.h"
#include "tests/kernels/software_tiles/scratch.h"

namespace qlora::cpu {
namespace {

std::mutex mutex;
std::set<std::pair<const char*, int64_t>> live;

struct Buffer {
  char* data = nullptr;
  int64_t bytes = 0;
  void release() {
    if (!data) return;
    const std::lock_guard<std::mutex> lock(mutex);
    live.erase({data, bytes});
    std::free(data);
    data = nullptr;
  }
  ~Buffer() { release(); }
};

}  // namespace

void* scratch(ScratchUse use, int64_t bytes) {
  static thread_local Buffer buffers[static_cast<int>(ScratchUse::kTokens) + 1];
  Buffer& buffer = buffers[static_cast<int>(use)];
  buffer.release();
  if (bytes == 0) return nullptr;
  buffer.data = static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>((bytes + 63) & -64)));
  buffer.bytes = bytes;
  for (int64_t i = 0; i < bytes; ++i) buffer.data[i] = static_cast<char>(0xFF);
  const std::lock_guard<std::mutex> lock(mutex);
  live.insert({buffer.data, bytes});
  return buffer.data;
}

// The product's definition is in dispatch.cpp, which this program does not link.
void throw_of_pool(bool) { throw std::bad_alloc(); }

bool is_scratch(const void* p, int64_t bytes) {
  const char* const begin = static_cast<const char*>(p);
  const std::lock_guard<std::mutex> lock(mutex);
  for (const auto& [data, size] : live)
    if (data <= begin && begin + bytes <= data + size) return true;
  return false;
}

namespace {

template <int threads>
bool run_threads(int64_t count, int64_t grain, Pool::Body body, void* context) {
  const int64_t share = std::max(grain, (count + threads - 1) / threads);
  std::vector<std::thread> running;
  for (int64_t i = 0; i < count; i += share) running.emplace_back(body, context, i, std::min(count, i + share));
  for (std::thread& thread : running) thread.join();
  return true;
}
const Pool kPools[] = {{run_threads<1>, 1}, {run_threads<2>, 2}, {run_threads<5>, 5}};

using Bf16 = std::vector<bfloat16>;
using Doubles = std::vector<double>;
std::mt19937 random_bits;

Bf16 normal(int64_t count, float scale) {
  std::normal_distribution<float> distribution(0.0f, scale);
  Bf16 out(static_cast<size_t>(count));
  for (bfloat16& e : out) from_float(distribution(random_bits), &e);
  return out;
}
Doubles widened(const Bf16& in) {
  Doubles out;
  for (const bfloat16& e : in) out.push_back(to_float(e));
  return out;
}

struct Shape {
  int64_t m, n, k, rank, block;
  bool nested, bias;
  double dropout;
  Code code = Code::kNf4;
  bool has_offsets = false;
};

// Whether each row and each column of `got` is within 2% of `want`, or of the average row or column, or of elements
// with this variance: the terms of the only element may cancel. Roundings to bfloat16 are; values that were read from
// or written to a wrong place are not.
bool near(const Bf16& got, const Doubles& want, int64_t rows, int64_t columns, double variance = 0.0) {
  std::vector<double> error(static_cast<size_t>(rows + columns)), size(static_cast<size_t>(rows + columns));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      const double w = want[static_cast<size_t>(r * columns + c)];
      const double e = to_float(got[static_cast<size_t>(r * columns + c)]) - w;
      if (!std::isfinite(e)) return false;
      for (const int64_t i : {r, rows + c})
        error[static_cast<size_t>(i)] += e * e, size[static_cast<size_t>(i)] += w * w;
    }
  }
  double all = 0.0;
  for (int64_t r = 0; r < rows; ++r) all += size[static_cast<size_t>(r)];
  for (int64_t i = 0; i < rows + columns; ++i) {
    const double average = all / static_cast<double>(i < rows ? rows : columns);
    const double expected = variance * static_cast<double>(i < rows ? columns : rows);
    if (error[static_cast<size_t>(i)] > 4e-4 * std::max({size[static_cast<size_t>(i)], average, expected}))
      return false;
  }
  return true;
}

template <class Problem, class Run>
bool same_for_all_pools(Problem p, void* Problem::* out, int64_t count, Run run, Bf16* result) {
  for (const Pool& pool : kPools) {
    Bf16 here = normal(count, 1.0f);
    p.*out = here.data();
    if (run(pool, p) != Outcome::kDone) return false;
    if (&pool == kPools) {
      *result = here;
    } else if (count && std::memcmp(here.data(), result->data(), static_cast<size_t>(count) * 2) != 0) {
      return false;
    }
  }
  return true;
}

// Whether another run, on two threads, gives `expected`.
template <class Problem, class Run>
bool again(Problem p, void* Problem::* out, const Bf16& expected, Run run) {
  Bf16 here = normal(static_cast<int64_t>(expected.size()), 1.0f);
  p.*out = here.data();
  return run(kPools[1], p) == Outcome::kDone &&
         (here.empty() || std::memcmp(here.data(), expected.data(), here.size() * sizeof(bfloat16)) == 0);
}

// Whether the tile unit's int8 gives the same bits for every number of threads: those of the vector unit, unless it has
// multiplied a low-rank product in bfloat16, which must be near.
template <class T, class Problem, class OfTiles, class OfVectors>
bool same_as_vectors(Problem p, void* Problem::* out, int64_t rows, int64_t columns, OfTiles of_tiles,
                     OfVectors of_vectors) {
  std::vector<T> want(static_cast<size_t>(rows * columns)), got(want);
  p.*out = want.data();
  of_vectors(kPools[0], p);
  if constexpr (std::is_same_v<T, bfloat16>) {
    if (p.lora.rank) {
      const Doubles of_vectors_64 = widened(want);
      p.*out = want.data();
      if (of_tiles(kPools[0], p) != Outcome::kDone || !near(want, of_vectors_64, rows, columns)) return false;
    }
  }
  for (const Pool& pool : kPools) {
    std::memset(static_cast<void*>(got.data()), 0xFF, got.size() * sizeof(T));
    p.*out = got.data();
    if (of_tiles(pool, p) != Outcome::kDone || std::memcmp(got.data(), want.data(), got.size() * sizeof(T)) != 0)
      return false;
  }
  return true;
}

template <class T>
const char* wrong_in_int8(const Shape& s, const Weight& w, bool has_adapters) {
  using namespace QLORA_ISA;
  if (s.m == 0 || !has_int8_segments(w)) return nullptr;
  const auto draw = [](int64_t count, float scale) {
    std::vector<T> out;
    for (const bfloat16& e : normal(count, scale)) from_float(to_float(e), &out.emplace_back());
    return out;
  };
  const std::vector<T> x = draw(s.m * s.k, 1.0f), dy = draw(s.m * s.n, 1.0f), bias = draw(s.n, 1.0f);
  // Of adapters, a stack of two.
  const int64_t second = has_adapters ? s.rank / 2 : 0, stack_rank = s.rank + second;
  const std::vector<T> a = draw(stack_rank * s.k, 0.1f), b = draw(s.n * stack_rank, 0.1f);
  Lora lora;
  lora.a = a.data(), lora.b = b.data(), lora.rank = s.rank, lora.scaling = 0.5;
  lora.dropout = make_dropout(s.dropout, 7);
  std::vector<int32_t> of_token;
  for (int64_t t = 0; t < s.m; ++t) of_token.push_back(static_cast<int32_t>(random_bits() % 3) - 1);
  Lora each[2] = {lora, lora};
  each[1].a = a.data() + s.rank * s.k, each[1].b = b.data() + s.rank, each[1].rank = second;
  each[0].b_stride = each[1].b_stride = stack_rank;
  const Adapters adapters{each, 2, of_token.data(), stack_rank};
  if (has_adapters) lora.adapters = &adapters;

  constexpr DType kDType = std::is_same_v<T, float> ? DType::kFloat32 : DType::kBFloat16;
  LinearProblem y;
  y.dtype = kDType, y.activations = Activations::kInt8, y.m = s.m, y.x = x.data(), y.w = w, y.lora = lora;
  y.bias = s.bias ? bias.data() : nullptr;
  const auto y_of_vectors = many_tokens::forward_int8_as<panel::WordInt8, many_tokens::WordF32, T>;
  if (!same_as_vectors<T>(y, &LinearProblem::y, s.m, s.n, many_tokens_tiles::forward_int8, y_of_vectors))
    return "y in int8";
  LinearDxProblem dx;
  dx.dtype = kDType, dx.activations = Activations::kInt8, dx.m = s.m, dx.dy = dy.data(), dx.w = w, dx.lora = lora;
  if (!accepts(Kernel::kManyTokensInt8, dx)) return nullptr;
  const auto dx_of_vectors = many_tokens::dx_int8_as<panel::WordInt8, many_tokens::WordF32, T>;
  if (!same_as_vectors<T>(dx, &LinearDxProblem::dx, s.m, s.k, many_tokens_tiles::dx_int8, dx_of_vectors))
    return "dx in int8";
  return nullptr;
}

const char* wrong(const Shape& s) {
  const int64_t numel = s.n * s.k, blocks = ceil_div(numel, s.block);
  std::vector<uint8_t> packed(static_cast<size_t>(packed_bytes(numel, bits_of(s.code)))),
      codes(static_cast<size_t>(blocks));
  for (uint8_t& e : packed) e = static_cast<uint8_t>(random_bits());
  for (uint8_t& e : codes) e = static_cast<uint8_t>(128 + random_bits() % 128);
  std::vector<float> absmax(static_cast<size_t>(blocks)),
      nested_absmax(static_cast<size_t>(ceil_div(blocks, 256)), 0.02f);
  for (float& e : absmax) e = 0.02f + static_cast<float>(random_bits() % 100) * 0.001f;
  const float offset = 0.03f;
  Weight w;
  w.packed = packed.data(), w.n = s.n, w.k = s.k, w.code = s.code;
  w.scales = s.nested ? nested_scales(codes.data(), nested_absmax.data(), &offset, s.block, 256)
                      : float_scales(absmax.data(), s.block);
  std::vector<float> offsets(static_cast<size_t>(blocks));
  for (float& e : offsets) e = static_cast<float>(random_bits() % 100) * 0.001f - 0.6f;
  if (s.has_offsets) w.scales.offsets = {OffsetForm::kFloat32, offsets.data(), nullptr};
  const std::mt19937 before_int8 = random_bits;
  for (const bool has_adapters : {false, true}) {
    for (const auto check : {wrong_in_int8<float>, wrong_in_int8<bfloat16>})
      if (const char* what = check(s, w, has_adapters)) return what;
  }
  random_bits = before_int8;
  const Bf16 x = normal(s.m * s.k, 1.0f), dy = normal(s.m * s.n, 1.0f), bias = normal(s.n, 1.0f);
  const Bf16 a = normal(s.rank * s.k, 0.1f), b = normal(s.n * s.rank, 0.1f);
  const Doubles x64 = widened(x), dy64 = widened(dy), bias64 = widened(bias), a64 = widened(a), b64 = widened(b);
  Lora lora, lora64;
  lora.rank = lora64.rank = s.rank, lora.scaling = lora64.scaling = 0.5;
  lora.dropout = lora64.dropout = make_dropout(s.dropout, 7);
  lora.a = a.data(), lora.b = b.data(), lora64.a = a64.data(), lora64.b = b64.data();

  Bf16 got;
  LinearProblem y;
  y.dtype = DType::kBFloat16, y.m = s.m, y.x = x.data(), y.w = w, y.bias = s.bias ? bias.data() : nullptr,
  y.lora = lora;
  if (!same_for_all_pools(y, &LinearProblem::y, s.m * s.n, QLORA_ISA::many_tokens_tiles::forward_tiles, &got))
    return "y differs with the threads";
  Bf16 h = normal(s.m * s.rank, 1.0f), g = h;
  y.h = h.data();
  if (!again(y, &LinearProblem::y, got, QLORA_ISA::many_tokens_tiles::forward_tiles))
    return "y differs where h is kept";
  y.h = nullptr;
  Doubles want(static_cast<size_t>(s.m * s.n));
  y.dtype = DType::kFloat64, y.x = x64.data(), y.bias = s.bias ? bias64.data() : nullptr, y.lora = lora64;
  y.y = want.data();
  float64::forward(kPools[0], y);
  if (!near(got, want, s.m, s.n)) return "y";

  LinearDxProblem dx;
  dx.dtype = DType::kBFloat16, dx.m = s.m, dx.dy = dy.data(), dx.w = w, dx.lora = lora;
  if (!same_for_all_pools(dx, &LinearDxProblem::dx, s.m * s.k, QLORA_ISA::many_tokens_tiles::dx_tiles, &got))
    return "dx differs with the threads";
  dx.g = g.data();
  if (!again(dx, &LinearDxProblem::dx, got, QLORA_ISA::many_tokens_tiles::dx_tiles))
    return "dx differs where g is kept";
  dx.g = nullptr;
  want.assign(static_cast<size_t>(s.m * s.k), 0.0);
  dx.dtype = DType::kFloat64, dx.dy = dy64.data(), dx.lora = lora64, dx.dx = want.data();
  float64::dx(kPools[0], dx);
  if (!near(got, want, s.m, s.k)) return "dx";

  if (s.rank == 0) return nullptr;
  LoraGradProblem p;
  p.dtype = DType::kBFloat16, p.m = s.m, p.n = s.n, p.k = s.k, p.x = x.data(), p.dy = dy.data(), p.lora = lora;
  Bf16 db(static_cast<size_t>(s.n * s.rank)), da;
  p.db = db.data();
  if (!same_for_all_pools(p, &LoraGradProblem::da, s.rank * s.k, QLORA_ISA::many_tokens_tiles::dlora_tiles, &da))
    return "da differs with the threads";
  Bf16 da_again(da.size());
  p.da = da_again.data();
  if (!same_for_all_pools(p, &LoraGradProblem::db, s.n * s.rank, QLORA_ISA::many_tokens_tiles::dlora_tiles, &db))
    return "db differs with the threads";
  for (const bool gives_h : {false, true}) {
    Bf16 db_given(db.size());
    p.db = db_given.data(), p.h = gives_h ? h.data() : nullptr, p.g = g.data();
    if (!again(p, &LoraGradProblem::da, da, QLORA_ISA::many_tokens_tiles::dlora_tiles) ||
        std::memcmp(db_given.data(), db.data(), db.size() * sizeof(bfloat16)) != 0)
      return gives_h ? "da or db differs with a given h" : "da or db differs with a given g";
  }
  p.h = p.g = nullptr;
  Doubles da64(da.size()), db64(db.size());
  p.dtype = DType::kFloat64, p.x = x64.data(), p.dy = dy64.data(), p.lora = lora64, p.da = da64.data(),
  p.db = db64.data();
  float64::dlora(kPools[0], p);
  const double variance = 0.5 * 0.5 * 0.1 * 0.1 * static_cast<double>(s.m);  // with the scaling, and elements of A or B
  if (!near(da, da64, s.rank, s.k, variance * static_cast<double>(s.n))) return "da";
  if (!near(db, db64, s.n, s.rank, variance * static_cast<double>(s.k))) return "db";
  return nullptr;
}

// The problems of this seed with at most `most` products of x and W.
int run_all(unsigned seed, int64_t most) {
  random_bits.seed(seed);
  std::vector<Shape> shapes = {
      {1, 32, 64, 16, 64, true, false, 0.0},
      {17, 33, 333, 5, 64, true, true, 0.2},
      {40, 70, 100, 1, 32, false, false, 0.0},
      {33, 40, 1100, 8, 128, true, true, 0.0},
      {70, 130, 64, 64, 4096, true, false, 0.3},
      {16, 119, 36, 30, 64, true, true, 0.0},
      {5, 1, 1, 1, 64, false, true, 0.0},
      {64, 96, 640, 65, 64, true, false, 0.0},
      {9, 96, 704, 130, 64, true, true, 0.5},
      {31, 700, 576, 16, 64, true, false, 0.1},
      {3, 64, 65, 600, 64, true, false, 0.1},
      {130, 576, 1536, 16, 64, true, false, 0.0},
      {600, 40, 192, 16, 64, true, false, 0.1},
      {33, 64, 128, 0, 64, false, true, 0.0},
      {20, 32, 64, 33, 64, true, false, 1.0},
      {0, 32, 64, 16, 64, true, false, 0.0},
      {300, 1100, 130, 4, 64, true, true, 0.1},
      {257, 100, 2752, 16, 64, true, true, 0.0},
      {257, 2700, 96, 70, 64, true, false, 0.2},  // more than a panel that fits in the cache
      {33, 96, 320, 8, 64, true, true, 0.1, Code::kShuffled},
      {40, 70, 176, 1, 16, false, true, 0.0, Code::kShuffled},
      {33, 33, 333, 5, 16, true, true, 0.2},
      {33, 96, 320, 8, 64, false, true, 0.1, Code::kUint4, true},
      {70, 130, 192, 4, 128, true, true, 0.0, Code::kUint4, true},
      {40, 70, 333, 3, 32, false, false, 0.0, Code::kUint4, true},
  };
  const auto some = [](int64_t most) { return 1 + static_cast<int64_t>(random_bits() % static_cast<unsigned>(most)); };
  for (int i = 0; i < 24; ++i) {
    shapes.push_back({some(80), some(150), some(300), static_cast<int64_t>(random_bits() % 70),
                      32LL << random_bits() % 4, random_bits() % 2 == 0, random_bits() % 2 == 0,
                      random_bits() % 3 == 0 ? 0.25 : 0.0, Code::kNf4, random_bits() % 4 == 0});
    if (i % 3 == 0) shapes.back().k = 64 * some(20);
  }
  shapes.push_back({49, 61, 832, 5, 16, false, true, 0.2, Code::kNf4});  // blocks below a segment of int8
  shapes.push_back({77, 107, 448, 3, 32, false, true, 0.1, Code::kUint4, true});
  for (int code = 0; code < 6; ++code) {  // wide codes that are integers, in rows that end with and within a group
    const Code wide = static_cast<Code>(kFirstWideCode + code);
    shapes.push_back({some(80), some(150), 64 * some(5), 4, 64, code % 2 == 0, true, 0.1, wide, code == 3});
    shapes.push_back({some(80), some(150), 32 + 64 * some(5), 4, 32, code % 2 == 0, false, 0.0, wide, code == 1});
  }
  // Halves of groups in blocks of their own, in rows that end with half a group.
  shapes.push_back({33, 70, 96, 3, 32, true, true, 0.1});
  shapes.push_back({20, 45, 160, 3, 32, false, false, 0.0, Code::kUint4, true});
  std::erase_if(shapes, [most](const Shape& s) { return s.m * s.n * s.k > most; });
  for (const Shape& s : shapes) {
    if (const char* what = wrong(s)) {
      std::printf("%s is wrong: m=%ld n=%ld k=%ld rank=%ld block=%ld nested=%d bias=%d dropout=%g seed=%u\n", what,
                  static_cast<long>(s.m), static_cast<long>(s.n), static_cast<long>(s.k), static_cast<long>(s.rank),
                  static_cast<long>(s.block), s.nested, s.bias, s.dropout, seed);
      return 1;
    }
  }
  std::printf("%zu problems\n", shapes.size());
  return 0;
}

}  // namespace
}  // namespace qlora::cpu

#define QLORA_NAME(isa) #isa
#define QLORA_NAME_OF(isa) QLORA_NAME(isa)

int main(int count, char** arguments) {
  // Asks the system for permission to use tiles.
  const qlora::cpu::Isa* const isa = qlora::cpu::find_isa(QLORA_NAME_OF(QLORA_ISA));
  if (isa && !qlora::cpu::supported(*isa)) {
    std::printf("this processor has no %s\n", isa->name);
    return 2;
  }
  const unsigned seed = count > 1 ? static_cast<unsigned>(std::atoi(arguments[1])) : 0u;
  return qlora::cpu::run_all(seed, count > 2 ? std::atoll(arguments[2]) : INT64_MAX);
}
