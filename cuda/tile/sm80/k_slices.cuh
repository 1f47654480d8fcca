// How the CTAs of a forward divide the sums over k of its output tiles. Either gridDim.y CTAs split the sum of each
// tile. Or the segments of all tiles, one tile after the other, form a stream, of which each CTA takes an equal run
// (stream-K). A run may begin and end within a tile, so the number of tiles need not be a multiple of the number of
// CTAs that run at once.
//
//   split, grid (3, 2)                  stream of 4 CTAs
//   | tile 0  | tile 1  | tile 2  |     | tile 0  | tile 1  | tile 2  |
//   |0,0 |0,1 |1,0 |1,1 |2,0 |2,1 |     |   0   |   1   |   2   |  3  |
//
// In both cases the parts of a tile's sum are numbered in the order of k.
#pragma once

#include <cstdint>

#include "cuda/tile/generic/arch_limits.cuh"
#include "cuda/tile/sm80/linear_tile.cuh"

namespace qlora::tile {

// The number of a part of a tile's sum, and the number of parts.
struct KPart {
  unsigned index, count;
};

// Part blockIdx.y of tile blockIdx.x.
class SplitSlice {
 public:
  static constexpr bool kMayBeCluster = true;
  int64_t segment0;
  int segments;

  __device__ __forceinline__ SplitSlice(int64_t k, int64_t segments_per_split)
      : segment0(blockIdx.y * segments_per_split) {
    const int64_t left = k / kSegment - segment0;
    segments = static_cast<int>(left < segments_per_split ? left : segments_per_split);
  }

  __device__ __forceinline__ int64_t tile() const { return blockIdx.x; }
  __device__ __forceinline__ KPart part() const { return {blockIdx.y, gridDim.y}; }
  // The index of the tile's first part among those of all tiles.
  __device__ __forceinline__ int64_t first_part() const { return int64_t{blockIdx.x} * gridDim.y; }
};

// From 10.0 on, cuda/tuning refuses streams, so their kernels are empty there.
inline constexpr bool kArchStreams = kArch < 1000;

// ptxas makes a function call of a 64-bit division, so 32-bit indices count the segments.
inline constexpr int64_t kMostStreamSegments = INT32_MAX;

struct KStream {
  int tile_segments = 0;  // of k
  int cta_segments = 0;   // of the stream, per CTA. Fewer are left for the last CTA
  int segments = 0;       // of the whole stream
  int most_parts = 0;     // into which the sum of a tile is divided
};

// The part of a tile's sum that CTA blockIdx.x of a stream computes at a time. Registers are scarce while it does, so
// only the tile's number is held meanwhile, and the rest is computed anew.
class StreamSlice {
 public:
  static constexpr bool kMayBeCluster = false;
  int64_t segment0;
  int segments;

  __device__ __forceinline__ explicit StreamSlice(const KStream& stream)
      : stream_(stream), tile_(static_cast<int>(blockIdx.x) * stream.cta_segments / stream.tile_segments) {
    locate();
  }

  // Goes on to the next tile of the CTA's run, and returns false if there is none.
  __device__ __forceinline__ bool next() {
    ++tile_;
    locate();
    return segments > 0;
  }

  __device__ __forceinline__ int64_t tile() const { return tile_; }
  __device__ __forceinline__ KPart part() const {
    const unsigned length = stream_.tile_segments, run = stream_.cta_segments;
    const unsigned begin = tile_ * length, first = begin / run;
    return {blockIdx.x - first, (begin + length - 1) / run - first + 1};
  }
  __device__ __forceinline__ int64_t first_part() const { return int64_t{tile_} * stream_.most_parts; }

 private:
  __device__ __forceinline__ void locate() {
    // The run, relative to the tile.
    const int tile_begin = tile_ * stream_.tile_segments;
    const int begin = static_cast<int>(blockIdx.x) * stream_.cta_segments - tile_begin;
    const int end = min(begin + stream_.cta_segments, stream_.segments - tile_begin);
    segment0 = max(begin, 0);
    segments = min(end, stream_.tile_segments) - max(begin, 0);
  }

  const KStream& stream_;
  int tile_;
};

}  // namespace qlora::tile
