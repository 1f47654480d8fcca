// The kernels that run on every architecture and take any shape: float32, and the forward of ragged shapes. And what
// the kernels of all architectures share.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpp/format/grouped.h"
#include "cuda/tuning/choice.h"
#include "cuda/tuning/device.h"
#include "cuda/tuning/splits.h"

namespace qlora::cuda {

// Tokens that a tile is chosen for where `experts` have `tokens` together, how many each only the device knows: twice
// the average, since the experts that most tokens go to have more than it. Not measured on a card.
constexpr int64_t grouped_tile_tokens(int64_t tokens, int64_t experts) {
  return std::min(tokens, ceil_div(2 * tokens, std::max<int64_t>(experts, 1)));
}
template <class Problem>
constexpr int64_t tile_tokens(const Grouped<Problem>& p) {
  return grouped_tile_tokens(p.stack.m, p.experts);
}

// CTAs, at most `most`, that share the k of LoRA's low-rank products, where `ctas` would make them without: few tokens
// leave the device empty. The 16 warps of a CTA take 512 k at a time; a split of less than two such turns would cost
// more in all than it saves in waiting.
constexpr int64_t low_rank_splits(int64_t ctas, int64_t k, int64_t most, const Device& device) {
  constexpr int64_t kTwoTurns = 1024;
  return std::clamp<int64_t>(std::min(ceil_div(k, kTwoTurns), device.sm_count / std::max<int64_t>(ctas, 1)), 1, most);
}

// ---- splits of the gradients, in float32 and on mma.sync alike ----

inline constexpr int64_t kDxStageRows = 64;

// Rows that a CTA takes, a multiple of kDxStageRows, where `splits` CTAs share a sum of n.
constexpr int64_t dx_split_rows(int64_t n, int64_t splits) {
  const int64_t stages = std::max<int64_t>(ceil_div(n, kDxStageRows), 1);
  return ceil_div(stages, splits) * kDxStageRows;
}

// Splits of a tile's sum, where an SM holds `ctas_per_sm` of its CTAs. A model of an H100, not a measurement: a stage
// of 64 rows takes a CTA 640 cycles (issue: 8 warps x 320 instructions over 4 schedulers), its tables another one; CTAs
// come in waves of as many as the device holds; and the last CTA of a tile adds up a split of 64 tokens x 256 columns
// (64 KB from L2, 64 bytes a cycle) in 1000, of fewer tokens in proportion.
constexpr int64_t dx_splits(int64_t tiles, int64_t n, int64_t tokens, int ctas_per_sm, const Device& device) {
  constexpr int64_t kStageCycles = 640, kSplitCycles = 1000;
  const int64_t stages = std::max<int64_t>(ceil_div(n, kDxStageRows), 1);
  const int64_t slots = std::max<int64_t>(int64_t{device.sm_count} * ctas_per_sm, 1);
  return cheapest_splits(std::min(stages, slots), [&](int64_t s) {
    return ceil_div(tiles * s, slots) * (ceil_div(stages, s) + 1) * kStageCycles +
           (s > 1 ? s * kSplitCycles * tokens / 64 : 0);
  });
}

inline constexpr int64_t kDLoraStepTokens = 8 * 16;  // that the warps of a CTA take at once

// Tokens that a CTA takes, a multiple of kDLoraStepTokens, where `splits` CTAs share a sum of m.
constexpr int64_t dlora_split_tokens(int64_t m, int64_t splits) {
  return ceil_div(ceil_div(m, splits), kDLoraStepTokens) * kDLoraStepTokens;
}

// What fills the device, where an SM holds `ctas_per_sm`, as long as each of a CTA's eight warps has eight steps of 16
// tokens.
constexpr int64_t dlora_splits(int64_t tiles, int64_t m, int ctas_per_sm, const Device& device) {
  const int64_t slots = int64_t{device.sm_count} * ctas_per_sm;
  const int64_t to_fill = std::max<int64_t>(slots / std::max<int64_t>(tiles, 1), 1);
  return std::clamp<int64_t>(ceil_div(m, 8 * kDLoraStepTokens), 1, to_fill);
}

namespace any {

template <class Problem>
constexpr bool exact_accepts(const Problem& p, const Device&) {
  return p.dtype == DType::kFloat32;
}
template <class Problem>
constexpr bool exact_accepts(const Grouped<Problem>& p, const Device& device) {
  return exact_accepts(p.stack, device);
}

// ---- the forward: float32, and bfloat16 and float16 of any shape, without tensor cores ----

inline constexpr int64_t kForwardRows = 64;  // of w, per CTA

// Tokens of a tile: the smallest of three that holds m, so that few products are with tokens that do not exist. 4 is
// what one thread multiplies. Not measured on a card.
constexpr int64_t forward_tokens(int64_t m) { return m <= 4 ? 4 : m <= 16 ? 16 : 64; }

constexpr bool ragged_accepts(const LinearProblem& p, const Device&) { return is_16_bit(p.dtype); }
constexpr bool ragged_accepts(const Grouped<LinearProblem>& p, const Device& d) { return ragged_accepts(p.stack, d); }

constexpr Config config(const LinearProblem& p, const Device&, const Config& wish) {
  return {.tokens = or_wish(wish.tokens, forward_tokens(p.m)), .rows = kForwardRows};
}
// Experts' tiles have 16 tokens or 64.
constexpr Config config(const Grouped<LinearProblem>& p, const Device&, const Config& wish) {
  const int64_t tokens = std::max<int64_t>(forward_tokens(tile_tokens(p)), 16);
  return {.tokens = or_wish(wish.tokens, tokens), .rows = kForwardRows};
}

// ---- dX in float32 ----

inline constexpr Config kExactDx = {.tokens = 16, .columns = 128};
constexpr Config exact_config(const LinearDxProblem&, const Device&, const Config& wish) {
  Config c = kExactDx;
  c.splits = wish.splits;
  return c;
}
constexpr Config exact_config(const Grouped<LinearDxProblem>&, const Device&, const Config&) { return kExactDx; }

// ---- the gradients of LoRA's weights in float32 ----

inline constexpr int64_t kLoraColumns = 64;  // of x or dy, per CTA
inline constexpr Config kExactDLora = {.ranks = 16, .columns = kLoraColumns};
constexpr Config exact_config(const LoraGradProblem&, const Device&, const Config& wish) {
  Config c = kExactDLora;
  c.splits = wish.splits;
  return c;
}
constexpr Config exact_config(const Grouped<LoraGradProblem>&, const Device&, const Config&) { return kExactDLora; }

}  // namespace any
}  // namespace qlora::cuda
