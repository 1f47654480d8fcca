// Chooses our own GEMM on a decoded weight (launch/sm80/linear_gemm.cu), how the sums of its tiles are cut, and its
// panels, for many tokens. No number here was measured on a card: they come from a model.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpp/format/problem.h"
#include "cuda/tuning/choice.h"
#include "cuda/tuning/device.h"
#include "cuda/tuning/library.h"
#include "cuda/tuning/splits.h"

namespace qlora::cuda::gemm {

inline constexpr int64_t kTokens = 128, kColumns = 256;  // of a tile, which one CTA per SM computes
inline constexpr int64_t kTerms = 32;                    // of a stage of its sum
inline constexpr int kSharedBytes = 96 * 1024;

// Rows of 16 bits are copied in pieces of 16 bytes, and their terms counted in 32 bits.
constexpr bool accepts_sizes(DType dtype, const Weight& w, const Device& device) {
  return is_16_bit(dtype) && w.n > 0 && w.k > 0 && w.k % 8 == 0 && std::max(w.n, w.k) <= INT32_MAX &&
         device.arch >= 80 && device.shared_per_cta >= kSharedBytes;
}
constexpr bool accepts(const LinearProblem& p, const Device& device) { return accepts_sizes(p.dtype, p.w, device); }
constexpr bool accepts(const LinearDxProblem& p, const Device& device) {
  return accepts_sizes(p.dtype, p.w, device) && p.w.n % 8 == 0;
}

// ---- cuts ----
//
// Where tiles would leave SMs idle, the sums of the last tiles are cut into parts, which other CTAs compute (stream-K).
// A float32 sum depends on where it is cut. So the cuts follow from the problem's sizes and the architecture alone.
// They are those that take the least time on the architecture's card in kCardRates, whatever the device's number of
// SMs. The bits then depend neither on the number of CTAs nor on the panels.

// In stages, each of which takes an A100 0.9 us by the rate below: starting a part and storing its sums, 128 KB at the
// 64 bytes per cycle that L2 has for an SM; and reading them again to add them up.
inline constexpr int64_t kPartStages = 2, kAddStages = 2;

struct Cuts {
  int64_t whole;  // columns of the output whose sums are whole. The sums of the following ones are cut
  int64_t parts;  // of a cut sum; 1 if there is none
};

constexpr int64_t stages(int64_t inner) { return ceil_div(inner, kTerms); }
constexpr int64_t part_stages(int64_t inner, int64_t parts) { return ceil_div(stages(inner), parts); }

// The time of tiles in stages, if CTAs take whole tiles first. In the last wave of these, some SMs are `busy`. The
// others go on with parts, of which each computes `beside` until the wave ends, or one more across that end.
constexpr int64_t tiles_time(int64_t whole, int64_t cut, int64_t parts, int64_t inner, int64_t sms) {
  const int64_t each = stages(inner), waves = whole / sms * each, busy = whole % sms;
  if (cut == 0) return waves + (busy > 0 ? each : 0);
  const int64_t part = part_stages(inner, parts) + kPartStages, units = cut * parts, add = parts * kAddStages;
  if (busy == 0) return waves + ceil_div(units, sms) * part + add;
  const int64_t beside = each / part, left = units - (sms - busy) * beside;
  const int64_t after_wave = each + ceil_div(std::max<int64_t>(left, 0), sms) * part;
  const int64_t across_its_end = (beside + ceil_div(std::max<int64_t>(left + busy, 0), sms)) * part;
  return waves + std::min(after_wave, std::max(across_its_end, each)) + add;
}

// Whole columns of tiles fill waves of SMs, and the rest is cut.
constexpr Cuts cuts(const PanelProduct& p, const Device& device) {
  constexpr int64_t kLeastStages = 8, kMostParts = 16;
  const int64_t sms = card_of(device).sm_count, token_tiles = ceil_div(p.m, kTokens);
  const int64_t tiles = token_tiles * ceil_div(p.columns, kColumns);
  const int64_t whole_columns = tiles / sms * sms / token_tiles, whole = token_tiles * whole_columns;
  const int64_t limit = std::clamp<int64_t>(stages(p.inner) / kLeastStages, 1, kMostParts);
  const int64_t parts = cheapest_splits(limit, [&](int64_t parts) {
    return parts == 1 ? tiles_time(tiles, 0, 1, p.inner, sms) : tiles_time(whole, tiles - whole, parts, p.inner, sms);
  });
  if (parts == 1) return {p.columns, 1};
  return {whole_columns * kColumns, ceil_div(stages(p.inner), part_stages(p.inner, parts))};
}

// ---- panels ----

// The same for panels of `panel` columns, each of which is a launch of its own.
constexpr int64_t panels_stages(const PanelProduct& p, int64_t panel, const Cuts& cuts, const Device& device) {
  const int64_t token_tiles = ceil_div(p.m, kTokens), panels = p.columns / panel;
  const auto of = [&](int64_t first, int64_t columns) {
    const int64_t whole = std::clamp<int64_t>(cuts.whole - first, 0, columns);
    return tiles_time(token_tiles * ceil_div(whole, kColumns), token_tiles * ceil_div(columns - whole, kColumns),
                      cuts.parts, p.inner, std::max(device.sm_count, 1));
  };
  const int64_t whole = std::min(cuts.whole / panel, panels);  // panels without cuts
  const int64_t mixed = whole < panels ? of(whole * panel, panel) : 0;
  const int64_t cut = whole < panels ? panels - whole - 1 : 0;
  return whole * of(0, std::min(panel, cuts.whole)) + mixed + cut * of(cuts.whole, panel) +
         of(panels * panel, p.columns % panel);
}

// The nanoseconds of a stage: tiles run at 0.8 of the data sheet's rate.
constexpr double stage_time(const Device& device) {
  return static_cast<double>(2 * kTokens * kColumns * kTerms * device.sm_count) / (0.8 * rates_of(device).flops);
}

// The nanoseconds that panels of `panel` columns take, by a model: each is two launches. Panels that do not fit in half
// of L2 are written to memory, and read while tiles are multiplied.
constexpr double panels_time(const PanelProduct& p, int64_t panel, const Cuts& cuts, const Device& device) {
  const double memory = time_outside_l2(p, panel, device) / 2;  // of writing, and of reading
  const double multiplied = static_cast<double>(panels_stages(p, panel, cuts, device)) * stage_time(device);
  return std::max(multiplied, memory) + memory + static_cast<double>(2 * ceil_div(p.columns, panel)) * kLaunchTime;
}

constexpr int64_t panel_columns(const PanelProduct& p, int64_t step, const Device& device) {
  const Cuts cut = cuts(p, device);
  return fastest_panel(p, step, device, [&](int64_t panel) { return panels_time(p, panel, cut, device); });
}

// LoRA and bias are added in the accumulators, so that there are no sums in memory.
template <class Problem>
constexpr Config config(const Problem& p, const Device& device, const Config& wish) {
  const int64_t step = library::panel_step(p);
  const PanelProduct whole = library::product(p);
  Config result = library::panels(whole.columns, step, panel_columns(whole, step, device), wish);
  result.splits = cuts(whole, device).parts;
  result.ctas = wish.ctas;
  return result;
}

// ---- when the GEMM is ahead of the fused kernels and of the library ----
//
// The GEMM runs at 0.8 of an A100's dense rate and at 0.88 of a GeForce card's while all SMs have work, and each panel
// costs its decode and two launches.
struct Ahead {
  int arch;        // for this architecture and later ones, up to the next row
  int64_t tokens;  // the GEMM is ahead of the fused kernels from this number on,
  int64_t fill;    // if the SMs have work for at least so many percent of the time of a panel of all columns
};
inline constexpr Ahead kAhead[] = {
    {80, 128, 50},      // A100: the fused kernels run at 0.6 of the dense rate; bnb 128 (library.h)
    {86, 2048, 85},     // RTX 3090, 4090, L40S: 5% ahead of the fused kernels per token; model 1100 for the decode
    {90, kNever, 100},  // H100, B200: the library does not use mma.sync, which is slower there
    {120, 2048, 85},    // RTX 5090: like the 4090; model 1300
};

// Where the GEMM takes a problem, it leaves none to the library: it adds LoRA and bias without float32 sums in memory,
// and cuts sums where the library's smaller tiles would fill the card.
template <class Problem>
constexpr bool is_ahead(const Problem& p, const Device& device) {
  Ahead ahead = kAhead[0];
  for (const Ahead& a : kAhead) {
    if (device.arch >= a.arch) ahead = a;
  }
  if (ahead.tokens == kNever) return false;
  if (library::is_ahead(p, device)) return true;
  if (p.m < ahead.tokens) return false;
  const PanelProduct whole = library::product(p);
  const int64_t time = panels_stages(whole, whole.columns, cuts(whole, device), device);
  return 100 * whole.m * whole.columns * stages(whole.inner) >=
         ahead.fill * time * device.sm_count * kTokens * kColumns;
}

}  // namespace qlora::cuda::gemm
