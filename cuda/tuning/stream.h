// Chooses whether the CTAs of the forward on mma.sync split the sum of each tile, or divide the segments of all tiles
// evenly (stream-K, cuda/tile/sm80/k_slices.cuh).
#pragma once

#include <cstdint>

#include "cuda/tuning/sm80.h"

namespace qlora::cuda::sm80 {

// Runs begin at multiples of 4 segments of a stream: 128 bytes of a row of w, if that begins at a multiple.
inline constexpr int64_t kStreamSegments = 4;

// Segments per CTA, if `ctas` CTAs divide the `segments` of a stream.
constexpr int64_t stream_cta_segments(int64_t segments, int64_t ctas) {
  return ceil_div(ceil_div(segments, ctas), kStreamSegments) * kStreamSegments;
}

// The most runs of `each` segments that share a tile of `segments`.
constexpr int64_t stream_parts(int64_t segments, int64_t each) { return ceil_div(segments - 1, each) + 1; }

// The time of a stream over all slots, by the model of forward_split_cost, with numbers that the kernel simulator
// counts:
//   - Going on to another tile fills the tables again, and adds up a part: as many instructions as 10 segments of up to
//     16 tokens, or as 5 of more.
//   - A launch that clears the tickets takes 2 us. An H100 reads 11 segments per SM from DRAM meanwhile, an A100 8.
constexpr int64_t forward_stream_cost(int64_t tiles, int64_t segments, int64_t tokens, int64_t slots, bool clears) {
  const int64_t next_tile = tokens <= 16 ? 10 : 5, clear = clears ? 11 : 0;
  const int64_t each = stream_cta_segments(tiles * segments, slots), next_tiles = ceil_div(each - 1, segments);
  return 64 * (each + kTables + next_tiles * next_tile + clear) + stream_parts(segments, each) * tokens;
}

// Whether DRAM alone bounds the forward, on cards whose SMs could read several times as fast. By the simulator's time
// model, 14336 x 4096 takes an RTX 5090 half as long with 112 of 170 SMs as DRAM takes. HBM is not that slow.
constexpr bool dram_bounds(int64_t tokens, const Device& device) {
  return tokens <= 16 && device.arch != 80 && device.arch != 90 && device.arch != 100 && device.arch != 103;
}

// Whether a stream is worth it, instead of `splits` CTAs per tile. `clears` says whether the stream alone needs a
// launch that clears its tickets. It gains nothing where the splits keep more than 80% of the slots busy: by the time
// model, 1% where it was 89% (A100, 8192 x 8192), and less than clearing costs where it was 85% (H100, 14336 x 4096),
// but 20% at 69% (A100, 14336 x 4096). As with splits, no CTA takes less time for its segments than for its tables.
constexpr bool forward_streams(int64_t tiles, int64_t segments, int64_t stage_segments, int64_t tokens, int64_t slots,
                               int64_t splits, bool clears, const Device& device) {
  const int64_t each = forward_split_segments(segments, splits, stage_segments);
  const int64_t busy = tiles * segments, all = ceil_div(tiles * splits, slots) * slots * each;
  return 5 * busy < 4 * all && stream_cta_segments(busy, slots) >= kTables && !dram_bounds(tokens, device) &&
         20 * forward_stream_cost(tiles, segments, tokens, slots, clears) <=
             19 * forward_split_cost(tiles, segments, stage_segments, tokens, slots, splits);
}

}  // namespace qlora::cuda::sm80
