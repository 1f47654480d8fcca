// The tile of dX on tcgen05, and how a thread decodes: 128 columns k of w, and stages of 64 rows n.
//
// It decodes as Hopper's dX does (cuda/tile/sm90/dx_tile.cuh). A warp takes 16 bytes of each row: 32 columns, as 8
// units of 2 bytes. ldmatrix transposes them, so thread (g, t) holds unit g of rows 16s + 2t, +1 and 16s + 8 + 2t, +1.
// The nibbles of a column in two rows are joined to a byte, whose entry in the table is a column of tensor memory.
// Columns 4g and 4g + 1 of w are the lanes g and g + 8, and columns 4g + 2 and 4g + 3 the lanes g + 16 and g + 24.
#pragma once

#include <cstdint>

#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/lop3.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/tile/generic/nf4_pairs_f32.cuh"
#include "cuda/tile/generic/unroll.cuh"
#include "cuda/tile/sm100/layout.cuh"

namespace qlora::tile {

template <class T, int kTokens>
struct DxSm100Tile : Sm100Layout<T, kTokens, kTokens == 256 ? 4 : 6, 2 * 64 * 4, true> {
  static constexpr int kStageRows = DxSm100Tile::kStageTerms;
  static constexpr int kGroupColumns = 64;  // columns that share a scale

  // Where the packed bytes of a stage begin: the byte in the row, and the row.
  __device__ static int2 packed_box(int row, int column) { return {column / 2, row}; }
};

template <class Tile>
struct DxSm100Lane {
  uint32_t table, copy;  // of the pairs
  uint32_t packed;       // the address of the row that this thread passes to ldmatrix, in slot 0
  uint32_t scales;       // the address of row 2t's scale in slot 0
  int column;            // 4g, in the tile
  int output;            // the column of the thread's own lane

  __device__ __forceinline__ explicit DxSm100Lane(uint32_t base) {
    const int lane = threadIdx.x % 32, slab = threadIdx.x % Tile::kProducers / 32;
    table = base + Tile::kTable;
    copy = lane % 16 * 8;
    packed = base + Tile::kPacked + sm90_packed_offset(lane, slab);
    scales = base + Tile::kScales + slab / 2 * (Tile::kStageRows * 4) + lane % 4 * 8;
    column = slab * 32 + lane / 4 * 4;
    output = slab * 32 + lane % 8 * 4 + lane / 8;
  }

  template <int kByte>
  __device__ __forceinline__ uint32_t pair(uint32_t codes, float2 scale) const {
    const float2 value = lookup_pair_f32<kByte>(table, copy, codes);
    return ptx::pack2<typename Tile::T>(value.x * scale.x, value.y * scale.y);
  }

  // Decodes the stage in `slot`: its first two columns of each unit, and the last two.
  __device__ __forceinline__ void decode(int slot, uint32_t (&w)[2][16]) const {
    constexpr uint32_t kFirst = 0xF0F0F0F0u;  // the nibble of a pair's first row
    uint32_t unit[8];
    const uint32_t rows = packed + slot * Tile::kStagePackedBytes, of_rows = scales + slot * Tile::kStageScaleBytes;
    ptx::ldmatrix_x4_trans(rows, unit[0], unit[1], unit[2], unit[3]);
    ptx::ldmatrix_x4_trans<32 * 64>(rows, unit[4], unit[5], unit[6], unit[7]);
    unroll<8>([&](auto i) {  // 8 rows
      const float2 scale = ptx::load_shared_v2_f32<i * 8 * 4>(of_rows);
      const uint32_t even = ptx::select_bits(kFirst, unit[i], unit[i] >> 20);
      const uint32_t odd = ptx::select_bits(kFirst, unit[i] << 4, unit[i] >> 16);
      w[0][2 * i] = pair<0>(even, scale), w[0][2 * i + 1] = pair<0>(odd, scale);
      w[1][2 * i] = pair<1>(even, scale), w[1][2 * i + 1] = pair<1>(odd, scale);
    });
  }
};

}  // namespace qlora::tile
