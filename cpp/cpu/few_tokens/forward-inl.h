// y = x · wᵀ + h · bᵀ + bias for few tokens: every packed byte is read once, decoded in registers and met with all
// tokens of a group.
//
// A tile is kTileRows rows of W of one shift (rows n, n + period, ...). For each row of the tile and each token one
// vector of partial sums is kept; at the end of the tile kTileRows of them are summed at once into kTileRows outputs.
#pragma once

#include <cstdint>

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/few_tokens/accumulate-inl.h"
#include "cpp/cpu/few_tokens/budget-inl.h"
#include "cpp/cpu/few_tokens/concentration-inl.h"
#include "cpp/cpu/few_tokens/forward_plan-inl.h"
#include "cpp/cpu/few_tokens/low_rank-inl.h"
#include "cpp/cpu/few_tokens/shares-inl.h"
#include "cpp/cpu/few_tokens/weight-inl.h"
#include "cpp/cpu/isa/isa.h"
#include "cpp/cpu/isa/stream.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/shared/carver-inl.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/pages-inl.h"
#include "cpp/cpu/shared/prefetch-inl.h"
#include "cpp/cpu/shared/scratch.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace few_tokens {

using namespace stream;

inline constexpr int64_t kMostAhead = 64 << 10;    // bytes that are asked for at once
inline constexpr int64_t kWorthTaking = 64 << 10;  // bytes of packed weights: what a thread takes over from another

template <class T, class Products>
class Forward {
 public:
  using Plan = ForwardPlan<Products>;
  Forward(const LinearProblem& p, const Products& products, const Plan& plan, int64_t first_token,
          const PreparedX<Products>& x)
      : p_(p), products_(products), plan_(plan), first_token_(first_token), x_(x) {}

  static int64_t super_rows(const WeightRows& rows) { return int64_t{kTileRows} * rows.period; }
  static int64_t scale_floats(const LinearProblem& p, const WeightRows& rows) {
    return ceil_div(super_rows(rows) * p.w.k, ScaleReader(p.w.scales).granule()) + 2 + kLanes;
  }

  // What threads are given at a time: so many super-tiles (`period` tiles whose rows interleave).
  static int64_t share_tiles(const LinearProblem& p, const WeightRows& rows) {
    constexpr int64_t kShareBytes = 4 << 10;
    const int64_t super = super_rows(rows), tiles = ceil_div(p.w.n, super);
    return max(ceil_div(kShareBytes, max(super * p.w.k / 2, 1)), ceil_div(tiles, Shares::kMostItems));
  }

  void operator()(Shares& shares, int64_t thread) const {
    constexpr int kMaxTokens = Products::kMaxTokens;
    Carver memory(scratch(ScratchUse::kThread, static_cast<int64_t>(sizeof(float)) *
                                                   (scale_floats(p_, plan_.rows) + kMaxTokens * kTileRows * kLanes)));
    float* sums = memory.take<float>(kMaxTokens * kTileRows * kLanes);
    float* scales = memory.take<float>(scale_floats(p_, plan_.rows));
    ScaleReader reader(p_.w.scales);
    const int64_t super = super_rows(plan_.rows);
    const auto row_of = [&](int64_t super_tile) { return min(super_tile * super, p_.w.n); };
    PagesAhead pages(p_.w, 0, p_.w.k);
    const int64_t share = share_tiles(p_, plan_.rows);
    int64_t expected = -1;
    for (Shares::Range left = shares.next(thread); !left.empty(); left = shares.next(thread)) {
      const int64_t begin = left.first * share, end = begin + share;
      if (begin != expected) {
        pages.go_to(row_of(begin), row_of(left.end * share));
        const int64_t first_bytes = (row_of(begin + 1) - row_of(begin)) * p_.w.k / 2;
        prefetch(p_.w.packed + row_of(begin) * p_.w.k / 2, min(first_bytes, kMostAhead));
        prefetch_beside(reader, row_of(begin), row_of(begin + 1));
      }
      expected = end;
      for (int64_t s = begin; s < end && row_of(s) < p_.w.n; ++s) {
        // The lines of a super-tile are fetched while the one before it is worked on, its pages touched before that.
        pages.touch_before((s + 2) * super);
        const int64_t first = row_of(s), last = row_of(s + 1);
        if (s + 1 < left.end * share) prefetch_beside(reader, last, row_of(s + 2));
        const int64_t first_granule = plan_.rows.first_weight(first) >> reader.log2_granule();
        const int64_t end_granule = ceil_div(last * p_.w.k, reader.granule());
        const GranuleScales of_rows{scales, first_granule, end_granule - first_granule};
        reader.read(of_rows.first, of_rows.count, scales);
        RowBits concentrated[8];  // of each shift, a bit per row of its tile
        for (int64_t group = 0; group < plan_.groups.count; ++group) {
          with_count<kMaxTokens>(plan_.groups.tokens(group), [&](auto tokens) {
            for (int64_t n = first; n < last && n < first + plan_.rows.period; ++n)
              tile<tokens>(n, ceil_div(last - n, plan_.rows.period), group, reader, of_rows, concentrated + (n - first),
                           sums);
          });
        }
      }
    }
  }

