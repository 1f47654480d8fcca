// Chooses between the fused kernels and a library's GEMM on a decoded weight.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>

#include "cpp/format/problem.h"
#include "cuda/tuning/choice.h"
#include "cuda/tuning/device.h"
#include "cuda/tuning/sm100_mma_sync.h"
#include "cuda/tuning/sm80.h"

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
    {80, kNever},   // A100: our own GEMM (gemm.h) is ahead; bnb 128
    {86, kNever},   // A40, RTX 3090, 4090, L40S: limited by the tensor cores, which hide the decode; bnb 256
    {90, 128},      // H100: bnb 64, model 320
    {100, 64},      // B200, B300: bnb 32, model 64; from there on, by the problem's sizes (is_behind_fused)
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

// Rates per nanosecond, by which the panels below are compared.
struct Rates {
  double flops, float32_flops, bytes;
};
// Those of one card per architecture, from its data sheet, with the SMs and the clock that give them.
struct CardRates {
  int arch;  // for this architecture and later ones, up to the next row
  Rates rates;
  int sm_count, clock_khz;
};
inline constexpr CardRates kCardRates[] = {
    {75, {65e3, 8.1e3, 320}, 40, 1'590'000},      // T4
    {80, {312e3, 19.5e3, 2039}, 108, 1'410'000},  // A100
    {86, {71e3, 35.6e3, 936}, 82, 1'695'000},     // RTX 3090
    {89, {165e3, 82.6e3, 1008}, 128, 2'520'000},  // RTX 4090
    {90, {989e3, 67e3, 3350}, 132, 1'830'000},    // H100
    {100, {2250e3, 80e3, 8000}, 148, 1'850'000},  // B200
    {110, {258e3, 8e3, 273}, 20, 1'575'000},      // Thor
    {120, {209e3, 105e3, 1792}, 170, 2'407'000},  // RTX 5090
};
// Of Thor and GB10, whose clock of the memory drivers do not report alike: 256 bits of LPDDR5X at 8533 MT/s.
inline constexpr double kIntegratedBytes = 273;

// The card of the device's architecture.
constexpr const CardRates& card_of(const Device& device) {
  const CardRates* card = kCardRates;
  for (const CardRates& c : kCardRates) {
    if (device.arch >= c.arch) card = &c;
  }
  return *card;
}

// The rates of a device: its SMs and clock scale those of its architecture's card, and its own memory replaces that
// card's. Attributes do not tell whether tensor cores add float32 sums at half the rate, as on GeForce cards but not on
// A10, L4 or L40S, so the rate of those is underestimated.
constexpr Rates rates_of(const Device& device) {
  const CardRates& card = card_of(device);
  Rates rates = card.rates;
  const double clock = device.clock_khz > 0 ? device.clock_khz : card.clock_khz;
  const double scale = device.sm_count * clock / (static_cast<double>(card.sm_count) * card.clock_khz);
  if (scale > 0) rates.flops *= scale, rates.float32_flops *= scale;
  if (device.is_integrated)
    rates.bytes = kIntegratedBytes;
  else if (device.memory_clock_khz > 0 && device.bus_bits > 0)
    rates.bytes = 2.0 * device.memory_clock_khz * device.bus_bits / 8 / 1e6;  // two transfers per clock
  return rates;
}

// A product on decoded panels of the weight: [m, inner] by the weight, for `columns` outputs of each token.
struct PanelProduct {
  int64_t m, inner, columns;
  bool float32_sums;  // in memory, of a panel
  DType dtype;

  // What a column of a panel takes in memory: its weights, and its sums.
  constexpr int64_t column_bytes() const {
    return std::max<int64_t>(inner * dtype_bytes(dtype) + (float32_sums ? 4 * m : 0), 1);
  }
};

inline constexpr double kLaunchTime = 2500, kMemoryRate = 0.9;  // nanoseconds; of the data sheet's rate
inline constexpr double kPackedBytes = 0.52;                    // of a weight, with its share of the scales

// The nanoseconds in which panels and their sums are written and read in memory. Those that fit in half of L2 stay
// there.
constexpr double time_outside_l2(const PanelProduct& p, int64_t panel, const Device& device) {
  if (panel * p.column_bytes() <= device.l2_bytes / 2) return 0;
  return static_cast<double>(2 * p.columns * p.column_bytes()) / (kMemoryRate * rates_of(device).bytes);
}

// The columns of the smallest panel for which `time(panel)` is least, a multiple of `step` or all. A panel and its sums
// have at most kMostBytes, or what fits in half of L2, or one step.
template <class Time>
constexpr int64_t fastest_panel(const PanelProduct& p, int64_t step, const Device& device, const Time& time) {
  constexpr int64_t kMostBytes = 128 << 20;
  const int64_t most = std::max<int64_t>(kMostBytes, device.l2_bytes / 2) / p.column_bytes() / step * step;
  int64_t best = p.columns;
  double least = std::numeric_limits<double>::max();
  for (int64_t panel = std::min(std::max(most, step), ceil_div(p.columns, step) * step); panel > 0; panel -= step) {
    const int64_t part = std::min(panel, p.columns);
    const double of_part = time(part);
    if (of_part <= least) least = of_part, best = part;
  }
  return best;
}

