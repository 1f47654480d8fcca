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
  int index = 0;
  int sm_count = 0;
  int arch = 0;            // 10 * major + minor
  int shared_per_cta = 0;  // bytes a CTA may opt in to
  int l2_bytes = 0;
};

// What a linear operator runs with. QLORA_PRINT_KERNELS=1 shows it, with the parameters below.
enum class Kernel {
  kTensorCores,  // bfloat16 and float16 of regular shape and alignment
  kHopper,       // the same, on compute capability 9.0 (cuda/tuning_sm90.h)
  kRagged,       // bfloat16 and float16 of any other: the forward without tensor cores, dX and LoRA's gradients on them
  kExact,        // float32: every product a float32 FMA, any shape
  kLibrary,      // many tokens: w is decoded, and torch's library multiplies
};

constexpr const char* kernel_name(Kernel kernel) {
  constexpr const char* kNames[] = {"tensor_cores", "sm90", "ragged", "exact", "library"};
  return kNames[static_cast<int>(kernel)];
}

// Without the library. What is `ragged` differs from operator to operator; their launchers say.
constexpr Kernel fused_kernel(DType dtype, bool ragged) {
  return dtype == DType::kFloat32 ? Kernel::kExact : ragged ? Kernel::kRagged : Kernel::kTensorCores;
}

// The codec's kernels: as many CTAs as the device holds at once, because a CTA stages its tables once and then strides
// over the tensor.
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

// The fewest parts that a sum is split into whose `cost(parts)` is within a twentieth of the best of 1 .. limit: the
// models below are no better than that, and each part is more work in all.
template <class Cost>
constexpr int64_t cheapest_splits(int64_t limit, const Cost& cost) {
  int64_t best = cost(1);
  for (int64_t s = 2; s <= limit; ++s) best = std::min(best, cost(s));
  int64_t splits = 1;
  while (20 * cost(splits) > 21 * best) ++splits;
  return splits;
}

// dX: tiles of `tokens` x `columns` outputs, the sum over rows split over `splits` CTAs.
struct DxConfig {
  static constexpr int kStageRows = 64;  // rows_per_split is a multiple of it
  static constexpr int kRaggedTokens = 32;
  static constexpr int kSmallBlockTokens = 16;  // of the ragged kernel, whose shared memory then holds more scales

  Kernel kernel = Kernel::kTensorCores;
  int tokens = 0, columns = 0;
  int64_t splits = 1, rows_per_split = 0;
};

// Tile: the fewest tokens that hold m, to decode each weight once up to 64.
constexpr DxConfig dx_tile(int64_t m, Kernel kernel, int64_t block_size = 64) {
  DxConfig c;
  c.kernel = kernel;
  c.columns = kernel == Kernel::kExact ? 128 : 256;
  c.tokens = kernel == Kernel::kExact    ? 16
             : kernel == Kernel::kRagged ? block_size < 32 ? DxConfig::kSmallBlockTokens : DxConfig::kRaggedTokens
             : m <= 8                    ? 8
             : m <= 16                   ? 16
             : m <= 32                   ? 32
                                         : 64;
  return c;
}

