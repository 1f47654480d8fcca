// x as the forward for few tokens reads it: how tokens are grouped, how the columns are cut into segments, and the
// arrangements of x.
//
// The inner loop walks a weight row once for a group of tokens, so x is stored in the order of that walk. The columns
// are cut into *segments*, and each has a multiplier, because integer products round a segment to its own step.
// Decoding starts at lane boundaries, so rows of different shift (weight-inl.h) meet x at different offsets, and each
// shift has an *arrangement* of its own:
//
// clang-format off
//   one arrangement     [ group 0                                  | group 1 .. ]
//   one group           [ chunk 0                 | chunk 1 ..     | .. ]
//   one chunk           [ token 0 | token 1 | ..  ]                                kChunk values each, in code order
//
//   sums, for offsets   [ first kLanes runs: token 0 | token 1 | .. | next runs .. ]  of a group's x (OffsetRuns)
//
//   values of a token   shift 0   [ x0 x1 x2 x3 x4 x5 x6 x7 | x8 ..                K = 12: two shifts,
//                       shift 4   [  0  0  0  0 x0 x1 x2 x3 | x4 ..                two arrangements
// clang-format on
#pragma once

#include <cstdint>

#include "cpp/cpu/few_tokens/products-inl.h"
#include "cpp/cpu/few_tokens/weight-inl.h"
#include "cpp/cpu/isa/stream.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace few_tokens {

using namespace stream;

// Tokens go through the kernel in groups of nearly equal size, as many at a time as the registers can sum.
struct TokenGroups {
  int64_t m, count;
  TokenGroups(int64_t m_, int max_tokens) : m(m_), count(ceil_div(m_, max_tokens)) {}
  int64_t first(int64_t group) const { return m * group / count; }
  int64_t tokens(int64_t group) const { return first(group + 1) - first(group); }
};

// The runs of a row's weights over which x is summed for offsets (OffsetsEnter::kSums): granules if a row is a number
// of them, and lanes otherwise.
struct OffsetRuns {
  bool are_granules;
  int64_t lanes;  // of a run
  OffsetRuns(const Weight& w) {
    const int64_t granule = ScaleReader(w.scales).granule();
    are_granules = w.k % granule == 0;
    lanes = are_granules ? granule / kLaneWeights : 1;
  }
  // How many vectors hold the sums of a row's runs.
  int64_t vectors(int64_t chunks) const { return ceil_div(chunks, lanes); }
};

template <class Products>
struct ForwardPlan {
  WeightRows rows;
  TokenGroups groups;
  OffsetRuns runs;
  int64_t chunks;          // of a row with the largest shift
  int64_t segment_chunks;  // with all tokens of a group, a segment of x takes a third of the first-level cache
  int64_t segments;
  bool has_whole_chunks;  // rows are whole chunks, with one scale each, and are processed one by one

  ForwardPlan(int64_t m, const Weight& w)
      : rows(w.k), groups(m, Products::kMaxTokens), runs(w), chunks(ceil_div(w.k + rows.max_shift(), kChunk)) {
    const int64_t most_tokens = ceil_div(m, groups.count);
    int64_t weights = 1024;
    while (weights > 256 && weights * most_tokens * static_cast<int64_t>(sizeof(typename Products::X)) > 16384)
      weights /= 2;
    // Of nearly equal size: a short last segment would often look as if it held an outlier.
    segment_chunks = ceil_div(chunks, ceil_div(chunks, weights / kChunk));
    segments = ceil_div(chunks, segment_chunks);
    has_whole_chunks = Products::kOffsets == OffsetsEnter::kNothing && Products::kMaxPairedTokens == 0 &&
                       w.k % kChunk == 0 && ScaleReader(w.scales).granule() == kChunk;
  }
  // An arrangement has values, [group][chunk][token of the group][kChunk], multipliers of the sums over its segments,
  // [group][segment][token of the group], and for offsets sums, [group][vector][token of the group][kLanes].
  int64_t arrangement_values() const { return groups.m * chunks * kChunk; }
  int64_t arrangement_scales() const { return groups.m * segments; }
  int64_t arrangement_sums() const {
    return Products::kOffsets == OffsetsEnter::kSums ? groups.m * runs.vectors(chunks) * kLanes : 0;
  }
  int arrangement(int shift) const { return shift * rows.period / 8; }
  int shift(int arrangement) const { return arrangement * (8 / rows.period); }
};

