// y = x · wᵀ + h · bᵀ + bias for few tokens: every packed byte is read once, decoded in registers and met with all
// tokens of a group.
//
// A tile is kTileRows rows of W of one shift (rows n, n + period, ...). For each row of the tile and each token one
// vector of partial sums is kept; at the end of the tile kTileRows of them are summed at once into kTileRows outputs.
#pragma once

#include <cstdint>

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/few_tokens/budget-inl.h"
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

inline constexpr int kTileRows = kLanes;
inline constexpr int64_t kMostAhead = 64 << 10;    // bytes that are asked for at once
inline constexpr int64_t kWorthTaking = 64 << 10;  // bytes of packed weights: what a thread takes over from another
inline constexpr int64_t kChunkBytes = kChunk / 2;

// Tokens go through the kernel in groups of equal size, as many at a time as the registers can sum.
struct TokenGroups {
  int64_t m, count;
  TokenGroups(int64_t m_, int max_tokens) : m(m_), count(ceil_div(m_, max_tokens)) {}
  int64_t first(int64_t group) const { return m * group / count; }
  int64_t tokens(int64_t group) const { return first(group + 1) - first(group); }
};

template <class Products>
struct ForwardPlan {
  WeightRows rows;
  TokenGroups groups;
  int64_t chunks;          // of a row with the largest shift
  int64_t segment_chunks;  // of x: with all tokens of a group, a segment takes a third of the first-level cache
  int64_t segments;

  ForwardPlan(int64_t m, int64_t k)
      : rows(k), groups(m, Products::kMaxTokens), chunks(ceil_div(k + rows.max_shift(), kChunk)) {
    const int64_t most_tokens = ceil_div(m, groups.count);
    int64_t weights = 1024;
    while (weights > 256 && weights * most_tokens * static_cast<int64_t>(sizeof(typename Products::X)) > 16384)
      weights /= 2;
    // Of nearly equal size: a last one of few values would have its largest be far above most of them by chance alone.
    segment_chunks = ceil_div(chunks, ceil_div(chunks, weights / kChunk));
    segments = ceil_div(chunks, segment_chunks);
  }
  // A copy of x, arranged for weight rows of one shift, is x [group][chunk][token in group][kChunk] and the multipliers
  // of its sums, [group][segment][token in group].
  int64_t copy_elements() const { return groups.m * chunks * kChunk; }
  int64_t copy_scales() const { return groups.m * segments; }
};

// The tokens of a call, up to 64, that its Products cannot serve. Any thread adds to it.
class TokenSet {
 public:
  static constexpr int64_t kMost = 64;
  void add(int64_t token) { __atomic_fetch_or(&bits_, uint64_t{1} << token, __ATOMIC_RELAXED); }
  bool holds(int64_t token) const { return bits_ >> token & 1; }
  bool holds_all(int64_t first, int64_t count) const {
    for (int64_t i = first; i < first + count; ++i)
      if (!holds(i)) return false;
    return true;
  }

 private:
  uint64_t bits_ = 0;
};
inline constexpr float kHugeScale = 0x1p90f;  // of W, with which integer sums may overflow though y is finite

template <class Products>
struct PreparedX {
  typename Products::X* x;
  float* scale;
  float* h;  // as low_rank-inl.h lays it out
  TokenSet* uneven;
};

// Arranges token i, which is token first_token + i of the call, for weight rows of one shift.
template <class Products, class T>
void prepare_token(const ForwardPlan<Products>& plan, const T* x, int64_t i, int copy, int64_t first_token,
                   const PreparedX<Products>& out) {
  int64_t group = 0;
  while (plan.groups.first(group + 1) <= i) ++group;
  const int64_t first = plan.groups.first(group), tokens = plan.groups.tokens(group), k = plan.rows.k;
  alignas(64) float segment[1024 + kLanes];
  const int shift = copy * (8 / plan.rows.period);
  for (int64_t s = 0; s < plan.segments; ++s) {
    const int64_t chunk = s * plan.segment_chunks;
    const int64_t chunks = plan.chunks - chunk < plan.segment_chunks ? plan.chunks - chunk : plan.segment_chunks;
    // Position p of the shifted token holds x[p - shift]; outside of the token it is 0.
    const int64_t begin = chunk * kChunk - shift, lead = begin < 0 ? -begin : 0;
    for (int64_t p = 0; p < lead; p += kLanes) store(segment + p, zero());
    for (int64_t p = lead; p < chunks * kChunk; p += kLanes) {
      const int64_t left = k - begin - p;
      store(segment + p, left > 0 ? load(x + i * k + begin + p, left) : zero());
    }
    typename Products::X* to =
        out.x + copy * plan.copy_elements() + (first * plan.chunks + chunk * tokens + i - first) * kChunk;
    float* const scale = out.scale + copy * plan.copy_scales() + first * plan.segments + s * tokens + i - first;
    if (!Products::arrange(segment, chunks, tokens * kChunk, to, scale)) return out.uneven->add(first_token + i);
  }
}

