// The grids of the codec's kernels, on every architecture.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpp/format/packing.h"
#include "cuda/tuning/device.h"

namespace qlora::cuda {

// The grid has as many CTAs as the device holds at once, because a CTA stages its tables only once and then strides
// over the tensor.
inline constexpr int kCodecThreads = 256;

// The number of CTAs for `work` CTA-sized pieces.
constexpr int64_t codec_grid(int64_t work, int ctas_per_sm, const Device& device) {
  return std::min<int64_t>(work, int64_t{device.sm_count} * ctas_per_sm);
}
// The same per expert, for `work` pieces of each. All experts together get twice as many CTAs as the device holds,
// because those of experts without tokens exit at once.
constexpr int64_t codec_grid_per_expert(int64_t work, int ctas_per_sm, int64_t experts, const Device& device) {
  return std::min<int64_t>(work, ceil_div(2 * int64_t{device.sm_count} * ctas_per_sm, experts));
}
inline constexpr int64_t kMostDecodedExperts = 65535;  // one row of the grid each

// Warps per CTA for encoding with feedback, where each warp takes `rows` rows. The warps of a CTA share the factors
// that it reads, so more warps read less, but every SM should still get a CTA. With 2 warps or more, a stripe of rows
// fills whole words of packed codes.
inline constexpr int kFeedbackWarps = 8;
// Compute capability 7.5 has shared memory for half of them.
inline constexpr int kFeedbackWarps75 = 4, kShared75 = 64 * 1024;
constexpr int most_feedback_warps(const Device& device) { return device.arch < 80 ? kFeedbackWarps75 : kFeedbackWarps; }
constexpr int feedback_warps(int64_t n, int rows, const Device& device) {
  int warps = most_feedback_warps(device);
  while (warps > 2 && n <= int64_t{device.sm_count} * rows * warps / 2) warps /= 2;
  return warps;
}

}  // namespace qlora::cuda
