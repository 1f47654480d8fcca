// The bulk copies that fill a stage of Hopper's kernels: the tokens' values (x or dy) and the packed bytes.
//
// The two tiles of a pair have the same tokens, so the partners share the copies of their values: each CTA copies half
// of the tokens to both by multicast, and L2 is read once. The bytes count for both CTAs' `full` barriers, which expect
// those of a whole stage. A CTA may only write to its partner's slot once the partner's consumers have released it.
// Before it copies, each CTA therefore tells its partner that its slot is empty, and waits for the same from the
// partner. All copies and arrivals from the partner are waited for, so a CTA may end without a further barrier.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/tile/sm90/work.cuh"

namespace qlora::tile {

// Call all functions from one thread, the one that issues copies.
template <class Tile>
class Sm90Copies {
 public:
  __device__ __forceinline__ Sm90Copies(const Sm90Work<Tile>& work, uint32_t base, const CUtensorMap& tokens,
                                        const CUtensorMap& packed)
      : work_(work), tokens_(tokens), packed_(packed), base_(base) {}

  // Starts the copies of the first `stages` stages of the CTA's first tile, for this CTA alone: the partner may not
  // have begun. The ring buffer is empty, so this does not wait for anything.
  __device__ __forceinline__ void start_early(int stages) const {
    const int64_t token0 = work_.first_token(work_.tile0()), output0 = work_.first_output(work_.tile0());
    const int part_tokens = Tile::kTokens / work_.plan.multicast;
    for (int stage = 0; stage < stages; ++stage) {
      start_packed(stage, stage, output0, 0);
      for (int token = 0; token < Tile::kTokens; token += part_tokens) {
        for_lines(stage, stage, token, [&](uint32_t shared, int term) {
          ptx::tma_load_2d(shared, tokens_, base_ + Tile::full(stage), term, static_cast<int>(token0) + token);
        });
      }
    }
  }

  // Starts the copies of a stage into an empty slot. `first_row` is the weight's first row in the map of packed bytes.
  __device__ __forceinline__ void start(int slot, int stage, int64_t token0, int64_t output0, int first_row) {
    const bool shares = work_.plan.multicast > 1;
    start_packed(slot, stage, output0, first_row);
    if (shares) {
      ptx::mbarrier_arrive_at(base_ + Tile::partner_empty(slot), work_.partner());
      ptx::mbarrier_wait<0>(base_ + Tile::partner_empty(slot), parities_ >> slot & 1);
      parities_ ^= 1u << slot;
    }
    const uint32_t full = base_ + Tile::full(slot), ctas = (1u | 1u << work_.plan.splits) << work_.split;
    const int first = work_.pair_tile * (Tile::kTokens / 2), token = static_cast<int>(token0) + first;
    for_lines(slot, stage, first, [&](uint32_t shared, int term) {
      if (shares)
        ptx::tma_load_2d_multicast(shared, tokens_, full, term, token, static_cast<uint16_t>(ctas));
      else
        ptx::tma_load_2d(shared, tokens_, full, term, token);
    });
  }

 private:
  __device__ __forceinline__ void start_packed(int slot, int stage, int64_t output0, int first_row) const {
    const uint32_t full = base_ + Tile::full(slot);
    ptx::mbarrier_arrive_expect(full, Tile::kStageTokenBytes + Tile::kStagePackedBytes);
    const int2 box = Tile::packed_box(first_term(stage), static_cast<int>(output0));
    ptx::tma_load_2d(base_ + Tile::kPacked + slot * Tile::kStagePackedBytes, packed_, full, box.x, first_row + box.y);
  }

  // Calls copy(shared address, first term) for each line of the stage's tokens from `token` on.
  template <class Copy>
  __device__ __forceinline__ void for_lines(int slot, int stage, int token, const Copy& copy) const {
    const uint32_t lines = base_ + Tile::kTokenLines + slot * Tile::kStageTokenBytes + token * kSm90LineBytes;
#pragma unroll
    for (int line = 0; line < Tile::kLines; ++line)
      copy(lines + line * Tile::kLineBytes, first_term(stage) + line * kSm90Line);
  }

  __device__ __forceinline__ int first_term(int stage) const { return (work_.stage0 + stage) * Tile::kStageTerms; }

  const Sm90Work<Tile>& work_;
  const CUtensorMap &tokens_, &packed_;
  uint32_t base_;
  uint32_t parities_ = 0;  // bit s: the parity of the next phase of partner_empty(s)
};

}  // namespace qlora::tile