// The tokens of a call that its Products cannot serve, and that another kernel has to compute. Any thread adds to them.
class FallbackTokens {
 public:
  static constexpr int64_t kMax = 64;  // tokens of a call whose Products may refuse one
  void add(int64_t token) { __atomic_fetch_or(&bits_, uint64_t{1} << token, __ATOMIC_RELAXED); }
  bool contains(int64_t token) const { return token < kMax && (bits_ >> token & 1); }
  bool contains_all(int64_t first, int64_t count) const {
    for (int64_t i = first; i < first + count; ++i)
      if (!contains(i)) return false;
    return true;
  }

 private:
  uint64_t bits_ = 0;
};

template <class Products>
struct ArrangedX {
  typename Products::X* values;  // [arrangement][arrangement_values()]
  float* scales;                 // [arrangement][arrangement_scales()]
  float* sums;                   // [arrangement][arrangement_sums()]
  float* h;                      // in the layout of low_rank-inl.h
  FallbackTokens* fallback_tokens;
};

// Writes the sums of x over the runs of a chunk to the token's vectors, which are `stride` apart. The sums of lanes are
// integers, and so are those of runs: float32 holds them exactly.
inline void store_run_sums(const OffsetRuns& runs, int64_t chunk, Floats lane_sums, float scale, int64_t stride,
                           float* sums) {
  float lane[kLanes];
  store(lane, lane_sums);
  for (int64_t l = 0; l < kLanes; l += runs.lanes) {
    float sum = lane[l];
    for (int64_t other = 1; other < runs.lanes; ++other) sum += lane[l + other];
    const int64_t run = (chunk * kLanes + l) / runs.lanes;
    sums[run / kLanes * stride + run % kLanes] = sum * scale;
  }
}

// Writes token i of x, which is token first_token + i of the call, into one arrangement. Adds it to the fallback tokens
// if the products cannot serve it.
template <class Products, class T>
void arrange_token(const Products& products, const ForwardPlan<Products>& plan, const T* x, int64_t i, int arrangement,
                   int64_t first_token, const ArrangedX<Products>& out) {
  int64_t group = 0;
  while (plan.groups.first(group + 1) <= i) ++group;
  const int64_t first = plan.groups.first(group), tokens = plan.groups.tokens(group), k = plan.rows.k;
  alignas(64) float segment[1024 + kLanes];
  const int shift = plan.shift(arrangement);
  const uint32_t largest = plan.segments > 1 ? largest_bits_within(x + i * k, k) : 0;
  float* const sums =
      out.sums + arrangement * plan.arrangement_sums() + (first * plan.runs.vectors(plan.chunks) + i - first) * kLanes;
  if constexpr (Products::kOffsets == OffsetsEnter::kSums) {
    for (int64_t v = 0; v < plan.runs.vectors(plan.chunks); ++v) store(sums + v * tokens * kLanes, zero());
  }
  for (int64_t s = 0; s < plan.segments; ++s) {
    const int64_t chunk = s * plan.segment_chunks;
    const int64_t chunks = plan.chunks - chunk < plan.segment_chunks ? plan.chunks - chunk : plan.segment_chunks;
    // Position p of the shifted token holds x[p - shift]; positions outside of the token hold 0.
    const int64_t begin = chunk * kChunk - shift, lead = begin < 0 ? -begin : 0;
    for (int64_t p = 0; p < lead; p += kLanes) store(segment + p, zero());
    for (int64_t p = lead; p < chunks * kChunk; p += kLanes) {
      const int64_t left = k - begin - p;
      store(segment + p, left > 0 ? load(x + i * k + begin + p, left) : zero());
    }
    typename Products::X* to = out.values + arrangement * plan.arrangement_values() +
                               (first * plan.chunks + chunk * tokens + i - first) * kChunk;
    float* const scale =
        out.scales + arrangement * plan.arrangement_scales() + first * plan.segments + s * tokens + i - first;
    const int64_t count = min(begin + chunks * kChunk, k) - max(begin, 0);
    if (!products.arrange({segment, chunks, count, largest}, tokens * kChunk, to, scale))
      return out.fallback_tokens->add(first_token + i);
    if constexpr (Products::kOffsets == OffsetsEnter::kSums) {
      for (int64_t c = 0; c < chunks; ++c)
        store_run_sums(plan.runs, chunk + c, Products::lane_sums(to + c * tokens * kChunk),
                       *scale * products.one_of_code(), tokens * kLanes, sums);
    }
  }
}

}  // namespace few_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
