// The tile of Hopper's dX, and how a lane decodes. cuda/tile/sm90/layout.cuh has the parts that it shares with the
// forward.
//
// A stage covers 64 rows n of 128 columns k of w: dy [kTokens][64], packed bytes [64 rows][64 bytes] and scales [2
// groups of 64 columns][64 rows]. wᵀ is the wgmma's register operand. The sum runs over rows, so the scale must be
// applied to the weight: the table holds pairs of float32, which are scaled and then rounded once.
//
// A warp takes 16 bytes of each row: 32 columns, as 8 units of 2 bytes. ldmatrix transposes them, so lane (g, t) holds
// unit g of rows 16s + 2t, +1 and 16s + 8 + 2t, +1: exactly the rows that step s of the wgmma needs from it. One
// warpgroup takes the first byte of each unit, columns 4g and 4g + 1, and the other warpgroup the second byte, columns
// 4g + 2 and 4g + 3. These columns are the operand's rows g and g + 8. The nibbles of a column in two rows are joined
// to a byte, and the table's entry for that byte is the pair.
#pragma once

#include <cstdint>

#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/lop3.cuh"
#include "cuda/ptx/prmt.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/tile/generic/nf4_pairs_f32.cuh"
#include "cuda/tile/sm90/layout.cuh"

namespace qlora::tile {

template <class T, int kTokens>
struct DxSm90Tile : Sm90Layout<T, kTokens, 1, 64 * 64, 2 * 64 * 4, 88> {
  static constexpr int kStageRows = DxSm90Tile::kStageTerms;
  static constexpr int kGroupColumns = 64;  // columns that share a scale

  // Consumers exchange their dropout masks here: 8 bytes per consumer for every 128 tokens.
  static constexpr int kMasks = DxSm90Tile::kBarriers + DxSm90Tile::kStages * DxSm90Tile::kSlotBarriers;
  static constexpr int kMaskBytes = (kTokens + 127) / 128 * DxSm90Tile::kConsumers * 8;
  static_assert(kMasks % 8 == 0 && kMasks + kMaskBytes <= DxSm90Tile::kTable);

  // Where the packed bytes of a stage begin: the byte in the row, and the row.
  __device__ static int2 packed_box(int row, int column) { return {column / 2, row}; }
};

template <class Tile>
struct DxSm90Lane {
  uint32_t table;     // the table's address plus 8 · (lane % 16)
  uint32_t selector;  // for prmt: picks this warpgroup's byte of a unit, between the bytes of `table`
  uint32_t packed;    // the address of the row that this lane passes to ldmatrix, in slot 0
  uint32_t scales;    // the address of row 2t's scale in slot 0
  int column;         // the first of its two columns in the tile

  __device__ __forceinline__ explicit DxSm90Lane(uint32_t base) {
    const int lane = threadIdx.x % 32, warp = (threadIdx.x - Tile::kProducers) / 32;
    const int slab = warp % 4, byte = warp / 4;
    table = base + Tile::kTable + lane % 16 * 8;
    selector = 0x7604u | byte << 4;
    packed = base + Tile::kPacked + sm90_packed_offset(lane, slab);
    scales = base + Tile::kScales + slab / 2 * (Tile::kStageRows * 4) + lane % 4 * 8;
    column = slab * 32 + lane / 4 * 4 + byte * 2;
  }

  // Loads w[2s] and w[2s + 1]: the units of the first and the last 8 rows of step s.
  template <int kSlot>
  __device__ __forceinline__ void load(uint32_t (&w)[8]) const {
    constexpr int kOffset = kSlot * Tile::kStagePackedBytes;
    ptx::ldmatrix_x4_trans<kOffset>(packed, w[0], w[1], w[2], w[3]);
    ptx::ldmatrix_x4_trans<kOffset + 32 * 64>(packed, w[4], w[5], w[6], w[7]);
  }

  __device__ __forceinline__ uint32_t pair(uint32_t codes, float2 scale) const {
    const float2 value = ptx::load_shared_v2_f32(ptx::prmt(codes, table, selector));
    return ptx::pack2<typename Tile::T>(value.x * scale.x, value.y * scale.y);
  }

  // Decodes into `a` the wgmma's operand for step kStep, whose units are `low` and `high`.
  template <int kSlot, int kStep>
  __device__ __forceinline__ void decode(uint32_t low, uint32_t high, uint32_t (&a)[4]) const {
    constexpr int kOffset = kSlot * Tile::kStageScaleBytes + kStep * 16 * 4;
    constexpr uint32_t kFirst = 0xF0F0F0F0u;  // the nibble of a pair's first row
    const float2 scale = ptx::load_shared_v2_f32<kOffset>(scales),
                 scale8 = ptx::load_shared_v2_f32<kOffset + 32>(scales);
    a[0] = pair(ptx::select_bits(kFirst, low, low >> 20), scale);
    a[1] = pair(ptx::select_bits(kFirst, low << 4, low >> 16), scale);
    a[2] = pair(ptx::select_bits(kFirst, high, high >> 20), scale8);
    a[3] = pair(ptx::select_bits(kFirst, high << 4, high >> 16), scale8);
  }
};

}  // namespace qlora::tile