 private:
  using RowBits = uint32_t;
  static_assert(kTileRows <= 32);

  // Asks for what goes with weight rows first .. last - 1: their scales and their rows of b.
  void prefetch_beside(const ScaleReader& reader, int64_t first, int64_t last) const {
    const int64_t row_bytes = p_.lora.rank * static_cast<int64_t>(sizeof(T));
    if (row_bytes) prefetch(static_cast<const uint8_t*>(p_.lora.b) + first * row_bytes, (last - first) * row_bytes);
    reader.prefetch_blocks(first * p_.w.k, last * p_.w.k);
  }

  // Weight rows n, n + period, ... (`count` of them) against one group of tokens.
  template <int kTokens>
  void tile(int64_t n, int64_t count, int64_t group, const ScaleReader& reader, const GranuleScales& scales,
            RowBits* concentrated, float* sums) const {
    const int64_t period = plan_.rows.period, k = p_.w.k, m0 = plan_.groups.first(group);
    const int shift = plan_.rows.shift(n), copy = shift * static_cast<int>(period) / 8;
    const typename Products::X* x = x_.x + copy * plan_.copy_elements() + m0 * plan_.chunks * kChunk;
    const float* scale_of_x = x_.scale + copy * plan_.copy_scales() + m0 * plan_.segments;
    const bool empty = p_.lora.rank == 0 && count == kTileRows;
    if (!empty) start<kTokens>(n, count, m0, sums);
    // As many segments of x as stay in the first-level cache go over a weight row before the next row.
    const int64_t segment_bytes =
        kTokens * plan_.segment_chunks * kChunk * static_cast<int64_t>(sizeof(typename Products::X));
    const int64_t most = segment_bytes < 12288 ? 24576 / segment_bytes : 1;
    const int64_t weights = shift + k, chunks = ceil_div(weights, kChunk);
    const int64_t first_weight = plan_.rows.first_weight(n);
    Stretch stretch;
    stretch.scales = scales.scale;
    stretch.row_weights = period * k;
    stretch.log2_granule = reader.log2_granule();
    stretch.segment_chunks = plan_.segment_chunks;
    stretch.prefetch_ahead = Forward::super_rows(plan_.rows) * k / 2;
    // Intel's first level does not keep the 32 KB until they are read: 4096x4096, two threads, one token 540 us, and
    // 440 from the second (4 tokens 607 and 567). AMD's numbers in bench/results/ are with the first.
    stretch.prefetch_to_second_level = current_cpu().intel;
    FirstChunks first_chunks(kLargeCodes[p_.w.code]);
    first_chunks.start();
    const bool looks = !Products::kServesEveryRow && group == 0 && weights >= kChunk;
    for (int64_t s = 0; s * plan_.segment_chunks < chunks; s += most) {
      const int64_t chunk = s * plan_.segment_chunks, first = first_weight + chunk * kChunk;
      stretch.packed = p_.w.packed + first / 2;
      stretch.first_weight = first - (scales.first << reader.log2_granule());
      const bool is_last = chunks - chunk <= most * plan_.segment_chunks;
      stretch.chunks = is_last ? chunks - chunk : most * plan_.segment_chunks;
      stretch.last_weights = is_last ? weights - (chunks - 1) * kChunk : kChunk;
      const typename Products::X* x_at = x + chunk * kTokens * kChunk;
      stretch.starts_sums = empty && s == 0;
      FirstChunks* const look = looks && s == 0 ? &first_chunks : nullptr;
      int64_t t = 0;
      if constexpr (kTokens <= Products::kMaxPairedTokens) {
        accumulate<kTokens, 2>(products_, stretch, count, x_at, scale_of_x + s * kTokens, look, sums);
        t = count & ~int64_t{1};
        stretch.packed += t * stretch.row_weights / 2;
        stretch.first_weight += t * stretch.row_weights;
      }
      if (t < count)
        accumulate<kTokens, 1>(products_, stretch, count - t, x_at, scale_of_x + s * kTokens, look, sums + t * kLanes);
    }
    if (!Products::kServesEveryRow && group == 0) {
      *concentrated = 0;
      const bool none = looks && first_chunks.suffice(reader.largest(scales.first, scales.count), ceil_div(shift, 2));
      if (!none) *concentrated = concentrated_rows(n, count, reader, scales);
    }
    for (RowBits left = Products::kServesEveryRow ? 0 : *concentrated; left; left &= left - 1) {
      const int64_t t = __builtin_ctz(left);
      sum_in_float(n + t * period, m0, kTokens, reader, scales, sums + t * kLanes);
    }
    finish(n, count, m0, kTokens, scales, sums);
  }

