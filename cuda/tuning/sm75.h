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

// Up to 4 tokens, the exact kernel waits for memory, but its next tile has 16 tokens, whose multiply-adds take longer
// than reading w. For 64 tokens of 4096 x 4096, the kernel simulator counts 40 us of passes through shared memory, 33
// of products and 27 of instructions. If nothing overlaps, these are 100 us, and decoding w for cuBLAS (233 us) pays
// from 270 tokens on; if everything does, it never pays.
inline constexpr int64_t kLeastTokens = 5, kLibraryTokens = 512;
constexpr bool is_ahead(const LinearProblem& p, const Device&) { return p.m >= kLeastTokens && p.m < kLibraryTokens; }

constexpr Config config(const LinearProblem&, const Device&, const Config& wish) {
  return {.tokens = kTokens, .rows = sm80::kForwardRows, .splits = wish.splits};
}

}  // namespace qlora::cuda::sm75
