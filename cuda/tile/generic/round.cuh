// Rounds to the nearest code under scales that were not computed from the values themselves, so q may be any float.
// There are two methods:
//
//   CellRound   uses the cells of EncodeCells. A q beyond [-1, 1] falls into the first or the last cell, and NaN into
//   the
//               first, whose code is that of the least value. The codes of a cell that holds a boundary and of the next
//               cell differ by one. So the code and the value of q stand in the cell itself or, if q is above the
//               boundary, in the next cell. Each lookup is one gather of 32 words in 32 banks.
//   RankRound   counts the boundaries below q, which works for every code.
//
// Both find the place of q in a table in shared memory, which holds its code and its value.
#pragma once

#include <cstdint>

#include "cpp/format/codes.h"
#include "cuda/ptx/float_bits.cuh"
#include "cuda/ptx/lop3.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/tile/generic/code_tables.cuh"

namespace qlora::tile {

struct alignas(EncodeCells::kBytes) CellTable {
  EncodeCells encode;
  float value[EncodeCells::kCells] = {};  // the value of the code below the cell's boundary

  constexpr CellTable() = default;
  explicit constexpr CellTable(const CodeTable& table) : CellTable(table, EncodeCells(table)) {}
  constexpr CellTable(const CodeTable& table, const EncodeCells& cells) : encode(cells) {
    for (int cell = 0; cell < EncodeCells::kCells; ++cell) value[cell] = table.value[encode.base[cell]];
  }
};
static __constant__ PerCode<CellTable> c_cells{};

__device__ __forceinline__ void stage_cells(CellTable* shared, const CellTable& table) {
  stage_table(shared->encode.boundary, table.encode.boundary);
  stage_table(shared->encode.base, table.encode.base);
  stage_table(shared->value, table.value);
}

// Returns the place of q's code and value. `table` is the shared address of the CellTable.
__device__ __forceinline__ uint32_t cell_place(float q, uint32_t table) {
  const float unit = ptx::fma_saturated(q, 0.5f, 0.5f);  // [-1, 1] -> [0, 1]
  const uint32_t j = ptx::fma_to_bits(unit, 2.0f * EncodeCells::kSlope, 8388608.0f);
  const uint32_t cell = ptx::and_or(j, EncodeCells::kOffsetMask, table);
  return ptx::add_where_greater<4>(q, ptx::load_shared_f32(cell), cell);
}
__device__ __forceinline__ uint32_t cell_code(uint32_t place) {
  return ptx::load_shared_u32<EncodeCells::kCells * 4>(place);
}
__device__ __forceinline__ float cell_value(uint32_t place) { return ptx::load_shared_f32<EncodeCells::kBytes>(place); }

struct CellRound {
  using Table = CellTable;
  int code;  // the number of the code

  __device__ __forceinline__ void stage(Table* shared) const { stage_cells(shared, c_cells.of[code]); }
  __device__ __forceinline__ uint32_t place(float q, uint32_t table) const { return cell_place(q, table); }
  __device__ __forceinline__ static uint32_t code_at(uint32_t place) { return cell_code(place); }
  __device__ __forceinline__ static float value_at(uint32_t place) { return cell_value(place); }
};

struct RankTable {
  uint32_t code[kCodes];
  float value[kCodes];
};
__device__ __forceinline__ void stage_ranks(RankTable* shared, int code) {
  stage_table(shared->code, c_codes.of[code].code_of_rank);
  stage_table(shared->value, c_codes.of[code].ranked);
}

struct RankRound {
  using Table = RankTable;
  int code;

  __device__ __forceinline__ void stage(Table* shared) const { stage_ranks(shared, code); }
  __device__ __forceinline__ uint32_t place(float q, uint32_t table) const {
    const auto& boundary = c_codes.of[code].boundary;
#pragma unroll
    for (int i = 0; i + 1 < kCodes; ++i) table += q > boundary[i] ? 4u : 0u;
    return table;
  }
  __device__ __forceinline__ static uint32_t code_at(uint32_t place) { return ptx::load_shared_u32<0>(place); }
  __device__ __forceinline__ static float value_at(uint32_t place) { return ptx::load_shared_f32<kCodes * 4>(place); }
};

// Calls use(round) with the faster method that works for the code.
template <class Use>
auto with_round(Code code, const Use& use) {
  const int number = static_cast<int>(code);
  return EncodeCells::serves(table_of(code)) ? use(CellRound{number}) : use(RankRound{number});
}

}  // namespace qlora::tile