// The nanoseconds that panels of `panel` columns take, by a model of the library, not a measurement. A panel is a
// launch that decodes it, a GEMM, and a launch that adds LoRA and bias to its sums if it has any. A GEMM has tiles of
// 128 tokens and 64, 128 or 256 columns, whichever take the least time. Its tiles run in waves of one per SM, at 0.75
// of the data sheet's rate; those of 64 columns read more, at 0.83 of that. From L2, sums are added and rounded in the
// time of 4 bytes of memory each. `p` is one of `parts` that are added to the same sums.
constexpr double library_time(const PanelProduct& p, int64_t panel, const Device& device, int64_t parts = 1) {
  constexpr int64_t kTileTokens = 128;
  constexpr struct {
    int64_t columns;
    double cost;  // in columns of the larger tiles
  } kTiles[] = {{64, 77}, {128, 128}, {256, 256}};
  const Rates rates = rates_of(device);
  const int64_t sms = std::max(device.sm_count, 1), token_tiles = ceil_div(p.m, kTileTokens);
  const auto gemm_columns = [&](int64_t columns) {  // columns of tiles that each SM computes
    double least = std::numeric_limits<double>::max();
    for (const auto& tile : kTiles) {
      const int64_t waves = ceil_div(token_tiles * ceil_div(columns, tile.columns), sms);
      least = std::min(least, static_cast<double>(waves) * tile.cost);
    }
    return least;
  };
  const double column_flops = static_cast<double>(2 * kTileTokens * p.inner * sms);
  const double flops = 0.75 * (p.dtype == DType::kFloat32 ? rates.float32_flops : rates.flops);
  const double columns = static_cast<double>(p.columns / panel) * gemm_columns(panel) + gemm_columns(p.columns % panel);
  const double launches = static_cast<double>(ceil_div(p.columns, panel) * (2 * parts + (p.float32_sums ? 1 : 0)));
  const double added = static_cast<double>(p.float32_sums ? 4 * p.m * p.columns : 0);
  const double of_part =
      columns * column_flops / flops + added / (kMemoryRate * rates.bytes) + time_outside_l2(p, panel, device);
  return static_cast<double>(parts) * of_part + launches * kLaunchTime;
}

constexpr int64_t library_panel_columns(const PanelProduct& p, int64_t step, const Device& device, int64_t parts = 1) {
  return fastest_panel(p, step, device, [&](int64_t panel) { return library_time(p, panel, device, parts); });
}

