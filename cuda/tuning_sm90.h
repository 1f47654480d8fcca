// What Hopper's own kernels run with (compute capability 9.0): pure host code without CUDA headers, as cuda/tuning.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>

#include "cpp/format/problem.h"
#include "cuda/tuning.h"

namespace qlora::cuda {

// Tiles of `tokens` x 128 outputs, the sum split in whole stages over the `splits` CTAs of a cluster.
struct Sm90Config {
  static constexpr int64_t kOutputs = 128;
  // From here on these kernels are chosen: up to 32 tokens the tiles on mma.sync decode each weight once as well.
  static constexpr int64_t kMinTokens = 33;
  // The library is not, however many they are. By the model below a token costs 1.1 times what it does in a GEMM at
  // 0.75 of the data sheet's rate: at 4096 x 4096 and 4096 tokens 204 us against 185, to which the library adds 5 to 14
  // for its decode and, with LoRA, some 25 for its float32 sums.

  int tokens = 0;
  int splits = 1;
  int64_t stages_per_split = 0;
  int64_t clusters = 0;
};

// Clusters of `splits` CTAs, one a multiprocessor, that are sure to run at once: a cluster lies within a GPC, which has
// 16 multiprocessors or a few more.
inline int64_t sm90_clusters(int splits, const Device& device) {
  constexpr int64_t kGpc = 16;
  const int64_t clusters = splits == 1 ? device.sm_count : device.sm_count / kGpc * (kGpc / splits);
  return std::max<int64_t>(clusters, 1);
}

// The fewest cycles by a model of an H100, not a measurement: a stage takes `stage_cycles(tokens)`, and a tile besides
// what it takes to start and to store it, and adding up splits two exchanges.
template <class StageCycles>
Sm90Config sm90_config(int64_t m, int64_t outputs, int64_t stages, std::initializer_list<int> tile_tokens,
                       const StageCycles& stage_cycles, const Device& device) {
  constexpr int64_t kTileCycles = 2500, kSplitCycles = 1000;
  constexpr int kMostSplits = 8;  // the largest cluster that every device takes
  Sm90Config best;
  int64_t fewest = std::numeric_limits<int64_t>::max();
  for (const int tokens : tile_tokens) {
    const int64_t tiles = ceil_div(m, tokens) * ceil_div(outputs, Sm90Config::kOutputs);
    for (int splits = 1; splits <= kMostSplits; ++splits) {
      const int64_t fit = sm90_clusters(splits, device), per_split = ceil_div(stages, splits);
      if (per_split * (splits - 1) >= stages) continue;  // the last one would have nothing to do
      const int64_t tile_cycles = per_split * stage_cycles(tokens) + kTileCycles + (splits > 1 ? kSplitCycles : 0);
      const int64_t cycles = ceil_div(tiles, fit) * tile_cycles;
      if (cycles >= fewest) continue;
      fewest = cycles;
      best = {tokens, splits, per_split, std::min(tiles, fit)};
    }
  }
  return best;
}

// The forward: stages of 128 k. They take as long as their passes over shared memory: x written once and read by both
// warpgroups, packed bytes written once and read, pairs and scales looked up.
inline Sm90Config linear_sm90_config(int64_t m, int64_t n, int64_t k, const Device& device) {
  return sm90_config(m, n, ceil_div(k, 128), {64, 128}, [](int64_t tokens) { return 6 * tokens + 540; }, device);
}

// dX: stages of 64 rows. The same with dy in place of x, and lookups of twice the size.
inline Sm90Config dx_sm90_config(int64_t m, int64_t n, int64_t k, const Device& device) {
  return sm90_config(m, k, ceil_div(n, 64), {64, 128, 256}, [](int64_t tokens) { return 3 * tokens + 440; }, device);
}

}  // namespace qlora::cuda
