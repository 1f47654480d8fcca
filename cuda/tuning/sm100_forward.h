// Chooses and configures the forward on tcgen05, for compute capability 10.0 and 10.3.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpp/format/problem.h"
#include "cuda/tuning/choice.h"
#include "cuda/tuning/device.h"
#include "cuda/tuning/library.h"
#include "cuda/tuning/sm100.h"
#include "cuda/tuning/sm90.h"

namespace qlora::cuda::sm100 {

inline constexpr int64_t kStageK = 64;        // terms of the sum per stage
inline constexpr int64_t kFewestTokens = 17;  // the tile on mma.sync for fewer has no column that is empty

constexpr bool accepts(const LinearProblem& p, const Device& device) {
  return device.arch / 10 == 10 && sm90::accepts_sizes(p.dtype, p.m, p.w, p.lora);
}

// A stage takes as long as its passes over shared memory, 128 bytes each: x is written once and read once, packed bytes
// too, and the pairs of 128 x 64 weights are looked up, 8 bytes each. L2 serves x, packed bytes and scale codes.
constexpr sm90::Stage stage_of(int64_t tokens) { return {2 * tokens + 64 + 256 + 4, tokens * 128, 128 * (32 + 1)}; }

// Per cycle: twice an H100's, because a B200 has two dies of its size. An assumption.
inline constexpr int64_t kL2Bytes = 2 * sm90::kL2Bytes;

constexpr Config config(const LinearProblem& p, const Device& device, const Config& wish) {
  Config c = sm90::fastest(p.m, p.w.n, ceil_div(p.w.k, kStageK), {64, 128, 256}, stage_of, device, wish, kL2Bytes);
  c.rows = sm90::kOutputs;
  return c;
}

// The nanoseconds at the clock of the data sheet's rate, or in which the weight is read; without the launch.
constexpr double time(const LinearProblem& p, const Device& device) {
  const Config c = config(p, device, {});
  const int64_t cycles = sm90::cycles(p.m, p.w.n, ceil_div(p.w.k, kStageK), stage_of, device, c, kL2Bytes);
  return std::max(static_cast<double>(cycles) * 1e6 / card_of(device).clock_khz, library::packed_time(p, device));
}

// By models of all three, not measurements. Those of the library, with its launches, and of mma.sync, without, are in
// library.h and sm100.h.
constexpr bool is_ahead(const LinearProblem& p, const Device& device) {
  if (p.m < kFewestTokens) return false;
  const double own = time(p, device);
  return own < fused_time(p, device) && own + kLaunchTime < library::time_with_decode(p, device);
}

}  // namespace qlora::cuda::sm100
