// How the tokens of a forward are laid out for its kernel: groups, segments, arranged copies of x.
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
    // Of nearly equal size: a short last segment would often look as if it held an outlier.
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
void prepare_token(const Products& products, const ForwardPlan<Products>& plan, const T* x, int64_t i, int copy,
                   int64_t first_token, const PreparedX<Products>& out) {
  int64_t group = 0;
  while (plan.groups.first(group + 1) <= i) ++group;
  const int64_t first = plan.groups.first(group), tokens = plan.groups.tokens(group), k = plan.rows.k;
  alignas(64) float segment[1024 + kLanes];
  const int shift = copy * (8 / plan.rows.period);
  const uint32_t largest = plan.segments > 1 ? largest_bits_within(x + i * k, k) : 0;
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
    const int64_t count = min(begin + chunks * kChunk, k) - max(begin, 0);
    if (!products.arrange({segment, chunks, count, largest}, tokens * kChunk, to, scale))
      return out.uneven->add(first_token + i);
  }
}

}  // namespace few_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
