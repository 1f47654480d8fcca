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

// dX: tiles of `tokens` x `columns` outputs, the sum over rows split over `splits` CTAs.
struct DxConfig {
  static constexpr int kStageRows = 64;  // rows_per_split is a multiple of it
  static constexpr int kRaggedTokens = 32;

  bool ragged = false;
  int tokens = 0, columns = 0;
  int64_t splits = 1, rows_per_split = 0;
};

// Tile: the fewest tokens that hold m, to decode each weight once up to 64.
//
// Splits: what fills the device with the CTAs that fit an SM at once, but no more than pay off. From the roofline model
// of an H100, not a measurement: a stage of 64 rows takes a CTA about 900 cycles, and adding up one more split of 64
// tokens x 256 columns (64 KB through L2) about 1000, in proportion to the tokens; the time of stages / s + s * tokens
// / 64 is least at s = sqrt(stages * 64 / tokens).
inline DxConfig dx_config(int64_t m, int64_t n, int64_t k, bool exact, bool ragged, const Device& device) {
  DxConfig c;
  c.ragged = ragged && !exact;
  c.columns = exact ? 128 : 256;
  c.tokens = exact ? 16 : ragged ? DxConfig::kRaggedTokens : m <= 8 ? 8 : m <= 16 ? 16 : m <= 32 ? 32 : 64;
  const int64_t tiles = ceil_div(m, c.tokens) * ceil_div(k, c.columns);
  const int64_t stages = ceil_div(n, DxConfig::kStageRows);
  const int64_t ctas_per_sm = exact ? 4 : c.tokens <= 16 ? 2 : 1;
  const int64_t to_fill = std::max<int64_t>(device.sm_count * ctas_per_sm / std::max<int64_t>(tiles, 1), 1);
  int64_t worthwhile = 1;
  while ((worthwhile + 1) * (worthwhile + 1) * c.tokens <= stages * 64) ++worthwhile;
  const int64_t stages_per_split = std::max<int64_t>(ceil_div(stages, std::min(to_fill, worthwhile)), 1);
  c.rows_per_split = stages_per_split * DxConfig::kStageRows;
  c.splits = std::max<int64_t>(ceil_div(stages, stages_per_split), 1);
  return c;
}

// LoRA's weight gradients: a CTA makes 64 columns x `ranks`, the sum over tokens split over `splits` CTAs.
struct DLoraConfig {
  int64_t ranks = 16, splits = 1, tokens_per_split = 0;
};

// Ranks: few enough for the accumulators (64 ranks are 128 registers), many enough to read x and dy once. Splits: what
// fills the device, two CTAs an SM, as long as each of a CTA's eight warps has eight steps of 16 tokens.
inline DLoraConfig dlora_config(int64_t m, int64_t n, int64_t k, int64_t rank, bool exact, const Device& device) {
  constexpr int64_t kTokens = 8 * 16;  // that the warps of a CTA take at once
  DLoraConfig c;
  c.ranks = exact || rank <= 16 ? 16 : rank <= 32 ? 32 : 64;
  const int64_t tiles = (ceil_div(k, 64) + ceil_div(n, 64)) * ceil_div(rank, c.ranks);
  const int64_t to_fill = std::max<int64_t>(2 * device.sm_count / std::max<int64_t>(tiles, 1), 1);
  const int64_t splits = std::clamp<int64_t>(ceil_div(m, 8 * kTokens), 1, to_fill);
  c.tokens_per_split = ceil_div(ceil_div(m, splits), kTokens) * kTokens;
  c.splits = ceil_div(m, c.tokens_per_split);
  return c;
}

}  // namespace qlora::cuda