// A part of a tile's weight rows, as long as the segments of x that stay in the first-level cache: these go over a row
// before the next row begins.
struct Stretch {
  const uint8_t* packed;   // of the first row
  const float* scales;     // one a granule
  int64_t first_weight;    // of the first row, counted from the first granule of `scales`
  int64_t row_weights;     // from a row to the next: whole bytes
  int log2_granule;        // of weights
  int64_t chunks;          // of a row; the last may be part of one
  int64_t segment_chunks;  // of a segment of x
  int64_t last_weights;    // of the last chunk
  int64_t prefetch_ahead;  // bytes
  bool prefetch_to_second_level;
};

// sums[i] += sum over segments s of scale_of_x[s][i] * (weight row · token i in s), lane by lane, for kTokens tokens
// and `rows` weight rows. Rows are taken kRows at a time, and their sums lie kLanes apart. This is a function of its
// own, or what its loops need is kept in memory.
template <int kTokens, int kRows, class Products>
[[gnu::noinline, gnu::flatten]] void accumulate(const Stretch& stretch, int64_t rows, const typename Products::X* x,
                                                const float* scale_of_x, float* sums) {
  const Products products;
  const int64_t row_bytes = stretch.row_weights / 2, prefetch_ahead = stretch.prefetch_ahead;
  const bool to_second_level = stretch.prefetch_to_second_level;
  const int64_t granules_per_chunk = kChunk >> stretch.log2_granule;
  const int64_t last_bytes = ceil_div(stretch.last_weights, 2);
  const int64_t last_lanes = ceil_div(stretch.last_weights, kLaneWeights);
  const uint8_t* first_packed = stretch.packed;
  int64_t first_weight = stretch.first_weight;
  for (int64_t t = 0; t + kRows <= rows; t += kRows, sums += kRows * kLanes) {
    const float* scales[kRows];
    Granules granules[kRows];
    unroll<kRows>([&](auto w) {
      const int64_t weight = first_weight + w * stretch.row_weights, granule = weight >> stretch.log2_granule;
      scales[w] = stretch.scales + granule;
      granules[w] =
          granule_of_lanes(static_cast<int>(weight - (granule << stretch.log2_granule)), stretch.log2_granule);
    });
    const uint8_t* packed = first_packed;
    const typename Products::X* segment_of_x = x;
    const float* segment_scale = scale_of_x;
    for (int64_t left = stretch.chunks; left > 0; segment_scale += kTokens) {
      Floats acc[kTokens][kRows];
      unroll<kTokens>([&](auto i) { unroll<kRows>([&](auto w) { acc[i][w] = zero(); }); });
      const int64_t left_after = left < stretch.segment_chunks ? 0 : left - stretch.segment_chunks;
      for (; left > left_after; --left) {
        typename Products::Codes codes[kRows];
        Floats scale[kRows];
        unroll<kRows>([&](auto w) {
          const uint8_t* const at = packed + w * row_bytes;
          const bool whole = left > 1;
          codes[w] = products.codes(whole ? load_chunk(at) : load_chunk(at, last_bytes));
          scale[w] = whole ? lane_scales(scales[w], granules[w]) : lane_scales(scales[w], granules[w], last_lanes);
          scales[w] += granules_per_chunk;
          // Last, for a prefetch may hold up the loads behind it.
          if (to_second_level) {
            __builtin_prefetch(at + prefetch_ahead, 0, 2);
          } else {
            __builtin_prefetch(at + prefetch_ahead, 0, 3);
          }
        });
        unroll<kTokens>([&](auto i) {
          Floats product[kRows];
          Products::multiply(codes, segment_of_x + i * kChunk, product);
          unroll<kRows>([&](auto w) { acc[i][w] = fma(product[w], scale[w], acc[i][w]); });
        });
        packed += kChunkBytes, segment_of_x += kTokens * kChunk;
      }
      // Without the fence GCC keeps the sums of all segments in registers, of which there are none left.
      __atomic_signal_fence(__ATOMIC_SEQ_CST);
      unroll<kTokens>([&](auto i) {
        unroll<kRows>([&](auto w) {
          float* sum = sums + (i * kTileRows + w) * kLanes;
          store(sum, fma(acc[i][w], splat(segment_scale[i]), load(sum)));
        });
      });
    }
    first_packed += kRows * row_bytes, first_weight += kRows * stretch.row_weights;
  }
}

