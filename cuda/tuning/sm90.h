// The kernels on wgmma and TMA, of compute capability 9.0 alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>

#include "cpp/format/problem.h"
#include "cuda/tuning/choice.h"
#include "cuda/tuning/device.h"

namespace qlora::cuda::sm90 {

inline constexpr int64_t kOutputs = 128;                           // of a tile, for each of its tokens
inline constexpr int64_t kForwardStageK = 128, kDxStageRows = 64;  // of the sum
inline constexpr int64_t kMostSplits = 8;                          // the largest cluster that every device takes

// k in groups of 64 with one scale each, and sizes within TMA's coordinates.
constexpr bool accepts_weight(DType dtype, int64_t m, const Weight& w, const Device& device) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  return device.arch == 90 && is_16_bit(dtype) && m > 0 && w.n > 0 && w.k > 0 && has_one_scale_per(64, w) &&
         m <= kMost && w.n <= kMost && w.k <= kMost;
}
constexpr bool accepts(const LinearProblem& p, const Device& device) {
  return accepts_weight(p.dtype, p.m, p.w, device);
}
// TMA reads rows of dy, which have to begin at multiples of 16 bytes.
constexpr bool accepts(const LinearDxProblem& p, const Device& device) {
  return accepts_weight(p.dtype, p.m, p.w, device) && p.w.n % 8 == 0;
}

// Up to 32 tokens the tiles on mma.sync decode each weight once as well. From there on these kernels are ahead, also of
// the library, however many tokens there are. By the model below a token costs 1.1 times what it does in a GEMM at 0.75
// of the data sheet's rate: at 4096 x 4096 and 4096 tokens 204 us against 185, to which the library adds 5 to 14 for
// its decode and, with LoRA, some 25 for its float32 sums.
template <class Problem>
constexpr bool is_ahead(const Problem& p, const Device&) {
  return p.m > 32;
}

// Clusters of `splits` CTAs, one a multiprocessor, that are sure to run at once: a cluster lies within a GPC, which has
// 16 multiprocessors or a few more.
constexpr int64_t resident_clusters(int64_t splits, const Device& device) {
  constexpr int64_t kGpc = 16;
  const int64_t clusters = splits == 1 ? device.sm_count : device.sm_count / kGpc * (kGpc / splits);
  return std::max<int64_t>(clusters, 1);
}

constexpr int64_t tiles(int64_t m, int64_t outputs, int64_t tokens) {
  return ceil_div(m, tokens) * ceil_div(outputs, kOutputs);
}

// The grid: as many clusters as run at once, or fewer if there are fewer tiles.
constexpr int64_t clusters(int64_t m, int64_t outputs, const Config& c, const Device& device) {
  return std::min(resident_clusters(c.splits, device), tiles(m, outputs, c.tokens));
}

// The fewest cycles by a model of an H100, not a measurement: a stage takes `stage_cycles(tokens)`, and a tile besides
// what it takes to start and to store it, and adding up splits two exchanges. The sum is split in whole stages over the
// CTAs of a cluster. Among the tiles and splits that are as wished; no tokens where there are none.
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
      if (per_split * (splits - 1) >= stages) continue;  // the last one would have nothing to do
      const int64_t tile_cycles = per_split * stage_cycles(tokens) + kTileCycles + (splits > 1 ? kSplitCycles : 0);
      const int64_t cycles = ceil_div(tiles(m, outputs, tokens), fit) * tile_cycles;
      if (cycles >= fewest) continue;
      fewest = cycles;
      best.tokens = tokens, best.splits = splits;
    }
  }
  return best;
}

// The forward's stages take as long as their passes over shared memory: x written once and read by both warpgroups,
// packed bytes written once and read, pairs and scales looked up.
constexpr Config config(const LinearProblem& p, const Device& device, const Config& wish) {
  Config c = fastest(
      p.m, p.w.n, ceil_div(p.w.k, kForwardStageK), {64, 128}, [](int64_t tokens) { return 6 * tokens + 540; }, device,
      wish);
  c.rows = kOutputs;
  return c;
}

// Those of dX, with dy in place of x, and lookups of twice the size.
constexpr Config config(const LinearDxProblem& p, const Device& device, const Config& wish) {
  Config c = fastest(
      p.m, p.w.k, ceil_div(p.w.n, kDxStageRows), {64, 128, 256}, [](int64_t tokens) { return 3 * tokens + 440; },
      device, wish);
  c.columns = kOutputs;
  return c;
}

}  // namespace qlora::cuda::sm90
