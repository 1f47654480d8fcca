// Chooses and configures the kernels on wgmma and TMA, for compute capability 9.0 only.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <limits>

#include "cpp/format/problem.h"
#include "cuda/tuning/choice.h"
#include "cuda/tuning/device.h"

namespace qlora::cuda::sm90 {

inline constexpr int64_t kOutputs = 128;                           // outputs per tile, for each of its tokens
inline constexpr int64_t kForwardStageK = 128, kDxStageRows = 64;  // terms of the sum per stage
inline constexpr int64_t kMostSplits = kMostClusterCtas;           // the CTAs of a cluster divide a tile's sum

// k has groups of 64 with one scale each and no offset, and the sizes fit TMA's coordinates.
constexpr bool accepts_weight(DType dtype, int64_t m, const Weight& w, const Device& device) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  return device.arch == 90 && is_16_bit(dtype) && m > 0 && w.n > 0 && w.k > 0 && has_one_scale_per(64, w) &&
         !has_offsets(w) && m <= kMost && w.n <= kMost && w.k <= kMost;
}
constexpr bool accepts(const LinearProblem& p, const Device& device) {
  return accepts_weight(p.dtype, p.m, p.w, device);
}
// TMA requires that rows of dy begin at multiples of 16 bytes.
constexpr bool accepts(const LinearDxProblem& p, const Device& device) {
  return accepts_weight(p.dtype, p.m, p.w, device) && p.w.n % 8 == 0;
}

// Up to kFewestTokens - 1 tokens, the tiles on mma.sync decode each weight only once, too. Up to kMostTokens, these
// kernels are ahead, also of the library; kCrossovers (library.h) only counts for problems that they do not accept. By
// the model below, a token costs 1.1 times as much as in a GEMM at 0.75 of the data sheet's rate: 204 us against 185 at
// 4096 x 4096 and 4096 tokens. But the library also needs 5 to 14 us for its decode and, with LoRA, about 25 us for its
// float32 sums, so the model has no upper limit. bench/cuda_crossover.py measures it on a card.
inline constexpr int64_t kFewestTokens = 33;
inline constexpr int64_t kMostTokens = std::numeric_limits<int64_t>::max();

template <class Problem>
constexpr bool is_ahead(const Problem& p, const Device&) {
  return p.m >= kFewestTokens && p.m <= kMostTokens;
}

// The number of clusters of `splits` CTAs that run at once, or 0 if the device cannot launch any.
constexpr int64_t resident_clusters(int64_t splits, const Device& device) {
  return device.resident_clusters[static_cast<size_t>(splits - 1)];
}

constexpr int64_t tiles(int64_t m, int64_t outputs, int64_t tokens) {
  return ceil_div(m, tokens) * ceil_div(outputs, kOutputs);
}

// The grid: as many clusters as run at once, or fewer if there are fewer tiles.
constexpr int64_t clusters(int64_t m, int64_t outputs, const Config& c, const Device& device) {
  return std::min(resident_clusters(c.splits, device), tiles(m, outputs, c.tokens));
}

// Chooses the tile and the splits with the fewest cycles by a model of an H100, not a measurement. A stage takes
// `stage_cycles(tokens)`. Each tile also takes time to start and to store, and adding up splits costs two exchanges.
// The CTAs of a cluster split the sum in whole stages, and tiles run in waves of as many clusters as the device holds.
// Only tiles and splits that match `wish` are considered. If there are none, the result has no tokens.
template <class StageCycles>
constexpr Config fastest(int64_t m, int64_t outputs, int64_t stages, std::initializer_list<int64_t> tile_tokens,
                         const StageCycles& stage_cycles, const Device& device, const Config& wish) {
  constexpr int64_t kTileCycles = 2500, kSplitCycles = 1000;
  Config best;
  int64_t fewest = std::numeric_limits<int64_t>::max();
  for (const int64_t tokens : tile_tokens) {
    for (int64_t splits = 1; splits <= kMostSplits; ++splits) {
      if (or_wish(wish.tokens, tokens) != tokens || or_wish(wish.splits, splits) != splits) continue;
      const int64_t fit = resident_clusters(splits, device), per_split = ceil_div(stages, splits);
      if (fit == 0) continue;
      if (per_split * (splits - 1) >= stages) continue;  // the last CTA would have nothing to do
      const int64_t tile_cycles = per_split * stage_cycles(tokens) + kTileCycles + (splits > 1 ? kSplitCycles : 0);
      const int64_t cycles = ceil_div(tiles(m, outputs, tokens), fit) * tile_cycles;
      if (cycles >= fewest) continue;
      fewest = cycles;
      best.tokens = tokens, best.splits = splits;
    }
  }
  return best;
}

// A stage of the forward takes as long as its passes over shared memory: x is written once and read by both warpgroups,
// packed bytes are written and read once, and pairs and scales are looked up.
constexpr Config config(const LinearProblem& p, const Device& device, const Config& wish) {
  Config c = fastest(
      p.m, p.w.n, ceil_div(p.w.k, kForwardStageK), {64, 128}, [](int64_t tokens) { return 6 * tokens + 540; }, device,
      wish);
  c.rows = kOutputs;
  return c;
}

// The same for dX, with dy in place of x, and lookups of twice the size.
constexpr Config config(const LinearDxProblem& p, const Device& device, const Config& wish) {
  Config c = fastest(
      p.m, p.w.k, ceil_div(p.w.n, kDxStageRows), {64, 128, 256}, [](int64_t tokens) { return 3 * tokens + 440; },
      device, wish);
  c.columns = kOutputs;
  return c;
}

}  // namespace qlora::cuda::sm90
