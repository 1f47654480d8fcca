// The forward for few tokens, y = x · wᵀ + h · bᵀ + bias: reads every packed byte once and decodes it in registers for
// all tokens of a group.
//
//   arrange-inl.h      x in the order in which codes are decoded, once per call
//   accumulate-inl.h   the inner loops
//   tile-inl.h         the outputs of kTileRows weight rows of one shift, and a group of tokens
//   this file          the call, and the walk of its threads over W
//
// A *super-tile* is one tile per shift: kTileRows * period rows, which are contiguous in memory. Threads take a few
// super-tiles at a time, an *item* (work_stealing-inl.h). While a thread computes one, it prefetches what follows:
//
// clang-format off
//   super-tile s + 1    lines of its packed weights, in the inner loop
//   item i + 1          lines of its scales and rows of B
//   item i + 2          pages of its packed weights
// clang-format on
#pragma once

#include <cstdint>

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/few_tokens/accumulate-inl.h"
#include "cpp/cpu/few_tokens/arrange-inl.h"
#include "cpp/cpu/few_tokens/budget-inl.h"
#include "cpp/cpu/few_tokens/low_rank-inl.h"
#include "cpp/cpu/few_tokens/tile-inl.h"
#include "cpp/cpu/few_tokens/weight-inl.h"
#include "cpp/cpu/isa/stream.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/shared/carver-inl.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/prefetch-inl.h"
#include "cpp/cpu/shared/scratch.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/cpu/shared/work_stealing-inl.h"
#include "cpp/cpu/verdict/rows-inl.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace few_tokens {

using namespace stream;
using namespace verdict;

inline constexpr int64_t kMaxPrefetchBytes = 64 << 10;  // at once
inline constexpr int64_t kLeastStolenBytes = 64 << 10;  // of packed weights

// How W is cut for the threads. An item is some kilobytes, so that what is done once per item costs little.
struct Items {
  int64_t super_tile, rows;  // weight rows of a super-tile and of an item

  Items(const Weight& w, int64_t super_tile_) : super_tile(super_tile_) {
    constexpr int64_t kItemBytes = 8 << 10;
    rows = super_tile * max(ceil_div(kItemBytes, max(w.bytes(super_tile * w.k), 1)),
                            ceil_div(ceil_div(w.n, super_tile), WorkStealingRanges::kMaxItems));
  }
  // Of a super-tile.
  int64_t scale_floats(const Weight& w) const {
    return ceil_div(super_tile * w.k, ScaleReader(w.scales).granule()) + 2 + kLanes;
  }
};

// Runs compute(first row, end) for the super-tiles that a thread takes, and prefetches what follows.
template <class T, class Compute>
[[gnu::always_inline]] inline void walk(const LinearProblem& p, const Items& items, const ScaleReader& reader,
                                        WorkStealingRanges& ranges, int64_t thread, const Compute& compute) {
  const auto first_row = [&](int64_t item) { return min(item * items.rows, p.w.n); };
  const auto prefetch_scales_and_lora_b = [&](int64_t first, int64_t last) {
    const int64_t row_bytes =
        (p.lora.adapters ? p.lora.adapters->stack_rank : p.lora.rank) * static_cast<int64_t>(sizeof(T));
    if (row_bytes) prefetch(static_cast<const uint8_t*>(p.lora.b) + first * row_bytes, (last - first) * row_bytes);
    reader.prefetch_blocks(first * p.w.k, last * p.w.k);
  };
  RowPagePrefetcher pages(p.w, 0, p.w.k);
  int64_t expected = -1;
  for (WorkStealingRanges::Range left = ranges.next(thread); !left.empty(); left = ranges.next(thread)) {
    const int64_t item = left.first, first = first_row(item), last = first_row(item + 1);
    if (item != expected) {  // the first item of a range
      pages.go_to(first, first_row(left.end));
      prefetch(p.w.packed + p.w.bytes(first * p.w.k), min(p.w.bytes((last - first) * p.w.k), kMaxPrefetchBytes));
      prefetch_scales_and_lora_b(first, last);
    }
    expected = item + 1;
    pages.reach((item + 2) * items.rows);
    if (item + 1 < left.end) prefetch_scales_and_lora_b(last, first_row(item + 2));
    for (int64_t n = first; n < last; n += items.super_tile) compute(n, min(n + items.super_tile, last));
  }
}

