// Chooses our own GEMM on the decoded weights of experts (launch/sm80/grouped_linear_gemm.cu), and its panels, which
// hold the same columns of every expert's output. Where a GEMM of single weights might be cuBLAS, this one is always
// ours: cuBLAS takes each expert's tokens from the host, which does not know them. No number here was measured on a
// card: they come from a model, in which half of each expert's last tile is empty.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpp/format/grouped.h"
#include "cuda/tuning/choice.h"
#include "cuda/tuning/codec.h"
#include "cuda/tuning/device.h"
#include "cuda/tuning/gemm.h"
#include "cuda/tuning/generic.h"
#include "cuda/tuning/library.h"
#include "cuda/tuning/sm80.h"

namespace qlora::cuda::gemm {

template <class Problem>
constexpr bool accepts(const Grouped<Problem>& p, const Device& device) {
  return accepts(p.stack, device) && p.experts > 0 && p.experts <= kMostDecodedExperts;
}

// Products per nanosecond on mma.sync. H100, B200 and Thor, whose data sheets' rates are those of other instructions,
// have as many per cycle and SM as an A100.
constexpr double mma_sync_flops(const Device& device) {
  constexpr double kPerCycle = 2048;
  if (device.arch < 90 || device.arch >= 120) return rates_of(device).flops;
  const int clock_khz = device.clock_khz > 0 ? device.clock_khz : card_of(device).clock_khz;
  return kPerCycle * device.sm_count * clock_khz / 1e6;
}

// The nanoseconds of tiles of `tokens` x `width` outputs for all `columns`, in waves of one per SM, at `flops`.
template <class Problem>
constexpr double tiles_time(const Grouped<Problem>& p, int64_t tokens, int64_t width, int64_t columns, double flops,
                            const Device& device) {
  const int64_t sms = std::max(device.sm_count, 1);
  const int64_t token_tiles = ceil_div(p.stack.m + p.experts * tokens / 2, tokens);
  const int64_t waves = ceil_div(token_tiles * ceil_div(columns, width), sms);
  return static_cast<double>(waves * sms * 2 * tokens * width * library::product(p.stack).inner) / flops;
}

// The nanoseconds that panels of `panel` columns take, as in gemm.h.
template <class Problem>
constexpr double panels_time(const Grouped<Problem>& p, const PanelProduct& all, int64_t panel, const Device& device) {
  const auto multiplied = [&](int64_t columns) {
    return tiles_time(p, kTokens, kColumns, columns, 0.8 * mma_sync_flops(device), device);
  };
  const double tiles = static_cast<double>(all.columns / panel) * multiplied(panel) + multiplied(all.columns % panel);
  const double memory = time_outside_l2(all, panel, device) / 2;  // of writing, and of reading
  const int64_t launches = 2 * ceil_div(all.columns, panel);
  return std::max(tiles, memory) + memory + static_cast<double>(launches) * kLaunchTime;
}

// The product whose panels' columns take as much memory as those of all experts.
template <class Problem>
constexpr PanelProduct product_of_all(const Grouped<Problem>& p) {
  PanelProduct all = library::product(p.stack);
  all.inner *= p.experts;
  return all;
}

template <class Problem>
constexpr Config config(const Grouped<Problem>& p, const Device& device, const Config& wish) {
  const int64_t step = library::panel_step(p.stack);
  const PanelProduct all = product_of_all(p);
  const int64_t best = fastest_panel(all, step, device, [&](int64_t n) { return panels_time(p, all, n, device); });
  return library::panels(all.columns, step, best, wish);
}

// ---- when the GEMM is ahead of the fused kernels ----

// The tile of the fused kernel that runs otherwise, and whether it multiplies on tensor cores.
struct Fused {
  Config tile;
  bool on_tensor_cores;
};
constexpr Fused fused(const Grouped<LinearProblem>& p, const Device& device) {
  if (sm80::accepts(p, device)) return {sm80::config(p, device, {}), true};
  return {generic::config(p, device, {}), false};
}
constexpr Fused fused(const Grouped<LinearDxProblem>& p, const Device& device) {
  if (is_wide(p.stack.w.code)) return {generic::exact_config(p, device, {}), false};
  return {sm80::accepts(p, device) ? sm80::config(p, device, {}) : sm80::ragged_config(p, device, {}), true};
}

// The part of mma.sync's rate that fused kernels reach: on A100 and newer cards for servers 0.6, which decoding limits,
// and on GeForce cards 5% less than the GEMM (kAhead). Products in float32 reach half of their rate.
constexpr double fused_flops(bool on_tensor_cores, const Device& device) {
  if (!on_tensor_cores) return 0.5 * rates_of(device).float32_flops;
  const bool for_servers = device.arch == 80 || (device.arch >= 90 && device.arch < 120);
  return (for_servers ? 0.6 : 0.8 / 1.05) * mma_sync_flops(device);
}

// On tensor cores, a tile takes at least the time of kLeastTokens tokens, because it decodes its weights.
template <class Problem>
constexpr double fused_time(const Grouped<Problem>& p, const Device& device) {
  constexpr int64_t kLeastTokens = 32;
  const auto [tile, on_tensor_cores] = fused(p, device);
  double flops = fused_flops(on_tensor_cores, device);
  if (on_tensor_cores && tile.tokens < kLeastTokens) flops *= static_cast<double>(tile.tokens) / kLeastTokens;
  const int64_t width = std::max(tile.rows, tile.columns);  // it has one of the two
  return tiles_time(p, tile.tokens, width, library::product(p.stack).columns, flops, device);
}

// Both read the packed weights, but only the GEMM before it multiplies. LoRA and bias are left out, so that a layer
// runs the same kernel without its adapter. Hundreds of experts would take much memory even for the smallest panel.
template <class Problem>
constexpr bool is_ahead(const Grouped<Problem>& p, const Device& device) {
  constexpr int64_t kMostBytes = 256 << 20;
  const PanelProduct all = product_of_all(p);
  const double packed =
      kPackedBytes * static_cast<double>(all.inner * all.columns) / (kMemoryRate * rates_of(device).bytes);
  const int64_t panel = config(p, device, {}).panel;
  if (panel * all.column_bytes() > kMostBytes) return false;
  return panels_time(p, all, panel, device) + packed < std::max(fused_time(p, device), packed);
}

}  // namespace qlora::cuda::gemm
