// Where weight rows begin in the packed bytes that the kernels of this folder stream.
//
// A lane is eight consecutive weights, a dword of packed bytes. When K is not a multiple of eight, a row starts inside
// a lane: its *shift* is the number of weights of that lane that come before it, and rows a *period* apart have the
// same shift. With K = 12, for instance, the period is 2:
//
// clang-format off
//   lanes     | 0 .. 7  | 8 .. 15     | 16 .. 23 | 24 .. 31 | 32 .. 39    | 40 .. 47 |
//   rows      | 0       | 0    | 1    | 1        | 2        | 2    | 3    | 3        |
//   shift       0              4                   0               4
// clang-format on
#pragma once

#include <cstdint>

#include "cpp/cpu/codec/scale_reader-inl.h"
#include "cpp/cpu/shared/instruction_set.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace few_tokens {

struct WeightRows {
  int64_t k;
  int period;  // rows of W: 1, 2, 4 or 8

  explicit WeightRows(int64_t k_) : k(k_), period(k_ % 8 == 0 ? 1 : k_ % 4 == 0 ? 2 : k_ % 2 == 0 ? 4 : 8) {}
  int shift(int64_t row) const { return static_cast<int>((row * k) & 7); }
  int64_t first_weight(int64_t row) const { return (row * k) & ~int64_t{7}; }
  int max_shift() const { return 8 - 8 / period; }
};

}  // namespace few_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
