// Grids of the codec's kernels, on every architecture.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/tuning/device.h"

namespace qlora::cuda {

// As many CTAs as the device holds at once, because a CTA stages its tables once and then strides over the tensor.
inline constexpr int kCodecThreads = 256;

// CTAs for `work` CTA-sized pieces.
constexpr int64_t codec_grid(int64_t work, int ctas_per_sm, const Device& device) {
  return std::min<int64_t>(work, int64_t{device.sm_count} * ctas_per_sm);
}

// Warps of a CTA that encodes with feedback, each of which takes `rows` rows: as many as read the factors together, but
// no more than leave every SM a CTA. From 2 on a stripe of rows fills whole words of packed codes.
inline constexpr int kFeedbackWarps = 8;
constexpr int feedback_warps(int64_t n, int rows, const Device& device) {
  int warps = kFeedbackWarps;
  while (warps > 2 && n <= int64_t{device.sm_count} * rows * warps / 2) warps /= 2;
  return warps;
}

}  // namespace qlora::cuda
