// Copies of one stage of the forward, global to shared memory, packed bytes and x as they lie.
#pragma once

#include <cstdint>

#include "cuda/ptx/cp_async.cuh"
#include "cuda/tile/linear_tile.cuh"
#include "cuda/tile/unroll.cuh"

namespace qlora::tile {

// One operand: a thread copies kCopies 16-byte chunks a stage, always the same chunk of rows that are kRowStep apart.
// The step is a multiple of 4, so that the swizzle is the same for all of them. Where there are more threads than
// chunks, the last ones have no row and must not copy.
template <int kThreads, int kRowCount, int kRowBytes>
struct StageCopier {
  static constexpr int kChunks = kRowBytes / 16;  // a row
  static constexpr int kRowStep = kThreads / kChunks;
  static constexpr int kCopies = kRowCount > kRowStep ? kRowCount / kRowStep : 1;
  static_assert(kRowStep % 4 == 0 && (kCopies * kRowStep == kRowCount || kRowStep > kRowCount));

  const uint8_t* source;  // this thread's chunk of its first row, in the next stage to copy
  int64_t step_bytes;     // kRowStep rows
  int row, chunk;
  uint32_t bytes[kCopies];  // 16, or 0 for rows that do not exist, which are filled with zeros

  __device__ __forceinline__ StageCopier(const void* base, int64_t first_row, int64_t rows, int64_t row_bytes,
                                         int64_t byte0)
      : step_bytes(kRowStep * row_bytes), row(threadIdx.x / kChunks), chunk(threadIdx.x % kChunks) {
    source = static_cast<const uint8_t*>(base) + (first_row + row) * row_bytes + byte0 + chunk * 16;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) bytes[i] = first_row + row + i * kRowStep < rows ? 16 : 0;
  }

  __device__ __forceinline__ bool has_row() const { return row < kRowCount; }

  // `destination` is where the chunk of the first row goes; kStepOffset bytes lie between the rows of consecutive
  // copies.
  template <int kStepOffset>
  __device__ __forceinline__ void copy(uint32_t destination) {
    const uint8_t* from = source;
    unroll<kCopies>([&](auto i) {
      ptx::cp_async_16<i * kStepOffset>(destination, from, bytes[i]);
      from += step_bytes;
    });
    source += kRowBytes;
  }
};

// Fetches stage after stage of a CTA's slice of k.
template <class Tile>
class LinearStages {
 public:
  // The slice is segments [segment0, segment0 + segments) of every row.
  __device__ __forceinline__ LinearStages(uint32_t shared, const void* x, const void* packed, int64_t token0, int64_t m,
                                          int64_t n0, int64_t n, int64_t k, int64_t segment0, int segments)
      : x_(x, token0, m, k * 2, segment0 * kSegmentXBytes),
        packed_(packed, n0, n, k / 2, segment0 * kSegmentPackedBytes),
        x_segments_(x_.has_row() ? segments - x_.chunk / 8 : 0),
        packed_segments_(packed_.has_row() ? segments - packed_.chunk / 2 : 0),
        x_address_(shared + Tile::kX + Tile::x_offset(x_.row, x_.chunk / 8, x_.chunk % 8)),
        packed_address_(shared + Tile::kPacked + Tile::packed_offset(packed_.row, packed_.chunk / 2) +
                        packed_.chunk % 2 * 16) {}

  // Starts the copies of `stage` into buffer `slot`; stages come in order. Past the end of the slice there is nothing
  // to copy, but still a group to wait for.
  __device__ __forceinline__ void fetch(int stage, int slot) {
    const int done = stage * Tile::kStageSegments;
    if (done < x_segments_)
      x_.template copy<XCopier::kRowStep * Tile::kXLineStride>(x_address_ + slot * Tile::kStageXBytes);
    if (done < packed_segments_)
      packed_.template copy<PackedCopier::kRowStep * Tile::kStageSegments * kSegmentPackedBytes>(
          packed_address_ + slot * Tile::kStagePackedBytes);
    ptx::cp_async_commit();
  }

 private:
  using XCopier = StageCopier<Tile::kThreads, Tile::kTokens, Tile::kStageSegments * kSegmentXBytes>;
  using PackedCopier = StageCopier<Tile::kThreads, Tile::kRows, Tile::kStageSegments * kSegmentPackedBytes>;

  XCopier x_;
  PackedCopier packed_;
  int x_segments_, packed_segments_;  // of the slice, from this thread's chunk of a stage on
  uint32_t x_address_, packed_address_;
};

}  // namespace qlora::tile
