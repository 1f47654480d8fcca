// The bulk copies that fill a stage of Hopper's kernels: the tokens' values (x or dy) and the packed bytes.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/tile/sm90/work.cuh"

namespace qlora::tile {

// Call all functions from one thread, the one that issues copies.
template <class Tile>
struct Sm90Copies {
  uint32_t base;
  const CUtensorMap &tokens, &packed;

  // Starts the copies of a stage, which is counted from the sum's first one.
  __device__ __forceinline__ void start(int slot, int stage, int64_t token0, int64_t output0) const {
    const int term = stage * Tile::kStageTerms;
    const uint32_t full = base + Tile::full(slot), lines = base + Tile::kTokenLines + slot * Tile::kStageTokenBytes;
    ptx::mbarrier_arrive_expect(full, Tile::kStageTokenBytes + Tile::kStagePackedBytes);
    const int2 box = Tile::packed_box(term, static_cast<int>(output0));
    ptx::tma_load_2d(base + Tile::kPacked + slot * Tile::kStagePackedBytes, packed, full, box.x, box.y);
#pragma unroll
    for (int line = 0; line < Tile::kLines; ++line) {
      ptx::tma_load_2d(lines + line * Tile::kLineBytes, tokens, full, term + line * kSm90Line,
                       static_cast<int>(token0));
    }
  }

  // Starts the copies of the first `stages` stages of the CTA's first tile. The ring buffer is empty then, so this does
  // not wait for anything.
  __device__ __forceinline__ void start_early(const Sm90Work<Tile>& work, int stages) const {
    for (int stage = 0; stage < stages; ++stage)
      start(stage, work.stage0 + stage, work.first_token(work.tile0), work.first_output(work.tile0));
  }
};

}  // namespace qlora::tile
