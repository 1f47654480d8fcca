// Chooses and configures the kernels over experts on wgmma and TMA, for compute capability 9.0 only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>

#include "cpp/format/grouped.h"
#include "cuda/tuning/any.h"
#include "cuda/tuning/choice.h"
#include "cuda/tuning/device.h"
#include "cuda/tuning/sm90.h"

namespace qlora::cuda::sm90 {

// The packed bytes of all experts are one matrix for TMA.
template <class Problem>
constexpr bool accepts(const Grouped<Problem>& p, const Device& device) {
  return accepts(p.stack, device) && p.experts > 0 && p.experts <= std::numeric_limits<int32_t>::max() / p.stack.w.n;
}

// From here on, the kernels on mma.sync have tiles of 64 tokens. By the kernel simulator's counters, a stage of 128 k
// and 128 rows for 128 tokens takes them 2149 passes over shared memory, and takes 1392 here, or 1830 cycles where L2
// serves 5.6 TB/s. For dX, 64 rows and 128 columns for 256 tokens take 2108, and 1256 or 1610 here. Not measured on a
// card.
template <class Problem>
constexpr bool is_ahead(const Grouped<Problem>& p, const Device&) {
  return tile_tokens(p) >= kFewestTokens;
}

// Chooses the number of tokens per tile with the fewest cycles, by the model for single weights (sm90.h). Sums are not
// split, because experts fill the device. Half of each expert's last tile is counted as empty.
template <class Problem, class StageCycles>
constexpr int64_t expert_tokens(const Grouped<Problem>& p, int64_t outputs, int64_t stages,
                                std::initializer_list<int64_t> tile_tokens, const StageCycles& stage_cycles,
                                const Device& device) {
  constexpr int64_t kTileCycles = 2500;
  int64_t best = 0, fewest = std::numeric_limits<int64_t>::max();
  for (const int64_t tokens : tile_tokens) {
    const int64_t tiles = ceil_div(p.stack.m + p.experts * tokens / 2, tokens) * ceil_div(outputs, kOutputs);
    const int64_t cycles =
        ceil_div(tiles, std::max(device.sm_count, 1)) * (stages * stage_cycles(tokens) + kTileCycles);
    if (cycles < fewest) best = tokens, fewest = cycles;
  }
  return best;
}

constexpr Config config(const Grouped<LinearProblem>& p, const Device& device, const Config& wish) {
  const Weight& w = p.stack.w;
  const int64_t tokens = expert_tokens(
      p, w.n, ceil_div(w.k, kForwardStageK), {64, 128}, [](int64_t tile) { return 6 * tile + 540; }, device);
  return {.tokens = or_wish(wish.tokens, tokens), .rows = kOutputs, .splits = 1};
}

constexpr Config config(const Grouped<LinearDxProblem>& p, const Device& device, const Config& wish) {
  const Weight& w = p.stack.w;
  const int64_t tokens = expert_tokens(
      p, w.k, ceil_div(w.n, kDxStageRows), {64, 128, 256}, [](int64_t tile) { return 3 * tile + 440; }, device);
  return {.tokens = or_wish(wish.tokens, tokens), .columns = kOutputs, .splits = 1};
}

}  // namespace qlora::cuda::sm90
