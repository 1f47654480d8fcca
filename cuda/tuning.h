// Which configuration a problem runs with on a device: pure host code without CUDA headers, so that it can be read and
// tested anywhere. Each number says where it comes from.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "cpp/format/problem.h"

namespace qlora::cuda {

// What the choices depend on.
struct Device {
  int sm_count = 0;
  int arch = 0;              // 10 * major + minor
  int shared_per_block = 0;  // bytes a CTA may opt in to
  int shared_per_sm = 0;     // bytes
};

// The codec's kernels: enough CTAs to fill the device, and no more, because a CTA stages its tables once and then
// strides over the tensor.
struct CodecConfig {
  static constexpr int kThreads = 256;
  static constexpr int kCtasPerSm = 8;  // 2048 threads an SM at 32 registers a thread; CTAs that do not fit queue
};

// CTAs for `work` CTA-sized pieces.
constexpr int64_t codec_grid(int64_t work, const Device& device) {
  return std::min<int64_t>(work, int64_t{device.sm_count} * CodecConfig::kCtasPerSm);
}

// ---- fused kernel, or dequantize and a library GEMM ----
//
// Roofline model, not measured on a card. Both ways cost a time in proportion to n * k. Fused, each token costs its
// multiply-adds at what a kernel on mma.sync reaches; the library costs one decode of the weight besides (2.63 bytes an
// element, block 64 with nested scales, 16-bit out), but its tokens are cheaper. They meet at
//   m = decode_time / (fused_time_per_token - library_time_per_token).
struct Ceiling {
  int arch;                 // of this one and above, up to the next row
  double bytes_per_second;  // memory, from the vendor's data sheet
  double mma_flops;         // dense bfloat16 with mma.sync: the data sheet's, or two thirds of it where wgmma is needed
  double library_flops;     // dense bfloat16, data sheet
};

inline constexpr Ceiling kCeilings[] = {
    {80, 2.0e12, 312e12, 312e12},    // A100 80 GB
    {90, 3.35e12, 660e12, 989e12},   // H100 SXM
    {100, 8.0e12, 740e12, 2250e12},  // B200
    {120, 1.8e12, 500e12, 500e12},   // RTX PRO 6000
};

constexpr int64_t roofline_crossover(const Ceiling& c) {
  constexpr double kMemoryShare = 0.9, kFusedShare = 0.6, kLibraryShare = 0.75, kBytesDecoded = 2.63;
  const double decode = kBytesDecoded / (kMemoryShare * c.bytes_per_second);
  const double per_token = 2.0 / (kFusedShare * c.mma_flops) - 2.0 / (kLibraryShare * c.library_flops);
  return static_cast<int64_t>(decode / per_token) / 64 * 64;
}

// Tokens from which the library is chosen. Shapes and types that the tensor core kernels do not take (float32, k that
// is no multiple of 64, blocks of 32) decode for every 64 tokens again with plain arithmetic: the library is ahead as
// soon as that happens twice.
constexpr int64_t library_crossover(DType dtype, int64_t k, int64_t block_size, const Device& device) {
  constexpr int64_t kTokensPerDecode = 64;
  if (dtype == DType::kFloat32 || k % 64 != 0 || block_size < 64) return kTokensPerDecode + 1;
  const Ceiling* best = kCeilings;
  for (const Ceiling& c : kCeilings) {
    if (device.arch >= c.arch) best = &c;
  }
  return roofline_crossover(*best);
}

// Rows of w [n, k] that are decoded at a time for the library: as many as the workspace's bound allows, in steps that
// keep the first element of each panel a multiple of the largest block.
inline constexpr int64_t kLibraryWorkspaceBytes = int64_t{512} << 20;  // a whole (28672, 8192) in 16 bits

constexpr int64_t library_panel_rows(int64_t n, int64_t k, DType dtype) {
  const int64_t step = kMaxBlockSize / std::gcd(kMaxBlockSize, std::max<int64_t>(k, 1));
  const int64_t fit = kLibraryWorkspaceBytes / (std::max<int64_t>(k, 1) * dtype_bytes(dtype)) / step * step;
  return std::min(n, std::max(fit, step));
}

// dx sums over rows of w, so that panels would round the sum once each: only a whole weight goes to the library.
constexpr bool library_takes_dx(int64_t n, int64_t k, DType dtype) { return library_panel_rows(n, k, dtype) >= n; }

}  // namespace qlora::cuda
