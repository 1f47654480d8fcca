// The tile of Hopper's forward, and how a lane decodes. cuda/tile/sm90/layout.cuh has the parts that it shares with dX.
//
// A stage covers 128 k, two segments: x [2][kTokens][64], packed bytes [128 rows][64 bytes] and scales [128 rows][2]. A
// warp has 16 rows of w.
//
// The wgmma fixes the order of k: in its step s, lane (g, t) holds k = 16s + 2t, +1 and 16s + 8 + 2t, +1 of rows g and
// g + 8. These are byte t of word 2s and byte t of word 2s + 1 in a row's 32 packed bytes. So the four lanes t of a row
// load the same words, and each uses its own byte of each word.
//
// Shared memory is the bound, while the schedulers have time left. A lane therefore looks up the pairs of three in four
// bytes in the table, and decodes every fourth in registers.
#pragma once

#include <cstdint>

#include "cuda/ptx/prmt.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/tile/generic/unroll.cuh"
#include "cuda/tile/sm80/linear_tile.cuh"
#include "cuda/tile/sm80/pair_registers.cuh"
#include "cuda/tile/sm90/layout.cuh"

namespace qlora::tile {

template <class T, int kTokens>
struct LinearSm90Tile : Sm90Layout<T, kTokens, 2, 128 * 64, 128 * 2 * 4, 72> {
  static constexpr int kStageK = LinearSm90Tile::kStageTerms;
  static_assert(kStageK == 2 * kSegment);
  static constexpr int kPackedLine = kStageK / 2;
  static constexpr int kRows = LinearSm90Tile::kOutputs;

  // Where the packed bytes of a stage begin: the byte in the row, and the row.
  __device__ static int2 packed_box(int k, int row) { return {k / 2, row}; }
};

// The addresses from which a consumer lane reads.
template <class Tile>
struct LinearSm90Lane {
  uint32_t table;      // the pair table's address plus 4 · lane
  uint32_t selector;   // for prmt: picks this lane's byte of a word, between the bytes of `table`
  uint32_t packed[4];  // the 16-byte chunks of row g in slot 0
  uint32_t scales;     // the scales of row g in slot 0
  uint32_t bytes;      // for prmt: picks this lane's bytes of two words
  PairRegisters<typename Tile::T> registers;

  __device__ __forceinline__ LinearSm90Lane(uint32_t base, int row, const CodeView& code) : registers(code) {
    const int lane = threadIdx.x % 32;
    table = base + Tile::kTable + 4 * lane;
    selector = 0x7604u | lane % 4 << 4;
    bytes = lane % 4 * 0x11 + 0x40;
#pragma unroll
    for (int chunk = 0; chunk < 4; ++chunk) packed[chunk] = base + Tile::kPacked + sm90_packed_offset(row, chunk);
    scales = base + Tile::kScales + row * 8;
  }

  __device__ __forceinline__ uint32_t pair(uint32_t word) const {
    return ptx::load_shared_u32(ptx::prmt(word, table, selector));
  }

  // Decodes into a[step] the wgmma's operand for the steps of one segment.
  template <int kSlot, int kSegment>
  __device__ __forceinline__ void decode(uint32_t (&a)[4][4]) const {
    unroll<4>([&](auto part) {  // rows g and g + 8, by 16 bytes
      constexpr int upper = part / 2, half = part % 2;
      constexpr int offset = kSlot * Tile::kStagePackedBytes + upper * 8 * Tile::kPackedLine;
      const uint4 words = ptx::load_shared_v4<offset>(packed[2 * kSegment + half]);
      uint32_t pairs[4];
      if constexpr (part == 3)
        registers.decode(ptx::prmt<0x5410>(ptx::prmt(words.x, words.y, bytes), ptx::prmt(words.z, words.w, bytes)),
                         pairs);
      else
        pairs[0] = pair(words.x), pairs[1] = pair(words.y), pairs[2] = pair(words.z), pairs[3] = pair(words.w);
      a[2 * half][upper] = pairs[0], a[2 * half][upper + 2] = pairs[1];
      a[2 * half + 1][upper] = pairs[2], a[2 * half + 1][upper + 2] = pairs[3];
    });
  }

  // Loads the scales of both segments, for row g (kUpper 0) or g + 8 (kUpper 1).
  template <int kSlot, int kUpper>
  __device__ __forceinline__ float2 scale() const {
    return ptx::load_shared_v2_f32<kSlot * Tile::kStageScaleBytes + kUpper * 64>(scales);
  }
};

}  // namespace qlora::tile