// Splits of a tile's sum, where an SM holds `ctas_per_sm` of its CTAs. A model of an H100, not a measurement: a stage
// of 64 rows takes a CTA 640 cycles (issue: 8 warps x 320 instructions over 4 schedulers), its tables another one; CTAs
// come in waves of as many as the device holds; and the last CTA of a tile adds up a split of 64 tokens x 256 columns
// (64 KB from L2, 64 bytes a cycle) in 1000, of fewer tokens in proportion.
constexpr DxConfig dx_config(DxConfig c, int64_t m, int64_t n, int64_t k, int ctas_per_sm, const Device& device) {
  constexpr int64_t kStageCycles = 640, kSplitCycles = 1000;
  const int64_t tiles = ceil_div(m, c.tokens) * ceil_div(k, c.columns);
  const int64_t stages = std::max<int64_t>(ceil_div(n, DxConfig::kStageRows), 1);
  const int64_t slots = std::max<int64_t>(int64_t{device.sm_count} * ctas_per_sm, 1);
  const int64_t splits = cheapest_splits(std::min(stages, slots), [&](int64_t s) {
    return ceil_div(tiles * s, slots) * (ceil_div(stages, s) + 1) * kStageCycles +
           (s > 1 ? s * kSplitCycles * c.tokens / 64 : 0);
  });
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

// Few enough for the accumulators (64 ranks are 128 registers), many enough to read x and dy once.
constexpr int64_t dlora_ranks(int64_t rank, Kernel kernel) {
  return kernel == Kernel::kExact || rank <= 16 ? 16 : rank <= 32 ? 32 : 64;
}

// Splits: what fills the device, where an SM holds `ctas_per_sm`, as long as each of a CTA's eight warps has eight
// steps of 16 tokens.
constexpr DLoraConfig dlora_config(int64_t m, int64_t n, int64_t k, int64_t rank, Kernel kernel, int ctas_per_sm,
                                   const Device& device) {
  constexpr int64_t kTokens = 8 * 16;  // that the warps of a CTA take at once
  DLoraConfig c;
  c.kernel = kernel;
  c.ranks = dlora_ranks(rank, kernel);
  const int64_t tiles = (ceil_div(k, 64) + ceil_div(n, 64)) * ceil_div(rank, c.ranks);
  const int64_t slots = int64_t{device.sm_count} * ctas_per_sm;
  const int64_t to_fill = std::max<int64_t>(slots / std::max<int64_t>(tiles, 1), 1);
  const int64_t splits = std::clamp<int64_t>(ceil_div(m, 8 * kTokens), 1, to_fill);
  c.tokens_per_split = ceil_div(ceil_div(m, splits), kTokens) * kTokens;
  c.splits = ceil_div(m, c.tokens_per_split);
  return c;
}

// ---- fused kernel, or dequantize and a library GEMM ----
//
// Both ways cost a time in proportion to n * k. Fused, each token costs its multiply-adds at what mma.sync reaches; the
// library costs one decode of the weight besides, but its tokens are cheaper. None of these numbers was measured with
// these kernels: each lies between two others, and says which.
struct Crossover {
  int arch;        // of this one and above, up to the next row
  int64_t tokens;  // from which the library is chosen
};
inline constexpr int64_t kNever = INT64_MAX;

// `model`: decoding 2.63 bytes an element at 0.9 of the data sheet's memory rate, against the difference of a token's
// multiply-adds at 0.6 of the mma.sync rate and at 0.75 of the dense rate. `bnb`: where bitsandbytes 0.50 leaves its
// own mma.sync kernel, by its calibration on cards (its dispatch table), at many CTAs.
inline constexpr Crossover kCrossovers[] = {
    {80, 256},      // A100: bnb 128, model 640
    {86, kNever},   // A40, RTX 3090, 4090, L40S: the tensor cores are the bound and hide the decode; bnb 256
    {90, 128},      // H100: bnb 64, model 320
    {100, 64},      // B200, B300: bnb 32, model 64
    {110, 512},     // Thor: model 1000 at its memory's rate; bnb 256 on GB10
    {120, kNever},  // RTX 5090, RTX PRO 6000: as the 4090, model 1200
};

// Shapes and types that the tensor core kernels do not take (float32, k that is no multiple of 64, blocks of 32) decode
// for every 64 tokens again with plain arithmetic: the library is ahead as soon as that happens twice.
constexpr int64_t library_crossover(DType dtype, int64_t k, int64_t block_size, const Device& device) {
  constexpr int64_t kTokensPerDecode = 64;
  if (dtype == DType::kFloat32 || k % 64 != 0 || block_size < 64) return kTokensPerDecode + 1;
  const Crossover* best = kCrossovers;
  for (const Crossover& c : kCrossovers) {
    if (device.arch >= c.arch) best = &c;
  }
  return best->tokens;
}

// For the library the weight is decoded a panel at a time, as much of it as stays in half of L2 beside the panel's
// float32 sums, where there are such: nothing but outputs then has to go to memory. `columns` of the output, `inner`
// terms each. A panel has 512 columns at least, because a GEMM's own tiles (128 x 256) no longer fill a device with
// fewer, and a multiple of `step`; panels are equal, so that the last is no remainder.
constexpr int64_t library_panel_columns(int64_t m, int64_t inner, int64_t columns, int64_t step, bool float32_sums,
                                        DType dtype, const Device& device) {
  const int64_t a_column = std::max<int64_t>(inner * dtype_bytes(dtype) + (float32_sums ? 4 * m : 0), 1);
  const int64_t fit = std::max<int64_t>(device.l2_bytes / 2 / a_column, 512);
  const int64_t each = ceil_div(columns, std::max<int64_t>(ceil_div(columns, fit), 1));
  return std::min(columns, ceil_div(each, step) * step);
}

// The forward's tiles on tensor cores, named by how many tokens they take (cuda/launch/sm80/linear_nf4.cu has their
// shapes).
enum class LinearTileSize { k4, k8, k16, k32, k64 };

// The widest tile, which wants 137 KB of shared memory, where a device has it: then w is decoded once for 64 tokens.
inline constexpr int kShared64 = 137 * 1024;

constexpr LinearTileSize linear_tile_size(int64_t m, const Device& device) {
  if (m <= 4) return LinearTileSize::k4;
  if (m <= 8) return LinearTileSize::k8;
  if (m <= 16) return LinearTileSize::k16;
  return m <= 32 || device.shared_per_cta < kShared64 ? LinearTileSize::k32 : LinearTileSize::k64;
}

// Tokens of the forward's other tile, which takes ragged shapes and float32: the smallest of three that holds m, so
// that few products are with tokens that do not exist. 4 is what one thread multiplies. Not measured on a card.
constexpr int linear_ragged_tokens(int64_t m) { return m <= 4 ? 4 : m <= 16 ? 16 : 64; }

// Segments of k that a CTA of the forward's tensor-core tile takes, a multiple of `stage_segments`, where the device
// holds `slots` CTAs at once. Roofline model, to be replaced by measurements on a card: a CTA's tables cost it as much
// as 16 segments (1024 k), so it takes no fewer; CTAs come in waves; and the last CTA of a tile adds up 64 tokens of a
// split in the time of a segment. No more than `most` splits.
constexpr int64_t linear_split_segments(int64_t tiles, int64_t segments, int64_t stage_segments, int64_t tokens,
                                        int64_t slots, int64_t most = INT64_MAX) {
  constexpr int64_t kTables = 16;
  const auto each = [&](int64_t s) { return ceil_div(ceil_div(segments, s), stage_segments) * stage_segments; };
  const int64_t limit = std::clamp<int64_t>(segments / kTables, 1, std::max<int64_t>(std::min(slots, most), 1));
  return each(cheapest_splits(limit, [&](int64_t s) {
    return 64 * ceil_div(tiles * s, slots) * (each(s) + kTables) + (s > 1 ? s * tokens : 0);
  }));
}

// Tokens that a tile is chosen for where `experts` have `tokens` together, how many each only the device knows: twice
// the average, since the experts that most tokens go to have more than it. Not measured on a card.
constexpr int64_t grouped_tile_tokens(int64_t tokens, int64_t experts) {
  return std::min(tokens, ceil_div(2 * tokens, std::max<int64_t>(experts, 1)));
}

// CTAs, at most `most`, that share the k of LoRA's low-rank products, where `ctas` would make them without: few tokens
// leave the device empty. The 16 warps of a CTA take 512 k at a time; a split of less than two such turns would cost
// more in all than it saves in waiting.
constexpr int64_t low_rank_splits(int64_t ctas, int64_t k, int64_t most, const Device& device) {
  constexpr int64_t kTwoTurns = 1024;
  return std::clamp<int64_t>(std::min(ceil_div(k, kTwoTurns), device.sm_count / std::max<int64_t>(ctas, 1)), 1, most);
}

}  // namespace qlora::cuda