namespace library {

template <class Problem>
constexpr bool accepts(const Problem& p, const Device&) {
  return p.dtype != DType::kFloat64 && p.w.n > 0 && p.w.k > 0;
}

// For wide codes, the kernels multiply 16-bit types without tensor cores. Their tiles have at most 16 tokens in dX, and
// 64 in the forward of more than 16, so that from here on they decode more than once, or multiply tokens that do not
// exist. This is a model, not a measurement.
inline constexpr int64_t kWideTokens = 17;

// On B200 and B300, LoRA and bias are further terms of the library's sums: [x | h | 1] · [w | lora_b | bias]ᵀ and
// [dy | g] · [w; lora_a]. This takes a copy of x or dy, whose rows the low-rank product extends. Cards with slower
// memory would lose more by the copy than they gain without float32 sums. Dropout of dX masks LoRA's part alone, which
// terms of a sum cannot express, and the library's order of the terms of several adapters is unknown. The terms are
// padded, so that rows stay aligned to 16 bytes.
constexpr int64_t padded_terms(int64_t terms) { return ceil_div(terms, int64_t{8}) * 8; }
constexpr bool extends_sums(DType dtype, const Lora& lora, int64_t inner, const Device& device) {
  const bool one_adapter = lora.rank > 0 && lora.adapters == nullptr;
  return device.arch / 10 == 10 && dtype_bytes(dtype) == 2 && one_adapter && inner % 8 == 0;
}

// The number of further terms, or 0.
constexpr int64_t further_terms(const LinearProblem& p, const Device& device) {
  if (!extends_sums(p.dtype, p.lora, p.w.k, device)) return 0;
  return padded_terms(p.lora.rank + (p.bias != nullptr ? 1 : 0));
}
constexpr int64_t further_terms(const LinearDxProblem& p, const Device& device) {
  const bool fits = p.lora.rank % 2 == 0 && !p.lora.dropout.active();
  return fits && extends_sums(p.dtype, p.lora, p.w.n, device) ? padded_terms(p.lora.rank) : 0;
}

// Sums are float32 if LoRA or bias are added to them afterwards.
constexpr bool has_sums(const LinearProblem& p, const Device& device) {
  return (p.lora.rank > 0 || p.bias != nullptr) && further_terms(p, device) == 0;
}
constexpr bool has_sums(const LinearDxProblem& p, const Device& device) {
  return p.lora.rank > 0 && further_terms(p, device) == 0;
}

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

// Without LoRA and bias.
constexpr PanelProduct product(const LinearProblem& p) { return {p.m, p.w.k, p.w.n, false, p.dtype}; }
constexpr PanelProduct product(const LinearDxProblem& p) { return {p.m, p.w.n, p.w.k, false, p.dtype}; }

// The terms of each of `splits` parts of a sum over `inner`: a panel holds the terms of a part, and the parts are added
// to float32 sums in memory.
constexpr int64_t part_terms(int64_t inner, int64_t splits) {
  return splits == 1 ? inner : ceil_div(ceil_div(inner, splits), kPanelStep) * kPanelStep;
}

// A part's product.
template <class Problem>
constexpr PanelProduct product(const Problem& p, const Device& device, int64_t splits) {
  PanelProduct result = product(p);
  result.inner = part_terms(result.inner, splits) + (splits == 1 ? further_terms(p, device) : 0);
  result.float32_sums = splits > 1 || has_sums(p, device);
  return result;
}

// On B200 and B300, whose products take less time than a panel's way through memory, sums may be split so that panels
// of all columns stay in L2.
constexpr int64_t splits_within_l2(const PanelProduct& whole, const Device& device) {
  constexpr int64_t kMost = 8;
  if (device.arch / 10 != 10 || !is_16_bit(whole.dtype)) return 1;
  const int64_t splits = ceil_div(whole.columns * whole.column_bytes(), int64_t{device.l2_bytes / 2});
  return splits <= kMost ? splits : 1;
}

template <class Problem>
constexpr double time(const Problem& p, const Device& device, const Config& config) {
  return library_time(product(p, device, config.splits), config.panel, device, config.splits);
}

// The choices below leave LoRA and bias out, so that a layer runs the same kernel without its adapter.
template <class Problem>
constexpr Problem without_lora(Problem p) {
  p.lora.rank = 0;
  if constexpr (requires { p.bias; }) p.bias = nullptr;
  return p;
}

template <class Problem>
constexpr Config split_config(const Problem& p, const Device& device, const Config& wish, int64_t wished_splits) {
  const int64_t step = panel_step(p), inner = product(p).inner;
  const int64_t splits = ceil_div(inner, part_terms(inner, wished_splits));
  const PanelProduct part = product(p, device, splits);
  Config result = panels(part.columns, step, library_panel_columns(part, step, device, splits), wish);
  result.splits = splits;
  return result;
}

template <class Problem>
constexpr Config config(const Problem& p, const Device& device, const Config& wish) {
  if (wish.splits > 0) return split_config(p, device, wish, wish.splits);
  const Problem bare = without_lora(p);
  const int64_t wished = splits_within_l2(product(bare), device);
  if (wished == 1) return split_config(p, device, wish, 1);
  const Config whole = split_config(bare, device, {}, 1), split = split_config(bare, device, {}, wished);
  return split_config(p, device, wish, time(bare, device, split) < time(bare, device, whole) ? split.splits : 1);
}

// The nanoseconds in which a packed weight is read, and those of the library, which does so first.
template <class Problem>
constexpr double packed_time(const Problem& p, const Device& device) {
  return kPackedBytes * static_cast<double>(p.w.n * p.w.k) / (kMemoryRate * rates_of(device).bytes);
}
template <class Problem>
constexpr double time_with_decode(const Problem& p, const Device& device) {
  const Problem bare = without_lora(p);
  return time(bare, device, config(bare, device, {})) + packed_time(p, device);
}

// On B200 and B300, whether a fused kernel takes less time than the library, by models of both. Its products take
// mma.sync's rate, but it does not write a decoded weight, and its splits fill the card. From a few hundred tokens on,
// only the rate counts.
template <class Problem>
constexpr bool is_behind_fused(const Problem& p, const Device& device) {
  constexpr int64_t kMostTokens = 512;
  if (device.arch / 10 != 10 || p.m > kMostTokens || !sm80::accepts(p, device)) return false;
  return sm100::fused_time(p, device) < time_with_decode(p, device);
}

template <class Problem>
constexpr bool is_ahead(const Problem& p, const Device& device) {
  if (is_wide(p.w.code) && is_16_bit(p.dtype)) return p.m >= kWideTokens;
  if (decodes_often(p.dtype, p.w.k, p.w.scales.block_size, has_offsets(p.w)))
    return p.m >= library_crossover(p.dtype, p.w.k, p.w.scales.block_size, device, has_offsets(p.w));
  return p.m >= library_crossover(p.dtype, p.w.k, p.w.scales.block_size, device) && !is_behind_fused(p, device);
}

}  // namespace library
}  // namespace qlora::cuda
