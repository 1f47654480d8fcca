// Encodes under given scales with stochastic rounding. These are plain loops over a group, which the compiler
// vectorizes.
#pragma once

#include <cstdint>

#include "cpp/cpu/kernels.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/with_type-inl.h"
#include "cpp/format/codes.h"
#include "cpp/format/stochastic.h"

namespace qlora::cpu::QLORA_ISA {
namespace {

inline constexpr int kStochasticGroup = 32;

// Encodes the `count` weights from element `first` of the tensor on. `first` is even, and so is `count` except at the
// tensor's end.
template <class T>
inline void encode_group_stochastically(const CodeTable& table, const T* w, int64_t count, float inverse, uint64_t seed,
                                        int64_t first, uint8_t* packed) {
  float q[kStochasticGroup] = {}, threshold[kStochasticGroup];
  int32_t code[kStochasticGroup] = {};  // first ranks, then codes
  for (int64_t i = 0; i < count; ++i) q[i] = to_float(w[i]) * inverse;
  for (int i = 0; i < kStochasticGroup; ++i) {
    threshold[i] = rounding_threshold(seed, static_cast<uint64_t>(first) + static_cast<uint64_t>(i));
  }
  for (int c = 0; c + 1 < kCodes; ++c) {
    for (int i = 0; i < kStochasticGroup; ++i) {
      code[i] += q[i] > table.ranked[c] + threshold[i] * table.gap[c];
    }
  }
  if (!table.is_ascending) {
    for (int32_t& c : code) c = table.code_of_rank[c];
  }
  if (count % 2) code[count] = table.zero_code;
  for (int64_t i = 0; i < packed_bytes(count); ++i) {
    packed[i] = static_cast<uint8_t>(code[2 * i] << 4 | code[2 * i + 1]);
  }
}

template <class T>
void encode_stochastically_as(const Pool& pool, const CodeTable& table, const T* w, const float* absmax, int64_t numel,
                              int64_t block_size, uint64_t seed, uint8_t* packed) {
  auto body = [=, &table](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const float inverse = inverse_scale(absmax[b]);
      const int64_t last = min((b + 1) * block_size, numel);
      for (int64_t first = b * block_size; first < last; first += kStochasticGroup) {
        const int64_t count = min(int64_t{kStochasticGroup}, last - first);
        encode_group_stochastically(table, w + first, count, inverse, seed, first, packed + first / 2);
      }
    }
  };
  pool(ceil_div(numel, block_size), ceil_div(int64_t{16384}, block_size), body);
}

void encode_nf4_stochastic(const Pool& pool, Code code, DType dtype, const void* w, const float* absmax, int64_t numel,
                           int64_t block_size, uint64_t seed, uint8_t* packed) {
  with_type(dtype, [&]<class T>() {
    encode_stochastically_as(pool, table_of(code), static_cast<const T*>(w), absmax, numel, block_size, seed, packed);
  });
}

}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
