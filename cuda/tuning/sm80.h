// Chooses and configures the kernels on mma.sync, for compute capability 8.0 and later.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpp/format/grouped.h"
#include "cuda/tuning/choice.h"
#include "cuda/tuning/device.h"
#include "cuda/tuning/generic.h"
#include "cuda/tuning/splits.h"

namespace qlora::cuda::sm80 {

// ---- which problems the kernels for regular shapes take ----
//
// Every operand begins at a multiple of 16 bytes, because cuda/ops.cpp copies those that do not.

// Whether the only offsets are zero points of integers, which the forward subtracts from the codes.
constexpr bool subtracts_zero_points(const Weight& w) {
  return w.scales.offsets.form == OffsetForm::kZeroPoint8 && is_consecutive(w.code);
}

// The forward reads w in segments of 64 k with one scale per row.
constexpr bool is_regular(const LinearProblem& p) {
  return p.w.k > 0 && has_one_scale_per(64, p.w) && (!has_offsets(p.w) || subtracts_zero_points(p.w));
}

// The forward's tiles for blocks of 16 and 32 and for other offsets, whose weights are decoded with scale and offset
// and then rounded. NF4 in such blocks keeps the kernel for any shape, which does not round weights.
constexpr bool scales_weights(const LinearProblem& p) {
  return p.w.k > 0 && p.w.k % 64 == 0 && !is_regular(p) && (p.w.code != Code::kNf4 || has_offsets(p.w));
}

// dX reads 16 bytes of a row of w, with one scale, and 16 bytes of dy at a time.
constexpr bool is_regular(const LinearDxProblem& p) { return has_one_scale_per(32, p.w) && p.w.n % 8 == 0; }

// LoRA's gradients read 16 bytes of x and dy at a time.
constexpr bool is_regular(const LoraGradProblem& p) { return p.k % 8 == 0 && p.n % 8 == 0; }

template <class Problem>
constexpr bool accepts_type(const Problem& p, const Device& device) {
  return is_16_bit(p.dtype) && has_tensor_core_kernels(device) && !has_wide_code(p);
}
template <class Problem>
constexpr bool accepts(const Problem& p, const Device& device) {
  return accepts_type(p, device) && is_regular(p);
}
constexpr bool accepts(const LinearProblem& p, const Device& device) {
  return accepts_type(p, device) && (is_regular(p) || scales_weights(p));
}
template <class Problem>
constexpr bool accepts(const Grouped<Problem>& p, const Device& device) {
  return accepts(p.stack, device);
}

// dX and LoRA's gradients of any shape, on the same tensor cores.
template <class Problem>
constexpr bool ragged_accepts(const Problem& p, const Device& device) {
  return accepts_type(p, device);
}
template <class Problem>
constexpr bool ragged_accepts(const Grouped<Problem>& p, const Device& device) {
  return ragged_accepts(p.stack, device);
}

// ---- the forward ----

inline constexpr int64_t kSegment = 64, kForwardRows = 128;

// The kernel for few tokens has a single tile for all tokens, and computes LoRA's product in the same launch. From 10.0
// on, its tile of 16 tokens would spill registers, so the kernel for more tokens has one of 16 there. A GeForce RTX
// 5090 needs that tile anyway: half of the columns that the kernel for few tokens multiplies are empty, which by the
// data sheet would take longer than reading w.
constexpr int64_t most_few_tokens(const Device& device) { return device.arch >= 100 ? 8 : 16; }

// Whether the kernel has a form for streams (stream.h). From 10.0 on they are not compiled. Wider tiles have no
// registers for them.
constexpr bool can_stream(const LinearProblem& p, int64_t tokens, const Device& device) {
  return device.arch < 100 && is_regular(p) && !has_offsets(p.w) && tokens <= 32;
}

constexpr bool few_tokens_accepts(const LinearProblem& p, const Device& device) {
  return accepts_type(p, device) && is_regular(p) && p.m <= most_few_tokens(device);
}
constexpr Config few_tokens_config(const LinearProblem& p, const Device& device, const Config& wish) {
  const int64_t least = p.m <= 4 ? 4 : p.m <= 8 ? 8 : 16;
  const int64_t tokens = std::min(std::max(wish.tokens, least), most_few_tokens(device));
  return {.tokens = tokens,
          .rows = kForwardRows,
          .splits = wish.splits,
          .ctas = can_stream(p, tokens, device) ? wish.ctas : 0};
}
constexpr bool has_tile_16(const Device& device) { return most_few_tokens(device) < 16; }

// The widest tile needs 137 KB of shared memory. Devices that have it decode w once per 64 tokens.
inline constexpr int kShared64 = 137 * 1024;

constexpr int64_t forward_tokens(int64_t m, const Device& device) {
  if (m <= 16 && has_tile_16(device)) return 16;
  return m <= 32 || device.shared_per_cta < kShared64 ? 32 : 64;
}
// A forced tile of 64 tokens is not granted if the device lacks the shared memory.
constexpr int64_t wished_tokens(const Config& wish, int64_t tokens, const Device& device) {
  return wish.tokens == 64 && device.shared_per_cta < kShared64 ? tokens : or_wish(wish.tokens, tokens);
}

// The tiles that scale weights have at least 16 tokens.
constexpr int64_t scaled_tokens(const Weight& w, int64_t m, const Device& device, const Config& wish) {
  const int64_t tokens = m <= 16 ? 16 : w.scales.block_size < 32 ? 32 : forward_tokens(m, device);
  if (wish.tokens == 64 && w.scales.block_size < 32) return tokens;
  return std::max<int64_t>(wished_tokens(wish, tokens, device), 16);
}

constexpr Config config(const LinearProblem& p, const Device& device, const Config& wish) {
  const int64_t tokens = scales_weights(p) ? scaled_tokens(p.w, p.m, device, wish)
                         : wish.tokens == 16 && !has_tile_16(device)
                             ? forward_tokens(p.m, device)  // few_tokens has a better tile
                             : wished_tokens(wish, forward_tokens(p.m, device), device);
  return {.tokens = tokens,
          .rows = kForwardRows,
          .splits = wish.splits,
          .ctas = can_stream(p, tokens, device) ? wish.ctas : 0};
}

// For experts, k is not split: this would gain nothing with many experts, and little with few.
constexpr Config config(const Grouped<LinearProblem>& p, const Device& device, const Config& wish) {
  const int64_t m = tile_tokens(p), tokens = m <= 8 ? 8 : m <= 16 ? 16 : forward_tokens(m, device);
  if (scales_weights(p.stack)) return {.tokens = scaled_tokens(p.stack.w, m, device, wish), .rows = kForwardRows};
  return {.tokens = wished_tokens(wish, tokens, device), .rows = kForwardRows};
}

// Segments of k per CTA, a multiple of `stage_segments`, if `splits` CTAs divide a sum over `segments`.
constexpr int64_t forward_split_segments(int64_t segments, int64_t splits, int64_t stage_segments) {
  return ceil_div(ceil_div(segments, splits), stage_segments) * stage_segments;
}

// A CTA's tables cost as much time as 16 segments (1024 k).
inline constexpr int64_t kTables = 16;

// The time of the forward, in 64ths of a segment's, if `splits` CTAs divide each of `tiles` sums and the device holds
// `slots` CTAs at once. This is a roofline model, not a measurement:
//   - CTAs run in waves.
//   - The last CTA of a tile adds up 64 tokens of a split in the time of one segment.
constexpr int64_t forward_split_cost(int64_t tiles, int64_t segments, int64_t stage_segments, int64_t tokens,
                                     int64_t slots, int64_t splits) {
  return 64 * ceil_div(tiles * splits, slots) * (forward_split_segments(segments, splits, stage_segments) + kTables) +
         (splits > 1 ? splits * tokens : 0);
}

// The number of splits of k, at most `most`. No CTA takes less time for its segments than for its tables.
constexpr int64_t forward_splits(int64_t tiles, int64_t segments, int64_t stage_segments, int64_t tokens, int64_t slots,
                                 int64_t most = INT64_MAX) {
  const int64_t limit = std::clamp<int64_t>(segments / kTables, 1, std::max<int64_t>(std::min(slots, most), 1));
  return cheapest_splits(
      limit, [&](int64_t s) { return forward_split_cost(tiles, segments, stage_segments, tokens, slots, s); });
}

// ---- dX ----

inline constexpr int64_t kDxColumns = 256;
// The ragged kernel's tile sizes. For 16 tokens its shared memory holds more scales, for blocks of 16.
inline constexpr int64_t kDxRaggedTokens = 32, kDxSmallBlockTokens = 16;

// The smallest tile that holds m tokens. Up to 64 tokens, each weight is decoded only once.
constexpr int64_t dx_tokens(int64_t m) { return m <= 8 ? 8 : m <= 16 ? 16 : m <= 32 ? 32 : 64; }
constexpr Config dx_tile(int64_t m, const Config& wish) {
  return {.tokens = or_wish(wish.tokens, dx_tokens(m)), .columns = kDxColumns, .splits = wish.splits};
}
// With offsets, the largest tile needs more shared memory than some devices have.
inline constexpr int kSharedDxOffsets64 = 103 * 1024;
constexpr Config dx_offset_tile(int64_t m, const Device& device, const Config& wish) {
  const int64_t most = device.shared_per_cta < kSharedDxOffsets64 ? 32 : 64;
  const int64_t wished = wish.tokens < 16 ? dx_tokens(m) : wish.tokens;
  return {.tokens = std::clamp<int64_t>(wished, 16, most), .columns = kDxColumns, .splits = wish.splits};
}
constexpr Config dx_ragged_tile(int64_t block_size, const Config& wish) {
  const int64_t most = block_size < 32 ? kDxSmallBlockTokens : kDxRaggedTokens;
  return {.tokens = std::min(or_wish(wish.tokens, most), most), .columns = kDxColumns, .splits = wish.splits};
}

constexpr Config config(const LinearDxProblem& p, const Device& device, const Config& wish) {
  return has_offsets(p.w) ? dx_offset_tile(p.m, device, wish) : dx_tile(p.m, wish);
}
constexpr Config config(const Grouped<LinearDxProblem>& p, const Device& device, const Config& wish) {
  const int64_t m = tile_tokens(p);
  return has_offsets(p.stack.w) ? dx_offset_tile(m, device, wish) : dx_tile(m, wish);
}
constexpr Config ragged_config(const LinearDxProblem& p, const Device&, const Config& wish) {
  return dx_ragged_tile(p.w.scales.block_size, wish);
}
constexpr Config ragged_config(const Grouped<LinearDxProblem>& p, const Device&, const Config& wish) {
  return dx_ragged_tile(p.stack.w.scales.block_size, wish);
}

// ---- the gradients of LoRA's weights ----

// The ranks per tile: few enough for the accumulators (64 ranks are 128 registers), many enough to read x and dy only
// once.
constexpr Config dlora_tile(int64_t rank, const Config& wish) {
  return {.ranks = or_wish(wish.ranks, rank <= 16   ? 16
                                       : rank <= 32 ? 32
                                                    : 64),
          .columns = generic::kLoraColumns,
          .splits = wish.splits};
}
constexpr Config config(const LoraGradProblem& p, const Device&, const Config& wish) {
  return dlora_tile(p.lora.rank, wish);
}
constexpr Config config(const Grouped<LoraGradProblem>& p, const Device&, const Config& wish) {
  return dlora_tile(p.stack.lora.rank, wish);
}

}  // namespace qlora::cuda::sm80
