// Rounding under scales that were not taken from the values themselves: any float has a code. There are two ways:
//
//   CellRound   the cells of EncodeCells. A q beyond [-1, 1] is in the first or the last of them; so is NaN, in the
//               first, whose code is that of the least value. A cell that holds a boundary and the one after it differ
//               by one code, so whatever is looked up for q stands in the cell itself, or in the next one if q is above
//               the boundary: each lookup is one gather of 32 words in 32 banks.
//   RankRound   the boundaries below q are counted, which serves every code.
//
// Both find the place of q in a table in shared memory, where its code and value stand.
#pragma once

#include <cstdint>

#include "cpp/format/codes.h"
#include "cuda/ptx/float_bits.cuh"
#include "cuda/ptx/lop3.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/tile/any/code_tables.cuh"

namespace qlora::tile {

struct alignas(EncodeCells::kBytes) CellTable {
  EncodeCells encode;
  float value[EncodeCells::kCells] = {};  // of the code below the cell's boundary

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

// Where q's code and value are found. `table` is the shared address of the CellTable.
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
  int code;  // its number

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

// use(round) with the way that serves the code best.
template <class Use>
auto with_round(Code code, const Use& use) {
  const int number = static_cast<int>(code);
  return EncodeCells::serves(table_of(code)) ? use(CellRound{number}) : use(RankRound{number});
}

}  // namespace qlora::tile
