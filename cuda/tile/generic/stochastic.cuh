// Stochastic rounding (cpp/format/stochastic.h): finds the code below q, and goes one rank up if q is above the bound
// between that code's value and the next.
#pragma once

#include <cstdint>

#include "cpp/format/codes.h"
#include "cpp/format/stochastic.h"
#include "cuda/ptx/float_bits.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/tile/generic/code_tables.cuh"
#include "cuda/tile/generic/round.cuh"

namespace qlora::tile {

// For codes that cells serve. The code below q changes at the inner values. A q that equals a value counts as above the
// previous value.
struct StochasticCells {
  CellTable below;
  float gap[EncodeCells::kCells] = {};  // from the value of the code below to the next value

  constexpr StochasticCells() = default;
  explicit constexpr StochasticCells(const CodeTable& table) {
    if (!serves(table)) return;
    below = CellTable(table, EncodeCells(table.value + 1, kCodes - 2));
    for (int cell = 0; cell < EncodeCells::kCells; ++cell) gap[cell] = table.gap[below.encode.base[cell]];
  }

  // Returns whether each code's bound lies between its value and the next for every threshold. If so, q is above the
  // bounds of all codes before the one below it and of none after, so one comparison replaces all fifteen. Bounds grow
  // with the threshold, so checking the largest threshold suffices.
  static constexpr bool serves(const CodeTable& table) {
    constexpr float kMost = 65535.5f / 65536.0f;
    if (!EncodeCells::serves(table) || !EncodeCells::is_exact(table.value + 1, kCodes - 2)) return false;
    for (int i = 0; i + 1 < kCodes; ++i) {
      const float way = kMost * table.gap[i];
      if (table.value[i] + way > table.value[i + 1]) return false;
    }
    return true;
  }
};
static_assert(StochasticCells::serves(table_of(Code::kNf4)));

static __constant__ PerCode<StochasticCells> c_stochastic{};

struct CellStochastic {
  using Table = StochasticCells;
  int code;

  __device__ __forceinline__ void stage(Table* shared) const {
    stage_cells(&shared->below, c_stochastic.of[code].below);
    stage_table(shared->gap, c_stochastic.of[code].gap);
  }
  // Returns q's code for its `threshold`. `table` is the shared address of the Table.
  __device__ __forceinline__ uint32_t operator()(float q, float threshold, uint32_t table) const {
    const uint32_t below = cell_place(q, table);
    const float gap = ptx::load_shared_f32<sizeof(CellTable)>(below);
    const float bound = __fadd_rn(cell_value(below), __fmul_rn(threshold, gap));
    return ptx::add_where_greater<1>(q, bound, cell_code(below));
  }
};

// For every code: compares q with all bounds.
struct RankStochastic {
  using Table = RankTable;
  int code;

  __device__ __forceinline__ void stage(Table* shared) const { stage_ranks(shared, code); }
  __device__ __forceinline__ uint32_t operator()(float q, float threshold, uint32_t table) const {
    const DeviceCode& values = c_codes.of[code];
#pragma unroll
    for (int i = 0; i + 1 < kCodes; ++i) {
      const float bound = __fadd_rn(values.ranked[i], __fmul_rn(threshold, values.gap[i]));
      table += q > bound ? 4u : 0u;
    }
    return RankRound::code_at(table);
  }
};

// Calls use(stochastic) with the faster method that works for the code.
template <class Use>
auto with_stochastic(Code code, const Use& use) {
  const int number = static_cast<int>(code);
  return StochasticCells::serves(table_of(code)) ? use(CellStochastic{number}) : use(RankStochastic{number});
}

}  // namespace qlora::tile
