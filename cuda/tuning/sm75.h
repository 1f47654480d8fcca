// Chooses and configures the forward on the tensor cores of compute capability 7.5, a T4: float16 alone.
#pragma once

#include <cstdint>

#include "cpp/format/problem.h"
#include "cuda/tuning/choice.h"
#include "cuda/tuning/device.h"
#include "cuda/tuning/sm80.h"

namespace qlora::cuda::sm75 {

// The kernel is that of 8.0 with the one tile that fits 64 KB of shared memory.
inline constexpr int64_t kTokens = 32;

constexpr bool accepts(const LinearProblem& p, const Device& device) {
  return device.arch < 80 && p.dtype == DType::kFloat16 && !has_wide_code(p) && sm80::is_regular(p);
}

// Up to 4 tokens, the exact kernel is limited by reading w. Its next tile has 16 tokens, whose multiply-adds take
// longer than that. The upper limit lies between two estimates. For 64 tokens of 4096 x 4096, the counters of the
// kernel simulator correspond to 40 us of shared memory, 33 us of tensor cores and 27 us of instructions. If nothing
// overlaps, this kernel takes 100 us, and decoding w once for cuBLAS (233 us) is faster from 270 tokens on. If
// everything overlaps, decoding is never faster.
inline constexpr int64_t kLeastTokens = 5, kLibraryTokens = 512;
constexpr bool is_ahead(const LinearProblem& p, const Device&) { return p.m >= kLeastTokens && p.m < kLibraryTokens; }

constexpr Config config(const LinearProblem&, const Device&, const Config& wish) {
  return {.tokens = kTokens, .rows = sm80::kForwardRows, .splits = wish.splits};
}

}  // namespace qlora::cuda::sm75