  // One bit for each of the `count` weight rows n, n + period, ..., set if the row is concentrated.
  [[gnu::noinline]] RowBits concentrated_rows(int64_t n, int64_t count, const ScaleReader& reader,
                                              const GranuleScales& scales) const {
    const RowConcentration concentration(p_.w, reader, scales);
    RowBits rows = 0;
    for (int64_t t = 0; t < count; ++t) rows |= RowBits{concentration.holds(n + t * plan_.rows.period)} << t;
    return rows;
  }

  // Replaces the sums of the concentrated weight row n by sums of float32 products.
  [[gnu::noinline]] void sum_in_float(int64_t n, int64_t m0, int64_t tokens, const ScaleReader& reader,
                                      const GranuleScales& scales, float* sums) const {
    const int64_t rank = p_.lora.rank, k = p_.w.k;
    const T* b = static_cast<const T*>(p_.lora.b) + n * rank;
    for (int64_t i = 0; i < tokens; ++i) {
      Floats acc = zero();
      for (int64_t j = 0; j < rank; j += kLanes)
        acc = fma(load(b + j, rank - j), load(x_.h + (j / kLanes * p_.m + m0 + i) * kLanes), acc);
      store(sums + i * kTileRows * kLanes, acc);
    }
    WeightPieces pieces(p_.w, reader, scales);
    for (int64_t begin = 0; begin < k; begin += WeightPieces::kWeights) {
      const int64_t count = min(k - begin, WeightPieces::kWeights);
      const float* w = pieces.decode(n * k + begin, n * k + begin + count);
      for (int64_t i = 0; i < tokens; ++i) {
        const T* x = static_cast<const T*>(p_.x) + (m0 + i) * k + begin;
        Floats acc = zero();
        for (int64_t j = 0; j < count; j += kLanes) acc = fma(load(w + j, count - j), load(x + j, count - j), acc);
        float* const sum = sums + i * kTileRows * kLanes;
        store(sum, add(load(sum), acc));
      }
    }
  }

  // The sums start with the lanes of h · bᵀ.
  template <int kTokens>
  [[gnu::noinline]] void start(int64_t n, int64_t count, int64_t m0, float* sums) const {
    const int64_t rank = p_.lora.rank, row_stride = plan_.rows.period * rank;
    const T* b = static_cast<const T*>(p_.lora.b) + n * rank;
    for (int64_t t = 0; t < kTileRows; ++t, b += row_stride, sums += kLanes) {
      Floats acc[kTokens];
      unroll<kTokens>([&](auto i) { acc[i] = zero(); });
      const float* h = x_.h + m0 * kLanes;
      for (int64_t j = 0; t < count && j < rank; j += kLanes, h += p_.m * kLanes) {
        const Floats row = load(b + j, rank - j);
        unroll<kTokens>([&](auto i) { acc[i] = fma(row, load(h + i * kLanes), acc[i]); });
      }
      unroll<kTokens>([&](auto i) { store(sums + i * kTileRows * kLanes, acc[i]); });
    }
  }

  void finish(int64_t n, int64_t count, int64_t m0, int64_t tokens, const GranuleScales& scales,
              const float* sums) const {
    const T* bias = static_cast<const T*>(p_.bias);
    const int64_t period = plan_.rows.period;
    for (int64_t i = 0; i < tokens; ++i) {
      Floats out = sums_of(sums + i * kTileRows * kLanes);
      if (Products::kMayOverflow && !all_finite(out) && any_huge(scales)) x_.uneven->add(first_token_ + m0 + i);
      T* y = static_cast<T*>(p_.y) + (m0 + i) * p_.w.n + n;
      if (period == 1) {
        if (bias) out = add(out, load(bias + n, count));
        store(y, out, count);
        continue;
      }
      if (bias) {
        float of_row[kLanes] = {};
        for (int64_t t = 0; t < count; ++t) of_row[t] = to_float(bias[n + t * period]);
        out = add(out, load(of_row));
      }
      T value[kLanes];
      store(value, out, kLanes);
      for (int64_t t = 0; t < count; ++t) y[t * period] = value[t];
    }
  }

  static bool any_huge(const GranuleScales& scales) {
    for (int64_t i = 0; i < scales.count; ++i) {
      const uint32_t bits = float_bits(scales.scale[i]) & kMagnitudeBits;
      if (bits > float_bits(kHugeScale) && bits < kInfinityBits) return true;
    }
    return false;
  }

