// Chooses and configures the kernels that run on every architecture and take any shape: exact products, and the forward
// of ragged shapes. Also holds what the kernels of all architectures share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpp/format/grouped.h"
#include "cuda/tuning/choice.h"
#include "cuda/tuning/device.h"
#include "cuda/tuning/splits.h"

namespace qlora::cuda {

// The number of tokens for which an expert's tile is chosen, if `experts` have `tokens` together. Only the device knows
// the number per expert. The choice assumes twice the average, since the busiest experts have more tokens than the
// average. Not measured on a card.
constexpr int64_t grouped_tile_tokens(int64_t tokens, int64_t experts) {
  return std::min(tokens, ceil_div(2 * tokens, std::max<int64_t>(experts, 1)));
}
template <class Problem>
constexpr int64_t tile_tokens(const Grouped<Problem>& p) {
  return grouped_tile_tokens(p.stack.m, p.experts);
}

// The number of CTAs, at most `most`, that divide the k of LoRA's low-rank products. `ctas` is the number without this
// split: for few tokens it leaves most of the device idle. The 16 warps of a CTA take 512 k at a time. A split of fewer
// than two such turns would add more work than it saves in latency.
constexpr int64_t low_rank_splits(int64_t ctas, int64_t k, int64_t most, const Device& device) {
  constexpr int64_t kTwoTurns = 1024;
  return std::clamp<int64_t>(std::min(ceil_div(k, kTwoTurns), device.sm_count / std::max<int64_t>(ctas, 1)), 1, most);
}

// The number of tokens, 8 or `most`, per tile of the experts' low-rank products, whose CTAs take `ranks` ranks. A CTA
// takes the time of reading its rows of x and of `a`, and CTAs run in waves of one per SM. A larger tile reads `a` less
// often. Half of each expert's last tile is counted as empty. This is a model, not a measurement.
constexpr int64_t grouped_low_rank_tokens(int64_t m, int64_t experts, int64_t ranks, int64_t most,
                                          const Device& device) {
  const auto time = [&](int64_t tokens) {
    const int64_t ctas = ceil_div(m + experts * tokens / 2, tokens);
    return ceil_div(ctas, std::max(device.sm_count, 1)) * (tokens + ranks);
  };
  return time(most) < time(8) ? most : 8;
}

// ---- splits of the gradients, in float32 and on mma.sync alike ----

inline constexpr int64_t kDxStageRows = 64;

// Rows per CTA, a multiple of kDxStageRows, if `splits` CTAs divide a sum over n.
constexpr int64_t dx_split_rows(int64_t n, int64_t splits) {
  const int64_t stages = std::max<int64_t>(ceil_div(n, kDxStageRows), 1);
  return ceil_div(stages, splits) * kDxStageRows;
}

// The number of splits of a tile's sum, if an SM holds `ctas_per_sm` CTAs. This is a model of an H100, not a
// measurement:
//   - A stage of 64 rows takes a CTA 640 cycles (issue: 8 warps x 320 instructions over 4 schedulers).
//   - Filling the tables takes as long as another stage.
//   - CTAs run in waves of as many as the device holds.
//   - The last CTA of a tile adds up a split of 64 tokens x 256 columns (64 KB from L2, 64 bytes per cycle) in 1000
//     cycles, and of fewer tokens proportionally faster.
inline constexpr int64_t kDxSplitCycles = 1000;
constexpr int64_t dx_splits(int64_t tiles, int64_t n, int64_t tokens, int ctas_per_sm, const Device& device) {
  constexpr int64_t kStageCycles = 640;
  const int64_t stages = std::max<int64_t>(ceil_div(n, kDxStageRows), 1);
  const int64_t slots = std::max<int64_t>(int64_t{device.sm_count} * ctas_per_sm, 1);
  return cheapest_splits(std::min(stages, slots), [&](int64_t s) {
    return ceil_div(tiles * s, slots) * (ceil_div(stages, s) + 1) * kStageCycles +
           (s > 1 ? s * kDxSplitCycles * tokens / 64 : 0);
  });
}

inline constexpr int64_t kDLoraStepTokens = 8 * 16;  // tokens that the warps of a CTA take at a time

// Tokens per CTA, a multiple of kDLoraStepTokens, if `splits` CTAs divide a sum over m.
constexpr int64_t dlora_split_tokens(int64_t m, int64_t splits) {
  return ceil_div(ceil_div(m, splits), kDLoraStepTokens) * kDLoraStepTokens;
}

// As many splits as fill the device, if an SM holds `ctas_per_sm` CTAs, as long as each of a CTA's eight warps has at
// least eight steps of 16 tokens.
constexpr int64_t dlora_splits(int64_t tiles, int64_t m, int ctas_per_sm, const Device& device) {
  const int64_t slots = int64_t{device.sm_count} * ctas_per_sm;
  const int64_t to_fill = std::max<int64_t>(slots / std::max<int64_t>(tiles, 1), 1);
  return std::clamp<int64_t>(ceil_div(m, 8 * kDLoraStepTokens), 1, to_fill);
}

namespace generic {

// Types and codes for which nothing else takes all shapes: float32, float16 on 7.5, and in dX wide codes.
template <class Problem>
constexpr bool exact_accepts(const Problem& p, const Device& device) {
  return p.dtype == DType::kFloat32 || (p.dtype == DType::kFloat16 && !has_tensor_core_kernels(device)) ||
         (std::is_same_v<Problem, LinearDxProblem> && is_16_bit(p.dtype) && has_wide_code(p));
}
template <class Problem>
constexpr bool exact_accepts(const Grouped<Problem>& p, const Device& device) {
  return exact_accepts(p.stack, device);
}

// ---- the forward: float32, and bfloat16 and float16 of any shape, without tensor cores ----

inline constexpr int64_t kForwardRows = 64;  // of w, per CTA

// Tokens per tile: the smallest of three sizes that holds m, so that little work goes into tokens that do not exist.
// One thread multiplies 4 tokens. Not measured on a card.
constexpr int64_t forward_tokens(int64_t m) { return m <= 4 ? 4 : m <= 16 ? 16 : 64; }

constexpr bool ragged_accepts(const LinearProblem& p, const Device& device) {
  return is_16_bit(p.dtype) && has_tensor_core_kernels(device);  // without them, the same kernel is `exact`
}
constexpr bool ragged_accepts(const Grouped<LinearProblem>& p, const Device& d) { return ragged_accepts(p.stack, d); }

constexpr Config config(const LinearProblem& p, const Device&, const Config& wish) {
  return {.tokens = or_wish(wish.tokens, forward_tokens(p.m)), .rows = kForwardRows};
}
// The tiles of experts have 16 or 64 tokens.
constexpr Config config(const Grouped<LinearProblem>& p, const Device&, const Config& wish) {
  const int64_t tokens = std::max<int64_t>(forward_tokens(tile_tokens(p)), 16);
  return {.tokens = or_wish(wish.tokens, tokens), .rows = kForwardRows};
}

// ---- dX by exact products ----

inline constexpr Config kExactDx = {.tokens = 16, .columns = 128};
constexpr Config exact_config(const LinearDxProblem&, const Device&, const Config& wish) {
  Config c = kExactDx;
  c.splits = wish.splits;
  return c;
}
constexpr Config exact_config(const Grouped<LinearDxProblem>&, const Device&, const Config&) { return kExactDx; }

// ---- the gradients of LoRA's weights by exact products ----

inline constexpr int64_t kLoraColumns = 64;  // of x or dy, per CTA
inline constexpr Config kExactDLora = {.ranks = 16, .columns = kLoraColumns};
constexpr Config exact_config(const LoraGradProblem&, const Device&, const Config& wish) {
  Config c = kExactDLora;
  c.splits = wish.splits;
  return c;
}
constexpr Config exact_config(const Grouped<LoraGradProblem>&, const Device&, const Config&) { return kExactDLora; }

}  // namespace generic
}  // namespace qlora::cuda
