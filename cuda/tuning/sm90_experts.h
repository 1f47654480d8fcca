// Chooses and configures the kernels over experts on wgmma and TMA, for compute capability 9.0 only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>

#include "cpp/format/grouped.h"
#include "cuda/tuning/choice.h"
#include "cuda/tuning/device.h"
#include "cuda/tuning/generic.h"
#include "cuda/tuning/sm90.h"

namespace qlora::cuda::sm90 {

// The packed bytes of all experts are one matrix for TMA.
template <class Problem>
constexpr bool accepts(const Grouped<Problem>& p, const Device& device) {
  return accepts(p.stack, device) && p.experts > 0 && p.experts <= std::numeric_limits<int32_t>::max() / p.stack.w.n;
}

// From here on, the kernels on mma.sync have tiles of 64 tokens. By the kernel simulator's counters, a stage of 128 k
// and 128 rows for 128 tokens takes them 2149 passes over shared memory, and takes 1330 here. For dX, 64 rows and 128
// columns for 256 tokens take 2108, and 1260 here. This is not a measurement on a card.
template <class Problem>
constexpr bool is_ahead(const Grouped<Problem>& p, const Device&) {
  return tile_tokens(p) >= kFewestTokens;
}

// Chooses the tile and the multicast with the fewest cycles, by the model for single weights (fastest in sm90.h). Sums
// are not split, because experts fill the device. Half of each expert's last tile is counted as empty.
template <class Problem, class StageOf>
constexpr Config fastest_of_experts(const Grouped<Problem>& p, int64_t outputs, int64_t stages,
                                    std::initializer_list<int64_t> tile_tokens, const StageOf& stage_of,
                                    const Device& device, const Config& wish) {
  Config best;
  int64_t fewest = std::numeric_limits<int64_t>::max();
  for (const int64_t tokens : tile_tokens) {
    for (int64_t multicast = 1; multicast <= kMostMulticast; ++multicast) {
      if (or_wish(wish.tokens, tokens) != tokens || or_wish(wish.multicast, multicast) != multicast) continue;
      const Config c{.tokens = tokens, .splits = 1, .multicast = multicast};
      const int64_t tiles =
          ceil_div(p.stack.m + p.experts * tokens / 2, tokens) * ceil_div(outputs, kOutputs * multicast);
      const int64_t fit = std::min(resident_clusters(c, device), tiles);
      if (fit == 0) continue;
      const int64_t tile_cycles = stages * stage_cycles(stage_of(tokens), multicast, fit * multicast) + kTileCycles;
      const int64_t cycles = ceil_div(tiles, fit) * tile_cycles;
      if (cycles < fewest) best = c, fewest = cycles;
    }
  }
  return best;
}

constexpr Config config(const Grouped<LinearProblem>& p, const Device& device, const Config& wish) {
  const Weight& w = p.stack.w;
  Config c = fastest_of_experts(p, w.n, ceil_div(w.k, kForwardStageK), {64, 128}, forward_stage, device, wish);
  c.rows = kOutputs;
  return c;
}

constexpr Config config(const Grouped<LinearDxProblem>& p, const Device& device, const Config& wish) {
  const Weight& w = p.stack.w;
  Config c = fastest_of_experts(p, w.k, ceil_div(w.n, kDxStageRows), {64, 128, 256}, dx_stage, device, wish);
  c.columns = kOutputs;
  return c;
}

}  // namespace qlora::cuda::sm90