  const LinearProblem& p_;
  const Products& products_;
  const Plan& plan_;
  const int64_t first_token_;
  const PreparedX<Products> x_;
};

// The tokens of p from `first` on.
template <class T>
LinearProblem tokens_of(const LinearProblem& p, int64_t first, int64_t count) {
  LinearProblem part = p;
  part.m = count;
  part.x = static_cast<const T*>(p.x) + first * p.w.k;
  part.y = static_cast<T*>(p.y) + first * p.w.n;
  if (p.h) part.h = static_cast<T*>(p.h) + first * p.lora.rank;
  return part;
}

// Tokens whose arranged copies do not fit the scratch are halved until they do. `first_token` is the token of the call
// that p.x begins with. What is written for tokens that are added to `uneven` counts for nothing.
template <class T, class Products>
Outcome forward(const Pool& pool, const LinearProblem& p, int64_t first_token, TokenSet* uneven) {
  using Body = Forward<T, Products>;
  const Products products(p.w);
  const ForwardPlan<Products> plan(p.m, p.w.k);
  const WeightRows& rows = plan.rows;
  const int64_t k = p.w.k, rank = p.lora.rank;
  const bool drops = rank && p.lora.dropout.active();
  PreparedX<Products> x{};
  x.uneven = uneven;
  T* dropped = nullptr;
  const auto lay_out = [&](void* base) {
    Carver memory(base);
    x.x = memory.take<typename Products::X>(plan.copy_elements() * rows.period);
    x.scale = memory.take<float>(plan.copy_scales() * rows.period);
    x.h = memory.take<float>(p.m * padded_rank(rank));
    dropped = memory.take<T>(drops ? p.m * k : 0);
    return memory.used();
  };
  const int64_t bytes = lay_out(nullptr);
  if (bytes > kMaxScratchBytes || 4 * Body::scale_floats(p, rows) > kMaxScratchBytes / 2) {
    if (p.m == 1) return Outcome::kTooLarge;
    const int64_t half = p.m / 2;
    const Outcome outcome = forward<T, Products>(pool, tokens_of<T>(p, 0, half), first_token, uneven);
    if (outcome != Outcome::kDone) return outcome;
    return forward<T, Products>(pool, tokens_of<T>(p, half, p.m - half), first_token + half, uneven);
  }
  lay_out(scratch(ScratchUse::kCall, bytes));
  // A few rows at a time go through A, too short for the processor to see them coming.
  prefetch(p.lora.a, min(rank * k * static_cast<int64_t>(sizeof(T)), kMostAhead));

  const T* in = static_cast<const T*>(p.x);
  for (int64_t i = 0; i < p.m * padded_rank(rank); ++i) x.h[i] = 0.0f;
  if (drops) drop(p.lora.dropout, in, p.m, k, first_token, dropped);
  const int64_t rank_groups = ceil_div(rank, kTileRanks), h_tiles = ceil_div(p.m, kTileTokens) * rank_groups;
  // Tiles of h and tokens to arrange in turn, so that every thread has its share of both.
  const int64_t arranged = p.m * rows.period, units = h_tiles + arranged;
  auto prepare = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t tile = i * h_tiles / units, token = i - tile;
      if ((i + 1) * h_tiles / units > tile) {
        low_rank_h(p.lora, drops ? dropped : in, p.m, k, tile / rank_groups, tile % rank_groups, x.h);
      } else {
        prepare_token(products, plan, in, token / rows.period, static_cast<int>(token % rows.period), first_token, x);
      }
    }
  };
  run(pool, p.m * k * (rank + 16 * rows.period) > kWorthThreads, units, 1, prepare);
  if (p.h)
    keep_low_rank<T>(p.m, rank, [&](int64_t i, int64_t j) { return x.h + (j / kLanes * p.m + i) * kLanes; }, p.h);
  if (uneven->holds_all(first_token, p.m)) return Outcome::kDone;
  const int64_t share_rows = Body::share_tiles(p, rows) * Body::super_rows(rows);
  share_out(pool, ceil_div(p.w.n, share_rows), ceil_div(kWorthThreads, share_rows * k * p.m),
            max(ceil_div(kWorthTaking, max(share_rows * k / 2, 1)), 2), Body(p, products, plan, first_token, x));
  return Outcome::kDone;
}

// The same for Products that serve every token.
template <class T, class Products>
Outcome forward(const Pool& pool, const LinearProblem& p, int64_t first_token = 0) {
  TokenSet none;
  return forward<T, Products>(pool, p, first_token, &none);
}

}  // namespace few_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
