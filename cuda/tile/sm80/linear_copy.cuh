// Copies the stages of the forward from global to shared memory: packed bytes and x, unchanged.
#pragma once

#include <cstdint>

#include "cuda/ptx/cp_async.cuh"
#include "cuda/tile/generic/unroll.cuh"
#include "cuda/tile/sm80/linear_tile.cuh"

namespace qlora::tile {

// Copies one operand, whose lines are rows of w or tokens of x. A thread copies kCopies 16-byte chunks per stage: the
// same chunk of lines that lie kLineStep apart. The step is a multiple of 4, so all of them have the same swizzle. If
// there are more threads than chunks, the last threads have no line and must not copy.
template <int kThreads, int kLines, int kBytesPerLine>
struct StageCopier {
  static constexpr int kChunks = kBytesPerLine / 16;  // per line
  static constexpr int kLineStep = kThreads / kChunks;
  static constexpr int kCopies = kLines > kLineStep ? kLines / kLineStep : 1;
  static_assert(kLineStep % 4 == 0 && (kCopies * kLineStep == kLines || kLineStep > kLines));

  const uint8_t* source;  // this thread's chunk of its first line, in the next stage to copy
  int64_t step_bytes;     // from a line to the line kLineStep further, in global memory
  int line, chunk;
  uint32_t bytes[kCopies];  // 16, or 0 for lines that do not exist, which are filled with zeros

  __device__ __forceinline__ StageCopier(const void* base, int64_t first_line, int64_t lines, int64_t line_bytes,
                                         int64_t byte0)
      : step_bytes(kLineStep * line_bytes), line(threadIdx.x / kChunks), chunk(threadIdx.x % kChunks) {
    source = static_cast<const uint8_t*>(base) + (first_line + line) * line_bytes + byte0 + chunk * 16;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) bytes[i] = first_line + line + i * kLineStep < lines ? 16 : 0;
  }

  __device__ __forceinline__ bool has_line() const { return line < kLines; }

  // `destination` receives the chunk of the first line. The destinations of consecutive copies lie kStepOffset bytes
  // apart.
  template <int kStepOffset>
  __device__ __forceinline__ void copy(uint32_t destination) {
    const uint8_t* from = source;
    unroll<kCopies>([&](auto i) {
      ptx::cp_async_16<i * kStepOffset>(destination, from, bytes[i]);
      from += step_bytes;
    });
    source += kBytesPerLine;
  }
};

// Fetches the stages of a CTA's slice of k one after another.
template <class Tile>
class LinearStages {
 public:
  // The slice is segments [segment0, segment0 + segments) of every row.
  __device__ __forceinline__ LinearStages(uint32_t shared, const void* x, const void* packed, int64_t token0, int64_t m,
                                          int64_t n0, int64_t n, int64_t k, int64_t segment0, int segments)
      : x_(x, token0, m, k * 2, segment0 * kSegmentXBytes),
        packed_(packed, n0, n, k / 2, segment0 * kSegmentPackedBytes),
        x_segments_(x_.has_line() ? segments - x_.chunk / 8 : 0),
        packed_segments_(packed_.has_line() ? segments - packed_.chunk / 2 : 0),
        x_address_(shared + Tile::kX + Tile::x_offset(x_.line, x_.chunk / 8, x_.chunk % 8)),
        packed_address_(shared + Tile::kPacked + Tile::packed_offset(packed_.line, packed_.chunk / 2) +
                        packed_.chunk % 2 * 16) {}

  // Starts the copies of `stage` into buffer `slot`. Stages come in order. Past the end of the slice nothing is copied,
  // but a group is still committed for the wait.
  __device__ __forceinline__ void fetch(int stage, int slot) {
    const int done = stage * Tile::kStageSegments;
    if (done < x_segments_)
      x_.template copy<XCopier::kLineStep * Tile::kXLineStride>(x_address_ + slot * Tile::kStageXBytes);
    if (done < packed_segments_)
      packed_.template copy<PackedCopier::kLineStep * Tile::kPackedRowStride>(packed_address_ +
                                                                              slot * Tile::kStagePackedBytes);
    ptx::cp_async_commit();
  }

 private:
  using XCopier = StageCopier<Tile::kThreads, Tile::kTokens, Tile::kStageSegments * kSegmentXBytes>;
  using PackedCopier = StageCopier<Tile::kThreads, Tile::kRows, Tile::kStageSegments * kSegmentPackedBytes>;

  XCopier x_;
  PackedCopier packed_;
  // This thread has something to copy in a stage that begins at segment s if s is below this number. It is the slice's
  // segment count, less the position within a stage of the segment that the thread's chunk belongs to.
  int x_segments_, packed_segments_;
  uint32_t x_address_, packed_address_;
};

}  // namespace qlora::tile
