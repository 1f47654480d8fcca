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

// The nanoseconds that panels of `panel` columns take, by a model, not a measurement: each is two launches, and tiles
// run at 0.8 of the data sheet's rate.
constexpr double panels_time(const PanelProduct& p, int64_t panel, const Device& device) {
  const int64_t of_tiles = waves(p.m, p.columns, panel, device) * device.sm_count * kTokens * kColumns;
  return static_cast<double>(2 * of_tiles * p.inner) / (0.8 * rates_of(device).flops) +
         static_cast<double>(2 * ceil_div(p.columns, panel)) * kLaunchTime + time_outside_l2(p, panel, device);
}

constexpr int64_t panel_columns(const PanelProduct& p, int64_t step, const Device& device) {
  return fastest_panel(p, step, device, [&](int64_t panel) { return panels_time(p, panel, device); });
}

// LoRA and bias are added in the accumulators.
template <class Problem>
constexpr PanelProduct product(const Problem& p) {
  PanelProduct result = library::product(p);
  result.float32_sums = false;
  return result;
}

template <class Problem>
constexpr Config config(const Problem& p, const Device& device, const Config& wish) {
  const int64_t step = library::panel_step(p);
  return library::panels(product(p).columns, step, panel_columns(product(p), step, device), wish);
}

// When the GEMM is ahead of the fused kernels. None of these numbers was measured. They come from a model: the GEMM
// runs at 0.8 of an A100's dense rate and at 0.88 of a GeForce card's while its waves are full, and each panel costs
// its decode and two launches.
struct Ahead {
  int arch;        // for this architecture and later ones, up to the next row
  int64_t tokens;  // from this number on,
  int64_t fill;    // if at least so many percent of the SMs in all waves have a tile
};
inline constexpr Ahead kAhead[] = {
    {80, 256, 60},      // A100: the fused kernels run at 0.6 of the dense rate
    {86, 2048, 85},     // RTX 3090, 4090, L40S: 5% ahead of the fused kernels per token; model 1100 for the decode
    {90, kNever, 100},  // H100, B200: the library does not use mma.sync, which is slower there
    {120, 2048, 85},    // RTX 5090: like the 4090; model 1300
};

// Where the library would be next, the GEMM has to be faster than that. The library has smaller tiles, which fill a
// card better, but it writes float32 sums of LoRA and bias to memory. They are always counted, so that a layer runs the
// same kernel without its adapter.
template <class Problem>
constexpr bool is_ahead(const Problem& p, const Device& device) {
  Ahead ahead = kAhead[0];
  for (const Ahead& a : kAhead) {
    if (device.arch >= a.arch) ahead = a;
  }
  const bool library_is_next = library::is_ahead(p, device);
  if (ahead.tokens == kNever || (!library_is_next && p.m < ahead.tokens)) return false;
  const int64_t panel = config(p, device, {}).panel, columns = product(p).columns;
  if (library_is_next) {
    PanelProduct theirs = library::product(p);
    theirs.float32_sums = true;
    const int64_t their_panel = library_panel_columns(theirs, library::panel_step(p), device);
    return panels_time(product(p), panel, device) <= library_time(theirs, their_panel, device);
  }
  const int64_t slots = waves(p.m, columns, panel, device) * device.sm_count;
  return 100 * p.m * columns >= ahead.fill * slots * kTokens * kColumns;
}

}  // namespace qlora::cuda::gemm
