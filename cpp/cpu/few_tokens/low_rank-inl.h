// The low-rank intermediates for few tokens, h = round(scaling · dropout(x) · aᵀ) and g = round(scaling · dy · b). Both
// are stored as float32, with the rank padded with zeros to whole vectors: h as [padded rank / kLanes, m, kLanes] and g
// as [m, padded rank].
#pragma once

#include <cstdint>

#include "cpp/cpu/few_tokens/budget-inl.h"
#include "cpp/cpu/isa/stream.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/shared/carver-inl.h"
#include "cpp/cpu/shared/dropout.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/cpu/tuning.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace few_tokens {

using namespace stream;

// The adapter of token `token` of the call; its rank is 0 if there is none.
inline constexpr Lora kNoLora{};
inline const Lora& lora_of(const Lora& lora, int64_t token) {
  if (!lora.adapters) return lora;
  const int32_t adapter = lora.adapters->of_token[token];
  return adapter < 0 ? kNoLora : lora.adapters->each[adapter];
}

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

// Threads compute h in tiles of kTileTokens tokens, which use the same adapter, and kTileRanks ranks. This one begins
// at token i of m and rank j.
inline constexpr int kTileTokens = kLanes == 16 ? 4 : 2;
inline constexpr int kTileRanks = 4;
template <class T>
void low_rank_h(const Lora& l, const T* x, int64_t m, int64_t k, int64_t i, int64_t count, int64_t j, float* h) {
  if (j >= l.rank) return;
  const float factor = static_cast<float>(l.scaling * l.dropout.keep_scale);
  with_count<kTileTokens>(count, [&](auto tokens) {
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

// The tokens of dy that use one adapter. Rows of its b are summed in slices, whose bounds depend on the shape alone,
// and the slices' sums in their order. So the result does not depend on the number of threads.
struct GTokens {
  const Lora* lora;
  const int8_t* tokens;
  int64_t count, slices;
  float* partial;  // [slice][token][padded rank]

  int64_t slice_floats() const { return count * padded_rank(lora->rank); }
};

// All tokens of dy by adapter.
class GTokenLists {
 public:
  explicit GTokenLists(const LinearDxProblem& p) {
    bool listed[kMostDxFloatTokens] = {};
    int8_t* next = tokens_;
    for (int64_t t = 0; t < p.m; ++t) {
      const Lora& lora = lora_of(p.lora, t);
      if (listed[t] || lora.rank == 0) continue;
      GTokens& group = groups_[count_++];
      group = {&lora, next, 0, slices_of(p, padded_rank(lora.rank)), nullptr};
      for (int64_t i = t; i < p.m; ++i) {
        if (&lora_of(p.lora, i) != &lora) continue;
        *next++ = static_cast<int8_t>(i);
        listed[i] = true;
      }
      group.count = next - group.tokens;
    }
  }
  void take(Carver* memory) {
    for (GTokens& group : *this) group.partial = memory->take<float>(group.slices * group.slice_floats());
  }
  GTokens* begin() { return groups_; }
  GTokens* end() { return groups_ + count_; }

 private:
  static int64_t slices_of(const LinearDxProblem& p, int64_t padded) {
    int64_t slices = ceil_div(p.w.n, 512);
    while (slices > 8 && slices * p.m * padded * 4 > kMaxScratchBytes / 2) slices = ceil_div(slices, 2);
    return slices;
  }

  int8_t tokens_[kMostDxFloatTokens];
  GTokens groups_[kMostDxFloatTokens];
  int64_t count_ = 0;
};

// Computes a slice of the g of some tokens.
template <class T>
void g_slice(const LinearDxProblem& p, const GTokens& of, int64_t slice) {
  const int64_t n = p.w.n, rank = of.lora->rank, padded = padded_rank(rank), per_slice = ceil_div(n, of.slices);
  const T *const factor = static_cast<const T*>(of.lora->b), *const in = static_cast<const T*>(p.dy);
  const int64_t stride = of.lora->b_row(1);
  float* const sums = of.partial + slice * of.slice_floats();
  for (int64_t i = 0; i < of.slice_floats(); i += kLanes) store(sums + i, zero());
  const int64_t last = (slice + 1) * per_slice < n ? (slice + 1) * per_slice : n;
  for (int64_t row = slice * per_slice; row < last; row += 4) {
    const int64_t rows = last - row < 4 ? last - row : 4;
    for (int64_t j = 0; j < rank; j += kLanes) {
      Floats b[4];
      for (int64_t r = 0; r < 4; ++r) b[r] = r < rows ? load(factor + (row + r) * stride + j, rank - j) : zero();
      for (int64_t i = 0; i < of.count; ++i) {
        const T* dy = in + of.tokens[i] * n + row;
        Floats sum = load(sums + i * padded + j);
        for (int64_t r = 0; r < rows; ++r) sum = fma(splat(to_float(dy[r])), b[r], sum);
        store(sums + i * padded + j, sum);
      }
    }
  }
}

// Computes g, [m, padded rank of the call].
template <class T>
void low_rank_g(const Pool& pool, const LinearDxProblem& p, GTokenLists& lists, float* g) {
  int64_t slices = 0;
  for (const GTokens& of : lists) slices += of.slices;
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const GTokens* of = lists.begin();
      int64_t slice = i;
      for (; slice >= of->slices; ++of) slice -= of->slices;
      g_slice<T>(p, *of, slice);
    }
  };
  run(pool, p.m * p.w.n * p.lora.rank > kWorthThreads, slices, 1, body);
  const int64_t stride = padded_rank(p.lora.rank);
  for (int64_t i = 0; i < p.m * stride; i += kLanes) store(g + i, zero());
  for (const GTokens& of : lists) {
    const int64_t padded = padded_rank(of.lora->rank);
    for (int64_t i = 0; i < of.count * padded; ++i) {
      float sum = 0.0f;
      for (int64_t s = 0; s < of.slices; ++s) sum += of.partial[s * of.slice_floats() + i];
      g[of.tokens[i / padded] * stride + i % padded] = rounded<T>(sum * static_cast<float>(of.lora->scaling));
    }
  }
}

}  // namespace few_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
