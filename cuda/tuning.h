// Which configuration a problem runs with on a device: pure host code, no CUDA header, so that it can be read and
// tested anywhere. Each table says where its numbers come from.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpp/format/nf4.h"

namespace qlora::cuda {

// What the choices depend on.
struct Device {
  int sm_count = 0;
  int arch = 0;              // 10 * major + minor
  int shared_per_block = 0;  // bytes a CTA may opt in to
  int shared_per_sm = 0;     // bytes
};

// The codec's kernels: enough CTAs to fill the device several times over, and no more, because a CTA stages its tables
// once and then strides over the tensor.
struct CodecConfig {
  static constexpr int kThreads = 256;
  static constexpr int kCtasPerSm = 8;  // 2048 threads an SM at 32 registers a thread; CTAs that do not fit queue
};

// CTAs for `work` CTA-sized pieces.
constexpr int64_t codec_grid(int64_t work, const Device& device) {
  return std::min<int64_t>(work, int64_t{device.sm_count} * CodecConfig::kCtasPerSm);
}

}  // namespace qlora::cuda
