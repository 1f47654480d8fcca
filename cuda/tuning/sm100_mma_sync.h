// The time of the fused kernels on mma.sync on a B200, with which the library's is compared. It is a model, not a
// measurement.
#pragma once

#include <cstdint>

#include "cpp/format/problem.h"
#include "cuda/tuning/device.h"
#include "cuda/tuning/generic.h"
#include "cuda/tuning/sm80.h"

namespace qlora::cuda::sm100 {

// Per nanosecond: as many products per cycle and SM as on an A100, at 1.97 GHz on 148 SMs. The kernels reach 0.6 of it,
// as there.
inline constexpr double kMmaSyncFlops = 0.6 * 600e3, kCycles = 1.97;
inline constexpr int64_t kMostClusterSplits = 8;

// The nanoseconds in which a CTA multiplies `flops`.
constexpr double cta_time(double flops, const Device& device) { return flops * device.sm_count / kMmaSyncFlops; }

constexpr double fused_time(const LinearProblem& p, const Device& device) {
  const int64_t tokens = sm80::forward_tokens(p.m, device), segments = p.w.k / sm80::kSegment;
  const int64_t tiles = ceil_div(p.m, tokens) * ceil_div(p.w.n, sm80::kForwardRows), slots = device.sm_count;
  const int64_t splits = sm80::forward_splits(tiles, segments, 2, tokens, slots, kMostClusterSplits);
  const int64_t cost = sm80::forward_split_cost(tiles, segments, 2, tokens, slots, splits);  // in 64ths of a segment
  return cta_time(
      static_cast<double>(cost) / 64 * 2 * static_cast<double>(tokens * sm80::kForwardRows) * sm80::kSegment, device);
}

constexpr double fused_time(const LinearDxProblem& p, const Device& device) {
  const Config tile = sm80::dx_tile(p.m, {});
  const int64_t tiles = ceil_div(p.m, tile.tokens) * ceil_div(p.w.k, tile.columns);
  const int64_t splits = dx_splits(tiles, p.w.n, tile.tokens, 1, device), slots = device.sm_count;
  const int64_t rows = ceil_div(tiles * splits, slots) * (dx_split_rows(p.w.n, splits) + kDxStageRows);
  const int64_t adding = splits > 1 ? splits * kDxSplitCycles * tile.tokens / 64 : 0;  // cycles
  return cta_time(2 * static_cast<double>(rows) * static_cast<double>(tile.tokens * tile.columns), device) +
         static_cast<double>(adding) / kCycles;
}

}  // namespace qlora::cuda::sm100
