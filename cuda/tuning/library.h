// Chooses between the fused kernels and a library's GEMM on a decoded weight.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "cpp/format/problem.h"
#include "cuda/tuning/choice.h"
#include "cuda/tuning/device.h"

namespace qlora::cuda {

// The time of both is proportional to n * k. In the fused kernels, each token costs its multiply-adds at the rate that
// mma.sync reaches. The library also decodes the weight once, but then each token costs less. None of these numbers was
// measured with these kernels: each is chosen between two estimates, which its comment states.
struct Crossover {
  int arch;        // for this architecture and later ones, up to the next row
  int64_t tokens;  // the library is chosen from this number on
};
inline constexpr int64_t kNever = INT64_MAX;

// `model` weighs decoding (2.63 bytes per element at 0.9 of the data sheet's memory rate) against the difference
// between a token's multiply-adds at 0.6 of the mma.sync rate and at 0.75 of the dense rate. `bnb` is the number of
// tokens from which bitsandbytes 0.50 leaves its own mma.sync kernel, according to its dispatch table calibrated on
// cards, at many CTAs.
inline constexpr Crossover kCrossovers[] = {
    {75, 17},       // T4: model 18 against float32 FMA at half of its 8.1 TFLOP/s; from 17 tokens on, a tile has 64
    {80, 256},      // A100: bnb 128, model 640
    {86, kNever},   // A40, RTX 3090, 4090, L40S: limited by the tensor cores, which hide the decode; bnb 256
    {90, 128},      // H100: bnb 64, model 320
    {100, 64},      // B200, B300: bnb 32, model 64
    {110, 512},     // Thor: model 1000 at its memory rate; bnb 256 on GB10
    {120, kNever},  // RTX 5090, RTX PRO 6000: like the 4090; model 1200
};

// Kernels without tensor cores (for float32, or k not a multiple of 64), and those that apply a scale or an offset to
// each weight (for blocks of 32, or offsets), decode the weight again for every 64 tokens. Decoding it once is faster
// as soon as they would decode twice. The table's row for 7.5 takes this into account for float16.
inline constexpr int64_t kTokensPerDecode = 64;
constexpr bool decodes_often(DType dtype, int64_t k, int64_t block_size, bool offsets) {
  return dtype == DType::kFloat32 || k % 64 != 0 || block_size < 64 || offsets;
}

constexpr int64_t library_crossover(DType dtype, int64_t k, int64_t block_size, const Device& device,
                                    bool offsets = false) {
  if ((dtype == DType::kFloat32 || has_tensor_core_kernels(device)) && decodes_often(dtype, k, block_size, offsets))
    return kTokensPerDecode + 1;
  const Crossover* best = kCrossovers;
  for (const Crossover& c : kCrossovers) {
    if (device.arch >= c.arch) best = &c;
  }
  return best->tokens;
}

// T4's 4 MB of L2 hold no panel of a large weight, so its panels are sized for waves: 1280 columns are 10 tiles of 128
// x 128, which fill its 40 SMs for every multiple of 512 tokens.
constexpr int64_t least_panel(const Device& device) { return has_tensor_core_kernels(device) ? 512 : 1280; }

// The library path decodes the weight panel by panel. A panel is as large as fits in half of L2 together with its
// float32 sums, if it has any, so only outputs go to memory. `columns` is the number of output columns, and each sums
// `inner` terms. A panel has at least least_panel columns, because with fewer a GEMM's own tiles (128 x 256) no longer
// fill a device, and a multiple of `step`. Panels have equal sizes, so the last one is not a small remainder.
constexpr int64_t library_panel_columns(int64_t m, int64_t inner, int64_t columns, int64_t step, bool float32_sums,
                                        DType dtype, const Device& device) {
  const int64_t a_column = std::max<int64_t>(inner * dtype_bytes(dtype) + (float32_sums ? 4 * m : 0), 1);
  const int64_t fit = std::max<int64_t>(device.l2_bytes / 2 / a_column, least_panel(device));
  const int64_t each = ceil_div(columns, std::max<int64_t>(ceil_div(columns, fit), 1));
  return std::min(columns, ceil_div(each, step) * step);
}

namespace library {

template <class Problem>
constexpr bool accepts(const Problem& p, const Device&) {
  return p.dtype != DType::kFloat64 && p.w.n > 0 && p.w.k > 0;
}

template <class Problem>
constexpr bool is_ahead(const Problem& p, const Device& device) {
  return p.m >= library_crossover(p.dtype, p.w.k, p.w.scales.block_size, device, has_offsets(p.w));
}

// Sums are float32 if LoRA or bias are added to them.
constexpr bool has_sums(const LinearProblem& p) { return p.lora.rank > 0 || p.bias != nullptr; }
constexpr bool has_sums(const LinearDxProblem& p) { return p.lora.rank > 0; }

inline constexpr int64_t kPanelStep = 256;  // columns: fits a GEMM's tiles and vector accesses

// A panel consists of whole rows of w, which are contiguous. Decoding them is fastest if the panel begins at a multiple
// of the largest block.
constexpr int64_t panel_step(const LinearProblem& p) {
  return std::max(kPanelStep, kMaxBlockSize / std::gcd(kMaxBlockSize, std::max<int64_t>(p.w.k, 1)));
}
constexpr int64_t panel_step(const LinearDxProblem&) { return kPanelStep; }

// A forced panel is rounded up to a whole step, and limited to all columns.
constexpr Config panels(int64_t columns, int64_t step, int64_t best, const Config& wish) {
  return {.panel = wish.panel > 0 ? std::min(columns, ceil_div(wish.panel, step) * step) : best};
}

constexpr Config config(const LinearProblem& p, const Device& device, const Config& wish) {
  const int64_t step = panel_step(p);
  return panels(p.w.n, step, library_panel_columns(p.m, p.w.k, p.w.n, step, has_sums(p), p.dtype, device), wish);
}
constexpr Config config(const LinearDxProblem& p, const Device& device, const Config& wish) {
  const int64_t step = panel_step(p);
  return panels(p.w.k, step, library_panel_columns(p.m, p.w.n, p.w.k, step, has_sums(p), p.dtype, device), wish);
}

}  // namespace library
}  // namespace qlora::cuda