template <class T, class Products>
class Forward {
 public:
  using Plan = ForwardPlan<Products>;
  Forward(const LinearProblem& p, const Plan& plan, int64_t first_token, const PreparedX<Products>& x)
      : p_(p), plan_(plan), first_token_(first_token), x_(x) {}

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
        const Granules of_rows{scales, first_granule, end_granule - first_granule};
        reader.read(of_rows.first, of_rows.count, scales);
        for (int64_t group = 0; group < plan_.groups.count; ++group) {
          with_count<kMaxTokens>(plan_.groups.tokens(group), [&](auto tokens) {
            for (int64_t n = first; n < last && n < first + plan_.rows.period; ++n)
              tile<tokens>(n, ceil_div(last - n, plan_.rows.period), group, reader, of_rows, sums);
          });
        }
      }
    }
  }

 private:
  struct Granules {
    const float* scale;
    int64_t first, count;
  };

  // Asks for what goes with weight rows first .. last - 1: their scales and their rows of b.
  void prefetch_beside(const ScaleReader& reader, int64_t first, int64_t last) const {
    const int64_t row_bytes = p_.lora.rank * static_cast<int64_t>(sizeof(T));
    if (row_bytes) prefetch(static_cast<const uint8_t*>(p_.lora.b) + first * row_bytes, (last - first) * row_bytes);
    reader.prefetch_blocks(first * p_.w.k, last * p_.w.k);
  }

  // Weight rows n, n + period, ... (`count` of them) against one group of tokens.
  template <int kTokens>
  void tile(int64_t n, int64_t count, int64_t group, const ScaleReader& reader, const Granules& scales,
            float* sums) const {
    const int64_t period = plan_.rows.period, k = p_.w.k, m0 = plan_.groups.first(group);
    const int shift = plan_.rows.shift(n), copy = shift * static_cast<int>(period) / 8;
    const typename Products::X* x = x_.x + copy * plan_.copy_elements() + m0 * plan_.chunks * kChunk;
    const float* scale_of_x = x_.scale + copy * plan_.copy_scales() + m0 * plan_.segments;
    start<kTokens>(n, count, m0, sums);
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
    for (int64_t s = 0; s * plan_.segment_chunks < chunks; s += most) {
      const int64_t chunk = s * plan_.segment_chunks, first = first_weight + chunk * kChunk;
      stretch.packed = p_.w.packed + first / 2;
      stretch.first_weight = first - (scales.first << reader.log2_granule());
      const bool is_last = chunks - chunk <= most * plan_.segment_chunks;
      stretch.chunks = is_last ? chunks - chunk : most * plan_.segment_chunks;
      stretch.last_weights = is_last ? weights - (chunks - 1) * kChunk : kChunk;
      const typename Products::X* x_at = x + chunk * kTokens * kChunk;
      int64_t t = 0;
      if constexpr (kTokens <= Products::kMaxPairedTokens) {
        accumulate<kTokens, 2, Products>(stretch, count, x_at, scale_of_x + s * kTokens, sums);
        t = count & ~int64_t{1};
        stretch.packed += t * stretch.row_weights / 2;
        stretch.first_weight += t * stretch.row_weights;
      }
      if (t < count)
        accumulate<kTokens, 1, Products>(stretch, count - t, x_at, scale_of_x + s * kTokens, sums + t * kLanes);
    }
    finish(n, count, m0, kTokens, scales, sums);
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

  void finish(int64_t n, int64_t count, int64_t m0, int64_t tokens, const Granules& scales, const float* sums) const {
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

  static bool any_huge(const Granules& scales) {
    for (int64_t i = 0; i < scales.count; ++i) {
      const uint32_t bits = float_bits(scales.scale[i]) & kMagnitudeBits;
      if (bits > float_bits(kHugeScale) && bits < kInfinityBits) return true;
    }
    return false;
  }

  const LinearProblem& p_;
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
        prepare_token(plan, in, token / rows.period, static_cast<int>(token % rows.period), first_token, x);
      }
    }
  };
  run(pool, p.m * k * (rank + 16 * rows.period) > kWorthThreads, units, 1, prepare);
  if (p.h)
    keep_low_rank<T>(p.m, rank, [&](int64_t i, int64_t j) { return x.h + (j / kLanes * p.m + i) * kLanes; }, p.h);
  if (uneven->holds_all(first_token, p.m)) return Outcome::kDone;
  const int64_t share_rows = Body::share_tiles(p, rows) * Body::super_rows(rows);
  share_out(pool, ceil_div(p.w.n, share_rows), ceil_div(kWorthThreads, share_rows * k * p.m),
            max(ceil_div(kWorthTaking, max(share_rows * k / 2, 1)), 2), Body(p, plan, first_token, x));
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
