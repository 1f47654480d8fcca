// Whether a problem can be multiplied in pairs of bfloat16.
#pragma once

#include <cstdint>

#include "cpp/cpu/codec/scales-inl.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/format/dtypes.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace many_tokens {

// The multiplication of bfloat16 in pairs takes subnormal factors, products and sums for zero. That changes no result
// noticeably if
//   - each row of a dense operand is all 0, or has a value of at least 2^-50, and
//   - each block of W has a scale of 0, or its largest possible value is at least 2^-60. An offset beside a scale of 0
//     is the value of the whole block.
inline bool in_range(const void* matrix, int64_t rows, int64_t columns) {
  constexpr uint16_t kEnough = (127 - 50) << 7;
  const bfloat16* x = static_cast<const bfloat16*>(matrix);
  for (int64_t r = 0; r < rows; ++r, x += columns) {
    if (columns > 0 && (x[0].bits & 0x7FFFu) >= kEnough) continue;  // true of nearly every row
    uint16_t largest = 0;
    for (int64_t c = 0; c < columns && largest < kEnough; c += 64) {  // the first 64 mostly suffice
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
  const float least = 0x1p-60f / largest_value(w.code);
  return scales_at_least(pool, w.scales, ceil_div(w.n * w.k, w.scales.block_size), least);
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
