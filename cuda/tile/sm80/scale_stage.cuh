// Decodes the scales of a CTA's rows, for some segments at a time, once to float32 in shared memory. `load` only issues
// loads, and none of them depends on another. `store` decodes what has arrived.
#pragma once

#include <cstdint>

#include "cuda/ptx/shared.cuh"
#include "cuda/tile/any/block_scale.cuh"
#include "cuda/tile/sm80/linear_tile.cuh"

namespace qlora::tile {

// Neighbouring threads take neighbouring segments, so each sector of a row's codes is read once. Rows and segments
// beyond the last repeat the last one, which costs no branch here: their results are multiplied by zeros or not stored.
template <class Tile, int kSegments>
class ScaleStage {
 public:
  __device__ __forceinline__ ScaleStage(const ScaleView& view, float unfactor, int64_t n0, int64_t n, int64_t k)
      : view_(view), unfactor_(unfactor), offset_(nested_offset(view)), row_step_(kRowStep * k) {
    last_row_ = n - n0 < Tile::kRows ? static_cast<int>(n - n0) - 1 : Tile::kRows - 1;
    row_element_ = (n0 + min(row(0), last_row_)) * k;
  }

  // Loads for the segments from segment0 of k on, of which `count` exist.
  __device__ __forceinline__ void load(int64_t segment0, int count) {
    const int64_t element = row_element_ + (segment0 + min(segment(), count - 1)) * kSegment;
    with_scale_loader(view_, [&](const auto& load) {
      load_each(element, [&](int i, int64_t block) { load(block, absmax_[i], code_[i]); });
    });
  }

  __device__ __forceinline__ void store(uint32_t scales, const float* dynamic8) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const float scale = decode_scale(view_, {absmax_[i], code_[i]}, dynamic8, offset_);
      ptx::store_shared_f32(scales + Tile::scale_offset(row(i), segment()), scale * unfactor_);
    }
  }

 private:
  static constexpr int kRowStep = Tile::kThreads / kSegments;
  static constexpr int kEach = Tile::kRows / kRowStep;

  __device__ __forceinline__ static int segment() { return threadIdx.x % kSegments; }
  __device__ __forceinline__ static int row(int i) { return threadIdx.x / kSegments + i * kRowStep; }

  template <class Load>
  __device__ __forceinline__ void load_each(int64_t element, const Load& load_one) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      load_one(i, element >> view_.block_shift);
      if (row(i + 1) <= last_row_) element += row_step_;
    }
  }

  const ScaleView view_;
  const float unfactor_;  // CodeView::unfactor of the weight's code
  float offset_;
  int last_row_;
  // In elements: from one row of this thread to its next, and where its first row begins.
  int64_t row_step_, row_element_;
  float absmax_[kEach];
  uint32_t code_[kEach] = {};
};

}  // namespace qlora::tile
