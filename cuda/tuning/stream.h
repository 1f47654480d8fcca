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
// counts for an A100:
//   - Going on to another tile fills the tables again, and adds up a part: as many instructions as 10 segments of up to
//     16 tokens, or as 5 of more.
//   - A launch that clears the tickets takes 2 us, in which an SM reads 8 segments from DRAM.
constexpr int64_t forward_stream_cost(int64_t tiles, int64_t segments, int64_t tokens, int64_t slots, bool clears) {
  const int64_t next_tile = tokens <= 16 ? 10 : 5, clear = clears ? 8 : 0;
  const int64_t each = stream_cta_segments(tiles * segments, slots), next_tiles = ceil_div(each - 1, segments);
  return 64 * (each + kTables + next_tiles * next_tile + clear) + stream_parts(segments, each) * tokens;
}

// Whether a stream is worth it, instead of `splits` CTAs per tile. `clears` says whether the stream alone needs a
// launch that clears its tickets. It gains nothing where the splits keep more than 80% of the slots busy: by the time
// model, 1% where it was 89%, but 18% at 69% (14336 x 4096). As with splits, no CTA takes less time for its segments
// than for its tables. Only an A100 gains: cards with GDDR wait for DRAM even if a third of their SMs are idle, and
// splits in clusters fill an H100 by 85% without a launch that clears tickets.
constexpr bool forward_streams(int64_t tiles, int64_t segments, int64_t stage_segments, int64_t tokens, int64_t slots,
                               int64_t splits, bool clears, const Device& device) {
  const int64_t each = forward_split_segments(segments, splits, stage_segments);
  const int64_t busy = tiles * segments, all = ceil_div(tiles * splits, slots) * slots * each;
  return device.arch == 80 && 5 * busy < 4 * all && stream_cta_segments(busy, slots) >= kTables &&
         20 * forward_stream_cost(tiles, segments, tokens, slots, clears) <=
             19 * forward_split_cost(tiles, segments, stage_segments, tokens, slots, splits);
}

}  // namespace qlora::cuda::sm80
