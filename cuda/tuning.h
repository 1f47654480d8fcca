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
  int arch = 0;            // 10 * major + minor
  int shared_per_cta = 0;  // bytes a CTA may opt in to
  int shared_per_sm = 0;   // bytes
};

// What a linear operator runs with. QLORA_PRINT_KERNELS=1 shows it, with the parameters below.
enum class Kernel {
  kTensorCores,  // bfloat16 and float16 of regular shape and alignment
  kRagged,       // bfloat16 and float16 of any other: the forward without tensor cores, dX and LoRA's gradients on them
  kExact,        // float32: every product a float32 FMA, any shape
  kLibrary,      // many tokens: w is decoded, and torch's library multiplies
};

constexpr const char* kernel_name(Kernel kernel) {
  constexpr const char* kNames[] = {"tensor_cores", "ragged", "exact", "library"};
  return kNames[static_cast<int>(kernel)];
}

// Without the library. What is `ragged` differs from operator to operator; their launchers say.
constexpr Kernel fused_kernel(DType dtype, bool ragged) {
  return dtype == DType::kFloat32 ? Kernel::kExact : ragged ? Kernel::kRagged : Kernel::kTensorCores;
}

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

// dX: tiles of `tokens` x `columns` outputs, the sum over rows split over `splits` CTAs.
struct DxConfig {
  static constexpr int kStageRows = 64;  // rows_per_split is a multiple of it
  static constexpr int kRaggedTokens = 32;

  Kernel kernel = Kernel::kTensorCores;
  int tokens = 0, columns = 0;
  int64_t splits = 1, rows_per_split = 0;
};

// Tile: the fewest tokens that hold m, to decode each weight once up to 64.
//
// Splits: as many as the device holds CTAs, if that pays. A model of an H100, not a measurement: a stage of 64 rows
// takes a CTA 640 cycles (issue: 8 warps x 320 instructions over 4 schedulers), and the last CTA of a tile adds up a
// split of 64 tokens x 256 columns (64 KB from L2, 64 bytes a cycle) in 1000, of fewer tokens in proportion. The fewest
// splits within a twentieth of the best are taken: the model is no better than that, and each split is more work in
// all.
inline DxConfig dx_config(int64_t m, int64_t n, int64_t k, Kernel kernel, const Device& device) {
  constexpr int64_t kStageCycles = 640, kSplitCycles = 1000;
  const bool exact = kernel == Kernel::kExact, ragged = kernel == Kernel::kRagged;
  DxConfig c;
  c.kernel = kernel;
  c.columns = exact ? 128 : 256;
  c.tokens = exact ? 16 : ragged ? DxConfig::kRaggedTokens : m <= 8 ? 8 : m <= 16 ? 16 : m <= 32 ? 32 : 64;
  const int64_t tiles = ceil_div(m, c.tokens) * ceil_div(k, c.columns);
  const int64_t stages = std::max<int64_t>(ceil_div(n, DxConfig::kStageRows), 1);
  const int64_t ctas_per_sm = exact ? 3 : c.tokens <= 16 ? 2 : 1;
  const int64_t to_fill = std::clamp<int64_t>(device.sm_count * ctas_per_sm / std::max<int64_t>(tiles, 1), 1, stages);
  const auto cycles = [&](int64_t splits) {
    return ceil_div(stages, splits) * kStageCycles + (splits > 1 ? splits * kSplitCycles * c.tokens / 64 : 0);
  };
  int64_t best = cycles(1);
  for (int64_t s = 2; s <= to_fill; ++s) best = std::min(best, cycles(s));
  int64_t splits = 1;
  while (20 * cycles(splits) > 21 * best) ++splits;
  const int64_t stages_per_split = ceil_div(stages, splits);
  c.rows_per_split = stages_per_split * DxConfig::kStageRows;
  c.splits = ceil_div(stages, stages_per_split);
  return c;
}

// LoRA's weight gradients: a CTA makes 64 columns x `ranks`, the sum over tokens split over `splits` CTAs.
struct DLoraConfig {
  Kernel kernel = Kernel::kTensorCores;
  int64_t ranks = 16, splits = 1, tokens_per_split = 0;
};

// Ranks: few enough for the accumulators (64 ranks are 128 registers), many enough to read x and dy once. Splits: what
// fills the device, two CTAs an SM, as long as each of a CTA's eight warps has eight steps of 16 tokens.
inline DLoraConfig dlora_config(int64_t m, int64_t n, int64_t k, int64_t rank, Kernel kernel, const Device& device) {
  constexpr int64_t kTokens = 8 * 16;  // that the warps of a CTA take at once
  DLoraConfig c;
  c.kernel = kernel;
  c.ranks = kernel == Kernel::kExact || rank <= 16 ? 16 : rank <= 32 ? 32 : 64;
  const int64_t tiles = (ceil_div(k, 64) + ceil_div(n, 64)) * ceil_div(rank, c.ranks);
  const int64_t to_fill = std::max<int64_t>(2 * device.sm_count / std::max<int64_t>(tiles, 1), 1);
  const int64_t splits = std::clamp<int64_t>(ceil_div(m, 8 * kTokens), 1, to_fill);
  c.tokens_per_split = ceil_div(ceil_div(m, splits), kTokens) * kTokens;
  c.splits = ceil_div(m, c.tokens_per_split);
  return c;
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

// The forward's tiles on tensor cores, named by how many tokens they take (cuda/launch/linear_nf4.cu has their shapes).
enum class LinearTileSize { k8, k16, k32, k64 };

// The widest tile, which wants 137 KB of shared memory, where a device has it: then w is decoded once for 64 tokens.
inline constexpr int kShared64 = 137 * 1024;

constexpr LinearTileSize linear_tile_size(int64_t m, const Device& device) {
  if (m <= 8) return LinearTileSize::k8;
  if (m <= 16) return LinearTileSize::k16;
  return m <= 32 || device.shared_per_cta < kShared64 ? LinearTileSize::k32 : LinearTileSize::k64;
}

// Tokens of the forward's other tile, which takes ragged shapes and float32: the smallest of three that holds m, so
// that few products are with tokens that do not exist. 4 is what one thread multiplies. Not measured on a card.
constexpr int linear_ragged_tokens(int64_t m) { return m <= 4 ? 4 : m <= 16 ? 16 : 64; }

// On tensor cores k is split until the CTAs fill the device once, but never below 16 segments (1024 k), where staging
// the tables would cost as much as the work. Roofline model, to be replaced by measurements on a card.
inline constexpr int64_t kMinSplitSegments = 16;

// Segments of k a CTA takes, a multiple of `stage_segments`.
constexpr int64_t linear_split_segments(int64_t tiles, int64_t segments, int64_t stage_segments, int shared_bytes,
                                        const Device& device) {
  const int64_t ctas_per_sm = std::clamp<int64_t>(device.shared_per_sm / (shared_bytes + 1024), 1, 2);
  const int64_t wanted = std::max<int64_t>(device.sm_count * ctas_per_sm / std::max<int64_t>(tiles, 1), 1);
  const int64_t each = std::max(ceil_div(segments, wanted), kMinSplitSegments);
  return ceil_div(each, stage_segments) * stage_segments;
}

}  // namespace qlora::cuda
