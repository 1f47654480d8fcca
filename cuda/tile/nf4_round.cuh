// NF4 rounding under scales that were not taken from the values themselves: any float has a code.
//
// The cells of Nf4EncodeTable, with a q beyond [-1, 1] in the first or the last of them and NaN in the first, whose
// code is 0. A cell that holds a boundary and the one after it differ by one code, so whatever is looked up for q
// stands in the cell itself, or in the next one if q is above the boundary: each lookup is one gather of 32 words in 32
// banks.
#pragma once

#include <cstdint>

#include "cpp/format/nf4.h"
#include "cuda/ptx/float_bits.cuh"
#include "cuda/ptx/lop3.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/tile/code_tables.cuh"

namespace qlora::tile {

struct alignas(Nf4EncodeTable::kBytes) Nf4RoundTable {
  Nf4EncodeTable encode;
  float value[Nf4EncodeTable::kCells] = {};  // of the code below the cell's boundary

  explicit constexpr Nf4RoundTable(const Nf4EncodeTable& cells = {}) : encode(cells) {
    for (int cell = 0; cell < Nf4EncodeTable::kCells; ++cell) value[cell] = kNf4.value[encode.base[cell]];
  }
};
static_assert(kNf4.boundary[kCodes - 2] < 1.0f && Nf4EncodeTable().boundary[Nf4EncodeTable::kCells - 1] > 1.0f);

static __constant__ Nf4RoundTable c_nf4_round{};

__device__ __forceinline__ void stage_nf4_round(Nf4RoundTable* shared, const Nf4RoundTable& table = c_nf4_round) {
  stage_table(shared->encode.boundary, table.encode.boundary);
  stage_table(shared->encode.base, table.encode.base);
  stage_table(shared->value, table.value);
}

// Where q's code and value are found. `table` is the shared address of the Nf4RoundTable.
__device__ __forceinline__ uint32_t nf4_round(float q, uint32_t table) {
  const float unit = ptx::fma_saturated(q, 0.5f, 0.5f);  // [-1, 1] -> [0, 1]
  const uint32_t j = ptx::fma_to_bits(unit, 2.0f * Nf4EncodeTable::kSlope, 8388608.0f);
  const uint32_t cell = ptx::and_or(j, Nf4EncodeTable::kOffsetMask, table);
  return ptx::add_where_greater<4>(q, ptx::load_shared_f32(cell), cell);
}
__device__ __forceinline__ uint32_t nf4_code(uint32_t place) {
  return ptx::load_shared_u32<Nf4EncodeTable::kCells * 4>(place);
}
__device__ __forceinline__ float nf4_value(uint32_t place) {
  return ptx::load_shared_f32<Nf4EncodeTable::kBytes>(place);
}

}  // namespace qlora::tile
