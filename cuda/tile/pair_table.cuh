// Decoding packed NF4 by a table of pairs in shared memory: one prmt and one load yield two weights as the two halves
// of a register, ready to be an operand of mma.
//
// Entry v (0..255) is the pair that byte v packs: its high nibble's value in the lower half, its low nibble's in the
// upper. Entries are 256 bytes apart, so the address is the packed byte moved one byte up (prmt), with the lane in the
// lowest byte. An entry holds 32 copies, one a lane, so 32 lanes looking up 32 different bytes never meet in a bank.
// The second 128 bytes of each entry are not touched.
//
// What is stored is round(value * factor), not the value itself: with the factors below the 16 codes happen to lie
// close to numbers of the 16-bit type, which makes the error of the weight about two thirds of what rounding value *
// absmax would have. Whoever sums the products multiplies by absmax / factor.
#pragma once

#include <cstdint>

#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/prmt.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/tile/code_tables.cuh"

namespace qlora::tile {

inline constexpr int kPairTableEntryBytes = 256;
inline constexpr int kPairTableBytes = 256 * kPairTableEntryBytes;

// Of the factors in [1, 2) that are numbers of T, so that the codes of -1 and 1 are exact, the one that minimises the
// root mean square error of the codes over normally distributed weights. Among all factors 1.4367 and 1.3662 do, with
// 7.8e-4 and 8.0e-5, but with them each product of a weight of one scale would be off by 5.6e-4 in bfloat16.
template <class T>
inline constexpr float kPairFactor = 1.0f;
template <>
inline constexpr float kPairFactor<bfloat16> = 1.1171875f;  // 8.9e-4 of the weight's norm; factor 1: 1.36e-3
template <>
inline constexpr float kPairFactor<float16> = 1.3662109375f;  // 8.1e-5; factor 1: 1.84e-4

// Fills the table at shared address `table` (a multiple of 128). Call from all kThreads threads of a CTA, then
// synchronise.
template <class T, int kThreads>
__device__ __forceinline__ void fill_pair_table(uint32_t table) {
  for (int entry = threadIdx.x; entry < 256; entry += kThreads) {
    const uint32_t pair =
        ptx::pack2<T>(c_nf4.value[entry >> 4] * kPairFactor<T>, c_nf4.value[entry & 15] * kPairFactor<T>);
    // Neighbouring threads write different 16-byte pieces of their entries at a time, for the sake of the banks.
    const uint32_t first = table + entry * kPairTableEntryBytes + (entry & 7) * 16;
#pragma unroll
    for (int piece = 0; piece < 8; ++piece)
      ptx::store_shared_v4(first ^ (piece * 16), make_uint4(pair, pair, pair, pair));
  }
}

// The pair of byte `kByte` of `word`. `lane_offset` is 4 * (thread's lane), and nothing else in its upper bytes.
template <int kByte>
__device__ __forceinline__ uint32_t lookup_pair(uint32_t table, uint32_t lane_offset, uint32_t word) {
  constexpr uint32_t kLaneThenByte = 0x7604u | (uint32_t{kByte} << 4);
  return ptx::load_shared_u32(ptx::prmt<kLaneThenByte>(word, lane_offset) + table);
}

}  // namespace qlora::tile