// A thread's walk over W.
template <class T, class Products>
class ForwardWalk {
 public:
  using Tile = ForwardTile<T, Products>;
  ForwardWalk(const LinearProblem& p, const ForwardPlan<Products>& plan, const Items& items, const Tile& tile)
      : p_(p), plan_(plan), items_(items), tile_(tile) {}

  void operator()(WorkStealingRanges& ranges, int64_t thread) const {
    const int64_t scale_floats = items_.scale_floats(p_.w);
    float *sums = nullptr, *scales = nullptr, *offsets = nullptr;
    const auto lay_out = [&](void* base) {
      Carver memory(base);
      sums = memory.take<float>(Tile::kSumFloats);
      scales = memory.take<float>(scale_floats);
      if (kHasOffsets) offsets = memory.take<float>(scale_floats);
      return memory.used();
    };
    lay_out(scratch(ScratchUse::kThread, lay_out(nullptr)));
    const ScaleReader reader(p_.w.scales);
    walk<T>(p_, items_, reader, ranges, thread,
            [&](int64_t first, int64_t last) { compute(first, last, reader, scales, offsets, sums); });
  }

 private:
  static constexpr bool kHasOffsets = Products::kOffsets != OffsetsEnter::kNothing;

  // Computes the super-tile of weight rows first .. last - 1 for all tokens.
  [[gnu::always_inline]] void compute(int64_t first, int64_t last, const ScaleReader& reader, float* scales,
                                      float* offsets, float* sums) const {
    const int64_t period = plan_.rows.period;
    const int64_t first_granule = plan_.rows.first_weight(first) >> reader.log2_granule();
    const int64_t end_granule = ceil_div(last * p_.w.k, reader.granule());
    GranuleScales of_rows{scales, offsets, first_granule, end_granule - first_granule, 0.0f};
    if (plan_.has_whole_chunks && reader.has_nested_chunks()) {
      of_rows.undecoded = scales;
    } else {
      reader.read(of_rows.first, of_rows.count, scales);
    }
    if constexpr (kHasOffsets) reader.read_offsets(of_rows.first, of_rows.count, scales, offsets);
    if constexpr (kHasOffsets) {
      if (!Products::kServesEveryRow || period > 1)
        of_rows.bound = weight_bound(p_.w.table(), scales, offsets, of_rows.count);
    } else if constexpr (!Products::kServesEveryRow) {
      of_rows.bound = reader.largest(of_rows.first, of_rows.count, scales);
    }
    RowBits apart[8];  // of the tile of each shift
    for (int64_t group = 0; group < plan_.groups.count; ++group) {
      with_count<Products::kMaxTokens>(plan_.groups.tokens(group), [&](auto tokens) {
        for (int64_t n = first; n < last && n < first + period; ++n)
          tile_.template compute<tokens>(n, ceil_div(last - n, period), group, reader, of_rows, apart + (n - first),
                                         sums);
      });
    }
  }

  const LinearProblem& p_;
  const ForwardPlan<Products>& plan_;
  const Items items_;
  const Tile tile_;
};

// Tokens first .. first + count - 1 of p.
template <class T>
LinearProblem tokens_of(const LinearProblem& p, int64_t first, int64_t count) {
  LinearProblem part = p;
  part.m = count;
  part.x = static_cast<const T*>(p.x) + first * p.w.k;
  part.y = static_cast<T*>(p.y) + first * p.w.n;
  if (p.h) part.h = static_cast<T*>(p.h) + first * p.lora.rank;
  return part;
}

