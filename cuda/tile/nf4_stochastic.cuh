// Stochastic rounding to NF4 (cpp/format/stochastic.h): the code below q is looked up, and is one more where q is above
// the bound between that code's value and the next.
#pragma once

#include <cstdint>

#include "cpp/format/nf4.h"
#include "cpp/format/stochastic.h"
#include "cuda/ptx/float_bits.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/tile/code_tables.cuh"
#include "cuda/tile/nf4_round.cuh"

namespace qlora::tile {

// The inner values are where the code below q changes, so that a q which is a value stands above the one before it.
struct Nf4StochasticTable {
  Nf4RoundTable below{Nf4EncodeTable(kNf4.value + 1, kCodes - 2)};
  float gap[Nf4EncodeTable::kCells] = {};  // from that value to the next

  constexpr Nf4StochasticTable() {
    for (int cell = 0; cell < Nf4EncodeTable::kCells; ++cell) gap[cell] = kNf4Gaps.gap[below.encode.base[cell]];
  }

  // Whether each code's bound lies between its value and the next whatever the threshold: q then is above the bounds of
  // all codes before the one below it, and of none after, and looking at one bound is looking at all fifteen. Bounds
  // grow with the threshold, so the largest is enough.
  static constexpr bool is_exact() {
    constexpr float kMost = 65535.5f / 65536.0f;
    for (int i = 0; i + 1 < kCodes; ++i) {
      const float way = kMost * kNf4Gaps.gap[i];
      if (kNf4.value[i] + way > kNf4.value[i + 1]) return false;
    }
    return true;
  }
};
static_assert(Nf4StochasticTable::is_exact() && Nf4EncodeTable::is_exact(kNf4.value + 1, kCodes - 2));
static_assert(Nf4StochasticTable().below.encode.boundary[Nf4EncodeTable::kCells - 1] > 1.0f);

static __constant__ Nf4StochasticTable c_nf4_stochastic{};

__device__ __forceinline__ void stage_nf4_stochastic(Nf4StochasticTable* shared) {
  stage_nf4_round(&shared->below, c_nf4_stochastic.below);
  stage_table(shared->gap, c_nf4_stochastic.gap);
}

// q's code for its `threshold`. `table` is the shared address of the Nf4StochasticTable.
__device__ __forceinline__ uint32_t nf4_stochastic_code(float q, float threshold, uint32_t table) {
  const uint32_t below = nf4_round(q, table);
  const float gap = ptx::load_shared_f32<sizeof(Nf4RoundTable)>(below);
  const float bound = __fadd_rn(nf4_value(below), __fmul_rn(threshold, gap));
  return ptx::add_where_greater<1>(q, bound, nf4_code(below));
}

}  // namespace qlora::tile
