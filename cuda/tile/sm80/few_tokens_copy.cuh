// How the forward for few tokens loads x and w. x goes to shared memory one stage at a time. Packed bytes go straight
// to registers, since no two warps use the same bytes.
#pragma once

#include <cstdint>

#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/load.cuh"
#include "cuda/tile/generic/unroll.cuh"
#include "cuda/tile/sm80/few_tokens_tile.cuh"

namespace qlora::tile {

// Starts copying one stage of x [tokens, k], which begins at segment `segment0`, into the buffer at `buffer`. The first
// `count` segments of the stage exist, and the others are filled with zeros. Tokens beyond `tokens` are not written.
template <class Tile>
__device__ __forceinline__ void fetch_x(uint32_t buffer, const typename Tile::T* x, int tokens, int64_t k,
                                        int64_t segment0, int count) {
  constexpr int kTokenChunks = Tile::kStageSegments * kSegmentXBytes / 16, kStep = Tile::kThreads / kTokenChunks;
  static_assert(kStep % 2 == 0, "a thread's tokens have the same swizzle");
  const int segment = threadIdx.x % kTokenChunks / 8, chunk = threadIdx.x % 8, first = threadIdx.x / kTokenChunks;
  const uint32_t bytes = segment < count ? 16 : 0, to = buffer + Tile::x_offset(first, segment, chunk);
  const auto* from = x + first * k + (segment0 + segment) * kSegment + chunk * 8;
  unroll<Tile::kTokens / kStep>([&](auto i) {
    if (first + i * kStep < tokens) ptx::cp_async_16<i * kStep * kPairTableEntryBytes>(to, from, bytes);
    from += kStep * k;
  });
}

// The packed bytes that a lane holds of a unit: those of rows g and g + 8 of every 16.
template <class Tile>
using PackedUnit = uint4[Tile::kRowTiles][2];

// Loads a warp's rows, unit after unit and 16 rows at a time. As soon as 16 rows have been multiplied, their registers
// receive the same rows of the next unit. Three quarters of a unit are therefore always in flight.
template <class Tile>
class UnitLoader {
 public:
  // The slice is segments [segment0, segment0 + segments). The warp's rows begin at row0, and its first unit begins at
  // segment `first` of the slice.
  __device__ __forceinline__ UnitLoader(const uint8_t* packed, int64_t row0, int64_t n, int64_t k, int64_t segment0,
                                        int segments, int first)
      : left_(segments - first), row_bytes_(k / 2) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int64_t rows = n - row0;
    rows_ = rows < Tile::kWarpRows ? static_cast<int>(rows) : Tile::kWarpRows;
    from_ = packed + (row0 + g) * row_bytes_ + (segment0 + first) * kSegmentPackedBytes + 16 * t;
  }

  // Loads the 16 rows from row 16 kTile of the current unit. Rows and segments that do not exist become zero. After the
  // last rows of a unit, the next unit becomes the current one.
  template <int kTile>
  __device__ __forceinline__ void load(uint4 (&w)[2]) {
    const uint8_t* const from = from_ + 16 * kTile * row_bytes_;
    if (left_ >= Tile::kUnitSegments && rows_ >= 16 * (kTile + 1)) {
      w[0] = ptx::load_stream_line_v4(from);
      w[1] = ptx::load_stream_line_v4(from + 8 * row_bytes_);
    } else {
      const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        w[i] = make_uint4(0, 0, 0, 0);
        if (t / 2 < left_ && 16 * kTile + 8 * i + g < rows_) w[i] = ptx::load_stream_line_v4(from + 8 * i * row_bytes_);
      }
    }
    if constexpr (kTile == Tile::kRowTiles - 1) {
      from_ += Tile::kRoundSegments * kSegmentPackedBytes;
      left_ -= Tile::kRoundSegments;
    }
  }

 private:
  const uint8_t* from_;
  int left_, rows_;  // segments left from the current unit on, and the number of the warp's rows that exist
  int64_t row_bytes_;
};

}  // namespace qlora::tile