// Computes h, and runs arrange(i) for i below `arranged`. Threads get tiles of h and parts of x to arrange in turn, so
// that each has its part of both. `dropped` holds x after dropout, or nothing where no element is dropped.
template <class T, class Arrange>
void prepare(const Pool& pool, const LinearProblem& p, int64_t first_token, T* dropped, float* h, int64_t arranged,
             const Arrange& arrange) {
  const int64_t k = p.w.k, rank = p.lora.rank;
  // A is read a few rows at a time, too few for the hardware to start prefetching.
  prefetch(p.lora.a, min(rank * k * static_cast<int64_t>(sizeof(T)), kMaxPrefetchBytes));

  const T* in = static_cast<const T*>(p.x);
  for (int64_t i = 0; i < p.m * padded_rank(rank); ++i) h[i] = 0.0f;
  const bool drops = rank && p.lora.dropout.active();
  for (int64_t i = 0; drops && i < p.m; ++i)
    drop(lora_of(p.lora, first_token + i).dropout, in + i * k, 1, k, first_token + i, dropped + i * k);
  const int64_t of_tile = p.lora.adapters ? 1 : kTileTokens;
  const int64_t rank_groups = ceil_div(rank, kTileRanks), h_tiles = ceil_div(p.m, of_tile) * rank_groups;
  const int64_t units = h_tiles + arranged;
  auto prepare_units = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t tile = i * h_tiles / units;
      if ((i + 1) * h_tiles / units > tile) {
        const int64_t first = tile / rank_groups * of_tile;
        low_rank_h(lora_of(p.lora, first_token + first), drops ? dropped : in, p.m, k, first, min(of_tile, p.m - first),
                   tile % rank_groups * kTileRanks, h);
      } else {
        arrange(i - tile);
      }
    }
  };
  run(pool, k * (p.m * rank + 16 * arranged) > kWorthThreads, units, 1, prepare_units);
  if (p.h) save_low_rank<T>(p.m, rank, [&](int64_t i, int64_t j) { return h + (j / kLanes * p.m + i) * kLanes; }, p.h);
}

// The forward of p, whose first token is token `first_token` of the call. If the arrangements do not fit the scratch,
// the tokens are halved until they do. The outputs of fallback tokens are meaningless.
template <class T, class Products>
Outcome forward(const Pool& pool, const LinearProblem& p, int64_t first_token, FallbackTokens* fallback_tokens) {
  const Products products(p.w);
  const ForwardPlan<Products> plan(p.m, p.w);
  const int64_t period = plan.rows.period;
  const Items items(p.w, kTileRows * period);
  const int64_t k = p.w.k;
  ArrangedX<Products> x{};
  x.fallback_tokens = fallback_tokens;
  T* dropped = nullptr;
  const auto lay_out = [&](void* base) {
    Carver memory(base);
    x.values = memory.take<typename Products::X>(plan.arrangement_values() * period);
    x.scales = memory.take<float>(plan.arrangement_scales() * period);
    x.sums = memory.take<float>(plan.arrangement_sums() * period);
    x.h = memory.take<float>(p.m * padded_rank(p.lora.rank));
    dropped = memory.take<T>(p.lora.rank && p.lora.dropout.active() ? p.m * k : 0);
    return memory.used();
  };
  const int64_t bytes = lay_out(nullptr);
  if (bytes > kMaxScratchBytes || 4 * items.scale_floats(p.w) > kMaxScratchBytes / 2) {
    if (p.m == 1) return Outcome::kTooLarge;
    const int64_t half = p.m / 2;
    const Outcome outcome = forward<T, Products>(pool, tokens_of<T>(p, 0, half), first_token, fallback_tokens);
    if (outcome != Outcome::kDone) return outcome;
    return forward<T, Products>(pool, tokens_of<T>(p, half, p.m - half), first_token + half, fallback_tokens);
  }
  lay_out(scratch(ScratchUse::kCall, bytes));
  prepare(pool, p, first_token, dropped, x.h, p.m * period, [&](int64_t i) {
    arrange_token(products, plan, static_cast<const T*>(p.x), i / period, static_cast<int>(i % period), first_token, x);
  });
  if (fallback_tokens->contains_all(first_token, p.m)) return Outcome::kDone;
  run_stealing(pool, ceil_div(p.w.n, items.rows), ceil_div(kWorthThreads, items.rows * k * p.m),
               max(ceil_div(kLeastStolenBytes, max(items.rows * k / 2, 1)), 2),
               ForwardWalk<T, Products>(p, plan, items, {p, products, plan, first_token, x}));
  return Outcome::kDone;
}

// The same for Products that serve every token.
template <class T, class Products>
Outcome forward(const Pool& pool, const LinearProblem& p, int64_t first_token = 0) {
  FallbackTokens none;
  return forward<T, Products>(pool, p, first_token, &none);
}

}  // namespace few_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
