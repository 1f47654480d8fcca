// Chooses our own GEMM on a decoded weight (launch/sm80/linear_gemm.cu) and its panels, for many tokens.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpp/format/problem.h"
#include "cuda/tuning/choice.h"
#include "cuda/tuning/device.h"
#include "cuda/tuning/library.h"

namespace qlora::cuda::gemm {

inline constexpr int64_t kTokens = 128, kColumns = 256;  // of a tile, which one CTA per SM computes
inline constexpr int kSharedBytes = 96 * 1024;

constexpr int64_t tiles(int64_t m, int64_t columns) { return ceil_div(m, kTokens) * ceil_div(columns, kColumns); }

// The waves of tiles, if each panel of `columns` is a launch of its own.
constexpr int64_t waves(int64_t m, int64_t columns, int64_t panel, const Device& device) {
  const auto of = [&](int64_t part) { return ceil_div(tiles(m, part), std::max<int64_t>(device.sm_count, 1)); };
  return columns / panel * of(panel) + of(columns % panel);
}

// Rows of 16 bits are copied in pieces of 16 bytes.
constexpr bool accepts_sizes(DType dtype, const Weight& w, const Device& device) {
  return is_16_bit(dtype) && w.n > 0 && w.k > 0 && w.k % 8 == 0 && device.arch >= 80 &&
         device.shared_per_cta >= kSharedBytes;
}
constexpr bool accepts(const LinearProblem& p, const Device& device) { return accepts_sizes(p.dtype, p.w, device); }
constexpr bool accepts(const LinearDxProblem& p, const Device& device) {
  return accepts_sizes(p.dtype, p.w, device) && p.w.n % 8 == 0;
}

// The panel with the fewest waves. The fewest panels break ties: a panel's two launches cost as much as kLaunchTerms
// terms of a tile's sum (model of an A100: 5 us at 0.8 of an SM's tensor cores). A panel is a multiple of `step`, and
// as large as fits in half of L2, or the next multiple. It has at least kLeastPanel columns, so that small caches do
// not leave SMs idle.
constexpr int64_t panel_columns(int64_t m, int64_t inner, int64_t columns, int64_t step, const Device& device) {
  constexpr int64_t kLaunchTerms = 180, kLeastPanel = 1024;
  const int64_t fit = std::max<int64_t>(device.l2_bytes / 2 / (2 * inner), kLeastPanel);
  int64_t best = columns, least = INT64_MAX;
  for (int64_t panel = ceil_div(std::min(fit, columns), step) * step; panel > 0; panel -= step) {
    const int64_t part = std::min(panel, columns);
    const int64_t cost = waves(m, columns, part, device) * inner + ceil_div(columns, part) * kLaunchTerms;
    if (cost < least) least = cost, best = part;
  }
  return best;
}

// `inner`: the terms of a sum.
template <class Problem>
constexpr Config config(const Problem& p, int64_t inner, int64_t columns, const Device& device, const Config& wish) {
  const int64_t step = library::panel_step(p);
  if (wish.panel > 0) return library::panels(columns, step, 0, wish);
  return {.panel = panel_columns(p.m, inner, columns, step, device)};
}
constexpr Config config(const LinearProblem& p, const Device& device, const Config& wish) {
  return config(p, p.w.k, p.w.n, device, wish);
}
constexpr Config config(const LinearDxProblem& p, const Device& device, const Config& wish) {
  return config(p, p.w.n, p.w.k, device, wish);
}

// When the GEMM is ahead. None of these numbers was measured. They come from a model: the GEMM runs at 0.8 of an A100's
// dense rate and at 0.88 of a GeForce card's while its waves are full, and each panel costs its decode and two
// launches.
struct Ahead {
  int arch;        // for this architecture and later ones, up to the next row
  int64_t tokens;  // ahead of the fused kernels from this number on,
  int64_t fill;    // if at least so many percent of the SMs in all waves have a tile
};
inline constexpr Ahead kAhead[] = {
    {80, 256, 60},      // A100: the fused kernels run at 0.6 of the dense rate
    {86, 2048, 85},     // RTX 3090, 4090, L40S: 5% ahead of the fused kernels per token; model 1100 for the decode
    {90, kNever, 100},  // H100, B200: the library does not use mma.sync, which is slower there
    {120, 2048, 85},    // RTX 5090: like the 4090; model 1300
};

// The library has smaller tiles, which fill a card better, but it writes float32 sums of LoRA and bias to memory.
inline constexpr int64_t kLeastFill = 60;

template <class Problem>
constexpr bool is_ahead(const Problem& p, int64_t columns, const Device& device) {
  Ahead ahead = kAhead[0];
  for (const Ahead& a : kAhead) {
    if (device.arch >= a.arch) ahead = a;
  }
  if (ahead.tokens == kNever) return false;
  if (decodes_often(p.dtype, p.w.k, p.w.scales.block_size, has_offsets(p.w)))
    ahead.tokens = kTokensPerDecode + 1, ahead.fill = kLeastFill;
  if (p.m < ahead.tokens) return false;
  const int64_t slots = waves(p.m, columns, config(p, device, {}).panel, device) * device.sm_count;
  return 100 * p.m * columns >= ahead.fill * slots * kTokens * kColumns;
}
constexpr bool is_ahead(const LinearProblem& p, const Device& device) { return is_ahead(p, p.w.n, device); }
constexpr bool is_ahead(const LinearDxProblem& p, const Device& device) { return is_ahead(p, p.w.k, device); }

}  // namespace qlora::cuda::gemm
