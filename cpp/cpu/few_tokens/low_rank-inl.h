// The low-rank intermediates for few tokens, h = round(scaling · dropout(x) · aᵀ) and g = round(scaling · dy · b). Both
// are stored as float32, with the rank padded with zeros to whole vectors: h as [padded rank / kLanes, m, kLanes] and g
// as [m, padded rank].
#pragma once

#include <cstdint>

#include "cpp/cpu/few_tokens/budget-inl.h"
#include "cpp/cpu/isa/stream.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/shared/dropout.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace few_tokens {

using namespace stream;

inline int64_t padded_rank(int64_t rank) { return ceil_div(rank, kLanes) * kLanes; }

// Copies x, with zeros for the elements that dropout drops. Token 0 here is token `first_token` of the call's x.
template <class T>
void drop(const Dropout& d, const T* x, int64_t m, int64_t k, int64_t first_token, T* out) {
  for (int64_t i = 0; i < m * k; ++i) out[i] = dropped(d, first_token * k + i) ? T{} : x[i];
}

// h of kTokens tokens and kRanks ranks: inner products of length k, times `factor`.
template <int kTokens, int kRanks, class T>
void h_tile(const T* x, const T* a, int64_t k, float factor, float* h) {
  constexpr int64_t kChain = 8 * kLanes;  // elements; short, so that float32 errors are no larger than a library's
  Floats sums[kTokens][kRanks];
  unroll<kTokens>([&](auto i) { unroll<kRanks>([&](auto j) { sums[i][j] = zero(); }); });
  for (int64_t first = 0; first < k; first += kChain) {
    Floats chain[kTokens][kRanks];
    unroll<kTokens>([&](auto i) { unroll<kRanks>([&](auto j) { chain[i][j] = zero(); }); });
    for (int64_t c = first; c < k && c < first + kChain; c += kLanes) {
      Floats token[kTokens];
      unroll<kTokens>([&](auto i) { token[i] = load(x + i * k + c, k - c); });
      unroll<kRanks>([&](auto j) {
        const Floats a_j = load(a + j * k + c, k - c);
        unroll<kTokens>([&](auto i) { chain[i][j] = fma(token[i], a_j, chain[i][j]); });
      });
    }
    unroll<kTokens>([&](auto i) { unroll<kRanks>([&](auto j) { sums[i][j] = add(sums[i][j], chain[i][j]); }); });
  }
  unroll<kTokens>(
      [&](auto i) { unroll<kRanks>([&](auto j) { h[i * kLanes + j] = rounded<T>(sum(sums[i][j]) * factor); }); });
}

// Threads compute h in tiles of kTileTokens tokens and kTileRanks ranks.
inline constexpr int kTileTokens = kLanes == 16 ? 4 : 2;
inline constexpr int kTileRanks = 4;
template <class T>
void low_rank_h(const Lora& l, const T* x, int64_t m, int64_t k, int64_t token_group, int64_t rank_group, float* h) {
  const int64_t i = token_group * kTileTokens, j = rank_group * kTileRanks;
  const float factor = static_cast<float>(l.scaling * l.dropout.keep_scale);
  with_count<kTileTokens>(m - i < kTileTokens ? m - i : kTileTokens, [&](auto tokens) {
    with_count<kTileRanks>(l.rank - j < kTileRanks ? l.rank - j : kTileRanks, [&](auto ranks) {
      h_tile<tokens, ranks>(x + i * k, static_cast<const T*>(l.a) + j * k, k, factor,
                            h + (j / kLanes * m + i) * kLanes + j % kLanes);
    });
  });
}

// Saves h or g for the backward, [m, rank]. at(i, j) points to token i, ranks j, j + 1, ...
template <class T, class At>
void save_low_rank(int64_t m, int64_t rank, const At& at, void* out) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < rank; j += kLanes) store(static_cast<T*>(out) + i * rank + j, load(at(i, j)), rank - j);
}

// Computes g. Rows of b are summed in slices, whose bounds depend on the shape alone, and the slices' sums in their
// order. So the result does not depend on the number of threads.
template <class T>
void low_rank_g(const Pool& pool, const LinearDxProblem& p, float* partial, int64_t slices, float* g) {
  const int64_t n = p.w.n, rank = p.lora.rank, padded = padded_rank(rank), per_slice = ceil_div(n, slices);
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      float* sums = partial + s * p.m * padded;
      for (int64_t i = 0; i < p.m * padded; i += kLanes) store(sums + i, zero());
      const int64_t last = (s + 1) * per_slice < n ? (s + 1) * per_slice : n;
      for (int64_t row = s * per_slice; row < last; row += 4) {
        const int64_t rows = last - row < 4 ? last - row : 4;
        for (int64_t j = 0; j < rank; j += kLanes) {
          Floats b[4];
          for (int64_t r = 0; r < 4; ++r)
            b[r] = r < rows ? load(static_cast<const T*>(p.lora.b) + (row + r) * rank + j, rank - j) : zero();
          for (int64_t i = 0; i < p.m; ++i) {
            const T* dy = static_cast<const T*>(p.dy) + i * n + row;
            Floats sum = load(sums + i * padded + j);
            for (int64_t r = 0; r < rows; ++r) sum = fma(splat(to_float(dy[r])), b[r], sum);
            store(sums + i * padded + j, sum);
          }
        }
      }
    }
  };
  run(pool, p.m * n * rank > kWorthThreads, slices, 1, body);
  for (int64_t i = 0; i < p.m * padded; ++i) {
    float sum = 0.0f;
    for (int64_t s = 0; s < slices; ++s) sum += partial[s * p.m * padded + i];
    g[i] = rounded<T>(sum * static_cast<float>(p.lora.scaling));
  }
}

}  // namespace few_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
