// The input gradient for few tokens, dx = dy · w + mask ∘ (g · a) · keep_scale. A kernel (dx_int-inl.h, dx_float-inl.h)
// computes the sums over weight rows, this file all else.
//
// The sum runs over the rows of W, so lanes are outputs: a decoded vector is multiplied by one element of dy and added
// to the sums of its columns. W is cut into *slabs* of rows, and the sums of the slabs are added in their order. A
// thread that has a slab to itself reads whole pages one after another.
//
// A kernel sums a *strip* of a slab at a time: a few chunks of columns, tile by tile from the top, chunk by chunk. A
// tile has kDxTileRows rows of each shift. The sums of a chunk stay in the first-level cache while a tile is added to
// them, and the bytes of the next tile are prefetched meanwhile:
//
// clang-format off
//                 strip           strip
//              chunk  chunk    chunk  chunk
//   slab 0   [ tile | tile  |  tile | tile ]      kDxTileRows * period rows
//            [ tile | tile  |  tile | tile ]      ...
//   slab 1   [ tile | tile  |  tile | tile ]
// clang-format on
#pragma once

#include <cstdint>

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/few_tokens/budget-inl.h"
#include "cpp/cpu/few_tokens/low_rank-inl.h"
#include "cpp/cpu/few_tokens/weight-inl.h"
#include "cpp/cpu/isa/stream.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/shared/carver-inl.h"
#include "cpp/cpu/shared/dropout.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/scratch.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace few_tokens {

using namespace stream;

inline constexpr int kDxTileRows = 16;
inline constexpr int64_t kMaxSlabs = 8, kMinSlabRows = 512;

// Slabs of `rows` rows. Columns are processed in ranges of `chunks` chunks, so that the sums of all slabs fit in the
// scratch. Both are the same for any number of threads, because they determine the order of the sums.
struct Slabs {
  int64_t count, rows, chunks, m;
  float* sums = nullptr;  // [slab][token][column of the range]

  Slabs(const LinearDxProblem& p, int64_t tile_rows) : m(p.m) {
    const int64_t fit = kMaxScratchBytes / 2 / (4 * m * kChunk), all = ceil_div(p.w.k, kChunk);
    chunks = all < fit ? all : fit;
    const int64_t most = fit / chunks < kMaxSlabs ? fit / chunks : kMaxSlabs;
    const int64_t equal = ceil_div(p.w.n, most);
    rows = tile_rows * ceil_div(equal < kMinSlabRows ? kMinSlabRows : equal, tile_rows);
    count = ceil_div(p.w.n, rows);
  }
  int64_t stride() const { return chunks * kChunk; }
  int64_t floats() const { return m * stride(); }  // of a slab
};

// The sums of one slab, [token][column of the range].
struct SlabSums {
  float* sums;
  int64_t stride, first_column;
  float* at(int64_t i, int64_t column) const { return sums + i * stride + column - first_column; }
};

// dx of columns begin .. end - 1: the sum of all slabs + mask ∘ (g · a) · keep_scale, rounded once.
template <class T>
void finish_dx(const LinearDxProblem& p, const float* g, const Slabs& slabs, int64_t first_column, int64_t begin,
               int64_t end) {
  const int64_t most_ranks = p.lora.rank, k = p.w.k;
  const Floats keep_scale = splat(static_cast<float>(p.lora.dropout.keep_scale));
  float* column = Carver(scratch(ScratchUse::kThread, most_ranks * kLanes * 4)).take<float>(most_ranks * kLanes);
  for (int64_t c = begin; c < end; c += kLanes) {
    const Lora* of_column = nullptr;  // whose a `column` holds
    for (int64_t i = 0; i < p.m; ++i) {
      const Lora& of_token = lora_of(p.lora, i);
      const int64_t rank = of_token.rank;
      const Dropout& dropout = of_token.dropout;
      const float* sums = slabs.sums + i * slabs.stride() + c - first_column;
      Floats out = load(sums);
      for (int64_t s = 1; s < slabs.count; ++s) out = add(out, load(sums + s * slabs.floats()));
      if (rank) {
        if (of_column != &of_token) {
          const T* a = static_cast<const T*>(of_token.a) + c;
          for (int64_t j = 0; j < rank; ++j) store(column + j * kLanes, load(a + j * k, end - c));
          of_column = &of_token;
        }
        const float* row = g + i * padded_rank(most_ranks);
        Floats lora = zero();
        for (int64_t j = 0; j < rank; ++j) lora = fma(splat(row[j]), load(column + j * kLanes), lora);
        if (dropout.active()) {
          float value[kLanes];
          store(value, mul(lora, keep_scale));
          for (int64_t l = 0; l < kLanes && c + l < end; ++l) {
            if (dropped(dropout, i * k + c + l)) value[l] = 0.0f;
          }
          lora = load(value);
        }
        out = add(out, lora);
      }
      store(static_cast<T*>(p.dx) + i * k + c, out, end - c);
    }
  }
}

// Computes dx from g by a kernel that sums one strip of one slab per call.
template <class T, class Kernel>
void dx_by_slabs(const Pool& pool, const LinearDxProblem& p, const float* g, const Kernel& kernel, const Slabs& slabs) {
  const int64_t all_chunks = ceil_div(p.w.k, kChunk), chunk_work = kChunk * p.m;
  for (int64_t first = 0; first < all_chunks; first += slabs.chunks) {
    const int64_t chunks = all_chunks - first < slabs.chunks ? all_chunks - first : slabs.chunks;
    // Chunks of the first slab, then those of the next one.
    auto sum = [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t slab = begin / chunks, chunk = begin % chunks, row = slab * slabs.rows;
        int64_t count = chunks - chunk < end - begin ? chunks - chunk : end - begin;
        if (count > kernel.strip_chunks()) count = kernel.strip_chunks();
        kernel(row, p.w.n - row < slabs.rows ? p.w.n : row + slabs.rows, first + chunk, first + chunk + count,
               SlabSums{slabs.sums + slab * slabs.floats(), slabs.stride(), first * kChunk});
        begin += count;
      }
    };
    pool(slabs.count * chunks, ceil_div(kWorthThreads, chunk_work * slabs.rows), sum);
    auto finish = [&](int64_t begin, int64_t end) {
      const int64_t last = (first + end) * kChunk;
      finish_dx<T>(p, g, slabs, first * kChunk, (first + begin) * kChunk, last < p.w.k ? last : p.w.k);
    };
    pool(chunks, ceil_div(kWorthThreads, chunk_work * (slabs.count + p.lora.rank)), finish);
  }
}

// Computes dx by a kernel whose tiles have tile_rows() rows and whose strips have at most strip_chunks() chunks.
template <class T, class Kernel>
void dx_with(const Pool& pool, const LinearDxProblem& p, const Kernel& kernel) {
  const int64_t padded = padded_rank(p.lora.rank);
  Slabs slabs(p, kernel.tile_rows());
  GTokenLists lists(p);
  float* g = nullptr;
  const auto lay_out = [&](void* base) {
    Carver memory(base);
    g = memory.take<float>(p.m * padded);
    lists.take(&memory);
    slabs.sums = memory.take<float>(slabs.count * slabs.floats());
    return memory.used();
  };
  lay_out(scratch(ScratchUse::kCall, lay_out(nullptr)));
  if (p.lora.rank) low_rank_g<T>(pool, p, lists, g);
  if (p.g) save_low_rank<T>(p.m, p.lora.rank, [&](int64_t i, int64_t j) { return g + i * padded + j; }, p.g);
  dx_by_slabs<T>(pool, p, g, kernel, slabs);
}

}  // namespace few_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
