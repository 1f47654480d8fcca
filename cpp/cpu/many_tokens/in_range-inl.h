// Whether a problem can be multiplied in pairs of bfloat16.
#pragma once

#include <cstdint>

#include "cpp/cpu/kernels.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/format/dtypes.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace many_tokens {

// The multiplication of bfloat16 in pairs takes subnormal factors, products and sums for zero. None that matters is
// subnormal where each row of a dense operand that is not all 0 has a value of at least 2^-50, and each scale of W that
// is not 0 is at least 2^-60.
inline bool in_range(const void* matrix, int64_t rows, int64_t columns) {
  constexpr uint16_t kEnough = (127 - 50) << 7;
  const bfloat16* x = static_cast<const bfloat16*>(matrix);
  for (int64_t r = 0; r < rows; ++r, x += columns) {
    if (columns > 0 && (x[0].bits & 0x7FFFu) >= kEnough) continue;  // as in nearly every row
    uint16_t largest = 0;
    for (int64_t c = 0; c < columns && largest < kEnough; c += 64) {  // the first 64 mostly settle it
      for (int64_t i = c; i < columns && i < c + 64; ++i) {
        const uint16_t bits = x[i].bits & 0x7FFFu;
        largest = bits > largest ? bits : largest;
      }
    }
    if (largest && largest < kEnough) return false;
  }
  return true;
}

inline bool in_range(const Pool& pool, const Weight& w) {
  // Doubly quantized scales are 0 or no smaller than a last place of their mean.
  if (w.scales.codes) return *w.scales.nested_offset > 0x1p-30f;
  constexpr uint32_t kEnough = (127u - 60u) << 23;
  bool all = true;
  auto body = [&](int64_t begin, int64_t end) {
    uint32_t smallest = ~0u;  // of the bits minus 1, which makes a scale of 0 the largest
    for (int64_t i = begin; i < end; ++i) {
      const uint32_t bits = (float_bits(w.scales.absmax[i]) & 0x7FFFFFFFu) - 1u;
      smallest = bits < smallest ? bits : smallest;
    }
    if (smallest < kEnough - 1u) __atomic_store_n(&all, false, __ATOMIC_RELAXED);
  };
  pool(ceil_div(w.n * w.k, w.scales.block_size), 1 << 15, body);
  return all;
}

inline bool in_range(const Pool& pool, const LinearProblem& p) {
  return in_range(p.x, p.m, p.w.k) && in_range(pool, p.w);
}
inline bool in_range(const Pool& pool, const LinearDxProblem& p) {
  return in_range(p.dy, p.m, p.w.n) && in_range(pool, p.w);
}
inline bool in_range(const Pool&, const LoraGradProblem& p) {
  return in_range(p.x, p.m, p.k) && in_range(p.dy, p.m, p.n) && in_range(p.lora.a, p.lora.rank, p.k) &&
         in_range(p.lora.b, p.n, p.lora.rank);
}

}  // namespace many_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
