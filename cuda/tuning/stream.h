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

// The time of a stream over all slots, by the model of forward_split_cost:
//   - A CTA that goes on to another tile fills its tables again, which costs 8 segments.
//   - Clearing the tickets costs as much as 8 segments, if a launch of its own does.
constexpr int64_t forward_stream_cost(int64_t tiles, int64_t segments, int64_t tokens, int64_t slots, bool clears) {
  constexpr int64_t kNextTile = 8, kClear = 8;
  const int64_t each = stream_cta_segments(tiles * segments, slots), next_tiles = ceil_div(each - 1, segments);
  return 64 * (each + kTables + next_tiles * kNextTile + (clears ? kClear : 0)) + stream_parts(segments, each) * tokens;
}

// Whether a stream is worth it, instead of `splits` CTAs per tile. `clears` says whether the stream alone needs a
// launch that clears its tickets.
constexpr bool forward_streams(int64_t tiles, int64_t segments, int64_t stage_segments, int64_t tokens, int64_t slots,
                               int64_t splits, bool clears) {
  return 20 * forward_stream_cost(tiles, segments, tokens, slots, clears) <=
         19 * forward_split_cost(tiles, segments, stage_segments, tokens, slots, splits);
}

}  // namespace qlora::cuda::sm80
