// How the CTAs of a forward divide the sums over k of its output tiles.
//
// Either gridDim.y CTAs split the sum of each tile. Or the segments of all tiles, one tile after the other, form a
// stream, of which each CTA takes an equal run (stream-K). A run may begin and end within a tile. So the number of
// tiles need not be a multiple of the number of CTAs that run at once.
//
//   grid (3, 2)                         stream of 4 CTAs
//   | tile 0  | tile 1  | tile 2  |     | tile 0  | tile 1  | tile 2  |
//   |0,0 |0,1 |1,0 |1,1 |2,0 |2,1 |     |   0   |   1   |   2   |  3  |
//
// In both cases the parts of a tile's sum are numbered in the order of k.
#pragma once

#include <cstdint>

namespace qlora::tile {

// 32-bit indices count a stream's segments, because ptxas makes a function call of a 64-bit division.
inline constexpr int64_t kMostStream = INT32_MAX;

struct KDivision {
  int64_t tile_segments;    // of k
  int64_t cta_segments;     // of k per CTA. Fewer are left for the last CTA of a tile, or of the stream
  int64_t stream_segments;  // of all tiles, at most kMostStream; only in kernels that stream
  int64_t most_parts;       // into which the sum of a tile is divided
};

// Whether a tile has a kernel that streams. The tile of 64 tokens has no registers for the state of a run.
template <class Tile>
inline constexpr bool kCanStream = Tile::kTokens <= 32;

// The number of a part of a tile's sum, and the number of parts.
struct KPart {
  unsigned index, count;
};

// The part of a tile's sum that a CTA computes at a time. Registers are scarce while it does, so only the tile's number
// is held meanwhile, and the rest is computed anew.
template <bool kStreams>
class KSlice {
 public:
  int64_t segment0;
  int segments;

  __device__ __forceinline__ explicit KSlice(const KDivision& of) : of_(of), tile_(blockIdx.x) {
    if (kStreams) tile_ = blockIdx.x * static_cast<unsigned>(of.cta_segments) / static_cast<unsigned>(of.tile_segments);
    locate();
  }

  // Goes on to the next tile of the CTA's run, and returns false if there is none.
  __device__ __forceinline__ bool next() {
    if (!kStreams) return false;
    ++tile_;
    locate();
    return segments > 0;
  }

  __device__ __forceinline__ int64_t tile() const { return tile_; }

  __device__ __forceinline__ KPart part() const {
    if (!kStreams) return {blockIdx.y, gridDim.y};
    const auto segments = static_cast<unsigned>(of_.tile_segments), run = static_cast<unsigned>(of_.cta_segments);
    const unsigned begin = tile_ * segments, first = begin / run;
    return {blockIdx.x - first, (begin + segments - 1) / run - first + 1};
  }

  // The index of the tile's first part among those of all tiles.
  __device__ __forceinline__ int64_t first_part() const { return tile() * of_.most_parts; }

 private:
  __device__ __forceinline__ void locate() {
    if (!kStreams) {
      segment0 = blockIdx.y * of_.cta_segments;
      segments = static_cast<int>(min(of_.cta_segments, of_.tile_segments - segment0));
      return;
    }
    // The ends of the CTA's run and of the stream, relative to the tile.
    const int tile = static_cast<int>(of_.tile_segments), run = static_cast<int>(of_.cta_segments);
    const int begin = static_cast<int>(blockIdx.x) * run - static_cast<int>(tile_) * tile;
    const int end = min(begin + run, static_cast<int>(of_.stream_segments) - static_cast<int>(tile_) * tile);
    segment0 = max(begin, 0);
    segments = min(end, tile) - max(begin, 0);
  }

  const KDivision& of_;
  unsigned tile_;
};

// A tile whose whole sum one CTA computes.
struct WholeK {
  static constexpr int64_t segment0 = 0;
  int segments;

  __device__ __forceinline__ explicit WholeK(int64_t segments) : segments(static_cast<int>(segments)) {}

  __device__ static constexpr int64_t tile() { return 0; }
  __device__ static constexpr KPart part() { return {0, 1}; }
  __device__ static constexpr int64_t first_part() { return 0; }
};

}  // namespace qlora::tile
