// Chooses and configures the forward and dX on tcgen05, for compute capability 10.0 and 10.3.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpp/format/problem.h"
#include "cuda/tuning/choice.h"
#include "cuda/tuning/device.h"
#include "cuda/tuning/library.h"
#include "cuda/tuning/sm100_mma_sync.h"
#include "cuda/tuning/sm90.h"

namespace qlora::cuda::sm100 {

inline constexpr int64_t kStageTerms = 64;    // of the sum per stage
inline constexpr int64_t kFewestTokens = 17;  // the tiles on mma.sync for fewer have no column that is empty

constexpr bool accepts(const LinearProblem& p, const Device& device) {
  return device.arch / 10 == 10 && sm90::accepts_sizes(p.dtype, p.m, p.w, p.lora);
}
// TMA requires that rows of dy begin at multiples of 16 bytes.
constexpr bool accepts(const LinearDxProblem& p, const Device& device) {
  return device.arch / 10 == 10 && sm90::accepts_sizes(p.dtype, p.m, p.w, p.lora) && p.w.n % 8 == 0;
}

// A stage takes as long as its passes over shared memory, 128 bytes each: x is written once and read once, packed bytes
// too, and the pairs of 128 x 64 weights are looked up, 8 bytes each. The kernel simulator counts the same
// (tests/cuda/test_sm100_cuda.py). L2 serves x, packed bytes and scale codes.
constexpr sm90::Stage forward_stage(int64_t tokens) {
  return {2 * tokens + 64 + 256 + 4, tokens * 128, 128 * (32 + 1)};
}
// The same for dX, whose decoders write scales and read them again.
constexpr sm90::Stage dx_stage(int64_t tokens) { return {2 * tokens + 64 + 256 + 72, tokens * 128, 64 * (64 + 32)}; }

// Per cycle: twice an H100's, because a B200 has two dies of its size. An assumption.
inline constexpr int64_t kL2Bytes = 2 * sm90::kL2Bytes;

// Outputs, stages, and the cost of a stage.
struct Work {
  int64_t outputs, stages;
  sm90::Stage (*stage)(int64_t tokens);
};
constexpr Work work_of(const LinearProblem& p) { return {p.w.n, ceil_div(p.w.k, kStageTerms), forward_stage}; }
constexpr Work work_of(const LinearDxProblem& p) { return {p.w.k, ceil_div(p.w.n, kStageTerms), dx_stage}; }

template <class Problem>
constexpr Config fastest(const Problem& p, const Device& device, const Config& wish) {
  const Work work = work_of(p);
  return sm90::fastest(p.m, work.outputs, work.stages, {64, 128, 256}, work.stage, device, wish, kL2Bytes);
}
constexpr Config config(const LinearProblem& p, const Device& device, const Config& wish) {
  Config c = fastest(p, device, wish);
  c.rows = sm90::kOutputs;
  return c;
}
constexpr Config config(const LinearDxProblem& p, const Device& device, const Config& wish) {
  Config c = fastest(p, device, wish);
  c.columns = sm90::kOutputs;
  return c;
}

// The nanoseconds at the clock of the data sheet's rate, or in which the weight is read; without the launch.
template <class Problem>
constexpr double time(const Problem& p, const Device& device) {
  const Work work = work_of(p);
  const int64_t cycles =
      sm90::cycles(p.m, work.outputs, work.stages, work.stage, device, fastest(p, device, {}), kL2Bytes);
  return std::max(static_cast<double>(cycles) * 1e6 / card_of(device).clock_khz, library::packed_time(p, device));
}

// By models of all three, not measurements. Those of the library, with its launches, and of mma.sync, without, are in
// library.h and sm100_mma_sync.h.
template <class Problem>
constexpr bool is_ahead(const Problem& p, const Device& device) {
  if (p.m < kFewestTokens) return false;
  const double own = time(p, device);
  return own < fused_time(p, device) && own + kLaunchTime < library::time_with_decode(p, device);
}

}  // namespace qlora::cuda::sm100
